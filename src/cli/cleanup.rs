//! `gossamer cleanup`: removes everything that gossamer created on this host, and nothing else.
//!
//! It is for a host whose agent no longer runs. A running agent leaves first, because it then hands over its
//! slots.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Instant,
};

use anyhow::bail;
use clap::Args;
use serde::Serialize;

use super::{
    Format, RETRY_INTERVAL, cni,
    confirm::Consent,
    fail, leave,
    running::{END_TIMEOUT, RunningAgent},
};
use crate::{
    api::Left,
    cni::Spool,
    config::{Instance, NAME},
    dataplane::kernel::{Extent, Kernel},
    files,
    model::visible_lines,
    pods::wiring::Wiring,
    store::{StateDir, StoreError, read_token},
    transport::NodeKey,
    wire::Token,
};

#[derive(Debug, Args)]
pub struct CleanupArgs {
    /// List what would be removed, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Let agents that run on this host leave their clusters first. On a terminal the command offers that
    #[arg(long)]
    leave: bool,
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

/// The answer of the command.
#[derive(Serialize)]
struct Answer<'a> {
    dry_run: bool,
    /// The agents that have left their clusters.
    left: &'a [Left],
    removed: &'a Removed,
}

pub fn run(args: &CleanupArgs) -> ExitCode {
    clean_up(args).unwrap_or_else(|error| fail(format_args!("{error:#}")))
}

fn clean_up(args: &CleanupArgs) -> anyhow::Result<ExitCode> {
    let places = Places::find(args);
    let sockets: BTreeSet<&PathBuf> = places.sockets.iter().chain(&places.all_sockets).collect();
    let agents = RunningAgent::find(sockets.into_iter())?;
    let asks = !args.dry_run && args.consent.asks();
    if let Some(agent) = agents.first().filter(|_| !asks && !args.leave) {
        bail!(
            "an agent is running here ({}): run `gossamer leave`, which hands over its subnet and removes \
             everything, or this command with --leave, or stop the agent first",
            agent.socket().display()
        );
    }
    let mode = if agents.is_empty() { Mode::List } else { Mode::ListBesideAgents };
    let planned = remove(&places, mode)?;
    let plan = || {
        let costs =
            agents.iter().map(|agent| format!("{} Its agent leaves first.\n", agent.costs()));
        costs.collect::<String>() + &text(&planned, true)
    };
    if args.dry_run {
        let answer = Answer { dry_run: true, left: &[], removed: &planned };
        args.output.print_visible(&answer, |_| plan() + &cni::note_of_installed());
        return Ok(ExitCode::SUCCESS);
    }
    if asks
        && !(agents.is_empty() && planned.is_empty())
        && let Err(code) = args.consent.obtain(|| plan().trim_end().to_owned())
    {
        return Ok(code);
    }
    let left: Vec<Left> = agents.iter().map(RunningAgent::leave).collect::<anyhow::Result<_>>()?;
    let removed = match agents.is_empty() {
        true => remove(&places, Mode::Remove)?,
        false => remove_after_end(args)?,
    };
    let answer = Answer { dry_run: false, left: &left, removed: &removed };
    args.output.print_visible(&answer, |_| {
        let left = left.iter().zip(&agents);
        let left = left.map(|(left, agent)| leave::outcome(left, agent.is_member()));
        visible_lines(&left.collect::<String>())
            + &text(&removed, false)
            + &cni::note_of_installed()
    });
    Ok(ExitCode::SUCCESS)
}

/// Removes what agents that have ended did not remove themselves.
///
/// # Errors
/// Fails if something cannot be removed for some seconds.
pub(super) fn remove_after_end(args: &CleanupArgs) -> anyhow::Result<Removed> {
    let begun = Instant::now();
    loop {
        let error = match remove(&Places::find(args), Mode::Remove) {
            Ok(removed) => return Ok(removed),
            Err(error) => error,
        };
        // A process keeps the lock of its state directory for a moment longer than its socket.
        let may_pass = error
            .downcast_ref::<StoreError>()
            .is_none_or(|error| matches!(error, StoreError::InUse { .. }));
        if !may_pass || begun.elapsed() >= END_TIMEOUT {
            return Err(error);
        }
        thread::sleep(RETRY_INTERVAL);
    }
}

