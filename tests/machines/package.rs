//! The Debian package under a real systemd.

use std::time::Duration;

use anyhow::{Context as _, ensure};

use crate::{
    common::{Needs, on_machines, say},
    machine::{Machine, SOON, World},
    pair::{Pair, TIMEOUT, converged, install, status},
};

const LIMIT: Duration = Duration::from_secs(1200);
/// `WatchdogSec` of the unit, and the start in emulation.
const WATCHDOG_TIMEOUT: Duration = Duration::from_secs(30 + 30);

/// Returns a property of a unit.
fn property(machine: &mut Machine, unit: &str, name: &str) -> anyhow::Result<String> {
    let said = machine.ok(&format!("systemctl show -P {name} {unit}"))?;
    Ok(said.trim().to_owned())
}

fn moment(machine: &mut Machine, unit: &str, name: &str) -> anyhow::Result<u64> {
    let text = property(machine, unit, name)?;
    text.parse().with_context(|| format!("{name} of {unit}: {text}"))
}

/// Returns the agent's kernel state.
fn kernel_state(machine: &mut Machine) -> anyhow::Result<String> {
    machine.ok("ip -br link show gossamer.1 && ip -br link show gsm0 && ip route show proto 73 && \
         bridge fdb show dev gossamer.1 | sort && ip neigh show dev gossamer.1 nud permanent && \
         nft list tables")
}

#[test]
#[ignore = "minutes"]
fn installed_package_starts_after_the_network_and_before_docker() {
    on_machines(Needs::Package, LIMIT, start_order);
}

fn start_order(world: &mut World) -> anyhow::Result<()> {
    let mut host = world.copy_booted("v1", 1)?;
    install(&mut host, "init = true\\n")?;
    let enabled = host.run("systemctl is-enabled gossamer; systemctl is-active gossamer", SOON)?;
    ensure!(enabled.text == "disabled\ninactive\n", "installed, it is {}", enabled.text);
    let mode = host.ok("stat -c %a /etc/gossamer/gossamer.toml")?;
    ensure!(mode.trim() == "640", "the settings have mode {mode}");
    // A stand-in for Docker: it queries the agent at the moment it is started.
    host.ok(
        "printf '[Unit]\\nAfter=network-online.target\\n[Service]\\nType=oneshot\\nRemainAfterExit=yes\\n\
         ExecStart=/bin/sh -c \"gossamer status -o json > /root/docker-saw 2>&1; \
         echo $? > /root/docker-code\"\\n\
         [Install]\\nWantedBy=multi-user.target\\n' > /etc/systemd/system/docker.service
         sed -i 's/\\$?/$$?/' /etc/systemd/system/docker.service
         systemctl -q enable docker gossamer",
    )?;
    host.ok_within("systemctl start gossamer", TIMEOUT)?;
    let subnet = converged(&mut host, 1)?;
    host.reboot()?;
    host.run("systemctl is-system-running --wait", TIMEOUT)?;
    ensure!(converged(&mut host, 1)? == subnet, "another subnet after a reboot");
    let online = moment(&mut host, "network-online.target", "ActiveEnterTimestampMonotonic")?;
    let begun = moment(&mut host, "gossamer", "InactiveExitTimestampMonotonic")?;
    let ready = moment(&mut host, "gossamer", "ActiveEnterTimestampMonotonic")?;
    let docker = moment(&mut host, "docker", "InactiveExitTimestampMonotonic")?;
    say(&format!(
        "start order: online {:.1} s, started {:.1} s, ready {:.1} s, docker {:.1} s after the kernel",
        online as f64 / 1e6,
        begun as f64 / 1e6,
        ready as f64 / 1e6,
        docker as f64 / 1e6
    ));
    ensure!(
        online > 0 && online <= begun,
        "started at {begun} us, the network was online at {online}"
    );
    ensure!(
        begun < ready && ready <= docker,
        "ready at {ready} us, docker was started at {docker}"
    );
    // Ready means that the agent answers. Code 3 is an agent that has not converged yet.
    let code = host.ok("cat /root/docker-code")?;
    let saw = host.ok("cat /root/docker-saw")?;
    ensure!(["0\n", "3\n"].contains(&code.as_str()), "docker saw ({code}): {saw}");
    // A removal leaves no unit; a purge removes the settings.
    host.ok_within("dpkg -r gossamer 2>&1; test -e /etc/gossamer/gossamer.toml", TIMEOUT)?;
    host.ok_within("dpkg -P gossamer 2>&1; test ! -e /etc/gossamer", TIMEOUT)?;
    let left = host.run("systemctl cat gossamer", SOON)?;
    ensure!(left.code != 0, "a unit is left: {}", left.text);
    Ok(())
}

