//! `gossamer doctor`: looks for everything that makes this host's pods unreachable.

use std::{fmt::Write as _, path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;
use serde_json::{Value, json};

use super::{
    block_on, fail,
    output::{bad, doubtful, elements, good, text, wrapped, write_stdout},
};
use crate::{
    api::{self, ClientError},
    config::{Instance, Settings},
    doctor::{self, Agent, Examination, examine},
};

/// An agent that does not answer within this time counts as hanging.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Columns before the text of each line.
const LABEL_COLUMNS: usize = 25;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Settings file of the agent
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
            doctor::write_bundle(path, &examination, &findings, args.config.as_deref())
    {
        return fail(error);
    }
    let verdict = doctor::verdict(&examination, &findings);
    let answer = json!({ "verdict": verdict, "findings": findings });
    args.output.print(&answer, findings_text);
    if let Some(path) = args.bundle.filter(|_| args.output.is_text()) {
        write_stdout(&format!("written: {}\n", path.display()));
    }
    ExitCode::from(verdict.exit_code())
}

fn examination(args: &DoctorArgs) -> Examination {
    let completed = args.settings.clone().complete(args.config.as_deref());
    let config = completed.and_then(Settings::check);
    let socket = match &config {
        Ok(config) => config.socket.clone(),
        Err(_) => Instance::default().socket(),
    };
    let query = async {
        let status = api::get(&socket, "/v1/status").await?;
        let routes = match api::get(&socket, "/v1/routes").await {
            Err(ClientError::Refused { .. } | ClientError::OtherVersion { .. }) => Value::Null,
            routes => routes?,
        };
        let events = match api::get(&socket, "/v1/events?follow=false").await {
            Err(ClientError::Refused { .. } | ClientError::OtherVersion { .. }) => Value::Null,
            events => events?,
        };
        Ok::<_, ClientError>(Agent { status, routes, events })
    };
    let response = block_on(async { tokio::time::timeout(QUERY_TIMEOUT, query).await });
    let (agent, agent_error) = match response {
        Ok(Ok(Ok(agent))) => (Some(agent), None),
        Ok(Ok(Err(error))) => (None, Some(error.to_string())),
        Ok(Err(_)) => (None, Some(format!("the agent does not answer within {QUERY_TIMEOUT:?}"))),
        Err(error) => (None, Some(error.to_string())),
    };
    Examination { config, agent, agent_error, socket }
}

fn pluralized(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn findings_text(answer: &Value, wide: bool) -> String {
    let mut out = String::new();
    let count = |verdict: &str| {
        elements(&answer["findings"]).filter(|finding| finding["verdict"] == verdict).count()
    };
    let with_verdicts = |verdicts: &[&str]| {
        let matches_verdict =
            |finding: &&Value| verdicts.contains(&finding["verdict"].as_str().unwrap_or(""));
        elements(&answer["findings"]).filter(matches_verdict).collect::<Vec<_>>()
    };
    // Problems come last, where a terminal shows them.
    let unremarkable = with_verdicts(&["ok", "skipped"]).into_iter();
    let complaints = with_verdicts(&["notice"]).into_iter().chain(with_verdicts(&["problem"]));
    for finding in unremarkable.chain(complaints) {
        let verdict = match finding["verdict"].as_str() {
            Some("ok") => good("ok      "),
            Some("notice") => doubtful("notice  "),
            Some("problem") => bad("PROBLEM "),
            _ => "skipped ".to_owned(),
        };
        let check = text(&finding["check"]);
        let seen = wrapped(&text(&finding["seen"]), LABEL_COLUMNS);
        let _ = writeln!(out, "{verdict}  {check:<13}  {seen}");
        for part in ["why", "fix"] {
            if let Some(words) = finding[part].as_str() {
                let _ = writeln!(out, "{:20}{part}  {}", "", wrapped(words, LABEL_COLUMNS));
            }
        }
    }
    let all = doctor::CHECKS.len();
    let verdict = text(&answer["verdict"]["text"]);
    let verdict = match answer["verdict"]["state"].as_str() {
        Some("healthy") => good(verdict),
        Some("degraded") => doubtful(verdict),
        _ => bad(verdict),
    };
    let _ = match (count("problem"), count("notice")) {
        (0, 0) => writeln!(out, "\n{verdict}; {all} checks found nothing"),
        (problems, notices) => writeln!(
            out,
            "\n{verdict}; {} and {} in {all} checks",
            pluralized(problems, "problem"),
            pluralized(notices, "notice")
        ),
    };
    if wide {
        for (check, what) in doctor::CHECKS {
            let _ = writeln!(out, "{check:<13}  {what}");
        }
    }
    out
}
