//! A network that delays, loses and reorders.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::{
    common::{Needs, on_machines, say},
    hosts::{WAIT, add_hosts, agent, ask, converged, table},
    machine::{Options, World},
};

const HOSTS: u8 = 10;
/// Longer than the five minutes after which paths are looked at again as if nothing were known of them.
const WATCHED: Duration = Duration::from_secs(330);
const JOIN: f64 = 2.0;

#[test]
#[ignore = "eight minutes"]
fn members_on_a_lossy_network_are_never_held_as_down() {
    on_machines(Needs::Program, Duration::from_secs(1800), lossy);
}

fn lossy(world: &mut World) -> anyhow::Result<()> {
    let options = Options { kernel: "6.12", memory: 1024, ..Options::mini("m1", 1) };
    let mut machine = world.start(options)?;
    machine.take_parcel()?;
    add_hosts(&mut machine, HOSTS)?;
    machine.ok(&format!(
        "for i in $(seq {HOSTS}); do
           tc -n h$i qdisc add dev eth0 root netem delay 50ms loss 5% reorder 20% limit 10000 || exit 1
         done"
    ))?;
    machine.ok(&format!("i=1; {}", agent("--init")))?;
    converged(&mut machine, 1, 1)?;
    machine.ok("umask 077; gossamer token --socket /run/h1.sock > /root/token")?;
    let mut joins = Vec::new();
    for number in 2..=HOSTS {
        // From the first line of its log to its subnet: the start of a process is slow
        // in emulation.
        let said = machine.ok(&format!(
            "i={number}
             [ -e /run/tick ] || mkfifo /run/tick; exec 5<> /run/tick
             read -r a _ < /proc/uptime; {}
             until [ -s /run/h$i.log ]; do {WAIT}; done; read -r b _ < /proc/uptime
             for n in {{1..3000}}; do [ -s /run/h$i.env ] && break; {WAIT}; done
             read -r c _ < /proc/uptime; echo $a $b $c",
            agent("--token-file /root/token")
        ))?;
        let moments: Vec<f64> =
            said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [started, spoke, joined] = moments[..] else { anyhow::bail!("{said}") };
        joins.push(joined - started);
        if joined - started > JOIN {
            say(&machine.ok(&format!("head -c 3000 /run/h{number}.log; cat /proc/loadavg"))?);
        }
        say(&format!(
            "h{number} had its subnet {:.2} s after its start ({:.2} s after its first line)",
            joined - started,
            joined - spoke
        ));
    }
    for number in 1..=HOSTS {
        converged(&mut machine, number, usize::from(HOSTS))?;
    }
    let sent = |text: String| {
        text.split_whitespace().filter_map(|word| word.parse::<u64>().ok()).sum::<u64>()
    };
    let bytes =
        format!("for i in $(seq {HOSTS}); do cat /sys/class/net/p$i/statistics/rx_bytes; done");
    let before = sent(machine.ok(&bytes)?);
    std::thread::sleep(WATCHED);
    let rate = (sent(machine.ok(&bytes)?) - before) / WATCHED.as_secs() / u64::from(HOSTS);
    let (mut downs, mut suspicions, mut offload_off) = (0, 0, Vec::new());
    for number in 1..=HOSTS {
        let status = ask(&mut machine, number, "status")?;
        downs += status["counters"]["downs"].as_u64().context("downs")?;
        if status["kernel"]["checksum_offload"] == false {
            offload_off.push(number);
        }
        let events = ask(&mut machine, number, "events")?;
        let events = events["events"].as_array().cloned().unwrap_or_default();
        suspicions += events.iter().filter(|event| event.to_string().contains("suspect")).count();
    }
    let worst = joins.iter().copied().fold(0.0, f64::max);
    say(&format!(
        "{HOSTS} agents, 50 ms, 5 % loss, 20 % reordered, {} s: {downs} false downs, \
         {suspicions} suspicions, {rate} bytes/s per agent, joins {} s, checksum offload turned off at {}; {}",
        WATCHED.as_secs(),
        joins.iter().map(|join| format!("{join:.2}")).collect::<Vec<_>>().join(" "),
        offload_off.len(),
        machine.figures()
    ));
    ensure!(downs == 0, "{downs} times a member that runs was held as down");
    let first = table(&mut machine, 1)?;
    for number in 2..=HOSTS {
        converged(&mut machine, number, usize::from(HOSTS))?;
        let rows = table(&mut machine, number)?;
        ensure!(rows == first, "h{number} holds\n{rows:?}\nand h1\n{first:?}");
    }
    ensure!(worst < JOIN, "a join took {worst:.2} s");
    ensure!(offload_off.is_empty(), "loss was taken for a broken card, at hosts {offload_off:?}");
    Ok(())
}
