//! `gossamer uninstall`: removes gossamer from this host, except the program.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, anyhow, ensure};
use clap::Args;

use super::{Options, finish, say, systemd::Systemd};
use crate::{
    api::{self, Left, Membership},
    cli::{
        block_on, cleanup,
        cleanup::{CleanupArgs, Mode, Places, Removed},
        cni,
        confirm::Consent,
        output::write_stdout,
        podman,
        running::RunningAgent,
    },
    config::Instance,
};

/// File of dpkg that exists while the package is installed.
const PACKAGE_MARK: &str = "/var/lib/dpkg/info/gossamer.list";

/// Socket of Docker's daemon.
const DOCKER_SOCKET: &str = "/run/docker.sock";

#[derive(Debug, Args)]
pub struct UninstallArgs {
    #[command(flatten)]
    consent: Consent,
    #[command(flatten)]
    options: Options,
}

/// What was found on this host.
struct Found {
    agents: Vec<RunningAgent>,
    units: Vec<Systemd>,
    /// Settings and tokens.
    settings: Vec<PathBuf>,
    /// Links and configurations in the directories of container runtimes.
    plugins: Vec<PathBuf>,
    /// What `cleanup` would remove; `None` while agents run.
    traces: Option<Removed>,
}

pub fn run(args: &UninstallArgs) -> ExitCode {
    let UninstallArgs { consent, options } = args;
    let done = || {
        options.require_root("uninstall")?;
        let found = Found::look(options)?;
        if found.is_nothing() {
            say("nothing", &"gossamer has left nothing on this host");
            return Ok(ExitCode::SUCCESS);
        }
        if options.dry_run || consent.asks() {
            found.list();
        }
        if options.dry_run {
            return Ok(ExitCode::SUCCESS);
        }
        match consent.obtain(|| "All of this is removed from this host.".to_owned()) {
            Ok(()) => found.remove(options).map(|()| ExitCode::SUCCESS),
            Err(code) => Ok(code),
        }
    };
    finish(done())
}

impl Found {
    fn look(options: &Options) -> anyhow::Result<Self> {
        let cleanup = CleanupArgs::for_all(true);
        let places = Places::find(&cleanup);
        let sockets = places.sockets.iter().filter(|_| options.root.is_none());
        // Without its own `leave`, the subnets of an agent would stay leased.
        let agents = RunningAgent::find(sockets)
            .map_err(|error| anyhow!("{error}; stop that agent first, or let it leave"))?;
        let mut instances = places.instances.clone();
        instances.extend(configured_instances(options));
        instances.sort();
        instances.dedup();
        let mut units = Vec::new();
        for instance in &instances {
            units.extend(Systemd::find(options, instance)?.filter(Systemd::has_unit));
        }
        let settings = instances.iter().flat_map(|i| [i.settings_file(), i.token_file()]);
        let settings = settings.map(|path| options.place(&path)).filter(|path| path.exists());
        let traces = match options.root {
            // Only files: the kernel is this system's, not the other one's.
            Some(_) => Some(Removed::default()),
            None if agents.is_empty() => Some(cleanup::remove(&places, Mode::List)?),
            None => None,
        };
        let mut plugins = cni::installed_files(|path| options.place(path))?;
        plugins.extend(podman::installed_file(|path| options.place(path)));
        Ok(Self { agents, units, settings: settings.collect(), plugins, traces })
    }

    fn is_nothing(&self) -> bool {
        let has_traces = self.traces.as_ref().is_none_or(|traces| !traces.is_empty());
        let has_units = self.units.iter().any(|unit| unit.own_file().is_some() || unit.is_active());
        let files = self.settings.len() + self.plugins.len();
        self.agents.is_empty() && files == 0 && !has_traces && !has_units
    }

    fn list(&self) {
        for agent in &self.agents {
            match agent.is_member() {
                true => say("leave", &agent.costs()),
                false => say("stop", &format_args!("the agent at {}", agent.socket().display())),
            }
        }
        self.units.iter().for_each(|unit| say("stop", &unit.unit()));
        let own_units = self.units.iter().filter_map(Systemd::own_file);
        let files = self.settings.iter().chain(&self.plugins).map(PathBuf::as_path);
        own_units.chain(files).for_each(|path| say("remove", &path.display()));
        match &self.traces {
            None => say("remove", &"devices, routes, nftables tables and state of gossamer"),
            Some(traces) => {
                traces.things().iter().for_each(|thing| say("remove", thing));
                traces.notes().iter().for_each(|note| say("note", note));
            }
        }
        self.what_stays().iter().for_each(|note| say("note", note));
    }

