//! `gossamer top`: a live view of this node in the terminal.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, IsTerminal as _},
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Cell, Paragraph, Row, Table, Wrap},
};
use serde_json::Value;

use super::{
    Client, block_on, fail,
    output::{elements, problem_text, text},
    status::is_present,
};
use crate::api::{self, ClientError};

/// Time between two refreshes.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for the agent. Keys are not read meanwhile.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of events shown.
const EVENT_LINES: u16 = 8;

/// Data of one screen.
#[derive(Default)]
struct Picture {
    status: Value,
    events: Vec<Value>,
    /// Bytes per second received and sent by the overlay device.
    traffic: Option<[f64; 2]>,
    /// Why the last query failed.
    error: Option<String>,
    /// Index of the first member shown.
    scroll: usize,
    order: Order,
}

/// Order of the members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Order {
    /// Members with problems first.
    #[default]
    State,
    Name,
    RoundTrip,
}

pub fn run(client: &Client) -> ExitCode {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return fail(
            "top: standard input and output must be a terminal: use `gossamer status` instead",
        );
    }
    let mut terminal = ratatui::init();
    let ended = watch(client, |picture| terminal.draw(|frame| draw(frame, picture)).map(drop));
    ratatui::restore();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error),
    }
}

fn watch(client: &Client, mut draw: impl FnMut(&Picture) -> io::Result<()>) -> io::Result<()> {
    let socket = client.socket();
    let mut picture = Picture::default();
    let mut previous: Option<(Instant, [u64; 2])> = None;
    loop {
        let begun = Instant::now();
        let response =
            block_on(async { tokio::time::timeout(QUERY_TIMEOUT, fetch(&socket)).await })?;
        match response.map_err(|_| format!("the agent does not answer within {QUERY_TIMEOUT:?}")) {
            Ok(Ok((status, events))) => {
                let device = text(&status["kernel"]["device"]);
                let now = device_bytes(&device).map(|bytes| (begun, bytes));
                picture.traffic = previous.zip(now).map(|(before, now)| rate(before, now));
                previous = now;
                (picture.status, picture.events, picture.error) = (status, events, None);
            }
            Ok(Err(error)) => picture.error = Some(error.to_string()),
            Err(late) => picture.error = Some(late),
        }
        draw(&picture)?;
        while let Some(left) = REFRESH_INTERVAL.checked_sub(begun.elapsed()) {
            if !event::poll(left)? {
                break;
            }
            let Event::Key(key) = event::read()? else {
                draw(&picture)?;
                continue;
            };
            let members = elements(&picture.status["members"]).count();
            match key.code {
                _ if key.kind != KeyEventKind::Press => continue,
                KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                    return Ok(());
                }
                KeyCode::Char('s') => picture.order = picture.order.next(),
                KeyCode::Down => {
                    picture.scroll = (picture.scroll + 1).min(members.saturating_sub(1))
                }
                KeyCode::Up => picture.scroll = picture.scroll.saturating_sub(1),
                KeyCode::Home => picture.scroll = 0,
                _ => continue,
            }
            draw(&picture)?;
        }
    }
}

impl Order {
    const fn next(self) -> Self {
        match self {
            Self::State => Self::Name,
            Self::Name => Self::RoundTrip,
            Self::RoundTrip => Self::State,
        }
    }

    const fn text(self) -> &'static str {
        match self {
            Self::State => "problems first",
            Self::Name => "by name",
            Self::RoundTrip => "slowest first",
        }
    }
}

async fn fetch(socket: &Path) -> Result<(Value, Vec<Value>), ClientError> {
    let status = api::get(socket, "/v1/status").await?;
    let mut events = api::get(socket, "/v1/events?follow=false").await?;
    let events = events["events"].as_array_mut().map(std::mem::take).unwrap_or_default();
    Ok((status, events))
}

