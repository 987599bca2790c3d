//! `gossamer cleanup`: removes everything that gossamer created on this host, and nothing else.
//!
//! It is for a host whose agent no longer runs. A running agent should leave instead, because it then
//! hands over its slots.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fmt::Write as _,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Args;

use super::{Format, block_on, cni, confirm::Consent, fail};
use crate::{
    api::{self, ClientError},
    cni::Spool,
    config::{Instance, NAME},
    dataplane::{
        desired::is_own_table,
        kernel::{FirewallTable, Kernel, pod_tables::PodTables},
    },
    pods::wiring::Wiring,
    store::{StateDir, StoreError},
    transport::NodeKey,
};

/// Text if there is nothing to remove.
pub(super) const NOTHING_LEFT: &str = "gossamer has left nothing on this host\n";

#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// List what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    consent: Consent,
    /// State directory [default: /var/lib/gossamer and those of all named instances]
    #[arg(long, env = "GOSSAMER_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// flannel-style subnet.env [default: those of all instances]
    #[arg(long, env = "GOSSAMER_SUBNET_FILE", value_name = "FILE")]
    subnet_file: Option<PathBuf>,
    /// The agent's control socket [default: those of all instances]
    #[arg(long, env = "GOSSAMER_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
}

pub fn run(args: &CleanupArgs) -> ExitCode {
    let places = Places::find(args);
    for socket in places.sockets.iter().chain(&places.all_sockets).collect::<BTreeSet<_>>() {
        match block_on(api::get(socket, "/v1/status")) {
            Ok(Err(ClientError::NoAgent { .. })) => {}
            Ok(Ok(_)) => {
                return fail(format_args!(
                    "an agent is running here ({}): run `gossamer leave`, which hands over its subnet and \
                     removes everything, or stop it first",
                    socket.display()
                ));
            }
            Ok(Err(error)) => return fail(error),
            Err(error) => return fail(error),
        }
    }
    if !args.dry_run && args.consent.asks() {
        let planned = match cleanup(&places, true) {
            Ok(planned) => removed_text(&planned, true),
            Err(error) => return fail(error),
        };
        if planned != NOTHING_LEFT
            && let Err(code) = args.consent.obtain(|| planned.trim_end().to_owned())
        {
            return code;
        }
    }
    match cleanup(&places, args.dry_run) {
        Ok(removed) => {
            print(&removed, args);
            ExitCode::SUCCESS
        }
        Err(error) => fail(error),
    }
}

impl CleanupArgs {
    /// Returns the arguments for everything on this host.
    pub(super) const fn for_all(dry_run: bool) -> Self {
        Self {
            dry_run,
            consent: Consent::given(),
            state_dir: None,
            subnet_file: None,
            socket: None,
            output: Format::Text,
        }
    }
}

/// Removes everything, or with `dry_run` nothing, and returns what that is, as text.
pub(super) fn summary(args: &CleanupArgs, places: &Places) -> anyhow::Result<String> {
    Ok(removed_text(&cleanup(places, args.dry_run)?, args.dry_run))
}

/// The paths at which gossamer may have left files.
pub(super) struct Places {
    /// The unnamed instance, and those with a directory in /run or /var/lib.
    pub(super) instances: Vec<Instance>,
    state_dirs: Vec<PathBuf>,
    subnet_files: Vec<PathBuf>,
    pub(super) sockets: Vec<PathBuf>,
    /// Sockets of every instance, including those not selected: kernel state may belong to any of them.
    all_sockets: Vec<PathBuf>,
}

impl Places {
    /// Returns the paths given in `args`, and for the others those of every instance with a directory in
    /// /run or /var/lib.
    pub(super) fn find(args: &CleanupArgs) -> Self {
        let directories =
            ["/run", "/var/lib"].into_iter().filter_map(|path| fs::read_dir(path).ok());
        let names = directories.flatten().flatten().map(|entry| entry.file_name());
        let instance = |name: OsString| {
            let rest = name.to_str()?.strip_prefix(NAME)?.to_owned();
            rest.strip_prefix('-').unwrap_or(&rest).parse::<Instance>().ok()
        };
        let mut instances: Vec<Instance> = names.filter_map(instance).collect();
        instances.push(Instance::default());
        let all = |given: &Option<PathBuf>, path: fn(&Instance) -> PathBuf| match given {
            Some(given) => vec![given.clone()],
            None => instances.iter().map(path).collect::<BTreeSet<_>>().into_iter().collect(),
        };
        Self {
            state_dirs: all(&args.state_dir, Instance::state_dir),
            subnet_files: all(&args.subnet_file, Instance::subnet_file),
            sockets: all(&args.socket, Instance::socket),
            all_sockets: all(&None, Instance::socket),
            instances,
        }
    }
}

