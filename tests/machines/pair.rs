//! Two Debian hosts with the package, one cluster, and a pod on each.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{
    common::{ping_counts, say},
    machine::{Machine, SOON, World},
};

/// Time limit of an installation, or the start of an agent, in emulation.
pub const TIMEOUT: Duration = Duration::from_secs(180);

pub struct Pair {
    pub hosts: [Machine; 2],
    /// Addresses of the pods.
    pub pods: [String; 2],
    pub subnets: [String; 2],
}

/// The counts of a ping.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    pub sent: u32,
    pub lost: u32,
}

impl Loss {
    pub fn percent(self) -> f64 {
        f64::from(self.lost) * 100.0 / f64::from(self.sent.max(1))
    }
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} packets lost", self.lost, self.sent)
    }
}

/// Installs the package and writes the settings, without starting the agent.
pub fn install(machine: &mut Machine, settings: &str) -> anyhow::Result<()> {
    machine.take_parcel()?;
    machine.ok_within("dpkg -i /parcel/gossamer.deb 2>&1", TIMEOUT)?;
    // The package's program is under test, not the one beside it.
    machine.ok("rm -f /usr/local/bin/gossamer; test -x /usr/bin/gossamer")?;
    machine.ok(&format!("printf '{settings}' >> /etc/gossamer/gossamer.toml")).map(drop)
}

pub fn status(machine: &mut Machine) -> anyhow::Result<Value> {
    let said = machine.ok("gossamer status -o json || true")?;
    serde_json::from_str(&said).with_context(|| said)
}

/// Waits until a host has converged with `members` members, and returns its subnet.
pub fn converged(machine: &mut Machine, members: usize) -> anyhow::Result<String> {
    // Standard error says what it waits for, which is no JSON.
    let wait =
        format!("gossamer status --wait=150 --members {members} -o json 2> /root/waiting-for");
    let answer = machine.run(&wait, TIMEOUT)?;
    if answer.code != 0 {
        let journal = machine.ok("journalctl -b -u gossamer --no-pager | tail -40")?;
        anyhow::bail!("{} has not converged: {}\n{journal}", machine.name(), answer.text);
    }
    let status: Value = serde_json::from_str(&answer.text)?;
    Ok(status["subnet"].as_str().context("a subnet")?.to_owned())
}

/// Adds a pod as a container runtime does, and returns its address.
pub fn add_pod(machine: &mut Machine, name: &str) -> anyhow::Result<String> {
    let said = machine.ok(&format!(
        "test -e /opt/cni/bin/gossamer || gossamer cni install >/dev/null || exit 1
         ip netns add {name} || exit 1
         echo '{{\"cniVersion\": \"1.0.0\", \"name\": \"gossamer\", \"type\": \"gossamer\"}}' |
         CNI_COMMAND=ADD CNI_CONTAINERID={name} CNI_NETNS=/run/netns/{name} CNI_IFNAME=eth0 \
         CNI_PATH=/opt/cni/bin /opt/cni/bin/gossamer"
    ))?;
    let answer: Value = serde_json::from_str(&said).with_context(|| said)?;
    let address = answer["ips"][0]["address"].as_str().context("an address")?;
    Ok(address.split('/').next().unwrap_or_default().to_owned())
}

impl Pair {
    pub fn new(world: &World) -> anyhow::Result<Self> {
        let ready = |name, index, settings| -> anyhow::Result<Machine> {
            let mut machine = world.copy_booted(name, index)?;
            install(&mut machine, settings)?;
            Ok(machine)
        };
        let (first, second) = std::thread::scope(|scope| {
            let second = "token_file = \"/etc/gossamer/token\"\\nset_sysctls = true\\n";
            let second = scope.spawn(|| ready("v2", 2, second));
            (ready("v1", 1, "init = true\\nset_sysctls = true\\n"), second.join())
        });
        let mut first = first?;
        let mut second = second.map_err(|_| anyhow::anyhow!("the second host's thread"))??;
        say(&format!("two hosts with the package: {}, {}", first.figures(), second.figures()));
        first.ok_within("systemctl enable --now gossamer 2>&1", TIMEOUT)?;
        let mut subnets = [converged(&mut first, 1)?, String::new()];
        let token = first.ok("gossamer token")?;
        second.ok(&format!("umask 077; echo {} > /etc/gossamer/token", token.trim()))?;
        second.ok_within("systemctl enable --now gossamer 2>&1", TIMEOUT)?;
        subnets[1] = converged(&mut second, 2)?;
        converged(&mut first, 2)?;
        let pods = [add_pod(&mut first, "pod")?, add_pod(&mut second, "pod")?];
        say(&format!("two hosts and their pods: {}, {}", first.figures(), second.figures()));
        let mut pair = Self { hosts: [first, second], pods, subnets };
        // The first packet waits for neighbor resolution.
        let mut talk = || {
            pair.start_ping()?;
            pair.hosts[0].ok("sleep 1")?;
            pair.stop_ping()
        };
        talk()?;
        let loss = talk()?;
        ensure!(loss.lost == 0 && loss.sent > 5, "before anything was done: {loss}");
        Ok(pair)
    }

    /// Starts a ping from the first host's pod to the second one's, ten times a second.
    pub fn start_ping(&mut self) -> anyhow::Result<()> {
        let to = &self.pods[1];
        self.hosts[0]
            .ok(&format!(
                "ip netns exec pod ping -n -i 0.1 {to} > /tmp/ping 2>&1 & echo $! > /tmp/ping.pid"
            ))
            .map(drop)
    }

    /// Ends the ping. The last two packets may still be in transit, and do not count as lost.
    pub fn stop_ping(&mut self) -> anyhow::Result<Loss> {
        let said = self.hosts[0].ok_within(
            "p=$(cat /tmp/ping.pid); kill -INT $p
             while [ -e /proc/$p ]; do sleep 0.1; done; cat /tmp/ping",
            SOON,
        )?;
        let (sent, _) = ping_counts(&said)?;
        let mut answered: Vec<u32> = said
            .lines()
            .filter(|line| line.contains("bytes from"))
            .filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok())
            .collect();
        answered.sort_unstable();
        answered.dedup();
        let count = u32::try_from(answered.len())?;
        let last = answered.last().copied().unwrap_or_default();
        let on_the_way = (sent - last).min(2);
        Ok(Loss { sent, lost: sent - on_the_way - count })
    }

    /// Returns the loss during an action on the second host, and for a time afterwards.
    pub fn lost_while(
        &mut self,
        rest: Duration,
        fault: impl FnOnce(&mut Machine) -> anyhow::Result<()>,
    ) -> anyhow::Result<Loss> {
        self.start_ping()?;
        std::thread::sleep(Duration::from_secs(1));
        fault(&mut self.hosts[1])?;
        std::thread::sleep(rest);
        self.stop_ping()
    }
}
