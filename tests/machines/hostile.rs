//! Network managers with configurations that match every interface. The package tells them to ignore
//! gossamer's devices.

use std::time::Duration;

use anyhow::ensure;

use crate::{
    common::{Needs, on_machines, say},
    machine::{Machine, SOON, World},
    pair::{Pair, TIMEOUT, add_pod, status},
};

const LIMIT: Duration = Duration::from_secs(1200);
/// Accepted loss in percent, outside the restart of the network manager itself.
const ACCEPTED_LOSS_PERCENT: f64 = 3.0;

/// Returns the number of repairs of all kinds.
fn repairs(host: &mut Machine) -> anyhow::Result<u64> {
    let status = status(host)?;
    let kinds = status["kernel"]["repairs"].as_object().cloned().unwrap_or_default();
    Ok(kinds.values().filter_map(serde_json::Value::as_u64).sum())
}

/// Restarts the network manager by a script, which may lose packets. Afterwards packets must pass, and
/// few repairs are allowed.
fn restart_and_watch(pair: &mut Pair, what: &str, script: &str) -> anyhow::Result<()> {
    let during =
        pair.lost_while(Duration::from_secs(5), |host| host.ok_within(script, TIMEOUT).map(drop))?;
    let before = repairs(&mut pair.hosts[1])?;
    let after = pair.lost_while(Duration::from_secs(30), |_| Ok(()))?;
    let repaired = repairs(&mut pair.hosts[1])? - before;
    say(&format!(
        "{what}: {during} during the restart, {after} afterwards, {repaired} repairs afterwards"
    ));
    ensure!(
        after.percent() < ACCEPTED_LOSS_PERCENT && after.sent > 200,
        "{what}: {after} ({:.1} %) after the restart, {repaired} repairs; {}",
        after.percent(),
        pair.hosts[1].run("gossamer status; networkctl; journalctl -n 30 --no-pager", SOON)?.text
    );
    ensure!(
        repaired < 5,
        "{what}: {repaired} repairs in 30 s: another program changes gossamer's devices"
    );
    Ok(())
}

#[test]
#[ignore = "minutes"]
fn networkd_matching_every_interface_leaves_pods_connected() {
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
        ensure!(line.contains("unmanaged"), "networkd manages gossamer's device: {line}");
    }
    Ok(())
}

#[test]
#[ignore = "minutes"]
fn network_manager_matching_every_interface_leaves_pods_connected() {
    on_machines(Needs::Package, LIMIT, network_manager);
}

fn network_manager(world: &mut World) -> anyhow::Result<()> {
    let mut pair = Pair::new(world)?;
    // It takes over the underlay's interface, with the same address, and by another profile every
    // Ethernet interface.
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
    // To NetworkManager, a new pod's interface looks like a newly connected device.
    pair.pods[1] = add_pod(&mut pair.hosts[1], "late")?;
    let restart = "systemctl restart NetworkManager";
    restart_and_watch(&mut pair, "a pod that is added to NetworkManager's host", restart)?;
    let listed = pair.hosts[1].ok("nmcli -t -f DEVICE,STATE device")?;
    say(&format!("NetworkManager: {}", listed.trim().replace('\n', ", ")));
    for line in listed.lines().filter(|line| line.contains("gossamer.") || line.contains("gsm")) {
        ensure!(line.contains("unmanaged"), "NetworkManager manages gossamer's device: {line}");
    }
    Ok(())
}
