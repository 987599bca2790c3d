//! The demo on the kernels of three Debian releases, on a machine with only a kernel and tools.

use std::time::Duration;

use anyhow::ensure;

use crate::{
    common::{Needs, on_machines, say},
    machine::{Options, World},
};

const LIMIT: Duration = Duration::from_secs(900);

fn demo_with_chaos(world: &mut World, kernel: &str) -> anyhow::Result<()> {
    let mut machine = world.start(Options { kernel, ..Options::mini("m1", 1) })?;
    machine.take_parcel()?;
    let booted = machine.figures();
    let answer = machine.run("gossamer demo --chaos 2>&1", Duration::from_secs(600))?;
    ensure!(answer.code == 0, "the demo failed ({}):\n{}", answer.code, answer.text);
    let release = machine.ok("uname -r")?;
    let last = answer.text.trim_end().lines().last().unwrap_or_default();
    say(&format!(
        "demo --chaos on {}: {last}; boot {booted}, in all {}",
        release.trim(),
        machine.figures()
    ));
    Ok(())
}

#[test]
fn demo_with_chaos_on_kernel_5_10_passes() {
    on_machines(Needs::Program, LIMIT, |world| demo_with_chaos(world, "5.10"));
}

#[test]
fn demo_with_chaos_on_kernel_6_1_passes() {
    on_machines(Needs::Program, LIMIT, |world| demo_with_chaos(world, "6.1"));
}

#[test]
fn demo_with_chaos_on_kernel_6_12_passes() {
    on_machines(Needs::Program, LIMIT, |world| demo_with_chaos(world, "6.12"));
}
