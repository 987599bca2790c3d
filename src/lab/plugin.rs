//! Calls CNI plugins as a container runtime does.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use serde_json::Value;

use super::NetNs;

/// Directory of Debian's CNI plugins.
pub const PLUGINS: &str = "/usr/lib/cni";

/// Result of a call.
#[derive(Clone, Debug)]
pub struct PluginResult {
    /// Run time of the plugin's process.
    pub duration: Duration,
    /// Whether the plugin succeeded.
    pub succeeded: bool,
    /// The plugin's output; `null` if it is not JSON.
    pub output: Value,
}

impl PluginResult {
    /// Returns the run time of a call that must succeed.
    ///
    /// # Errors
    /// Fails with the plugin's output if the plugin failed.
    pub fn done(self) -> anyhow::Result<Duration> {
        anyhow::ensure!(self.succeeded, "the plugin failed: {}", self.output);
        Ok(self.duration)
    }
}

/// Calls a plugin in a host's namespace. The container's namespace has the container's name.
///
/// # Errors
/// Fails if the plugin cannot be started.
pub fn call_plugin(
    program: &Path,
    host: &NetNs,
    config: &Value,
    verb: &str,
    container: &str,
) -> anyhow::Result<PluginResult> {
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
    let finished = child.wait_with_output()?;
    let duration = begun.elapsed();
    let output = serde_json::from_slice(&finished.stdout).unwrap_or(Value::Null);
    Ok(PluginResult { duration, succeeded: finished.status.success(), output })
}
