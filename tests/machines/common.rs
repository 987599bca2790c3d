//! Requirements of these tests, the program under test, and isolated namespaces.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use gossamer::lab::Lab;

use crate::machine::World;

const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/machines");

/// Returns the program under test: the path in GOSSAMER, or cargo's build.
pub fn program() -> PathBuf {
    std::env::var_os("GOSSAMER").map_or_else(|| env!("CARGO_BIN_EXE_gossamer").into(), Into::into)
}

/// Returns the Debian package under test: the path in `GOSSAMER_DEB`, or the one that `packaging/build-deb`
/// has built.
pub fn package() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("GOSSAMER_DEB") {
        return Some(path.into());
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/debian");
    let entries = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|end| end == "deb")).max()
}

/// Returns the directory of the images, outside the source tree.
fn cache() -> PathBuf {
    let home = || std::env::var_os("HOME").map_or_else(|| "/var/tmp".into(), PathBuf::from);
    std::env::var_os("GOSSAMER_MACHINES")
        .map_or_else(|| home().join(".cache/gossamer-machines"), Into::into)
}

/// What a test needs in addition to the machines.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    Program,
    Package,
}

/// Runs the body of a test in new namespaces. To do so, it starts this test alone again inside them; all
/// processes inside end with it. One test runs at a time, whichever program starts it, because two
/// machines are enough load for a small computer. Skips the test if a requirement is missing.
pub fn on_machines<F>(needs: Needs, limit: Duration, body: F)
where
    F: FnOnce(&mut World) -> anyhow::Result<()>,
{
    let thread = std::thread::current();
    let test = thread.name().expect("a test runs in a thread of its name");
    if std::env::var_os("GOSSAMER_LAB").is_some() {
        let _lab = Lab::new().expect("a lab inside the namespaces");
        let mut world = World::new(&cache()).expect("a place for machines");
        if let Err(error) = body(&mut world) {
            panic!("{error:?}\n{}", world.consoles());
        }
        return;
    }
    if let Some(why) = missing(needs) {
        return skipped(test, &why);
    }
    let run = || -> anyhow::Result<()> {
        let cache = cache();
        images(&cache)?;
        let lock = File::create(cache.join("lock-of-tests"))?;
        lock.lock()?;
        let this = std::env::current_exe()?;
        // Standard error is not captured, because figures are printed whether the test passes or not. If
        // this process is killed, all processes that it has started are killed, too.
        let output = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "timeout"])
            .arg(limit.as_secs().to_string())
            .arg(env!("CARGO_BIN_EXE_gossamer"))
            .args(["lab", "--"])
            .arg(this)
            .args([test, "--exact", "--include-ignored", "--nocapture", "--test-threads=1"])
            .stderr(Stdio::inherit())
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "on its machines the test failed ({})", output.status);
        ensure!(said.contains("1 passed"), "the test was not run:\n{said}");
        Ok(())
    };
    run().unwrap_or_else(|error| panic!("{test}: {error:?}"));
}

/// Builds the images, if requested. Checks that they match this recipe.
fn images(cache: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(cache)?;
    let script = Path::new(SOURCES).join("build-images");
    let output = Command::new("nice").args(["-n", "10"]).arg(script).arg(cache).output()?;
    if !output.status.success() {
        bail!("build-images: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

fn missing(needs: Needs) -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("the images are those of amd64".into());
    }
    let has = |tool: &str| {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).any(|path| path.join(tool).is_file())
    };
    for tool in ["qemu-system-x86_64", "qemu-img", "debootstrap", "mke2fs", "cpio", "ip", "setpriv"]
    {
        if !has(tool) {
            return Some(format!("{tool} is not installed"));
        }
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/net/tun") {
        return Some(format!("/dev/net/tun: {error}"));
    }
    let probe = Command::new(env!("CARGO_BIN_EXE_gossamer")).args(["lab", "--", "true"]).output();
    match probe {
        Ok(output) if output.status.success() => {}
        Ok(output) => return Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => return Some(error.to_string()),
    }
    let cache = cache();
    if !cache.join("recipe").exists() && std::env::var_os("GOSSAMER_MACHINES_BUILD").is_none() {
        let cache = cache.display();
        return Some(format!(
            "there are no images in {cache}: run tests/machines/build-images {cache}, \
             or set GOSSAMER_MACHINES_BUILD=1"
        ));
    }
    if needs == Needs::Package && package().is_none_or(|path| !path.exists()) {
        return Some("there is no package: run packaging/build-deb".into());
    }
    None
}

/// Reports that a test was skipped, and why.
fn skipped(test: &str, why: &str) {
    say(&format!("SKIPPED {test}: {why}"));
}

/// Prints a line. Not by a macro, because the output of a passing test is captured.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Returns the packets sent and received, from the last lines of ping.
pub fn ping_counts(said: &str) -> anyhow::Result<(u32, u32)> {
    let line = said.lines().find(|line| line.contains("packets transmitted"));
    let line = line.with_context(|| format!("ping did not count:\n{said}"))?;
    let numbers: Vec<u32> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    ensure!(numbers.len() >= 2, "{line}");
    Ok((numbers[0], numbers[1]))
}
