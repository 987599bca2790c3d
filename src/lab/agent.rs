//! A real agent as a child process on a host of the lab.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Host;
use crate::{api, config::NO_FILE, runtime};

/// A running `gossamer agent`. The process is killed on drop.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Agent {
    /// Starts `program agent` on a host, with all its files in the host's directory.
    ///
    /// # Errors
    /// Fails if the log cannot be opened or the process cannot be started.
    pub fn start(program: &Path, host: &Host, arguments: &[&str]) -> io::Result<Self> {
        Self::start_with(program, host, arguments, &[])
    }

    /// Like [`Self::start`], with additional environment variables.
    ///
    /// # Errors
    /// Fails if the log cannot be opened or the process cannot be started.
    pub fn start_with(
        program: &Path,
        host: &Host,
        arguments: &[&str],
        variables: &[(&str, String)],
    ) -> io::Result<Self> {
        let log = host.dir.join("log");
        let file = File::options().create(true).append(true).open(&log)?;
        let socket = host.dir.join("gossamer.sock");
        let mut command = Command::new(program);
        command
            .arg("agent")
            .args(["--node-name", &host.name])
            .arg("--state-dir")
            .arg(host.dir.join("state"))
            .arg("--socket")
            .arg(&socket)
            .arg("--subnet-file")
            .arg(host.dir.join("subnet.env"))
            .args(arguments)
            // The settings of this machine do not concern hosts of the lab.
            .env("GOSSAMER_CONFIG", NO_FILE)
            .envs(variables.iter().map(|(name, value)| (*name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file);
        let child = host.netns.spawn(&mut command)?;
        Ok(Self { child, socket, log })
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the path of the control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Returns the log, including that of earlier runs on this host. Empty if the log is a pipe.
    pub fn log(&self) -> String {
        let is_file = self.log.metadata().is_ok_and(|log| log.is_file());
        is_file.then(|| std::fs::read_to_string(&self.log).ok()).flatten().unwrap_or_default()
    }

    /// Queries the agent over the control socket. Waits until the socket exists.
    ///
    /// # Errors
    /// Fails if the agent ends, refuses the request, or does not answer within `patience`.
    pub fn ask(&mut self, target: &str, patience: Duration) -> anyhow::Result<Value> {
        runtime::block_on(async {
            tokio::time::timeout(patience, async {
                loop {
                    match api::get(&self.socket, target).await {
                        Err(api::ClientError::NoAgent { .. }) => {}
                        Err(error) => anyhow::bail!("{error}; its log:\n{}", self.log()),
                        Ok(answer) => return Ok(answer),
                    }
                    if let Some(status) = self.child.try_wait()? {
                        anyhow::bail!("the agent ended ({status}):\n{}", self.log());
                    }
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            })
            .await
            .map_err(|_| anyhow::anyhow!("no answer from the agent:\n{}", self.log()))?
        })?
    }

    /// Like [`Self::ask`], and returns the answer as a type of the API.
    ///
    /// # Errors
    /// Also if the answer is of another type.
    pub fn ask_as<T: DeserializeOwned>(
        &mut self,
        target: &str,
        patience: Duration,
    ) -> anyhow::Result<T> {
        Ok(serde_json::from_value(self.ask(target, patience)?)?)
    }

    /// Waits until the node has converged with `members` members, and returns its status.
    ///
    /// # Errors
    /// Fails if that takes longer than `patience`.
    pub fn wait_converged(&mut self, members: usize, patience: Duration) -> anyhow::Result<Value> {
        let target = format!("/v1/status?wait={}&members={members}", patience.as_secs());
        let status = self.ask(&target, patience + Duration::from_secs(5))?;
        if status["converged"] != true {
            anyhow::bail!("not converged: {status:#}\n{}", self.log());
        }
        Ok(status)
    }

    /// Waits until the node has its subnet: an agent may answer before it has read its state.
    ///
    /// # Errors
    /// Fails if that takes longer than `patience`.
    pub fn wait_subnet(&mut self, patience: Duration) -> anyhow::Result<Ipv4Net> {
        let begun = Instant::now();
        loop {
            let status = self.ask("/v1/status", patience)?;
            if status["subnet"].is_string() {
                return Self::subnet(&status);
            }
            anyhow::ensure!(begun.elapsed() < patience, "no subnet: {status:#}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Returns the subnet in a status.
    ///
    /// # Errors
    /// Fails if there is none.
    pub fn subnet(status: &Value) -> anyhow::Result<Ipv4Net> {
        let text = status["subnet"].as_str().ok_or_else(|| anyhow::anyhow!("no subnet"))?;
        Ok(text.parse()?)
    }

    /// Makes the node leave its cluster for good, and waits for the end of the process.
    ///
    /// # Errors
    /// Fails if the agent refuses.
    pub fn leave(&mut self) -> anyhow::Result<Value> {
        let answer = runtime::block_on(api::post(&self.socket, "/v1/leave"))??;
        self.child.wait()?;
        Ok(answer)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// Fails if the process no longer exists.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Sends a signal and waits for the end of the process.
    ///
    /// # Errors
    /// Fails if the process no longer exists.
    pub fn end(&mut self, signal: Signal) -> io::Result<ExitStatus> {
        self.signal(signal)?;
        self.child.wait()
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// Fails if the process cannot be waited for.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
