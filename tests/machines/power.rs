//! Reboots and power cuts.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    common::{Needs, on_machines, say},
    hosts::{END_AGENTS, PAUSE, add_hosts, agent, ask, converged, table},
    machine::{Machine, Options, SOON, World},
    pair::{self, Pair},
};

const POWER_CUTS: u32 = 20;
const HOSTS: u8 = 4;

#[test]
#[ignore = "minutes"]
fn rebooted_or_power_cut_host_keeps_its_subnet() {
    on_machines(Needs::Package, Duration::from_secs(1200), reboot_and_cut);
}

fn reboot_and_cut(world: &mut World) -> anyhow::Result<()> {
    let mut pair = Pair::new(world)?;
    for cut in [false, true] {
        let what = if cut { "power cut" } else { "reboot" };
        match cut {
            true => pair.hosts[1].power_on()?,
            false => pair.hosts[1].reboot()?,
        }
        let subnet = pair::converged(&mut pair.hosts[1], 2)?;
        ensure!(subnet == pair.subnets[1], "{what}: {subnet}, it was {}", pair.subnets[1]);
        no_quarantine(&mut pair.hosts[1], "/var/lib/gossamer")?;
        pair::converged(&mut pair.hosts[0], 2)?;
        pair.pods[1] = pair::add_pod(&mut pair.hosts[1], "pod")?;
        pair.lost_while(Duration::from_secs(1), |_| Ok(()))?;
        let loss = pair.lost_while(Duration::from_secs(3), |_| Ok(()))?;
        ensure!(loss.lost == 0, "{what}: a new pod afterwards: {loss}");
        say(&format!("{what}: {subnet} again, {}", pair.hosts[1].figures()));
    }
    Ok(())
}

fn no_quarantine(machine: &mut Machine, states: &str) -> anyhow::Result<()> {
    let found = machine.ok(&format!("find {states} -name '*damaged*' -exec ls -lR {{}} +"))?;
    let why = machine.ok("grep -h 'moved aside' /run/h*.log || true")?;
    ensure!(found.is_empty(), "a database was moved aside: {found}\n{why}");
    Ok(())
}

#[test]
#[ignore = "a quarter of an hour"]
fn hosts_with_random_power_cuts_keep_their_subnets() {
    on_machines(Needs::Program, Duration::from_secs(3600), cuts);
}

