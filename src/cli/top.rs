//! `gossamer top`: a live view of this node in the terminal.

use std::{
    cell::Cell,
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
    widgets::{Block, Paragraph, Row, Table, Wrap},
};

use super::{Control, block_on, fail, output::problem_text};
use crate::{
    api::{
        self, AgentStatus, ClientError, EventLevel, Member, MemberState, PastEvents, PathStatus,
        VerdictState,
    },
    model::NodeId,
};

/// Time between two refreshes.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for the agent. Keys are not read meanwhile.
const QUERY_TIMEOUT: Duration = Duration::from_secs(2);
/// Number of events shown.
const EVENT_LINES: u16 = 8;
/// Lines of the frame around a list.
const FRAME_LINES: u16 = 2;
/// Below this width, the less important columns are left out.
const NARROW_COLUMNS: u16 = 80;

/// Data of one screen.
#[derive(Default)]
struct Picture {
    /// `None` before the first answer.
    status: Option<AgentStatus>,
    events: Vec<api::Event>,
    /// Bytes per second received and sent by the overlay device.
    traffic: Option<[f64; 2]>,
    /// Why the last query failed.
    error: Option<String>,
    /// Index of the first member shown.
    scroll: usize,
    /// Greatest such index, with which the last member is shown; set when drawing.
    last_scroll: Cell<usize>,
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

pub fn run(control: &Control) -> ExitCode {
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return fail(
            "top: standard input and output must be a terminal: use `gossamer status` instead",
        );
    }
    let mut terminal = ratatui::init();
    let ended = watch(control, |picture| terminal.draw(|frame| draw(frame, picture)).map(drop));
    ratatui::restore();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error),
    }
}

