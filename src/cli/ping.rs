//! `gossamer ping`: pings the underlay, the overlay and the pods' gateway of one member.

use std::{
    fmt::Display,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    Client, block_on, fail,
    output::{or_dash, problem_text, visible_answer, write_stdout},
    percent_encoded,
};
use crate::api::{self, PingReport, Reach};

#[derive(Debug, Args)]
pub struct PingArgs {
    /// Name, id, beginning of the id, or address of a member
    node: String,
    /// Number of rounds
    #[arg(short, long, default_value_t = 3, value_name = "NUMBER")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    count: u32,
    /// Time between the starts of two rounds
    #[arg(short, long, default_value = "1s", value_parser = humantime::parse_duration, value_name = "SPAN")]
    interval: Duration,
    #[command(flatten)]
    client: Client,
}

/// The answer of the command.
#[derive(Serialize, Deserialize)]
struct Rounds {
    rounds: Vec<PingReport>,
}

/// Returns exit code 1 if the overlay answered in no round.
pub fn run(args: &PingArgs) -> ExitCode {
    let name = percent_encoded(&args.node);
    let target = format!("/v1/ping?node={name}");
    let socket = args.client.socket();
    let is_text = args.client.output.is_text();
    let mut rounds: Vec<PingReport> = Vec::new();
    for number in 1..=args.count {
        let begun = Instant::now();
        let round: PingReport = match block_on(api::get_as(&socket, &target)) {
            Ok(Ok(round)) => round,
            Ok(Err(error)) => return fail(error),
            Err(error) => return fail(error),
        };
        if is_text {
            let header = if number == 1 { header(&round) } else { String::new() };
            if !write_stdout(&format!("{header}{}\n", line(&number.to_string(), times(&round)))) {
                return ExitCode::SUCCESS;
            }
        }
        rounds.push(round);
        if number < args.count {
            thread::sleep(args.interval.saturating_sub(begun.elapsed()));
        }
    }
    let has_overlay = rounds.iter().any(|round| answered(&round.overlay));
    if is_text {
        let summary = rounds.last().map(summary).unwrap_or_default();
        write_stdout(&format!("{}\n{summary}", line("", totals(&rounds))));
    } else {
        args.client.output.print(&Rounds { rounds }, |_, _| String::new());
    }
    if has_overlay { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn header(round: &PingReport) -> String {
    let PingReport { name, node, underlay, overlay, pods, .. } = round;
    let to = [or_dash(underlay.to), or_dash(overlay.to), or_dash(pods.to)];
    let titles = ["underlay (QUIC)", "overlay (VTEP)", "pods (gateway)"].map(str::to_owned);
    format!("{name} ({node})\n{}\n{}\n", line("", titles), line("", to))
}

fn line(number: &str, cells: [String; 3]) -> String {
    let [underlay, overlay, pods] = cells;
    format!("{number:>4}  {underlay:<28}{overlay:<28}{pods}").trim_end().to_owned()
}

fn answered<A>(reach: &Reach<A>) -> bool {
    reach.round_trip_ms.is_some()
}

/// Returns whether the gateway of the member's pods answered, or its failure is a fault. The gateway has its
/// address from the first pod on.
pub(super) fn has_pods(round: &PingReport) -> bool {
    answered(&round.pods) || !answered(&round.overlay) || round.problem.is_some()
}

/// Formats the results of one round.
fn times(round: &PingReport) -> [String; 3] {
    let pods = if has_pods(round) { time(&round.pods) } else { "no pods yet".to_owned() };
    [time(&round.underlay), time(&round.overlay), pods]
}

fn time<A: Display>(reach: &Reach<A>) -> String {
    match (&reach.to, reach.round_trip_ms) {
        (None, _) => "-".to_owned(),
        (_, Some(ms)) => format!("{ms:.2} ms"),
        _ => "no answer".to_owned(),
    }
}

/// Formats the numbers of answers to each probe.
fn totals(rounds: &[PingReport]) -> [String; 3] {
    let total = |is_answered: fn(&PingReport) -> bool| {
        format!("{} of {}", rounds.iter().filter(|round| is_answered(round)).count(), rounds.len())
    };
    let pods = match rounds.last().is_some_and(has_pods) {
        true => total(|round| answered(&round.pods)),
        false => String::new(),
    };
    [total(|round| answered(&round.underlay)), total(|round| answered(&round.overlay)), pods]
}

/// Returns what the results of the last round mean together.
fn summary(round: &PingReport) -> String {
    if let Some(problem) = &round.problem {
        return visible_answer(problem)
            .map_or_else(|_| String::new(), |problem| format!("{}\n", problem_text(&problem)));
    }
    let words = match [answered(&round.underlay), answered(&round.overlay), answered(&round.pods)] {
        [_, true, false] => {
            "pods: the gateway has no address there yet; it gets one with the first pod"
        }
        [false, true, _] => "its agent does not answer, but its kernel forwards",
        [true, false, _] => "its agent answers, but no packet passes the tunnel",
        [false, false, _] => "neither its agent nor its kernel answers",
        _ => return String::new(),
    };
    format!("{words}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeId, Problem, ProblemCode};

    #[test]
    fn gateway_without_an_answer_is_a_fault_if_the_path_has_a_problem() {
        let silent = PingReport {
            node: NodeId::UNKNOWN,
            name: "n2".to_owned(),
            underlay: Reach::unanswered(None),
            overlay: Reach { to: None, round_trip_ms: Some(1.0) },
            pods: Reach::unanswered(None),
            path: None,
            problem: None,
        };
        assert!(!has_pods(&silent));
        let problem = Problem::new(ProblemCode::MemberDown, "n2", "packets are lost", "");
        assert!(has_pods(&PingReport { problem: Some(problem), ..silent }));
    }
}
