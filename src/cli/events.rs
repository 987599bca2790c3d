//! `gossamer events`: shows recent events of this node, and follows new ones.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Args;
use serde_json::Value;

use super::{
    Client, Format, block_on, fail,
    output::{doubtful, elements, query_and_print, text, write_stdout},
};
use crate::api;

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// Continue with new events until Ctrl-C; JSON is then one object per line
    #[arg(short, long)]
    follow: bool,
    #[command(flatten)]
    client: Client,
}

pub fn run(args: &EventsArgs) -> ExitCode {
    let socket = args.client.socket();
    if !args.follow {
        let query = api::get(&socket, "/v1/events?follow=false");
        let all = |events: &Value, _| elements(&events["events"]).map(line).collect();
        return query_and_print(&args.client, query, all)
            .map_or_else(|code| code, |_| ExitCode::SUCCESS);
    }
    let format = args.client.output;
    let show = |event: &Value| match format {
        Format::Json => _ = write_stdout(&format!("{event}\n")),
        Format::Yaml => format.print(&Value::from(vec![event.clone()]), |_, _| String::new()),
        _ => _ = write_stdout(&line(event)),
    };
    match block_on(api::follow(&socket, "/v1/events", show)) {
        Ok(Ok(())) => fail("the agent has ended"),
        Ok(Err(error)) => fail(error),
        Err(error) => fail(error),
    }
}

fn line(event: &Value) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(event["at"].as_f64().unwrap_or(0.0));
    let (kind, words) = (text(&event["kind"]), text(&event["text"]));
    let words = if event["level"] == "warn" { doubtful(words) } else { words };
    format!("{}  {kind:<8} {words}\n", humantime::format_rfc3339_millis(at))
}
