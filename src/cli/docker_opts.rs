//! `gossamer docker-opts`: prints the dockerd options with which Docker's own bridge gives containers
//! addresses of this node's subnet, as flannel's `mk-docker-opts.sh` does.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, anyhow};
use clap::Args;
use serde_json::{Map, Value};

use super::{fail, output::write_stdout};
use crate::{config::Instance, files};

#[derive(Debug, Args)]
pub struct DockerOptsArgs {
    /// Name of the overlay, if this host has several
    #[arg(long, env = "GOSSAMER_INSTANCE", default_value_t, hide_default_value = true)]
    #[arg(value_name = "NAME")]
    instance: Instance,
    /// File that the agent writes [default: /run/gossamer/subnet.env]
    #[arg(long, env = "GOSSAMER_SUBNET_FILE", value_name = "FILE")]
    subnet_file: Option<PathBuf>,
    /// Let other hosts reach the containers, which Docker 28 and later refuse by default
    #[arg(long)]
    direct_routing: bool,
    /// Print options for /etc/docker/daemon.json instead of the command line
    #[arg(long)]
    json: bool,
}

pub fn run(args: &DockerOptsArgs) -> ExitCode {
    match options(args) {
        Ok(options) if args.json => {
            write_stdout(&format!("{:#}\n", Value::from(options)));
            ExitCode::SUCCESS
        }
        Ok(options) => {
            write_stdout(&format!("{}\n", flags(&options)));
            ExitCode::SUCCESS
        }
        Err(error) => fail(format_args!("docker-opts: {error:#}")),
    }
}

fn options(args: &DockerOptsArgs) -> anyhow::Result<Map<String, Value>> {
    let path = args.subnet_file.clone().unwrap_or_else(|| args.instance.subnet_file());
    let text = files::read_text(&path, files::SMALL)
        .map_err(|error| {
        let path = path.display();
        anyhow!("{path}: {error}: start the agent, which writes this file, or name it with --subnet-file")
    })?;
    let field = |name: &str| {
        let mut fields = text.lines().filter_map(|line| line.split_once('='));
        fields.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    };
    let required = |name: &str| field(name).ok_or_else(|| anyhow!("{}: no {name}", path.display()));
    let mut options = Map::new();
    options.insert("bip".to_owned(), required("FLANNEL_SUBNET")?.into());
    let mtu: u32 = required("FLANNEL_MTU")?.parse().context("FLANNEL_MTU")?;
    options.insert("mtu".to_owned(), mtu.into());
    // Either gossamer or Docker masquerades, not both.
    options.insert("ip-masq".to_owned(), (required("FLANNEL_IPMASQ")? != "true").into());
    if let Some(subnet) = field("FLANNEL_IPV6_SUBNET") {
        options.insert("ipv6".to_owned(), true.into());
        options.insert("fixed-cidr-v6".to_owned(), subnet.into());
    }
    if args.direct_routing {
        options.insert("allow-direct-routing".to_owned(), true.into());
    }
    Ok(options)
}

fn flags(options: &Map<String, Value>) -> String {
    let flag = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("--{name}={text}"),
        other => format!("--{name}={other}"),
    };
    options.iter().map(flag).collect::<Vec<_>>().join(" ")
}