/// What was found, and removed unless `--dry-run` was given.
#[derive(Debug, Default, serde::Serialize)]
struct Removed {
    devices: Vec<String>,
    /// Bridges of pods; their veth pairs are removed, too.
    bridges: Vec<String>,
    routes: Vec<String>,
    /// Number of policy rules.
    rules: usize,
    /// Next hops whose neighbor entries gossamer protected from the kernel's garbage collection.
    neighbors: Vec<IpAddr>,
    /// nftables tables of family `inet`.
    tables: Vec<String>,
    /// nftables tables of family `bridge`.
    bridge_tables: Vec<String>,
    files: Vec<PathBuf>,
    /// Ids of the nodes whose keys were in the state directories. They have not left their clusters.
    nodes: Vec<String>,
}

fn cleanup(places: &Places, dry_run: bool) -> anyhow::Result<Removed> {
    let mut kernel = Kernel::open()?;
    let leftovers = kernel.leftovers()?;
    let mut wiring = Wiring::open()?;
    let mut pod_tables = PodTables::open();
    // A kernel without nftables has no tables to remove.
    let mut firewall = FirewallTable::open().ok();
    let tables = firewall.as_mut().and_then(|firewall| firewall.tables(is_own_table).ok());
    let mut removed = Removed {
        devices: leftovers.devices.clone(),
        routes: leftovers.routes.iter().map(|(subnet, _)| subnet.to_string()).collect(),
        rules: leftovers.rules.len(),
        neighbors: leftovers.neighbors.iter().map(|entry| entry.ip).collect(),
        tables: tables.unwrap_or_default(),
        bridges: wiring.bridges()?,
        bridge_tables: pod_tables.tables(is_own_table).unwrap_or_default(),
        ..Removed::default()
    };
    let files = || places.subnet_files.iter().chain(&places.sockets);
    removed.files.extend(files().filter(|path| path.exists()).cloned());
    let spools: Vec<Spool> = places.sockets.iter().map(|socket| Spool::beside(socket)).collect();
    let noted = spools.iter().map(Spool::path).filter(|path| path.is_dir());
    removed.files.extend(noted.map(Path::to_owned));
    let state_dirs = || places.state_dirs.iter().filter(|path| path.exists());
    for path in state_dirs() {
        // Fails if the directory belongs to another program.
        if let Some(seed) = StateDir::peek_node_key(path)? {
            removed.nodes.push(NodeKey::from_seed(seed)?.id().to_string());
        }
        removed.files.push(path.clone());
    }
    if dry_run {
        return Ok(removed);
    }
    // Locks all state directories before removing anything.
    let opened = state_dirs().map(|path| Ok((StateDir::open(path)?, path)));
    let states: Vec<_> = opened.collect::<Result<_, StoreError>>()?;
    kernel.sweep(leftovers)?;
    removed.bridges.iter().try_for_each(|bridge| wiring.remove(bridge))?;
    if let Some(firewall) = &mut firewall {
        removed.tables.iter().try_for_each(|table| firewall.remove(table))?;
    }
    removed.bridge_tables.iter().try_for_each(|table| pod_tables.remove(table))?;
    files().try_for_each(|path| remove_file(path))?;
    spools.iter().filter(|spool| spool.path().is_dir()).try_for_each(|spool| {
        spool.read().iter().for_each(|note| spool.drop(note));
        fs::remove_dir(spool.path())
    })?;
    for (state, path) in states {
        state.wipe()?;
        drop(state);
        // Fails if other programs have files in it: those stay.
        let _ = fs::remove_dir(path);
    }
    Ok(removed)
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn print(removed: &Removed, args: &CleanupArgs) {
    let answer = serde_json::json!({ "dry_run": args.dry_run, "removed": removed });
    args.output
        .print(&answer, |_, _| removed_text(removed, args.dry_run) + &cni::note_of_installed());
}

fn removed_text(removed: &Removed, dry_run: bool) -> String {
    let verb = if dry_run { "would remove" } else { "removed" };
    let devices =
        removed.devices.iter().map(|name| format!("device {name} with all entries on it"));
    let bridges = removed.bridges.iter().map(|name| format!("bridge {name} with the pods on it"));
    let routes = removed.routes.iter().map(|subnet| format!("route to {subnet}"));
    let rules = removed.rules;
    let rules = (rules > 0).then(|| format!("{rules} policy rule(s) for the VXLAN port"));
    let tables = removed.tables.iter().map(|name| format!("nftables table inet {name}"));
    let bridge_tables =
        removed.bridge_tables.iter().map(|name| format!("nftables table bridge {name}"));
    let files = removed.files.iter().map(|path| path.display().to_string());
    let all = devices.chain(bridges).chain(routes).chain(rules);
    let neighbors =
        removed.neighbors.iter().map(|ip| format!("protection of the neighbor entry of {ip}"));
    let all = all.chain(neighbors).chain(tables).chain(bridge_tables).chain(files);
    let mut text: String = all.map(|what| format!("{verb} {what}\n")).collect();
    if text.is_empty() {
        text.push_str(NOTHING_LEFT);
    }
    for node in &removed.nodes {
        let _ = writeln!(
            text,
            "node {node} has not left its cluster: run `gossamer forget {node}` on another member to \
             reclaim its subnets"
        );
    }
    text
}
