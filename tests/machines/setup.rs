//! `gossamer init`, `join` and `uninstall` under a real systemd, where only the program was copied.

use std::time::Duration;

use anyhow::ensure;

use crate::{
    common::{Needs, on_machines, say},
    machine::World,
    pair::{TIMEOUT, converged},
};

const LIMIT: Duration = Duration::from_secs(1200);

#[test]
#[ignore = "minutes"]
fn copied_program_is_set_up_by_init_and_join_and_removed_by_uninstall() {
    on_machines(Needs::Program, LIMIT, set_up);
}

fn set_up(world: &mut World) -> anyhow::Result<()> {
    let mut one = world.copy_booted("v1", 1)?;
    let mut two = world.copy_booted("v2", 2)?;
    for host in [&mut one, &mut two] {
        host.take_parcel()?;
        host.ok("rm /usr/local/bin/gossamer && install -m 755 /parcel/gossamer /usr/local/bin/")?;
    }
    let said = one.ok_within("gossamer init 2>&1", TIMEOUT)?;
    say(&said);
    ensure!(said.contains("wrote       /etc/systemd/system/gossamer.service"), "{said}");
    ensure!(said.contains("ready"), "{said}");
    let token = one.ok("gossamer token")?;
    let said = two.ok_within(&format!("gossamer join {} 2>&1", token.trim()), TIMEOUT)?;
    say(&said);
    ensure!(said.contains("ready"), "{said}");
    let subnet = converged(&mut two, 2)?;
    let again = two.ok_within(&format!("gossamer join {} 2>&1", token.trim()), TIMEOUT)?;
    ensure!(again.contains("unchanged") && again.contains("ready"), "{again}");
    let state = two.ok("systemctl is-enabled gossamer; systemctl is-active gossamer")?;
    ensure!(state == "enabled\nactive\n", "after join the unit is {state}");
    // The service starts at boot.
    two.reboot()?;
    ensure!(converged(&mut two, 2)? == subnet, "another subnet after a reboot");
    let said = two.ok_within("gossamer uninstall --yes 2>&1", TIMEOUT)?;
    say(&said);
    let left = two.ok(
        "ls -d /etc/gossamer /var/lib/gossamer /etc/systemd/system/gossamer.service 2>/dev/null; \
         ip -br link show type vxlan; systemctl is-active gossamer; true",
    )?;
    ensure!(left == "inactive\n", "uninstall has left: {left}");
    let members = one.ok("gossamer members --all -o json")?;
    ensure!(members.contains("\"left\": true"), "{members}");
    Ok(())
}
