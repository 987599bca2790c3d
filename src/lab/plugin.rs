//! Calls of a CNI plugin, as a runtime makes them.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::Host;

/// Where Debian has its CNI plugins.
pub const PLUGINS: &str = "/usr/lib/cni";

/// Calls a plugin on a host for a container whose namespace has the container's name; gives the time that its
/// process took.
///
/// # Errors
/// Fails if the plugin cannot be run, or with what it says if it fails.
pub fn call_plugin(
    program: &Path,
    host: &Host,
    config: &Value,
    verb: &str,
    container: &str,
) -> anyhow::Result<Duration> {
    let mut command = Command::new(program);
    command
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", container)
        .env("CNI_NETNS", format!("/run/netns/{container}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", PLUGINS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let begun = Instant::now();
    let mut child = host.netns.spawn(&mut command)?;
    let mut input = child.stdin.take().context("a pipe")?;
    input.write_all(config.to_string().as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    let took = begun.elapsed();
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{} {verb} failed: {said}", program.display());
    Ok(took)
}
