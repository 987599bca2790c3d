//! `gossamer ping`: pings the underlay, the overlay and the pods' gateway of one member.

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::{Value, json};

use super::{
    Client, block_on, fail,
    output::{problem_in, write_stdout},
    percent_encoded,
};
use crate::api;

/// Keys of the three results in an answer.
const PROBES: [&str; 3] = ["underlay", "overlay", "pods"];

#[derive(Debug, Args)]
pub struct PingArgs {
    /// Name, id, beginning of the id, or address of a member
    node: String,
    /// Number of rounds
    #[arg(short, long, default_value_t = 3, value_name = "NUMBER")]
    count: u32,
    /// Time between the starts of two rounds
    #[arg(short, long, default_value = "1s", value_parser = humantime::parse_duration, value_name = "SPAN")]
    interval: Duration,
    #[command(flatten)]
    client: Client,
}

/// Returns exit code 1 if the overlay answered in no round.
pub fn run(args: &PingArgs) -> ExitCode {
    let name = percent_encoded(&args.node);
    let target = format!("/v1/ping?node={name}");
    let socket = args.client.socket();
    let text = args.client.output.is_text();
    let mut rounds: Vec<Value> = Vec::new();
    for number in 1..=args.count.max(1) {
        let begun = Instant::now();
        let round = match block_on(api::get(&socket, &target)) {
            Ok(Ok(round)) => round,
            Ok(Err(error)) => return fail(error),
            Err(error) => return fail(error),
        };
        if text {
            let header = if number == 1 { header(&round) } else { String::new() };
            let has_pods = has_pods(&round);
            let times = PROBES.map(|probe| match probe {
                "pods" if !has_pods => "no pods yet".to_owned(),
                _ => time(&round[probe]),
            });
            let times = line(&number.to_string(), times);
            if !write_stdout(&format!("{header}{times}\n")) {
                return ExitCode::SUCCESS;
            }
        }
        rounds.push(round);
        if number < args.count {
            thread::sleep(args.interval.saturating_sub(begun.elapsed()));
        }
    }
    let answered = |probe: &str| {
        rounds.iter().filter(|round| round[probe]["round_trip_ms"].is_number()).count()
    };
    if text {
        let total = |probe: &str| match probe {
            "pods" if !rounds.last().is_some_and(has_pods) => String::new(),
            _ => format!("{} of {}", answered(probe), rounds.len()),
        };
        let totals = line("", PROBES.map(total));
        write_stdout(&format!("{totals}\n{}", rounds.last().map(summary).unwrap_or_default()));
    } else {
        args.client.output.print(&json!({ "rounds": rounds }), |_, _| String::new());
    }
    if answered("overlay") == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn header(round: &Value) -> String {
    let to = PROBES.map(|probe| round[probe]["to"].as_str().unwrap_or("-").to_owned());
    format!(
        "{} ({})\n{}\n{}\n",
        round["name"].as_str().unwrap_or("?"),
        round["node"].as_str().unwrap_or("?"),
        line("", ["underlay (QUIC)", "overlay (VTEP)", "pods (gateway)"].map(str::to_owned)),
        line("", to)
    )
}

fn line(number: &str, cells: [String; 3]) -> String {
    let [underlay, overlay, pods] = cells;
    format!("{number:>4}  {underlay:<28}{overlay:<28}{pods}").trim_end().to_owned()
}

/// Returns whether the gateway of the member's pods answered, or its failure is a fault. The gateway has its
/// address from the first pod on.
fn has_pods(round: &Value) -> bool {
    let answered = |probe: &str| round[probe]["round_trip_ms"].is_number();
    answered("pods") || !answered("overlay") || problem_in(round).is_some()
}

fn time(reach: &Value) -> String {
    match (reach["to"].is_null(), reach["round_trip_ms"].as_f64()) {
        (true, _) => "-".to_owned(),
        (_, Some(ms)) => format!("{ms:.2} ms"),
        _ => "no answer".to_owned(),
    }
}

/// Returns what the results of the last round mean together.
fn summary(round: &Value) -> String {
    let answered = PROBES.map(|probe| round[probe]["round_trip_ms"].is_number());
    let problem = problem_in(round);
    let words = match (problem.as_deref(), answered) {
        (Some(problem), _) => problem,
        (None, [_, true, false]) => {
            "pods: the gateway has no address there yet; it gets one with the first pod"
        }
        (None, [false, true, _]) => "its agent does not answer, but its kernel forwards",
        (None, [true, false, _]) => "its agent answers, but no packet passes the tunnel",
        (None, [false, false, _]) => "neither its agent nor its kernel answers",
        _ => return String::new(),
    };
    format!("{words}\n")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::{Problem, ProblemCode};

    #[test]
    fn gateway_without_an_answer_is_a_fault_if_the_path_has_a_problem() {
        let silent = json!({ "overlay": { "round_trip_ms": 1.0 }, "pods": {} });
        assert!(!has_pods(&silent));
        let problem = Problem::new(ProblemCode::MemberDown, "n2", "packets are lost", "");
        let mut faulty = silent;
        faulty["problem"] = serde_json::to_value(problem).expect("JSON");
        assert!(has_pods(&faulty));
    }
}