fn watch(control: &Control, mut draw: impl FnMut(&Picture) -> io::Result<()>) -> io::Result<()> {
    let socket = control.socket();
    let mut picture = Picture::default();
    let mut previous: Option<(Instant, [u64; 2])> = None;
    loop {
        let begun = Instant::now();
        let response =
            block_on(async { tokio::time::timeout(QUERY_TIMEOUT, fetch(&socket)).await })?;
        match response.map_err(|_| format!("the agent does not answer within {QUERY_TIMEOUT:?}")) {
            Ok(Ok((status, events))) => {
                let device = status.kernel.device.as_deref().unwrap_or_default();
                let now = device_bytes(device).map(|bytes| (begun, bytes));
                picture.traffic = previous.zip(now).map(|(before, now)| rate(before, now));
                previous = now;
                (picture.status, picture.events, picture.error) = (Some(status), events, None);
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
            match key.code {
                _ if key.kind != KeyEventKind::Press => continue,
                KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                    return Ok(());
                }
                KeyCode::Char('s') => picture.order = picture.order.next(),
                KeyCode::Down => {
                    picture.scroll = (picture.scroll + 1).min(picture.last_scroll.get());
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

async fn fetch(socket: &Path) -> Result<(AgentStatus, Vec<api::Event>), ClientError> {
    let status = api::get_as(socket, "/v1/status").await?;
    let PastEvents { events } = api::get_as(socket, "/v1/events?follow=false").await?;
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
        Constraint::Length(EVENT_LINES + FRAME_LINES),
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
    let Some(status) = status else { return vec![Line::default(); 4] };
    let AgentStatus { verdict, kernel, slots, .. } = status;
    let color = match verdict.state {
        VerdictState::Healthy => Color::Green,
        VerdictState::Degraded => Color::Yellow,
        VerdictState::NotReady => Color::Red,
    };
    let state = Span::styled(verdict.to_string(), color);
    let name = Span::styled(status.name.clone(), Modifier::BOLD);
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let subnet = or_none(status.subnet.map(|subnet| subnet.to_string()));
    let network = status.settings.as_ref().map(|settings| settings.pool.network().to_string());
    let subnet = format!("  {subnet} of {}", or_none(network));
    let present = status.members.iter().filter(|member| member.is_current()).count();
    let [inward, outward] =
        traffic.map_or(["-".to_owned(), "-".to_owned()], |t| t.map(format_bits));
    let repairs: u64 = kernel.repairs.values().sum();
    vec![
        Line::from(vec![name, Span::raw("  "), state, Span::raw(subnet)]),
        Line::from(format!(
            "members {} alive of {present}   subnets {} leased, {} free   pods {}   repairs {repairs}",
            status.members_alive(),
            slots.leased,
            slots.free,
            status.pods
        )),
        Line::from(format!(
            "{} on {}   mtu {}   in {inward}  out {outward}",
            or_none(kernel.device.clone()),
            kernel.underlay_interface,
            kernel.mtu
        )),
        Line::default(),
    ]
}

fn problem_lines(picture: &Picture) -> Vec<Line<'static>> {
    let problems = picture.status.iter().flat_map(|status| &status.problems).map(problem_text);
    let all = picture.error.clone().into_iter().chain(problems);
    all.map(|problem| Line::styled(format!("! {problem}"), Color::Red)).collect()
}

fn draw_members(frame: &mut Frame<'_>, picture: &Picture, area: Rect) {
    let paths = picture.status.iter().flat_map(|status| &status.paths);
    let paths: BTreeMap<NodeId, &PathStatus> = paths.map(|path| (path.node, path)).collect();
    let members = picture.status.iter().flat_map(|status| &status.members);
    let mut members: Vec<(&Member, Option<&PathStatus>)> = members
        .filter(|member| member.is_current())
        .map(|member| (member, paths.get(&member.node).copied()))
        .collect();
    let span = |path: &Option<&PathStatus>| path.and_then(|path| path.round_trip_ms);
    match picture.order {
        Order::Name => {}
        Order::State => members.sort_by_key(|(member, path)| !has_problem(member, *path)),
        Order::RoundTrip => {
            members.sort_by(|(_, a), (_, b)| {
                span(b).unwrap_or(0.0).total_cmp(&span(a).unwrap_or(0.0))
            });
        }
    }
    let is_narrow = area.width < NARROW_COLUMNS;
    let row = |(member, path): &(&Member, Option<&PathStatus>)| {
        let state = if member.me { "this node".to_owned() } else { member.state().to_string() };
        let way = path.map_or("-", |path| path.state.name());
        let milliseconds =
            |span: Option<f64>| span.map_or("-".to_owned(), |span| format!("{span:.2} ms"));
        let subnet = member.subnets.first().map(ToString::to_string).unwrap_or_default();
        let mut cells = vec![member.label.clone(), state, way.to_owned()];
        if !is_narrow {
            cells.push(milliseconds(path.and_then(|path| path.underlay_round_trip_ms)));
        }
        cells.extend([milliseconds(path.and_then(|path| path.round_trip_ms)), subnet]);
        let style =
            if has_problem(member, *path) { Style::new().fg(Color::Yellow) } else { Style::new() };
        Row::new(cells).style(style)
    };
    let visible = usize::from(area.height.saturating_sub(FRAME_LINES + 1));
    picture.last_scroll.set(members.len().saturating_sub(visible));
    let scroll = picture.scroll.min(picture.last_scroll.get());
    let rows: Vec<Row<'_>> = members.iter().skip(scroll).map(row).collect();
    let columns = [
        ("NAME", Constraint::Fill(1)),
        ("STATE", Constraint::Length(9)),
        ("PATH", Constraint::Length(11)),
        ("RTT DIRECT", Constraint::Length(11)),
        ("RTT TUNNEL", Constraint::Length(11)),
        ("SUBNET", Constraint::Min(15)),
    ];
    let columns = columns.into_iter().filter(|(name, _)| !is_narrow || *name != "RTT DIRECT");
    let (names, widths): (Vec<&str>, Vec<Constraint>) = columns.unzip();
    let header = Row::new(names);
    let table = Table::new(rows, widths).header(header.style(Modifier::BOLD));
    frame.render_widget(table.block(Block::bordered().title("members")), area);
}

fn has_problem(member: &Member, path: Option<&PathStatus>) -> bool {
    let is_alive = member.me || member.state() == MemberState::Alive;
    !is_alive || path.is_some_and(|path| path.state.is_problem())
}

fn draw_events(frame: &mut Frame<'_>, picture: &Picture, area: Rect) {
    let line = |event: &api::Event| {
        let at = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs_f64(event.at);
        let at = humantime::format_rfc3339_seconds(at);
        let is_warning = event.level == EventLevel::Warn;
        let style = if is_warning { Style::new().fg(Color::Yellow) } else { Style::new() };
        Line::styled(format!("{at}  {:<8} {}", event.kind.name(), event.text), style)
    };
    let newest = picture.events.iter().rev().take(usize::from(EVENT_LINES)).map(line);
    let lines: Vec<Line<'_>> = newest.collect();
    frame.render_widget(
        Paragraph::new(lines)
            .wrap(Wrap { trim: true })
            .block(Block::bordered().title("events, newest first")),
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
    use crate::{
        core::NodeStatus,
        model::{Problem, ProblemCode},
    };

    fn picture() -> Picture {
        let id = |number: u64| format!("{number:016x}");
        let member = |number: u64, name: &str, liveness: &str| {
            json!({
                "name": name, "label": name, "former_self": false, "node": id(number),
                "me": number == 1, "liveness": liveness,
                "left": false, "forgotten": false, "awaited": false, "address": "192.0.2.1:8473",
                "underlay": "192.0.2.1", "vtep_mac": "02:00:00:00:00:01", "free": 0,
                "subnets": [format!("10.42.{}.0/24", name.len())],
            })
        };
        let path = |number: u64, name: &str, state: &str| {
            json!({
                "node": id(number), "name": name, "state": state, "round_trip_ms": 0.51,
                "underlay_round_trip_ms": 0.25, "pods_answer": false,
            })
        };
        let node = NodeStatus::waiting(
            NodeId::UNKNOWN,
            "n1".parse().expect("a name"),
            Problem::new(ProblemCode::PathLost, "n300", "the tunnel to n300 is blocked", ""),
        );
        let mut status = serde_json::to_value(AgentStatus::of(node)).expect("JSON");
        let more = json!({
            "subnet": "10.42.2.0/24", "pods": 2,
            "members": [member(1, "n1", "alive"), member(2, "n20", "alive"), member(3, "n300", "down")],
            "paths": [path(2, "n20", "ok"), path(3, "n300", "unanswered")],
            "slots": { "leased": 3, "free": 252, "own_free": 0, "total": 255 },
            "settings": {
                "pool": { "network": "10.42.0.0/16", "subnet_len": 24, "first": 1, "last": 255 },
                "vni": 1, "vxlan_port": 8472,
            },
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            status[key] = value.clone();
        }
        status["kernel"]["device"] = "gossamer.1".into();
        status["kernel"]["repairs"] = json!({ "route": 2, "neighbor": 1 });
        let event = api::Event {
            number: 1,
            at: 0.0,
            kind: api::EventKind::Path,
            level: EventLevel::Warn,
            text: "lost".to_owned(),
            member: None,
        };
        Picture {
            status: Some(serde_json::from_value(status).expect("a status")),
            events: vec![event],
            traffic: Some([125_000.0, 0.0]),
            ..Picture::default()
        }
    }

    fn screen(picture: &Picture) -> Vec<String> {
        screen_of(picture, 90)
    }

    fn screen_of(picture: &Picture, columns: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, 30)).expect("a terminal");
        terminal.draw(|frame| draw(frame, picture)).expect("drawn");
        let buffer = terminal.backend().buffer();
        let row = |y| (0..columns).map(|x| buffer[(x, y)].symbol()).collect::<String>();
        (0..30).map(row).collect()
    }

    #[test]
    fn draw_list_that_fits_is_not_scrolled_and_a_narrow_screen_shows_subnets() {
        let scrolled = Picture { scroll: 2, ..picture() };
        let all = screen(&scrolled).join("\n");
        assert!(all.contains("n1 ") && all.contains("n20") && all.contains("RTT DIRECT"), "{all}");
        assert_eq!(scrolled.last_scroll.get(), 0);
        let narrow = screen_of(&picture(), 60).join("\n");
        assert!(narrow.contains("10.42.4.0/24") && !narrow.contains("RTT DIRECT"), "{narrow}");
    }

    #[test]
    fn draw_long_event_is_wrapped() {
        let mut long = picture();
        long.events[0].text = "word ".repeat(30) + "end";
        let all = screen(&long).join("\n");
        assert!(all.contains("end"), "{all}");
    }

    #[test]
    fn draw_member_with_problem_is_listed_first() {
        let lines = screen(&picture());
        let all = lines.join("\n");
        for words in [
            "n1  degraded: 1 problem  10.42.2.0/24 of 10.42.0.0/16",
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