/// Odd cuts interrupt the join to a new cluster, even ones the restart. Each cluster is used for two
/// cuts, because nodes that were interrupted in their join keep the slots that they were granted.
fn cuts(world: &mut World) -> anyhow::Result<()> {
    let seed = std::env::var("GOSSAMER_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) ^ now_nanos());
    say(&format!("power cuts: GOSSAMER_SEED={seed}"));
    let mut random = StdRng::seed_from_u64(seed);
    let mut survivor = world.start(Options::mini("survivor", 1))?;
    survivor.take_parcel()?;
    add_hosts_at(&mut survivor)?;
    let mut victim = world.start(Options::mini("victim", 2))?;
    victim.take_parcel()?;
    add_hosts(&mut victim, HOSTS)?;
    let (mut printed_before, mut joins_cut) = (0, 0);
    // Time until all hosts have printed their subnets; it depends on the load of the machine.
    let mut usual = Duration::from_secs(5);
    for cut in 1..=POWER_CUTS {
        let join = cut % 2 == 1;
        if join {
            create_cluster(&mut survivor, &mut victim)?;
        }
        // The console output from here on belongs to this cluster.
        let from = if join { victim.console().len() } else { cluster_began(&victim) };
        if join {
            victim.ok(&format!("echo CLUSTER {cut} > /dev/ttyS0"))?;
        }
        launch(&mut victim)?;
        let delay = usual.mul_f64(random.random_range(0.0..1.4));
        std::thread::sleep(delay);
        victim.kill()?;
        let before = printed_subnets(&victim.console()[from..]);
        printed_before += before.len();
        joins_cut += usize::from(HOSTS) - before.len();
        victim.power_on()?;
        add_hosts(&mut victim, HOSTS)?;
        let again = victim.console().len();
        launch(&mut victim)?;
        let launched = Instant::now();
        while printed_subnets(&victim.console()[again..]).len() < usize::from(HOSTS) {
            if launched.elapsed() >= SOON {
                let said = victim.console()[again..].to_owned();
                let logs = victim.ok("tail -n 25 /run/h*.env /run/h*.log")?;
                bail!("cut {cut}: not all have a subnet afterwards\nconsole: {said}\n{logs}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        usual = launched.elapsed();
        let members = usize::from(HOSTS) + 1;
        for number in 1..=HOSTS {
            let status = converged(&mut victim, number, members)?;
            let name = format!("h{number}");
            let subnet = status["subnet"].as_str().unwrap_or_default().to_owned();
            if let Some(old) = before.get(&name) {
                ensure!(*old == subnet, "cut {cut}: {name} had {old} and has {subnet}");
            }
        }
        no_quarantine(&mut victim, "/root/h*")?;
        let count = before.len();
        say(&format!(
            "cut {cut} of {POWER_CUTS} ({}), after {:.2} s: {count} of {HOSTS} had printed a subnet, \
             {count} kept it; all had theirs after {:.1} s, converged after {:.1} s; {}",
            if join { "join" } else { "restart" },
            delay.as_secs_f64(),
            usual.as_secs_f64(),
            launched.elapsed().as_secs_f64(),
            victim.figures()
        ));
        if !join {
            // Tables become equal by comparisons with a peer, every ten seconds.
            let first = converged_table(&mut survivor)?;
            for number in 1..=HOSTS {
                let mut rows = table(&mut victim, number)?;
                for _ in 0..60 {
                    if rows == first {
                        break;
                    }
                    std::thread::sleep(Duration::from_secs(1));
                    rows = table(&mut victim, number)?;
                }
                ensure!(rows == first, "cut {cut}: h{number}:\n{rows:?}\nsurvivor:\n{first:?}");
            }
        }
        end_agents(&mut victim)?;
    }
    say(&format!(
        "{POWER_CUTS} cuts of {HOSTS} hosts: {printed_before} times a subnet had been said, and was kept; \
         {joins_cut} joins were cut before that; {}",
        survivor.figures()
    ));
    Ok(())
}

fn now_nanos() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::from(now.subsec_nanos()) << 20)
}

/// Creates the survivor's only host, number 9.
fn add_hosts_at(survivor: &mut Machine) -> anyhow::Result<()> {
    survivor
        .ok("set -e; ip netns add h9; ip link add p9 type veth peer name eth0 netns h9
             ip link set p9 master lan up; ip -n h9 addr add 10.77.0.19/24 dev eth0
             ip -n h9 link set lo up; ip -n h9 link set eth0 up; ip -n h9 route add default via 10.77.0.1
             mkdir -p /root/h9")
        .map(drop)
}

/// Removes all states, and lets the survivor create another cluster.
fn create_cluster(survivor: &mut Machine, victim: &mut Machine) -> anyhow::Result<()> {
    end_agents(survivor)?;
    survivor.ok(&format!("rm -rf /root/h9/state /run/h9.env; i=9; {}", agent("--init")))?;
    converged(survivor, 9, 1)?;
    let token = survivor.ok("gossamer token --socket /run/h9.sock")?;
    let token = token.trim();
    victim
        .ok(&format!("rm -rf /root/h*/state; umask 077; echo {token} > /root/token; sync"))
        .map(drop)
}

/// Starts the agents, and a process that prints each subnet of an agent to the console.
fn launch(victim: &mut Machine) -> anyhow::Result<()> {
    let agent = agent("--token-file /root/token");
    victim
        .ok(&format!(
            "rm -f /run/h*.env
             for i in $(seq {HOSTS}); do {agent} done
             [ -e /run/tick ] || mkfifo /run/tick
             (exec 5<> /run/tick; left=$(echo $(seq {HOSTS}))
             while [ -n \"$left\" ]; do
               rest=
               for i in $left; do
                 if [ -s /run/h$i.env ]; then
                   . /run/h$i.env
                   echo \"SAID h$i $FLANNEL_SUBNET\" > /dev/ttyS0
                 else
                   rest=\"$rest $i\"
                 fi
               done
               left=$rest; {PAUSE}
             done) > /dev/null 2>&1 &"
        ))
        .map(drop)
}

fn end_agents(machine: &mut Machine) -> anyhow::Result<()> {
    machine.ok(END_AGENTS).map(drop)
}

/// Returns where the output of the last cluster begins in the console.
fn cluster_began(victim: &Machine) -> usize {
    victim.console().rfind("CLUSTER ").unwrap_or_default()
}

/// Returns the subnet of each host, from the console.
fn printed_subnets(console: &str) -> BTreeMap<String, String> {
    console
        .lines()
        .filter_map(|line| line.split("SAID ").nth(1)?.trim().split_once(' '))
        .filter(|(_, subnet)| subnet.ends_with(".1/24"))
        .map(|(name, subnet)| (name.to_owned(), subnet.replace(".1/24", ".0/24")))
        .collect()
}

fn converged_table(survivor: &mut Machine) -> anyhow::Result<Vec<(String, String, String)>> {
    converged(survivor, 9, usize::from(HOSTS) + 1)?;
    let status = ask(survivor, 9, "status")?;
    ensure!(status["counters"]["ownership_conflicts"] == 0, "{status:#}");
    table(survivor, 9)
}
