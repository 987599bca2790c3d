//! `gossamer agent`: reads the settings, starts the log, and runs the agent.

use std::{
    fmt::Display, io, os::unix::net::UnixListener, path::PathBuf, process::ExitCode, sync::Arc,
    time::Duration,
};

use clap::Args;
use listenfd::ListenFd;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::block_on;
use crate::{
    agent::{self, Ending, SettingsReader},
    config::{Settings, check_environment, log_filter},
    log,
    model::visible,
};

/// Upper bound of the soft limit of open files. An agent never needs more.
const MAX_OPEN_FILES: u64 = 65_536;
/// Lowest usable hard limit of open files: threads, database, a few peers and API requests at once.
const MIN_OPEN_FILES: u64 = 256;
/// How long the end waits for the log's reader.
const LOG_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// TOML file with settings; flags and environment variables take precedence [default:
    /// /etc/gossamer/gossamer.toml if it exists; "/dev/null": none]
    #[arg(long, env = "GOSSAMER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

pub fn run(args: AgentArgs) -> ExitCode {
    if let Err(error) = agent::survive_file_size_limit().and_then(|()| log::start()) {
        return super::fail(error);
    }
    let code = run_logged(args);
    log::flush(LOG_TIMEOUT);
    code
}

/// Reports an error through the log's thread.
fn fail(error: impl Display) -> ExitCode {
    log::print(format_args!("gossamer: {error:#}"));
    ExitCode::FAILURE
}

fn run_logged(args: AgentArgs) -> ExitCode {
    let plugin = match docker_socket_from_systemd() {
        Ok(plugin) => plugin,
        Err(error) => {
            return fail(format_args!("the socket of Docker's plugin, opened by systemd: {error}"));
        }
    };
    let code = run_with(args, plugin.as_ref());
    // Docker blocks until its connection is accepted. Accept and close all of them: this agent cannot
    // start.
    if code != ExitCode::SUCCESS {
        plugin.into_iter().for_each(|plugin| while plugin.accept().is_ok() {});
    }
    code
}

/// Returns the socket that `gossamer-docker.socket` opened, if systemd passed one.
fn docker_socket_from_systemd() -> io::Result<Option<UnixListener>> {
    let plugin = ListenFd::from_env().take_unix_listener(0)?;
    plugin.iter().try_for_each(|plugin| plugin.set_nonblocking(true))?;
    Ok(plugin)
}

fn run_with(args: AgentArgs, plugin: Option<&UnixListener>) -> ExitCode {
    let unknown_variables = match check_environment() {
        Ok(unknown) => unknown,
        Err(error) => return fail(error),
    };
    let file = args.settings.file(args.config.as_deref());
    let settings = match args.settings.clone().complete(file.as_deref()) {
        Ok(settings) => settings,
        Err(error) if error.is_refused => {
            return fail(format_args!(
                "{error}: run it as root (sudo gossamer agent), or try gossamer demo"
            ));
        }
        Err(error) => return fail(error),
    };
    let started = log_filter(settings.log.as_deref())
        .map_err(|error| error.to_string())
        .and_then(|f| log::subscribe(f, settings.log_format.unwrap_or_default()));
    let set_filter = match started {
        Ok(set_filter) => set_filter,
        Err(error) => return fail(error),
    };
    for name in unknown_variables {
        tracing::warn!("the environment variable {} is no setting", visible(&name));
    }
    let config = match settings.check() {
        Ok(config) => config,
        Err(error) => return fail(error),
    };
    let read_settings: Arc<SettingsReader> = Arc::new(Box::new(move || {
        let settings = args.settings.clone().complete(file.as_deref());
        let settings = settings.map_err(|error| error.to_string())?;
        let filter = log_filter(settings.log.as_deref()).map_err(|error| error.to_string())?;
        let config = settings.check().map_err(|error| error.to_string())?;
        set_filter(filter)?;
        Ok(config)
    }));
    if let Err(error) = allow_many_files() {
        return fail(error);
    }
    let end = match agent::guard() {
        Ok(end) => end,
        Err(error) => return fail(error),
    };
    let ended = loop {
        // `block_on` wakes its own future through the kernel, but a spawned task in memory, which is
        // cheaper.
        let (config, end, read_settings) = (config.clone(), end.clone(), read_settings.clone());
        let plugin = match plugin.map(UnixListener::try_clone).transpose() {
            Ok(plugin) => plugin,
            Err(error) => break Err(error),
        };
        let agent = async move { agent::run(config, plugin, end, &read_settings).await };
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

/// Raises the soft limit of open files to at most [`MAX_OPEN_FILES`]. The usual limit of a service is 1,024.
///
/// # Errors
/// Fails if the hard limit is lower than [`MIN_OPEN_FILES`]: the agent would run without answering
/// requests.
fn allow_many_files() -> Result<(), String> {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(hard.min(MAX_OPEN_FILES)), hard)?;
        Ok(hard)
    });
    match raised {
        Ok(hard) if hard < MIN_OPEN_FILES => Err(format!(
            "this process may open only {hard} files, but an agent needs {MIN_OPEN_FILES}: raise the hard \
             limit (LimitNOFILE= in the systemd unit, `ulimit -Hn` in a shell, --ulimit nofile= for a \
             container)"
        )),
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::debug!(%error, "limit of open files not raised");
            Ok(())
        }
    }
}