    /// Says what of gossamer this command does not find, and how to remove it.
    fn what_stays(&self) -> Vec<&'static str> {
        let mut notes = Vec::new();
        if !self.plugins.is_empty() {
            notes.push(
                "configurations in other directories stay: `gossamer cni uninstall --conf-dir DIR` removes \
                 what `cni install --conf-dir DIR` wrote",
            );
        }
        if Path::new(DOCKER_SOCKET).exists() {
            notes.push(
                "Docker's networks of the driver gossamer stay: `docker network ls --filter \
                 driver=gossamer` lists them, `docker network rm` removes them",
            );
        }
        notes
    }

    fn remove(&self, options: &Options) -> anyhow::Result<()> {
        let mut agents = Vec::new();
        for agent in &self.agents {
            agents.push((agent, leave(agent)?));
        }
        for unit in &self.units {
            unit.stop()?;
            say("stopped", &unit.unit());
        }
        for (agent, ends) in agents {
            stop(agent, ends)?;
        }
        let plugins = cni::remove_installed(|path| options.place(path))?;
        let podman = podman::remove_installed(|path| options.place(path))?;
        for line in plugins.iter().chain(&podman) {
            write_stdout(&format!("{:<11} {line}\n", "runtimes"));
        }
        if options.root.is_none() {
            self.clean_up()?;
        }
        for path in &self.settings {
            fs::remove_file(path).with_context(|| path.display().to_string())?;
            say("removed", &path.display());
        }
        // Fails if the administrator keeps other files in it.
        let _ = fs::remove_dir(options.place(Path::new("/etc/gossamer")));
        self.what_stays().iter().for_each(|note| say("note", note));
        let program = std::env::current_exe().context("the path of this program")?;
        match options.place(Path::new(PACKAGE_MARK)).exists() {
            true => say("next", &"apt purge gossamer    # removes the program"),
            false => say("next", &format_args!("rm {}    # the program", program.display())),
        }
        Ok(())
    }

    /// Removes state and kernel entries.
    fn clean_up(&self) -> anyhow::Result<()> {
        let args = CleanupArgs::for_all(false);
        let removed = match self.agents.is_empty() {
            true => cleanup::remove(&Places::find(&args), Mode::Remove)?,
            false => cleanup::remove_after_end(&args)?,
        };
        removed.things().iter().for_each(|thing| say("removed", thing));
        removed.notes().iter().for_each(|note| say("note", note));
        Ok(())
    }
}

/// Lets an agent leave its cluster, or end if it is in none. Returns whether the agent does so.
///
/// # Errors
/// Fails if the agent refuses to leave its cluster.
fn leave(agent: &RunningAgent) -> anyhow::Result<bool> {
    let was_in_cluster = agent.is_member();
    let error = match agent.request_leave()? {
        Ok(left) => {
            // A member may have admitted it since it was listed.
            if was_in_cluster || left.successor.is_some() {
                say("left", &successor_text(&left));
            }
            return Ok(true);
        }
        Err(error) => error,
    };
    let membership = block_on(api::get_as::<Membership>(agent.socket(), "/v1/status"))?;
    // An agent that waits to start cannot leave.
    let is_in_cluster = membership.is_ok_and(|membership| membership.cluster.is_some());
    ensure!(
        !was_in_cluster && !is_in_cluster,
        "this host cannot leave its cluster (to remove it all the same, stop its agent, run this command \
         again, and then `gossamer forget` on another member): {error}"
    );
    Ok(false)
}

/// Waits until an agent has ended, after a signal unless it ends by itself.
///
/// # Errors
/// Fails if it still runs.
fn stop(agent: &RunningAgent, ends: bool) -> anyhow::Result<()> {
    if agent.has_ended() {
        return Ok(());
    }
    if !ends {
        agent.request_stop()?;
    }
    agent.wait_until_ended("stop it, and run this command again")?;
    say("stopped", &format_args!("the agent at {}", agent.socket().display()));
    Ok(())
}

fn successor_text(left: &Left) -> String {
    match &left.successor {
        Some(successor) => format!("the cluster: {successor} owns the subnets of this node now"),
        None => "the cluster: this was its last member, so it no longer exists".to_owned(),
    }
}

/// Returns the instances with a settings file.
fn configured_instances(options: &Options) -> Vec<Instance> {
    let directory = options.place(Path::new("/etc/gossamer"));
    let names = fs::read_dir(directory).into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name();
        let name = name.to_str()?.strip_suffix(".toml")?.to_owned();
        let instance = if name == crate::config::NAME { "" } else { &name };
        instance.parse().ok()
    });
    names.collect()
}
