//! What other programs print: run only to explain what is known to be wrong, and only where they are
//! installed.

use std::{
    io::Read as _,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

/// They print at once, or do not at all.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of output that are read.
const MOST: u64 = 1 << 20;

/// What a program prints. None where it is not installed, does not end in time, or prints no UTF-8.
pub fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let output = child.stdout.take()?;
    let (done, read) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        let whole = output.take(MOST).read_to_string(&mut text);
        let _ = done.send(whole.is_ok().then_some(text));
    });
    let text = read.recv_timeout(PATIENCE).ok().flatten();
    let _ = child.kill();
    let _ = child.wait();
    let _ = reader.join();
    text
}
