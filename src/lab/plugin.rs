//! Calls of a CNI plugin, as a runtime makes them.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;

use super::NetNs;

/// Where Debian has its CNI plugins.
pub const PLUGINS: &str = "/usr/lib/cni";

/// How a call went.
#[derive(Clone, Debug)]
pub struct Called {
    /// What the plugin's process took.
    pub took: Duration,
    pub is_done: bool,
    /// What it printed; nothing if that is no JSON.
    pub said: Value,
}

impl Called {
    /// The time of a call that must succeed.
    ///
    /// # Errors
    /// Fails with what the plugin said if it has failed.
    pub fn done(self) -> anyhow::Result<Duration> {
        anyhow::ensure!(self.is_done, "the plugin failed: {}", self.said);
        Ok(self.took)
    }
}

/// Calls a plugin in a host's namespace for a container whose namespace has the container's name.
///
/// # Errors
/// Fails if the plugin cannot be run.
pub fn call_plugin(
    program: &Path,
    host: &NetNs,
    config: &Value,
    verb: &str,
    container: &str,
) -> anyhow::Result<Called> {
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
    let mut child = host.spawn(&mut command)?;
    let mut input = child.stdin.take().context("a pipe")?;
    input.write_all(config.to_string().as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    let took = begun.elapsed();
    let said = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    Ok(Called { took, is_done: output.status.success(), said })
}