impl CleanupArgs {
    /// Returns the arguments for everything on this host.
    pub(super) const fn for_all(dry_run: bool) -> Self {
        Self {
            dry_run,
            leave: false,
            consent: Consent::given(),
            state_dir: None,
            subnet_file: None,
            socket: None,
            output: Format::Text,
        }
    }
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

/// What was found, and removed unless it was a dry run.
#[derive(Debug, Default, Serialize)]
pub(super) struct Removed {
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

/// What to do with what is found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Remove it.
    Remove,
    /// Only list it.
    List,
    /// Only list it, while agents run that will have left.
    ListBesideAgents,
}

/// Removes everything, or only lists it, and returns what that is.
///
/// # Errors
/// Fails if an agent uses a state directory, or if something cannot be read or removed.
pub(super) fn remove(places: &Places, mode: Mode) -> anyhow::Result<Removed> {
    let mut kernel = Kernel::open()?;
    let leftovers = kernel.leftovers(Extent::Everything)?;
    let mut wiring = Wiring::open()?;
    let mut removed = Removed {
        devices: leftovers.devices.clone(),
        routes: leftovers.routes.iter().map(|(subnet, _)| subnet.to_string()).collect(),
        rules: leftovers.rules.len(),
        neighbors: leftovers.neighbors.iter().map(|entry| entry.ip).collect(),
        tables: leftovers.tables.clone(),
        bridges: wiring.bridges()?,
        bridge_tables: leftovers.bridge_tables.clone(),
        ..Removed::default()
    };
    let left = || places.subnet_files.iter().chain(&places.sockets);
    removed.files.extend(left().filter(|path| path.exists()).cloned());
    let spools: Vec<Spool> = places.sockets.iter().map(|socket| Spool::beside(socket)).collect();
    let noted = spools.iter().map(Spool::path).filter(|path| path.is_dir());
    removed.files.extend(noted.map(Path::to_owned));
    let state_dirs = || places.state_dirs.iter().filter(|path| path.exists());
    for path in state_dirs() {
        match StateDir::peek_node_key(path) {
            Ok(Some(seed)) if may_be_member(path) => {
                removed.nodes.push(NodeKey::from_seed(seed)?.id().to_string());
            }
            Ok(_) => {}
            Err(StoreError::InUse { .. }) if mode == Mode::ListBesideAgents => {}
            // The directory may belong to another program.
            Err(error) => return Err(error.into()),
        }
        removed.files.push(path.clone());
    }
    if mode != Mode::Remove {
        return Ok(removed);
    }
    // Locks all state directories before removing anything.
    let opened = state_dirs().map(|path| Ok((StateDir::open(path)?, path)));
    let states: Vec<_> = opened.collect::<Result<_, StoreError>>()?;
    removed.bridges.iter().try_for_each(|bridge| wiring.remove(bridge))?;
    kernel.sweep(leftovers)?;
    left().try_for_each(|path| files::remove(path))?;
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

/// Whether the node of a state directory has joined a cluster: it then has a token that names the cluster.
/// True if that cannot be determined.
fn may_be_member(state_dir: &Path) -> bool {
    read_token(state_dir)
        .map_or(true, |token| token.as_ref().and_then(Token::known_cluster).is_some())
}

fn text(removed: &Removed, dry_run: bool) -> String {
    let verb = if dry_run { "would remove" } else { "removed" };
    let mut lines: Vec<String> =
        removed.things().iter().map(|thing| format!("{verb} {thing}")).collect();
    if lines.is_empty() {
        lines.push("gossamer has left nothing on this host".to_owned());
    }
    lines.extend(removed.notes());
    visible_lines(&lines.iter().map(|line| format!("{line}\n")).collect::<String>())
}

impl Removed {
    /// Returns whether there was nothing to remove.
    pub(super) fn is_empty(&self) -> bool {
        self.things().is_empty()
    }

    /// Describes each thing.
    pub(super) fn things(&self) -> Vec<String> {
        fn each<T>(items: &[T], describe: impl Fn(&T) -> String) -> impl Iterator<Item = String> {
            items.iter().map(describe)
        }
        let rules = self.rules;
        let rules = (rules > 0).then(|| format!("{rules} policy rule(s) for the VXLAN port"));
        each(&self.devices, |name| format!("device {name} with all entries on it"))
            .chain(each(&self.bridges, |name| format!("bridge {name} with the pods on it")))
            .chain(each(&self.routes, |subnet| format!("route to {subnet}")))
            .chain(rules)
            .chain(each(&self.neighbors, |ip| format!("protection of the neighbor entry of {ip}")))
            .chain(each(&self.tables, |name| format!("nftables table inet {name}")))
            .chain(each(&self.bridge_tables, |name| format!("nftables table bridge {name}")))
            .chain(each(&self.files, |path| path.display().to_string()))
            .collect()
    }

    /// Says what remains to be done on other hosts.
    pub(super) fn notes(&self) -> Vec<String> {
        let note = |node: &String| {
            format!(
                "node {node} has not left its cluster: once this host has been silent for a minute, run \
                 `gossamer forget {node}` on another member to reclaim its subnets"
            )
        };
        self.nodes.iter().map(note).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::ClusterId, wire::Secret};

    #[test]
    fn node_without_a_token_of_a_cluster_need_not_be_forgotten() {
        let directory = tempfile::tempdir().expect("tempdir");
        let state = StateDir::open(directory.path()).expect("opens");
        assert!(!may_be_member(directory.path()));
        let secret = Secret::new(vec![7; 32]).expect("long enough");
        let token = |cluster| Token { cluster, secret: secret.clone(), seeds: Vec::new() };
        state.save_token(&token(ClusterId::UNKNOWN)).expect("saved");
        assert!(!may_be_member(directory.path()), "it waits to join");
        state.save_token(&token(ClusterId::from_bytes([7; 8]))).expect("saved");
        assert!(may_be_member(directory.path()));
    }
}
