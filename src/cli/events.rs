//! `gossamer events`: shows recent events of this node, and follows new ones.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Args;

use super::{
    Client, Format, block_on, fail,
    output::{doubtful, json, query_and_print, visible_answer, write_stdout},
};
use crate::api::{self, Event, EventLevel, PastEvents};

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
        let query = api::get_as(&socket, "/v1/events?follow=false");
        let all = |past: &PastEvents, _| past.events.iter().map(line).collect();
        return query_and_print(&args.client, query, all)
            .map_or_else(|code| code, |_| ExitCode::SUCCESS);
    }
    let format = args.client.output;
    let show = |event: &Event| match (format, visible_answer(event)) {
        (Format::Json, _) => _ = write_stdout(&format!("{}\n", json(event))),
        (Format::Yaml, _) => format.print_visible(&[event], |_| String::new()),
        (_, Ok(event)) => _ = write_stdout(&line(&event)),
        (_, Err(error)) => eprintln!("gossamer: {error}"),
    };
    match block_on(api::follow(&socket, "/v1/events", show)) {
        Ok(Ok(())) => fail("the agent has ended"),
        Ok(Err(error)) => fail(error),
        Err(error) => fail(error),
    }
}

fn line(event: &Event) -> String {
    let at = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(event.at.max(0.0));
    let words = match event.level {
        EventLevel::Info => event.text.clone(),
        EventLevel::Warn => doubtful(&event.text),
    };
    format!("{}  {:<8} {words}\n", humantime::format_rfc3339_millis(at), event.kind.name())
}
