//! `gossamer agent`: settings, log, run.

use std::{
    io::{self, IsTerminal as _},
    os::unix::net::UnixListener,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use clap::Args;
use listenfd::ListenFd;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::{
    EnvFilter, fmt, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

use super::{block_on, fail};
use crate::{
    agent::{self, Ending, Reread},
    config::{LogFormat, Settings},
};

/// Open files that an agent never needs more of.
const FILES: u64 = 65_536;
/// As many as an agent needs for its own threads, its database, a few peers and questions at once.
const FEWEST_FILES: u64 = 256;

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// A TOML file with settings; flags and environment outrank it
    #[arg(long, env = "GOSSAMER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

pub fn run(args: AgentArgs) -> ExitCode {
    let plugin = match inherited() {
        Ok(plugin) => plugin,
        Err(error) => return fail(format_args!("the socket of Docker's plugin: {error}")),
    };
    let code = run_with(args, plugin.as_ref());
    // Docker waits for as long as nobody takes its call, and must not wait for an agent that cannot start.
    if code != ExitCode::SUCCESS {
        plugin.into_iter().for_each(|plugin| while plugin.accept().is_ok() {});
    }
    code
}

/// The socket that systemd has opened by gossamer-docker.socket.
fn inherited() -> io::Result<Option<UnixListener>> {
    let plugin = ListenFd::from_env().take_unix_listener(0)?;
    plugin.iter().try_for_each(|plugin| plugin.set_nonblocking(true))?;
    Ok(plugin)
}

fn run_with(args: AgentArgs, plugin: Option<&UnixListener>) -> ExitCode {
    let settings = match args.settings.clone().complete(args.config.as_deref()) {
        Ok(settings) => settings,
        Err(error) => return fail(error),
    };
    let started = filter(settings.log.as_deref())
        .and_then(|f| start_log(f, settings.log_format.unwrap_or_default()));
    let set_filter = match started {
        Ok(set_filter) => set_filter,
        Err(error) => return fail(error),
    };
    let config = match settings.check() {
        Ok(config) => config,
        Err(error) => return fail(error),
    };
    let reread: Arc<Reread> = Arc::new(Box::new(move || {
        let settings = args.settings.clone().complete(args.config.as_deref());
        let settings = settings.map_err(|error| error.to_string())?;
        let filter = filter(settings.log.as_deref())?;
        let config = settings.check().map_err(|error| error.to_string())?;
        set_filter(filter)?;
        Ok(config)
    }));
    if let Err(error) = allow_many_files() {
        return fail(error);
    }
    if let Err(error) = agent::guard() {
        return fail(error);
    }
    let ended = loop {
        // A task is woken in memory; the future that a runtime blocks on, by way of the kernel.
        let (config, reread) = (config.clone(), reread.clone());
        let plugin = match plugin.map(UnixListener::try_clone).transpose() {
            Ok(plugin) => plugin,
            Err(error) => break Err(error),
        };
        let agent = async move { agent::run(config, plugin, &reread).await };
        match block_on(async { tokio::spawn(agent).await }) {
            Ok(Ok(Ok(Ending::Restart | Ending::Reassigned))) => {}
            Ok(Ok(ended)) => break Ok(ended),
            Ok(Err(panicked)) => std::panic::resume_unwind(panicked.into_panic()),
            Err(error) => break Err(error),
        }
    };
    match ended {
        Ok(Ok(Ending::Stopped | Ending::Restart | Ending::Reassigned | Ending::Left { .. })) => {
            ExitCode::SUCCESS
        }
        Ok(Ok(Ending::Failed(why) | Ending::Broken(why))) => fail(why),
        Ok(Err(failure)) => fail(failure),
        Err(error) => fail(error),
    }
}

/// Raises the limit of open files as far as it may be, within reason: the usual one of services is 1,024.
///
/// # Errors
/// The hard limit is too low for an agent, which would run and answer no question.
fn allow_many_files() -> Result<(), String> {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(FILES)), hard)?;
        Ok(hard)
    });
    match raised {
        Ok(hard) if hard < FEWEST_FILES => Err(format!(
            "this process may open {hard} files and an agent needs {FEWEST_FILES}: raise the hard limit \
             (LimitNOFILE= in systemd's unit, `ulimit -Hn` in a shell, --ulimit nofile= of a container)"
        )),
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "the limit of open files is not raised");
            Ok(())
        }
    }
}

/// A bare level is about gossamer; libraries are heard from when something is wrong.
fn filter(text: Option<&str>) -> Result<EnvFilter, String> {
    let text = text.unwrap_or("info");
    let filter = match text.contains([',', '=']) {
        true => text.to_owned(),
        false => format!("warn,gossamer={text}"),
    };
    EnvFilter::try_new(&filter).map_err(|error| format!("log: {filter:?} is not a filter: {error}"))
}

/// Gives what changes the filter afterwards.
fn start_log(
    filter: EnvFilter,
    format: LogFormat,
) -> Result<impl Fn(EnvFilter) -> Result<(), String>, String> {
    let (filter, handle) = reload::Layer::new(filter);
    let log = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter);
    match format {
        LogFormat::Text => registry.with(log.with_target(false)).init(),
        LogFormat::Json => registry.with(log.json()).init(),
        LogFormat::Journal => {
            let journal = tracing_journald::layer().map_err(|error| {
                format!("log_format: systemd's journal cannot be reached: {error}: use \"text\"")
            })?;
            let levels = PriorityMappings {
                error: Priority::Error,
                warn: Priority::Warning,
                info: Priority::Informational,
                debug: Priority::Debug,
                trace: Priority::Debug,
            };
            registry.with(journal.with_priority_mappings(levels)).init();
        }
    }
    Ok(move |filter| handle.reload(filter).map_err(|error| error.to_string()))
}
