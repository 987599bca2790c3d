//! `gossamer agent`: settings, log, run.

use std::{io::IsTerminal as _, path::PathBuf, process::ExitCode};

use clap::Args;
use tracing_subscriber::EnvFilter;

use super::{block_on, fail};
use crate::{
    agent::{self, Ending},
    config::{LogFormat, Settings},
};

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// A TOML file with settings; flags and environment outrank it
    #[arg(long, env = "GOSSAMER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

pub fn run(args: AgentArgs) -> ExitCode {
    let settings = match args.settings.complete(args.config.as_deref()) {
        Ok(settings) => settings,
        Err(error) => return fail(error),
    };
    if let Err(error) = start_log(settings.log.as_deref(), settings.log_format.unwrap_or_default())
    {
        return fail(error);
    }
    let config = match settings.check() {
        Ok(config) => config,
        Err(error) => return fail(error),
    };
    let ended = loop {
        // A task is woken in memory; the future that a runtime blocks on, by way of the kernel.
        let agent = agent::run(config.clone());
        match block_on(async { tokio::spawn(agent).await }) {
            Ok(Ok(Ok(Ending::Anew))) => {}
            Ok(Ok(ended)) => break Ok(ended),
            Ok(Err(panicked)) => std::panic::resume_unwind(panicked.into_panic()),
            Err(error) => break Err(error),
        }
    };
    match ended {
        Ok(Ok(Ending::Stopped | Ending::Anew | Ending::Left { .. })) => ExitCode::SUCCESS,
        Ok(Ok(Ending::Failed(why))) => fail(why),
        Ok(Err(failure)) => fail(failure),
        Err(error) => fail(error),
    }
}

fn start_log(filter: Option<&str>, format: LogFormat) -> Result<(), String> {
    let filter = filter.unwrap_or("info");
    // A bare level is about gossamer; libraries are heard from when something is wrong.
    let filter = if filter.contains([',', '=']) {
        filter.to_owned()
    } else {
        format!("warn,gossamer={filter}")
    };
    let filter = EnvFilter::try_new(&filter)
        .map_err(|error| format!("log: {filter:?} is not a filter: {error}"))?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
    Ok(())
}