#[test]
#[ignore = "minutes"]
fn reloaded_restarted_killed_hung_or_stopped_agent_loses_no_packet() {
    on_machines(Needs::Package, LIMIT, faults);
}

fn faults(world: &mut World) -> anyhow::Result<()> {
    let mut pair = Pair::new(world)?;
    let quiet = Duration::from_secs(5);
    let pid = property(&mut pair.hosts[1], "gossamer", "MainPID")?;

    let loss = pair.lost_while(quiet, |host| host.ok("systemctl reload gossamer").map(drop))?;
    let same = property(&mut pair.hosts[1], "gossamer", "MainPID")?;
    say(&format!("reload: {loss}"));
    ensure!(loss.lost == 0 && pid == same, "reload: {loss}; process {pid}, then {same}");

    let loss = pair.lost_while(quiet, |host| {
        host.ok_within("systemctl restart gossamer", TIMEOUT)?;
        converged(host, 2).map(drop)
    })?;
    say(&format!("restart: {loss}"));
    ensure!(loss.lost == 0, "restart: {loss}");

    let loss = pair.lost_while(quiet, |host| {
        let pid = property(host, "gossamer", "MainPID")?;
        host.ok(&format!("kill -9 {pid}"))?;
        wait_other_process(host, &pid, TIMEOUT)?;
        converged(host, 2).map(drop)
    })?;
    say(&format!("kill -9: {loss}"));
    ensure!(loss.lost == 0, "kill -9: {loss}");

    let mut waited = 0.0;
    let loss = pair.lost_while(quiet, |host| {
        let pid = property(host, "gossamer", "MainPID")?;
        host.ok(&format!("kill -STOP {pid}"))?;
        waited = wait_other_process(host, &pid, WATCHDOG_TIMEOUT)?;
        converged(host, 2).map(drop)
    })?;
    say(&format!("hung: started again after {waited:.1} s by the watchdog, {loss}"));
    ensure!(loss.lost == 0, "watchdog: {loss}");

    let before = kernel_state(&mut pair.hosts[1])?;
    ensure!(before.contains("gossamer.1") && before.contains("via"), "{before}");
    let loss = pair.lost_while(Duration::from_secs(10), |host| {
        host.ok_within("systemctl stop gossamer", TIMEOUT).map(drop)
    })?;
    let after = kernel_state(&mut pair.hosts[1])?;
    say(&format!("stop: {loss}"));
    ensure!(loss.lost == 0, "stop: {loss}");
    ensure!(before == after, "stopped, it left:\n{after}\nIt was:\n{before}");

    let loss = pair.lost_while(quiet, |host| {
        host.ok_within("systemctl start gossamer", TIMEOUT)?;
        converged(host, 2).map(drop)
    })?;
    say(&format!("start: {loss}; {}, {}", pair.hosts[0].figures(), pair.hosts[1].figures()));
    ensure!(loss.lost == 0, "start: {loss}");
    let status = status(&mut pair.hosts[1])?;
    ensure!(status["subnet"] == pair.subnets[1], "another subnet: {status:#}");
    Ok(())
}

/// Waits until systemd has restarted the agent. Returns the seconds that this took.
fn wait_other_process(host: &mut Machine, pid: &str, patience: Duration) -> anyhow::Result<f64> {
    let said = host.ok_within(
        &format!(
            "a=$(cut -d' ' -f1 /proc/uptime)
             for i in $(seq {}); do
               now=$(systemctl show -P MainPID gossamer)
               [ \"$now\" != {pid} ] && [ \"$now\" != 0 ] && break
               sleep 0.5
             done
             echo $a $(cut -d' ' -f1 /proc/uptime) $now",
            patience.as_secs() * 2
        ),
        patience * 2,
    )?;
    let words: Vec<&str> = said.split_whitespace().collect();
    ensure!(words.len() == 3 && words[2] != pid && words[2] != "0", "not started again: {said}");
    Ok(words[1].parse::<f64>()? - words[0].parse::<f64>()?)
}
