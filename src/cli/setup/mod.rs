//! `gossamer init`, `join` and `uninstall`: set up this host, and undo that.
//!
//! `init` and `join` write the settings file and the token file, and start the agent where systemd runs.
//! They add settings to the file, and never replace one that differs. A second run changes nothing.

mod files;
mod host;
mod systemd;
mod uninstall;

use std::{
    io::{self, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use self::{files::SettingsFile, systemd::Systemd};
use super::{
    block_on, fail, get_once_started,
    output::{or_dash, write_stdout},
};
use crate::{
    api::{self, AgentStatus, ClientError, Membership},
    config::{Instance, Settings, check_environment, parse_token, read_token_file},
    files::{PRIVATE, replace},
    model::visible,
    store::{StateDir, StoreError, read_token},
    transport::check_name,
    wire::Token,
};

pub use uninstall::{UninstallArgs, run as uninstall};

/// Exit code if the agent runs but this host is not a member yet.
const NOT_READY: u8 = 3;
/// Time that a command waits for this host to become a member.
const MEMBER_TIMEOUT: Duration = Duration::from_secs(30);
/// Mode of the settings file, which may contain a token.
const SETTINGS_MODE: u32 = 0o640;

#[derive(Debug, Args)]
struct Options {
    /// Print what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Work on the system in this directory, such as an image, and neither start nor stop a service
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
}

impl Options {
    /// Returns where a path of the system to set up is now.
    fn place(&self, path: &Path) -> PathBuf {
        let relative = path.strip_prefix("/").unwrap_or(path);
        self.root.as_ref().map_or_else(|| path.to_owned(), |root| root.join(relative))
    }

    /// Fails without the rights to change this host.
    fn require_root(&self, command: &str) -> anyhow::Result<()> {
        let may = self.dry_run || self.root.is_some() || nix::unistd::geteuid().is_root();
        ensure!(may, "this changes the system: run it as root (sudo gossamer {command})");
        Ok(())
    }
}

#[derive(Debug, Args)]
pub struct InitArgs {
    #[command(flatten)]
    options: Options,
    #[command(flatten, next_help_heading = "Settings to write")]
    settings: Settings,
}

#[derive(Debug, Args)]
pub struct JoinArgs {
    /// The token, from `gossamer token` on a member; "-" reads it from standard input
    #[arg(id = "join_token", value_name = "TOKEN", required_unless_present_any = ["token", "token_file"])]
    token: Option<String>,
    /// Members to join through, HOST or HOST:PORT [default: those in the token]
    #[arg(value_name = "ADDRESS")]
    addresses: Vec<String>,
    #[command(flatten)]
    options: Options,
    #[command(flatten, next_help_heading = "Settings to write")]
    settings: Settings,
}

/// Sets up the first host of a cluster.
pub fn init(args: InitArgs) -> ExitCode {
    let InitArgs { options, mut settings } = args;
    settings.init = Some(true);
    finish(options.require_root("init").and_then(|()| Setup::new(options, settings)?.run()))
}

/// Sets up a host that joins a cluster.
pub fn join(args: JoinArgs) -> ExitCode {
    let JoinArgs { token, addresses, options, mut settings } = args;
    let setup = || {
        options.require_root("join")?;
        let is_set = settings.token.is_some() || settings.token_file.is_some();
        match token {
            Some(text) if !is_set => {
                settings.token = Some(if text == "-" { from_stdin()? } else { text });
            }
            // With the token in an option, all arguments are addresses.
            address => settings.join.extend(address),
        }
        settings.join.extend(addresses);
        let is_token = |text: &String| text.parse::<Token>().is_ok();
        ensure!(
            !settings.join.iter().any(is_token),
            "give the token once: as an argument, --token or --token-file"
        );
        ensure!(settings.init != Some(true), "join enters a cluster, and init creates one");
        Setup::new(options, settings)?.run()
    };
    finish(setup())
}

fn finish(done: anyhow::Result<ExitCode>) -> ExitCode {
    done.unwrap_or_else(|error| fail(format_args!("{error:#}")))
}

fn from_stdin() -> anyhow::Result<String> {
    let mut text = String::new();
    io::stdin().take(1 << 16).read_to_string(&mut text).context("token from standard input")?;
    Ok(text)
}

/// The set-up of one host.
struct Setup {
    options: Options,
    settings: Settings,
    instance: Instance,
    token: Option<Token>,
    socket: PathBuf,
}

impl Setup {
    fn new(options: Options, mut settings: Settings) -> anyhow::Result<Self> {
        check_environment()?;
        let instance: Instance = settings.instance.as_deref().unwrap_or_default().parse()?;
        let token = match (settings.token.take(), settings.token_file.take()) {
            (Some(_), Some(_)) => bail!("set token or token_file, not both"),
            (Some(text), None) => Some(parse_token("token", &text)?),
            (None, Some(path)) => Some(read_token_file(&path)?),
            (None, None) => None,
        };
        let is_creator = settings.init == Some(true);
        if let Some(token) = &token {
            settings.token_file = Some(instance.token_file());
            ensure!(
                is_creator || !settings.join.is_empty() || !token.seeds.is_empty(),
                "the token contains no address of a member: append one (gossamer join TOKEN ADDRESS)"
            );
        }
        files::make_paths_absolute(&mut settings)?;
        let socket = settings.socket.clone().unwrap_or_else(|| instance.socket());
        Ok(Self { options, settings, instance, token, socket })
    }

    fn run(self) -> anyhow::Result<ExitCode> {
        let path = self.instance.settings_file();
        let systemd = Systemd::find(&self.options, &self.instance)?;
        let running = self.running_agent()?;
        if let (Some(systemd), Some(_)) = (&systemd, &running) {
            ensure!(
                systemd.is_active(),
                "an agent runs on this host already, and not as {}: stop it first (the kernel keeps \
                 forwarding)",
                systemd.unit()
            );
        }
        let mut file = SettingsFile::read(&self.options.place(&path))?;
        file.require_same_purpose(&self.settings)?;
        let mut wanted = self.settings.clone();
        // Without forwarding, pods of a new host reach no other host.
        wanted.set_sysctls = wanted.set_sysctls.or(file.set_sysctls()).or(Some(true));
        file.add(&wanted)?;
        let config = file.check(self.token.as_ref())?;
        if let Some(token) = &self.token {
            let is_member = running.as_ref().is_some_and(|running| running.cluster.is_some());
            self.require_same_cluster(token, &config.state_dir, is_member)?;
        }
        if self.options.root.is_none() {
            let is_new = running.is_none() && !StateDir::is_known(&config.state_dir);
            host::require_usable(&config, is_new, self.options.dry_run)?;
            warn_of_names(&config.seeds);
        }

        self.say_if_init_is_late(&file, &config.state_dir);
        let mut changed = self.write(&path, &file)?;
        if let Some(token) = &self.token {
            changed |= self.write_token(token)?;
        }
        let Some(systemd) = systemd else {
            return Ok(self.without_systemd(&path, running.is_some(), changed));
        };
        systemd.start(&self.options, &path, changed)?;
        if self.options.dry_run || self.options.root.is_some() {
            return Ok(ExitCode::SUCCESS);
        }
        Ok(self.report_membership())
    }

    /// Returns the status of a running agent.
    ///
    /// # Errors
    /// Fails if the agent is a member of another cluster than the token's.
    fn running_agent(&self) -> anyhow::Result<Option<Membership>> {
        if self.options.root.is_some() {
            return Ok(None);
        }
        let membership: Membership = match block_on(api::get_as(&self.socket, "/v1/status"))? {
            Ok(membership) => membership,
            Err(ClientError::NoAgent { .. }) => return Ok(None),
            Err(ClientError::NotPermitted { .. }) if self.options.dry_run => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let wanted = self.token.as_ref().and_then(Token::known_cluster);
        if let (Some(cluster), Some(wanted)) = (membership.cluster, wanted) {
            ensure!(
                cluster == wanted,
                "the token is for cluster {wanted}, but this host is a member of cluster {cluster}: to \
                 move it, run `gossamer uninstall` first"
            );
        }
        Ok(Some(membership))
    }

    /// Says that `init` creates no cluster on a host that is a member of one.
    fn say_if_init_is_late(&self, file: &SettingsFile, state_dir: &Path) {
        let is_new = self.settings.init == Some(true) && !file.created();
        let saved = read_token(&self.options.place(state_dir)).ok().flatten();
        if let Some(cluster) = saved.as_ref().and_then(Token::known_cluster).filter(|_| is_new) {
            say(
                "note",
                &format_args!(
                    "{} holds the state of a member of cluster {cluster}: this host stays in it, and init \
                     creates no other (to create one, run `gossamer uninstall` first)",
                    state_dir.display()
                ),
            );
        }
    }

    /// Writes the settings file. Returns whether it has changed.
    fn write(&self, path: &Path, file: &SettingsFile) -> anyhow::Result<bool> {
        let Some(added) = file.added() else {
            say("unchanged", &path.display());
            return Ok(false);
        };
        if !self.options.dry_run {
            let place = self.options.place(path);
            replace(&place, file.text(), SETTINGS_MODE)
                .with_context(|| place.display().to_string())?;
        }
        self.say_done("wrote", "would write", &format_args!("{}:", path.display()));
        added.lines().for_each(|line| say("", &line));
        Ok(true)
    }

    /// Fails if this host is a member of another cluster, as its token file or the state of a stopped agent
    /// shows. `is_member`: its agent says that it is a member.
    fn require_same_cluster(
        &self,
        token: &Token,
        state_dir: &Path,
        is_member: bool,
    ) -> anyhow::Result<()> {
        let file = self.options.place(&self.instance.token_file());
        let in_file = if file.exists() { Some(read_token_file(&file)?) } else { None };
        let state_dir = self.options.place(state_dir);
        let in_state = match read_token(&state_dir) {
            // Only root can look into it.
            Err(StoreError::Directory { .. }) if self.options.dry_run => None,
            read => read?,
        };
        // The token of a host that never joined is a mistake to correct, as its addresses are.
        let in_file = in_file.filter(|_| is_member || in_state.is_some());
        let found = in_file.map(|old| (old, format!("{} holds the token", file.display())));
        let state = in_state.map(|old| (old, format!("{} holds the state", state_dir.display())));
        for (old, what) in found.into_iter().chain(state) {
            // Another token of the same cluster is a newer one, or has other seeds.
            let same_cluster = old.known_cluster().is_some() && old.cluster == token.cluster;
            ensure!(
                old.secret == token.secret || same_cluster,
                "{what} of another cluster: to move this host, run `gossamer uninstall` first"
            );
        }
        Ok(())
    }

    /// Writes the token file. Returns whether it has changed.
    fn write_token(&self, token: &Token) -> anyhow::Result<bool> {
        let path = self.instance.token_file();
        let place = self.options.place(&path);
        let text = format!("{token}\n");
        if place.exists() && read_token_file(&place)? == *token {
            say("unchanged", &path.display());
            return Ok(false);
        }
        if !self.options.dry_run {
            replace(&place, &text, PRIVATE).with_context(|| place.display().to_string())?;
        }
        self.say_done("wrote", "would write", &format_args!("{} (mode 0600)", path.display()));
        Ok(true)
    }

    fn say_done(&self, done: &str, planned: &str, what: &dyn std::fmt::Display) {
        say(if self.options.dry_run { planned } else { done }, what);
    }

    /// Says how to start the agent by hand.
    fn without_systemd(&self, settings: &Path, is_running: bool, changed: bool) -> ExitCode {
        let option = match &self.settings.instance {
            Some(_) => format!(" --config {}", settings.display()),
            None => String::new(),
        };
        let command = format!("gossamer agent{option}");
        match is_running {
            _ if self.options.dry_run => {
                say("no systemd", &format_args!("would not start: {command}"))
            }
            true if changed => say("running", &"an agent; restart it to apply changed settings"),
            true => say("running", &"an agent; its settings are unchanged"),
            false => {
                say("next", &"this host has no systemd: let its init system run, as root,");
                say("", &command);
                let flag = self.flag();
                say(
                    "",
                    &format_args!(
                        "then `gossamer status{flag} --wait` shows whether this host is a member"
                    ),
                );
            }
        }
        ExitCode::SUCCESS
    }

    /// Waits until this host is a member, and says so.
    fn report_membership(&self) -> ExitCode {
        let target = format!("/v1/status?wait={}", MEMBER_TIMEOUT.as_secs());
        let query = get_once_started::<AgentStatus>(&self.socket, &target);
        // The agent answers by itself when the time is over.
        let patience = MEMBER_TIMEOUT + Duration::from_secs(2);
        let status = match block_on(async { tokio::time::timeout(patience, query).await }) {
            Ok(Ok(Ok(status))) => status,
            Ok(Ok(Err(error))) => return fail(error),
            Ok(Err(_)) => return fail(format_args!("no agent answers: {}", self.journal())),
            Err(error) => return fail(error),
        };
        let flag = self.flag();
        if !status.converged {
            let patience = MEMBER_TIMEOUT.as_secs();
            let verdict = &status.verdict.text;
            let (label, why) =
                verdict.split_once(": ").unwrap_or((verdict, "it has not converged"));
            say(label, &format_args!("after {patience} s: {why}; the agent continues to try"));
            say(
                "next",
                &format_args!("`gossamer status{flag}` and `gossamer doctor{flag}` say why"),
            );
            return ExitCode::from(NOT_READY);
        }
        let (subnet, cluster) = (or_dash(status.subnet), or_dash(status.cluster));
        say("ready", &format_args!("{} has {subnet} in cluster {cluster}", status.name));
        say(
            "next",
            &format_args!("`gossamer token{flag}` prints the command with which hosts join"),
        );
        ExitCode::SUCCESS
    }

    /// Returns the option that selects this instance in other commands.
    fn flag(&self) -> String {
        let name = self.settings.instance.as_ref();
        name.map_or_else(String::new, |name| format!(" --instance {name}"))
    }

    fn journal(&self) -> String {
        format!("`journalctl -u {}` may say why", self.instance.unit())
    }
}

/// Warns of names of members that do not resolve. They may resolve once the network is up.
fn warn_of_names(seeds: &[String]) {
    for seed in seeds {
        if let Ok(Err(why)) = block_on(check_name(seed)) {
            say("warning", &visible(&why.to_string()));
        }
    }
}

/// Prints a line with a label.
fn say(label: &str, text: &dyn std::fmt::Display) {
    write_stdout(&format!("{label:<11} {text}\n"));
}