/// Returns the bytes received and sent since the device was created.
fn device_bytes(device: &str) -> Option<[u64; 2]> {
    let read = |what: &str| {
        let path = format!("/sys/class/net/{device}/statistics/{what}_bytes");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    Some([read("rx")?, read("tx")?])
}

fn rate(before: (Instant, [u64; 2]), now: (Instant, [u64; 2])) -> [f64; 2] {
    let seconds = now.0.duration_since(before.0).as_secs_f64().max(f64::EPSILON);
    std::array::from_fn(|i| now.1[i].saturating_sub(before.1[i]) as f64 / seconds)
}

fn draw(frame: &mut Frame<'_>, picture: &Picture) {
    let problems = problem_lines(picture);
    let [head, problem_area, members, events, foot] = Layout::vertical([
        Constraint::Length(4),
        Constraint::Length(problems.len().min(6) as u16),
        Constraint::Min(4),
        Constraint::Length(EVENT_LINES + 2),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(head_lines(picture)), head);
    frame.render_widget(Paragraph::new(problems).wrap(Wrap { trim: true }), problem_area);
    draw_members(frame, picture, members);
    draw_events(frame, picture, events);
    let keys = format!("q quit  s sort ({})  up/down scroll", picture.order.text());
    frame.render_widget(Paragraph::new(keys).style(Style::new().add_modifier(Modifier::DIM)), foot);
}

fn head_lines(picture: &Picture) -> Vec<Line<'static>> {
    let Picture { status, traffic, .. } = picture;
    let kernel = &status["kernel"];
    let verdict = &status["verdict"];
    let color = match verdict["state"].as_str() {
        Some("healthy") => Color::Green,
        Some("degraded") => Color::Yellow,
        _ => Color::Red,
    };
    let state = Span::styled(text(&verdict["text"]), color);
    let name = Span::styled(text(&status["name"]), Modifier::BOLD);
    let subnet = format!(
        "  {} of {}",
        text(&status["subnet"]),
        text(&status["settings"]["pool"]["network"])
    );
    let present = || elements(&status["members"]).filter(|member| is_present(member));
    let alive = present().filter(|member| member["liveness"] == "alive").count();
    let slots = &status["slots"];
    let [inward, outward] =
        traffic.map_or(["-".to_owned(), "-".to_owned()], |t| t.map(format_bits));
    let repairs: u64 =
        kernel["repairs"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
    vec![
        Line::from(vec![name, Span::raw("  "), state, Span::raw(subnet)]),
        Line::from(format!(
            "members {alive} alive of {}   subnets {} leased, {} free   pods {}   repairs {repairs}",
            present().count(),
            slots["leased"],
            slots["free"],
            status["pods"]
        )),
        Line::from(format!(
            "{} on {}   mtu {}   in {inward}  out {outward}",
            text(&kernel["device"]),
            text(&kernel["underlay_interface"]),
            kernel["mtu"]
        )),
        Line::default(),
    ]
}

fn problem_lines(picture: &Picture) -> Vec<Line<'static>> {
    let problems = elements(&picture.status["problems"]).map(problem_text);
    let all = picture.error.clone().into_iter().chain(problems);
    all.map(|problem| Line::styled(format!("! {problem}"), Color::Red)).collect()
}

fn draw_members(frame: &mut Frame<'_>, picture: &Picture, area: Rect) {
    let status = &picture.status;
    let paths: BTreeMap<&str, &Value> = elements(&status["paths"])
        .filter_map(|path| Some((path["node"].as_str()?, path)))
        .collect();
    let mut members: Vec<(&Value, Option<&Value>)> = elements(&status["members"])
        .filter(|member| is_present(member))
        .map(|member| (member, member["node"].as_str().and_then(|id| paths.get(id)).copied()))
        .collect();
    let span = |path: &Option<&Value>| path.and_then(|path| path["round_trip_ms"].as_f64());
    match picture.order {
        Order::Name => {}
        Order::State => members.sort_by_key(|(member, path)| !has_problem(member, *path)),
        Order::RoundTrip => {
            members.sort_by(|(_, a), (_, b)| {
                span(b).unwrap_or(0.0).total_cmp(&span(a).unwrap_or(0.0))
            });
        }
    }
    let row = |(member, path): &(&Value, Option<&Value>)| {
        let state =
            if member["me"] == true { "this node".to_owned() } else { text(&member["liveness"]) };
        let way = path.map_or("-".to_owned(), |path| text(&path["state"]));
        let milliseconds = |key: &str| {
            let span = path.and_then(|path| path[key].as_f64());
            span.map_or("-".to_owned(), |span| format!("{span:.2} ms"))
        };
        let subnet = elements(&member["subnets"]).next().map(text).unwrap_or_default();
        let cells = [
            text(&member["name"]),
            state,
            way,
            milliseconds("underlay_round_trip_ms"),
            milliseconds("round_trip_ms"),
            subnet,
        ];
        let style =
            if has_problem(member, *path) { Style::new().fg(Color::Yellow) } else { Style::new() };
        Row::new(cells.map(Cell::from)).style(style)
    };
    let rows: Vec<Row<'_>> = members.iter().skip(picture.scroll).map(row).collect();
    let widths = [
        Constraint::Fill(2),
        Constraint::Length(10),
        Constraint::Length(14),
        Constraint::Length(11),
        Constraint::Length(11),
        Constraint::Fill(2),
    ];
    let header = Row::new(["NAME", "STATE", "PATH", "UNDERLAY", "OVERLAY", "SUBNET"]);
    let table = Table::new(rows, widths).header(header.style(Modifier::BOLD));
    frame.render_widget(table.block(Block::bordered().title("members")), area);
}

fn has_problem(member: &Value, path: Option<&Value>) -> bool {
    let way = path.and_then(|path| path["state"].as_str());
    let is_alive = member["me"] == true || member["liveness"] == "alive";
    !is_alive || way.is_some_and(|way| !matches!(way, "ok" | "unknown"))
}

fn draw_events(frame: &mut Frame<'_>, picture: &Picture, area: Rect) {
    let line = |event: &Value| {
        let at = Duration::from_secs_f64(event["at"].as_f64().unwrap_or(0.0));
        let at =
            humantime::format_rfc3339_seconds(std::time::SystemTime::UNIX_EPOCH + at).to_string();
        let style =
            if event["level"] == "warn" { Style::new().fg(Color::Yellow) } else { Style::new() };
        Line::styled(format!("{}  {:<8} {}", at, text(&event["kind"]), text(&event["text"])), style)
    };
    let newest = picture.events.iter().rev().take(usize::from(EVENT_LINES)).map(line);
    let lines: Vec<Line<'_>> = newest.collect();
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title("events, newest first")),
        area,
    );
}

