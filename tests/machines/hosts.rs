//! Hosts in namespaces of one machine, in the network of all machines, with an agent on each.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::machine::{Machine, SOON};

/// Creates hosts 1 to `count` with addresses from 10.77.0.11 on. Each boot needs this again: namespaces and
/// interfaces are in memory, only the agents' states are on disk.
pub fn add_hosts(machine: &mut Machine, count: u8) -> anyhow::Result<()> {
    machine
        .ok(&format!(
            "set -e
             mkdir -p /run/netns
             for i in $(seq {count}); do
               mkdir -p /root/h$i
               echo netns add h$i
               echo link add p$i type veth peer name eth0 netns h$i
               echo link set p$i master lan up
             done > /run/links
             ip -batch /run/links
             for i in $(seq {count}); do
               printf '%s\\n' \"addr add 10.77.0.$((10 + i))/24 dev eth0\" 'link set lo up' \\
                 'link set eth0 up' 'route add default via 10.77.0.1' > /run/links
               ip -n h$i -batch /run/links
               ip netns exec h$i sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward'
             done"
        ))
        .map(drop)
}

/// A short pause without another process: descriptor 5 is a pipe on which nothing arrives.
pub const PAUSE: &str = "read -r -t 0.02 -u 5";

/// A script that ends all agents of a machine.
pub const END_AGENTS: &str = "for p in $(pidof gossamer); do kill $p; done
    while pidof gossamer > /dev/null; do sleep 0.1; done";

/// Returns a script that starts the agent of host `$i`.
pub fn agent(arguments: &str) -> String {
    format!(
        "ip netns exec h$i gossamer agent --node-name h$i --state-dir /root/h$i/state --socket /run/h$i.sock \
         --subnet-file /run/h$i.env {arguments} >> /run/h$i.log 2>&1 &"
    )
}

/// Runs a command that prints JSON on host `number`, and returns the output.
pub fn ask(machine: &mut Machine, number: u8, command: &str) -> anyhow::Result<Value> {
    let said = machine
        .ok(&format!("gossamer {command} -o json --socket /run/h{number}.sock || [ $? = 3 ]"))?;
    serde_json::from_str(&said).with_context(|| said)
}

/// Waits until host `number` has converged with `members` members, and returns its status.
pub fn converged(machine: &mut Machine, number: u8, members: usize) -> anyhow::Result<Value> {
    let wait = format!(
        "gossamer status --wait=120 --members {members} -o json --socket /run/h{number}.sock \
         2> /run/waiting-for"
    );
    let answer = machine.run(&wait, SOON + Duration::from_secs(30))?;
    if answer.code != 0 {
        let log = machine.ok(&format!("tail -n 30 /run/waiting-for /run/h{number}.log"))?;
        anyhow::bail!("h{number} has not converged: {}\n{log}", answer.text);
    }
    Ok(serde_json::from_str(&answer.text)?)
}

/// Returns the owners of all slots, in an order that does not depend on the queried host.
pub fn table(machine: &mut Machine, number: u8) -> anyhow::Result<Vec<(String, String, String)>> {
    let leases = ask(machine, number, "leases")?;
    let owners = leases["owners"].as_array().context("owners")?;
    let mut rows: Vec<_> = owners
        .iter()
        .map(|owner| {
            (owner["node"].to_string(), owner["subnets"].to_string(), owner["free"].to_string())
        })
        .collect();
    rows.sort();
    let mut subnets: Vec<&str> = owners
        .iter()
        .filter_map(|owner| owner["subnets"].as_array())
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let all = subnets.len();
    subnets.sort_unstable();
    subnets.dedup();
    ensure!(subnets.len() == all, "a subnet has two owners: {leases:#}");
    Ok(rows)
}
