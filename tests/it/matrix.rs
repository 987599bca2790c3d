//! Faults next to an agent, in each phase of its life: at start, while it runs, and when it stops.
//!
//! In each phase pods stay connected, the status reports the cause, an agent that is told to end does so
//! within its deadline, and it recovers without a restart once the fault is over.

mod disks;
mod logs;
mod others;

use std::{
    fs,
    net::Ipv4Addr,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host, Lab, NetNs, Pinger};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use crate::{
    cni::{Runtime, address, namespaces},
    common::{Cluster, TIMEOUT, has_problem, program, token_of, wait_until},
};

/// A stopped agent ends within 5 s, whatever hangs; the rest is for a busy machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);

/// Two hosts with a pod each. The fault is on the first host.
struct Scene {
    cluster: Cluster,
    /// Includes a namespace for a pod that is added and removed repeatedly.
    pods: Vec<NetNs>,
    /// The address of the second host's pod.
    other: Ipv4Addr,
    subnet: String,
}

impl Scene {
    /// `prepare` is called with the first host before its agent starts.
    fn new(
        lab: &mut Lab,
        prepare: impl FnOnce(&Host) -> anyhow::Result<()>,
    ) -> anyhow::Result<Self> {
        let first = lab.host(1, "n1")?;
        fs::create_dir_all(first.dir.join("state"))?;
        prepare(&first)?;
        let mut agent = Agent::start(program(), &first, &["--init"])?;
        agent.wait_converged(1, TIMEOUT)?;
        let token = token_of(&mut agent)?;
        let mut cluster = Cluster { hosts: vec![first], agents: vec![agent], token };
        cluster.join(lab, 2)?;
        cluster.converge()?;
        let pods = namespaces(&["a", "b", "c", "d"])?;
        Runtime::new(&cluster.agents[0]).add("a");
        let other = address(&Runtime::new(&cluster.agents[1]).add("b")).parse()?;
        let subnet = Agent::subnet(&cluster.agents[0].wait_converged(2, TIMEOUT)?)?.to_string();
        let scene = Self { cluster, pods, other, subnet };
        scene.assert_pods_connected("before the fault")?;
        Ok(scene)
    }

    fn assert_pods_connected(&self, when: &str) -> anyhow::Result<()> {
        let answered = Pinger::new(&self.pods[0])?.ping(self.other, TIMEOUT)?;
        assert!(answered.is_some(), "pods are cut off {when}");
        Ok(())
    }

    /// Waits until the first agent reports the cause.
    fn wait_reported(&mut self, words: &str) {
        let agent = &mut self.cluster.agents[0];
        wait_until(&format!("not reported: {words}"), TIMEOUT, || has_problem(agent, words));
    }

    fn ends(&mut self) -> anyhow::Result<()> {
        let signaled = Instant::now();
        self.cluster.agents[0].end(Signal::SIGTERM)?;
        assert!(signaled.elapsed() < STOP_TIMEOUT, "ending took {:?}", signaled.elapsed());
        self.assert_pods_connected("once the agent has ended")
    }

    fn starts(&mut self) -> anyhow::Result<()> {
        self.cluster.agents[0] = Agent::start(program(), &self.cluster.hosts[0], &["--init"])?;
        Ok(())
    }

    /// Checks that the same agent, in its cluster and with its subnet, serves pods again.
    fn recovers(&mut self) -> anyhow::Result<()> {
        let status = self.cluster.agents[0].wait_converged(2, TIMEOUT)?;
        assert_eq!(Agent::subnet(&status)?.to_string(), self.subnet);
        let runtime = Runtime::new(&self.cluster.agents[0]);
        wait_until("no pod gets an address again", TIMEOUT, || {
            runtime.call("ADD", "c", &json!({})).0
        });
        runtime.del("c");
        self.assert_pods_connected("after the fault")
    }
}

/// A tracer that makes a system call of an agent fail while it runs.
struct Tracer(Child);

impl Tracer {
    fn is_there() -> bool {
        Command::new("strace").arg("-V").output().is_ok()
    }

    /// `whom` are strace's options that select the traced process: `-p` and its id last.
    fn start(whom: &[&str], call: &str, error: &str) -> anyhow::Result<Self> {
        let (trace, inject) = (format!("trace={call}"), format!("inject={call}:error={error}"));
        let mut strace = Command::new("strace");
        strace.args(["-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]).args(whom);
        let child = strace.stderr(Stdio::null()).spawn()?;
        let traced = format!("/proc/{}/status", whom.last().expect("a number"));
        wait_until("it is not traced", TIMEOUT, || {
            let status = fs::read_to_string(&traced).unwrap_or_default();
            !status.contains("TracerPid:\t0\n")
        });
        Ok(Self(child))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // On SIGTERM, strace detaches from the process.
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}
