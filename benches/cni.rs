//! Measures how long it takes to connect and disconnect a container: gossamer's CNI plugin against
//! Debian's `bridge` with `host-local`, called as a runtime calls them. `cargo bench --bench cni [--
//! ROUNDS]`.
//!
//! Both plugins alternate on one host, with a new namespace in each round. The time runs from the start
//! of the plugin's process to its end. Needs `containernetworking-plugins`. `GOSSAMER=PATH` measures
//! another program than this build's. The shipped static program starts faster.

#![allow(clippy::expect_used)]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use gossamer::lab::{self, Agent, Host, Lab, NetNs, PLUGINS, call_plugin, median, spread};
use serde_json::{Value, json};

const ROUNDS: usize = 100;
const TIMEOUT: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if let Some(code) = lab::rerun_inside(&arguments) {
        return code;
    }
    if !Path::new(PLUGINS).join("bridge").exists() {
        println!("SKIPPED: containernetworking-plugins is not installed");
        return ExitCode::SUCCESS;
    }
    let rounds = arguments.iter().find_map(|a| a.parse().ok()).unwrap_or(ROUNDS);
    measure(rounds).expect("measured");
    ExitCode::SUCCESS
}

/// A plugin with its configuration and measured times.
struct Plugin {
    name: &'static str,
    program: PathBuf,
    config: Value,
    adding: Vec<f64>,
    deleting: Vec<f64>,
}

fn measure(rounds: usize) -> anyhow::Result<()> {
    let mut lab = Lab::new()?;
    let host = lab.host(1, "host")?;
    let shipped = std::env::var_os("GOSSAMER");
    let program = shipped.as_deref().map_or(Path::new(env!("CARGO_BIN_EXE_gossamer")), Path::new);
    let mut agent = Agent::start(program, &host, &["--init"])?;
    agent.wait_converged(1, TIMEOUT)?;
    let leases = host.dir.join("host-local");
    let mut plugins = [
        Plugin::new(
            "gossamer",
            program.to_owned(),
            json!({ "type": "gossamer", "socket": agent.socket() }),
        ),
        Plugin::new(
            "bridge + host-local",
            Path::new(PLUGINS).join("bridge"),
            json!({
                "type": "bridge",
                "bridge": "cni0",
                "isDefaultGateway": true,
                "hairpinMode": true,
                "mtu": 1450,
                "ipam": {
                    "type": "host-local",
                    "dataDir": leases,
                    "ranges": [[{ "subnet": "10.200.0.0/24" }]],
                },
            }),
        ),
    ];
    for round in 0..rounds {
        // Alternate the order, so that neither plugin always runs first.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for plugin in order {
            plugins[plugin].round(&host, &format!("c{round}-{plugin}"))?;
        }
    }
    println!("ms, median (min-max) of {rounds} rounds");
    println!("{:<20}  {:<22}  {:<22}", "", "ADD", "DEL");
    for plugin in &plugins {
        let [add, del] = [&plugin.adding, &plugin.deleting].map(|times| spread(times, 1));
        println!("{:<20}  {add:<22}  {del:<22}", plugin.name);
    }
    let middle = |times: &Vec<f64>| median(times.clone());
    let ratio = |of: fn(&Plugin) -> &Vec<f64>| middle(of(&plugins[1])) / middle(of(&plugins[0]));
    println!(
        "times as fast (goal: 4)  {:.1}  {:.1}",
        ratio(|plugin| &plugin.adding),
        ratio(|plugin| &plugin.deleting)
    );
    Ok(())
}

impl Plugin {
    fn new(name: &'static str, program: PathBuf, mut config: Value) -> Self {
        config["cniVersion"] = "1.0.0".into();
        config["name"] = "bench".into();
        Self { name, program, config, adding: Vec::new(), deleting: Vec::new() }
    }

    fn round(&mut self, host: &Host, container: &str) -> anyhow::Result<()> {
        let _space = NetNs::new(container)?;
        let call =
            |verb| call_plugin(&self.program, &host.netns, &self.config, verb, container)?.done();
        let (added, deleted) = (call("ADD")?, call("DEL")?);
        self.adding.push(added.as_secs_f64() * 1e3);
        self.deleting.push(deleted.as_secs_f64() * 1e3);
        Ok(())
    }
}
