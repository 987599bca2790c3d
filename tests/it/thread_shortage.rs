//! Hosts on which the agent temporarily cannot create threads.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    cni::{Runtime, namespaces},
    common::{Cluster, has_problem, isolated, skipped, tool, wait_until},
};

/// A failed test is reported only after several attempts.
const REPORT_TIMEOUT: Duration = Duration::from_secs(90);

/// A cgroup with a process, which limits its threads.
struct ThreadLimit {
    path: PathBuf,
    pid: u32,
}

impl ThreadLimit {
    /// Returns None if no usable pids controller exists.
    fn of(pid: u32) -> Option<Self> {
        let parents = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].into_iter().map(Path::new);
        parents.into_iter().find_map(|parent| {
            let path = parent.join(format!("gossamer-test-{pid}"));
            fs::create_dir(&path).ok()?;
            let made = Self { path, pid };
            let entered = fs::write(made.path.join("cgroup.procs"), pid.to_string());
            entered.and_then(|()| made.limit("max")).is_ok().then_some(made)
        })
    }

    fn limit(&self, most: &str) -> io::Result<()> {
        fs::write(self.path.join("pids.max"), most)
    }
}

impl Drop for ThreadLimit {
    fn drop(&mut self) {
        if let Some(parent) = self.path.parent() {
            let _ = fs::write(parent.join("cgroup.procs"), self.pid.to_string());
        }
        let _ = fs::remove_dir(&self.path);
    }
}

#[test]
fn temporary_thread_shortage_is_reported_and_forwarding_tests_resume() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let _spaces = namespaces(&["a", "b"])?;
        ["a", "b"].iter().for_each(|pod| _ = Runtime::new(&cluster.agents[0]).add(pod));
        let (host, agent) = (&cluster.hosts[0].netns, &mut cluster.agents[0]);
        let Some(threads) = ThreadLimit::of(agent.pid()) else {
            skipped(
                "temporary_thread_shortage_is_reported_and_forwarding_tests_resume",
                "it needs a cgroup with the controller pids",
            );
            return Ok(());
        };
        let mut wait_for = |state: &str, words: &str| {
            wait_until(words, REPORT_TIMEOUT, || {
                let status: Value = agent.ask("/v1/status", REPORT_TIMEOUT).expect("a status");
                let forwarding = &status["kernel"]["forwarding"];
                forwarding["state"] == state && forwarding["detail"].to_string().contains(words)
            });
        };
        wait_for("ok", "packets pass");
        threads.limit("1")?;
        // The agent re-creates this device, and enters a namespace for that.
        tool(host, "ip link del gsp.1");
        wait_for("skipped", "cannot start a thread");
        threads.limit("max")?;
        wait_for("ok", "packets pass");
        tool(
            host,
            "nft add table bridge wall; \
             add chain bridge wall f { type filter hook forward priority 0; policy drop; }",
        );
        wait_until("it is not reported", REPORT_TIMEOUT, || {
            has_problem(agent, "does not forward packets between its own pods")
        });
        threads.limit("1")?;
        let ended = agent.end(Signal::SIGTERM)?;
        assert_eq!(ended.code(), Some(0), "{}", agent.log());
        assert!(!agent.log().contains("panicked"), "{}", agent.log());
        Ok(())
    });
}
