//! `gossamer doctor`: looks for everything that makes this host's pods unreachable.

use std::{
    collections::BTreeSet, fmt::Write as _, path::PathBuf, process::ExitCode, time::Duration,
};

use clap::Args;
use serde_json::{Value, json};

use super::{
    block_on, fail,
    output::{bad, doubtful, good, wrapped, write_stdout},
    status::painted_verdict,
};
use crate::{
    api::{self, ClientError, PastEvents, Routes},
    config::{Instance, Settings, check_environment},
    doctor::{self, Agent, Examination, Finding, Verdict, examine},
    model::visible_lines,
};

/// An agent that does not answer within this time counts as hanging.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Columns before the text of each line.
const LABEL_COLUMNS: usize = 25;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Settings file of the agent [default: /etc/gossamer/gossamer.toml if it exists]
    #[arg(long, env = "GOSSAMER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Also write a support archive with these findings, the agent's view and the host's tables, without
    /// secrets
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// Output format
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: super::output::Format,
    #[command(flatten)]
    settings: Settings,
}

/// Returns the exit code of the verdict.
pub fn run(args: DoctorArgs) -> ExitCode {
    let examination = examination(&args);
    let findings = examine(&examination);
    if let Some(path) = &args.bundle
        && let Err(error) =
            doctor::write_bundle(path, &examination, &findings, config_file(&args).as_deref())
    {
        return fail(error);
    }
    let verdict = doctor::verdict(&examination, &findings);
    let answer = json!({ "verdict": verdict, "findings": findings });
    args.output.print_visible(&answer, |wide| findings_text(&findings, &verdict, wide));
    if let Some(path) = args.bundle.filter(|_| args.output.is_text()) {
        write_stdout(&format!("written: {}\n", path.display()));
    }
    ExitCode::from(verdict.exit_code())
}

/// Returns the instance that an option or the environment names.
fn instance(args: &DoctorArgs) -> Instance {
    args.settings.instance.as_deref().and_then(|name| name.parse().ok()).unwrap_or_default()
}

fn config_file(args: &DoctorArgs) -> Option<PathBuf> {
    args.settings.file(args.config.as_deref())
}

fn examination(args: &DoctorArgs) -> Examination {
    let completed = check_environment()
        .and_then(|_| args.settings.clone().complete(config_file(args).as_deref()));
    let config = completed.and_then(Settings::check);
    let socket = match &config {
        Ok(config) => config.socket.clone(),
        // Options and environment name the agent although the file cannot be read.
        Err(_) => args.settings.socket.clone().unwrap_or_else(|| instance(args).socket()),
    };
    let query = async {
        let optional = async |target| match api::get(&socket, target).await {
            Err(ClientError::Refused { .. } | ClientError::OtherVersion { .. }) => Ok(Value::Null),
            reply => reply,
        };
        let reply = api::get(&socket, "/v1/status").await?;
        let routes = optional("/v1/routes").await?;
        let events = optional("/v1/events?follow=false").await?;
        let status = api::typed(&socket, "/v1/status", reply.clone()).await?;
        let entries = serde_json::from_value::<Routes>(routes.clone()).ok();
        let past = serde_json::from_value::<PastEvents>(events.clone()).unwrap_or_default();
        Ok::<_, ClientError>(Agent {
            status,
            routes: entries.map(|routes| routes.entries),
            events: past.events,
            replies: vec![
                ("status.json", reply),
                ("kernel-entries.json", routes),
                ("events.json", events),
            ],
        })
    };
    let response = block_on(async { tokio::time::timeout(QUERY_TIMEOUT, query).await });
    let is_agent_refused = matches!(response, Ok(Ok(Err(ClientError::NotPermitted { .. }))));
    // Settings that cannot be read may name another socket.
    let is_agent_absent =
        config.is_ok() && matches!(response, Ok(Ok(Err(ClientError::NoAgent { .. }))));
    let (agent, agent_error) = match response {
        Ok(Ok(Ok(agent))) => (Some(agent), None),
        Ok(Ok(Err(error))) => (None, Some(error.to_string())),
        Ok(Err(_)) => (None, Some(format!("the agent does not answer within {QUERY_TIMEOUT:?}"))),
        Err(error) => (None, Some(error.to_string())),
    };
    let has_settings_file = config_file(args).is_some();
    Examination {
        config,
        agent,
        agent_error,
        is_agent_refused,
        is_agent_absent,
        socket,
        has_settings_file,
    }
}

fn pluralized(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Returns what the last line says after the verdict. One of a node that is ready already has the number of
/// problems.
fn summary(findings: &[Finding], verdict: &api::Verdict) -> String {
    let count = |of: Verdict| findings.iter().filter(|finding| finding.verdict == of).count();
    let with = |is_skipped: bool| -> BTreeSet<&str> {
        let of = findings.iter().filter(|f| (f.verdict == Verdict::Skipped) == is_skipped);
        of.map(|finding| finding.check).collect()
    };
    let skipped = with(true).difference(&with(false)).count();
    let checks = doctor::CHECKS.len().saturating_sub(skipped);
    let skipped = if skipped > 0 { format!(", {skipped} skipped") } else { String::new() };
    let problems = match verdict.state {
        api::VerdictState::NotReady => count(Verdict::Problem),
        _ => 0,
    };
    let found = [(problems, "problem"), (count(Verdict::Notice), "notice")];
    let found = found.iter().filter(|(count, _)| *count > 0);
    let found: Vec<String> = found.map(|(count, of)| pluralized(*count, of)).collect();
    match (found.is_empty(), count(Verdict::Problem)) {
        (true, 0) => format!("{checks} checks found nothing{skipped}"),
        (true, _) => format!("{checks} checks{skipped}"),
        _ => format!("{} in {checks} checks{skipped}", found.join(", ")),
    }
}

fn findings_text(findings: &[Finding], verdict: &api::Verdict, wide: bool) -> String {
    let mut out = String::new();
    // Problems come last, where a terminal shows them.
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|finding| match finding.verdict {
        Verdict::Ok | Verdict::Skipped => 0,
        Verdict::Notice => 1,
        Verdict::Problem => 2,
    });
    for Finding { check, verdict, seen, why, fix, .. } in sorted {
        let verdict = match verdict {
            Verdict::Ok => good("ok      "),
            Verdict::Notice => doubtful("notice  "),
            Verdict::Problem => bad("PROBLEM "),
            Verdict::Skipped => "skipped ".to_owned(),
        };
        let seen = wrapped(&visible_lines(seen), LABEL_COLUMNS);
        let _ = writeln!(out, "{verdict}  {check:<13}  {seen}");
        for (part, words) in [("why", why), ("fix", fix)] {
            if let Some(words) = words {
                let words = wrapped(&visible_lines(words), LABEL_COLUMNS);
                let _ = writeln!(out, "{:20}{part}  {words}", "");
            }
        }
    }
    let _ = writeln!(out, "\n{}; {}", painted_verdict(verdict, 0), summary(findings, verdict));
    if wide {
        for (check, what) in doctor::CHECKS {
            let _ = writeln!(out, "{check:<13}  {what}");
        }
    }
    out
}
