//! Network managers with configurations that take in every interface. The package tells them to leave
//! gossamer's devices alone.

use std::time::Duration;

use anyhow::ensure;

use crate::{
    common::{Needs, on_machines, say},
    machine::{Machine, SOON, World},
    pair::{Pair, TIMEOUT, add_pod, status},
};

const LIMIT: Duration = Duration::from_secs(1200);
/// Loss that is accepted outside the restart of the network manager itself.
const ACCEPTED: f64 = 3.0;

/// How often something of ours was put right, of all kinds.
fn repairs(host: &mut Machine) -> anyhow::Result<u64> {
    let status = status(host)?;
    let kinds = status["kernel"]["repairs"].as_object().cloned().unwrap_or_default();
    Ok(kinds.values().filter_map(serde_json::Value::as_u64).sum())
}

/// Restarts it by a script, which may cost packets; then nothing may.
fn restart_and_watch(pair: &mut Pair, what: &str, script: &str) -> anyhow::Result<()> {
    let during =
        pair.lost_while(Duration::from_secs(5), |host| host.ok_within(script, TIMEOUT).map(drop))?;
    let before = repairs(&mut pair.hosts[1])?;
    let after = pair.lost_while(Duration::from_secs(30), |_| Ok(()))?;
    let fought = repairs(&mut pair.hosts[1])? - before;
    say(&format!(
        "{what}: {during} during the restart, {after} afterwards, {fought} repairs afterwards"
    ));
    ensure!(
        after.percent() < ACCEPTED && after.sent > 200,
        "{what}: {after} ({:.1} %) after the restart, {fought} repairs; {}",
        after.percent(),
        pair.hosts[1].run("gossamer status; networkctl; journalctl -n 30 --no-pager", SOON)?.text
    );
    ensure!(fought < 5, "{what}: {fought} repairs in 30 s: somebody fights for our devices");
    Ok(())
}

#[test]
#[ignore = "minutes"]
fn networkd_that_takes_every_interface_leaves_pods_alone() {
    on_machines(Needs::Package, LIMIT, networkd);
}

fn networkd(world: &mut World) -> anyhow::Result<()> {
    let mut pair = Pair::new(world)?;
    restart_and_watch(&mut pair, "networkd as it is", "systemctl restart systemd-networkd")?;
    for section in ["Name=*", "Type=ether"] {
        let script = format!(
            "printf '[Match]\\n{section}\\n[Network]\\nDHCP=yes\\n' > /etc/systemd/network/90-all.network
             systemctl restart systemd-networkd"
        );
        restart_and_watch(&mut pair, &format!("networkd with {section}"), &script)?;
    }
    let listed = pair.hosts[1].ok("networkctl --no-pager --no-legend")?;
    for line in listed.lines().filter(|line| line.contains("gossamer.") || line.contains("gsm")) {
        ensure!(line.contains("unmanaged"), "networkd manages our device: {line}");
    }
    Ok(())
}

#[test]
#[ignore = "minutes"]
fn network_manager_that_takes_every_interface_leaves_pods_alone() {
    on_machines(Needs::Package, LIMIT, network_manager);
}

fn network_manager(world: &mut World) -> anyhow::Result<()> {
    let mut pair = Pair::new(world)?;
    // It takes over the underlay's interface, with the same address, and by another profile all that is like
    // a network card.
    let script = "set -e
        D=$(ls /sys/class/net | grep -E '^en' | head -1)
        mkdir -p /etc/NetworkManager/conf.d /etc/NetworkManager/system-connections
        printf '[device-all]\\nmatch-device=*\\nmanaged=1\\n' > /etc/NetworkManager/conf.d/90-all.conf
        f=/etc/NetworkManager/system-connections/lan.nmconnection
        printf '%s\\n' '[connection]' id=lan type=ethernet interface-name=$D \\
            '[ipv4]' method=manual address1=10.77.0.2/24,10.77.0.1 '[ipv6]' method=ignore > $f
        all=/etc/NetworkManager/system-connections/all.nmconnection
        printf '%s\\n' '[connection]' id=all type=ethernet multi-connect=3 autoconnect-priority=-9 \\
            '[ipv4]' method=auto > $all
        chmod 600 $f $all
        systemctl -q disable --now systemd-networkd.socket systemd-networkd.service 2>/dev/null
        systemctl -q unmask NetworkManager.service
        systemctl start NetworkManager.service
        for i in $(seq 60); do
            nmcli -t -f DEVICE,STATE device | grep -q \"^$D:connected\" && exit 0
            sleep 1
        done
        nmcli device; exit 1";
    restart_and_watch(&mut pair, "NetworkManager started", script)?;
    restart_and_watch(&mut pair, "NetworkManager restarted", "systemctl restart NetworkManager")?;
    // What is new there looks to it like a veth pair that has just been plugged in.
    pair.pods[1] = add_pod(&mut pair.hosts[1], "late")?;
    let restart = "systemctl restart NetworkManager";
    restart_and_watch(&mut pair, "a pod that is added to NetworkManager's host", restart)?;
    let listed = pair.hosts[1].ok("nmcli -t -f DEVICE,STATE device")?;
    say(&format!("NetworkManager: {}", listed.trim().replace('\n', ", ")));
    for line in listed.lines().filter(|line| line.contains("gossamer.") || line.contains("gsm")) {
        ensure!(line.contains("unmanaged"), "NetworkManager manages our device: {line}");
    }
    Ok(())
}
