//! A network that delays, loses and reorders packets.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{
    common::{Needs, on_machines, say},
    hosts::{END_AGENTS, add_hosts, agent, ask, converged, table},
    machine::{Machine, Options, World},
};

const HOSTS: u8 = 10;
/// Longer than the five minutes after which the agent re-examines paths from scratch.
const OBSERVATION_PERIOD: Duration = Duration::from_secs(330);
const MAX_JOIN_DELAY_SECONDS: f64 = 2.0;

#[test]
#[ignore = "eight minutes"]
fn members_on_a_lossy_network_are_never_reported_down() {
    on_machines(Needs::Program, Duration::from_secs(1800), lossy);
}

/// Starts a cluster on all hosts. Returns how many seconds each join took.
fn cluster(machine: &mut Machine) -> anyhow::Result<Vec<f64>> {
    machine.ok(&format!("i=1; {}", agent("--init")))?;
    converged(machine, 1, 1)?;
    machine.ok("umask 077; gossamer token --socket /run/h1.sock > /root/token")?;
    (2..=HOSTS).map(|number| join(machine, number)).collect()
}

/// Starts an agent. Returns the seconds from the first line of its log to its subnet, by the guest's
/// clock, which no program adjusts.
fn join(machine: &mut Machine, number: u8) -> anyhow::Result<f64> {
    machine.ok(&format!("i={number}; {}", agent("--token-file /root/token")))?;
    converged(machine, number, usize::from(number))?;
    let log = machine.ok(&format!("cat /run/h{number}.log"))?;
    let moment = |words: &str| -> anyhow::Result<f64> {
        let line = log.lines().find(|line| line.contains(words));
        let line = line.with_context(|| format!("h{number} has not logged `{words}`:\n{log}"))?;
        let time = line.split_once('T').context("a time")?.1;
        let parts = time.split(['Z', ':']).take(3).map(str::parse);
        Ok(parts.collect::<Result<Vec<f64>, _>>()?.iter().fold(0.0, |sum, part| sum * 60.0 + part))
    };
    let seconds = (moment("subnet leased")? - moment("starting")?).rem_euclid(86_400.0);
    if seconds > MAX_JOIN_DELAY_SECONDS {
        say(&format!("h{number} took {seconds:.2} s to join:\n{log}"));
    }
    Ok(seconds)
}

fn lossy(world: &mut World) -> anyhow::Result<()> {
    let options = Options { kernel: "6.12", memory: 1024, processors: 2, ..Options::mini("m1", 1) };
    let mut machine = world.start(options)?;
    machine.take_parcel()?;
    add_hosts(&mut machine, HOSTS)?;
    // The cost of joins in emulation on a good network: cryptography, and work of other agents.
    let good = cluster(&mut machine)?;
    machine.ok(&format!(
        "{END_AGENTS}
         for i in $(seq {HOSTS}); do
           rm -rf /root/h$i/state /run/h$i.*; ip -n h$i link del gossamer.1
           tc -n h$i qdisc add dev eth0 root netem delay 50ms loss 5% reorder 20% limit 10000 || exit 1
         done"
    ))?;
    let bad = cluster(&mut machine)?;
    for number in 1..=HOSTS {
        converged(&mut machine, number, usize::from(HOSTS))?;
    }
    let sent = |text: String| {
        text.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum::<u64>()
    };
    let bytes =
        format!("for i in $(seq {HOSTS}); do cat /sys/class/net/p$i/statistics/rx_bytes; done");
    let before = sent(machine.ok(&bytes)?);
    std::thread::sleep(OBSERVATION_PERIOD);
    let rate =
        (sent(machine.ok(&bytes)?) - before) / OBSERVATION_PERIOD.as_secs() / u64::from(HOSTS);
    let (mut downs, mut suspicions) = (0, 0);
    let (mut offload_off, mut reported_down) = (Vec::new(), Vec::new());
    for number in 1..=HOSTS {
        let status = ask(&mut machine, number, "status")?;
        downs += status["counters"]["downs"].as_u64().context("downs")?;
        if status["kernel"]["checksum_offload"] == false {
            offload_off.push(number);
        }
        let events = ask(&mut machine, number, "events")?;
        let events = events["events"].as_array().cloned().unwrap_or_default();
        let events_with = |word: &'static str| {
            let text = |event: &Value| event["text"].as_str().unwrap_or_default().to_owned();
            events.iter().map(text).filter(move |text| text.contains(word))
        };
        suspicions += events_with("suspect").count();
        reported_down.extend(events_with("down").map(|text| format!("h{number}: {text}")));
    }
    let seconds =
        |joins: &[f64]| joins.iter().map(|join| format!("{join:.2}")).collect::<Vec<_>>().join(" ");
    let worst = good.iter().zip(&bad).map(|(good, bad)| bad - good).fold(0.0, f64::max);
    say(&format!(
        "{HOSTS} agents, 50 ms, 5 % loss, 20 % reordered, {} s: {downs} false downs, \
         {suspicions} suspicions, {rate} bytes/s per agent, checksum offload turned off at {}; \
         joins {} s, on a good network {} s; {}",
        OBSERVATION_PERIOD.as_secs(),
        offload_off.len(),
        seconds(&bad),
        seconds(&good),
        machine.figures()
    ));
    // Agents without CPU time for seconds look dead.
    let slow = machine.ok(
        "cat /run/h*.log | grep -o 'slow turn of the event loop.*' | wc -l; cat /proc/loadavg",
    )?;
    say(&format!("slow turns of loops, and load: {}", slow.trim().replace('\n', ", ")));
    ensure!(
        downs == 0,
        "{downs} times a running member was reported down: {:#?}",
        reported_down.iter().take(30).collect::<Vec<_>>()
    );
    let first = table(&mut machine, 1)?;
    for number in 2..=HOSTS {
        converged(&mut machine, number, usize::from(HOSTS))?;
        let rows = table(&mut machine, number)?;
        ensure!(rows == first, "h{number} holds\n{rows:?}\nand h1\n{first:?}");
    }
    ensure!(worst < MAX_JOIN_DELAY_SECONDS, "the network made a join take {worst:.2} s longer");
    ensure!(
        offload_off.is_empty(),
        "random loss turned the checksum offload off, at hosts {offload_off:?}"
    );
    Ok(())
}