/// Formats a rate in bits per second.
fn format_bits(bytes: f64) -> String {
    let bits = bytes * 8.0;
    let units = [(1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")];
    match units.into_iter().find(|(size, _)| bits >= *size) {
        Some((size, unit)) => format!("{:.1} {unit}", bits / size),
        None => format!("{bits:.0} bit/s"),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};
    use serde_json::json;

    use super::*;

    fn picture() -> Picture {
        let member = |name: &str, me: bool, liveness: &str| {
            json!({
                "name": name, "node": name, "me": me, "liveness": liveness, "left": false,
                "forgotten": false, "subnets": [format!("10.42.{}.0/24", name.len())],
            })
        };
        let path = |name: &str, state: &str| {
            json!({
                "node": name, "name": name, "state": state, "round_trip_ms": 0.51,
                "underlay_round_trip_ms": 0.25,
            })
        };
        let status = json!({
            "name": "n1", "verdict": { "state": "healthy", "text": "healthy" },
            "subnet": "10.42.2.0/24", "pods": 2,
            "members": [member("n1", true, "alive"), member("n20", false, "alive"),
                        member("n300", false, "down")],
            "paths": [path("n20", "ok"), path("n300", "unanswered")],
            "slots": { "leased": 3, "free": 252 },
            "problems": [{ "what": "the tunnel to n300 is blocked", "fix": "" }],
            "settings": { "pool": { "network": "10.42.0.0/16" } },
            "kernel": { "device": "gossamer.1", "underlay_interface": "eth0", "mtu": 1450,
                        "repairs": { "route": 2, "neighbor": 1 } },
        });
        let event = json!({ "at": 0.0, "kind": "path", "level": "warn", "text": "lost" });
        Picture {
            status,
            events: vec![event],
            traffic: Some([125_000.0, 0.0]),
            ..Picture::default()
        }
    }

    fn screen(picture: &Picture) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(90, 30)).expect("a terminal");
        terminal.draw(|frame| draw(frame, picture)).expect("drawn");
        let buffer = terminal.backend().buffer();
        let row = |y| (0..90).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..30).map(row).collect()
    }

    #[test]
    fn draw_member_with_problem_is_listed_first() {
        let lines = screen(&picture());
        let all = lines.join("\n");
        for words in [
            "n1  healthy  10.42.2.0/24 of 10.42.0.0/16",
            "members 2 alive of 3",
            "repairs 3",
            "in 1.0 Mbit/s  out 0 bit/s",
            "! the tunnel to n300 is blocked",
            "1970-01-01T00:00:00Z  path     lost",
        ] {
            assert!(all.contains(words), "{words} in\n{all}");
        }
        let place =
            |name: &str| lines.iter().position(|line| line.starts_with(&format!("│{name} ")));
        assert!(place("n300") < place("n1") && place("n300").is_some(), "{all}");
        let by_name = screen(&Picture { order: Order::Name, ..picture() });
        assert!(by_name.join("\n").contains("by name"));
    }

    #[test]
    fn draw_agent_gone_keeps_last_data_and_shows_error() {
        let gone = Picture { error: Some("no agent".to_owned()), ..picture() };
        let all = screen(&gone).join("\n");
        assert!(all.contains("! no agent") && all.contains("n20"), "{all}");
        // Without an earlier answer only the error is shown.
        assert!(
            screen(&Picture { error: Some("no agent".to_owned()), ..Picture::default() })
                .join("\n")
                .contains("! no agent")
        );
    }
}
