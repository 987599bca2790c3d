//! The dashboard in a real browser: of a real cluster, and of a hundred members.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
};

use gossamer::lab::NetNs;
use serde_json::{Value, json};

use crate::{
    browser::{self, Browser},
    common::{Cluster, isolated, skipped, tool},
};

const PORT: u16 = 9473;
const URL: &str = "http://127.0.0.1:9473/";

/// Returns whether a browser is installed; otherwise reports the test as skipped.
fn has_browser(test: &str) -> bool {
    let has = browser::is_installed();
    if !has {
        skipped(test, "chromium is not installed");
    }
    has
}

/// Returns the directory for screenshots, if one is wanted; it outlives the test.
fn screenshot_directory() -> Option<PathBuf> {
    std::env::var_os("GOSSAMER_SCREENSHOTS").map(PathBuf::from)
}

fn photograph(browser: &mut Browser, name: &str) -> anyhow::Result<()> {
    match screenshot_directory() {
        Some(screenshot_directory) => browser.photograph(&screenshot_directory.join(name)),
        None => Ok(()),
    }
}

/// Checks that nothing overflows the page, in both color schemes.
fn assert_fits(browser: &mut Browser, width: u32) -> anyhow::Result<()> {
    for scheme in ["light", "dark"] {
        browser.set_screen(width, 800, scheme)?;
        let wide = browser.ask("document.documentElement.scrollWidth")?;
        assert!(wide.as_u64() <= Some(u64::from(width)), "{wide} at {width} in {scheme}");
    }
    Ok(())
}

#[test]
fn dashboard_shows_a_real_cluster_and_its_changes() {
    if !has_browser("dashboard_shows_a_real_cluster_and_its_changes") {
        return;
    }
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 3)?;
        cluster.restart(0, &["--http", &format!("127.0.0.1:{PORT}")])?;
        let mut browser = Browser::start(&cluster.hosts[0].netns)?;
        browser.set_screen(1280, 900, "light")?;
        browser.open(URL)?;
        browser.wait_for("document.getElementById('verdict').innerText === 'healthy'")?;
        let rows = "document.querySelectorAll('#members tbody tr').length";
        assert_eq!(browser.ask(rows)?, 3);
        let summary = "document.getElementById('matrix-summary').innerText";
        browser.wait_for(&format!("{summary}.includes('6')"))?;
        let problems = browser.ask("document.getElementById('problems').innerText")?;
        assert!(problems.as_str().is_some_and(|text| text.contains("No problems")), "{problems}");
        photograph(&mut browser, "dashboard-three.png")?;

        // Events appear as they happen.
        let host = &cluster.hosts[0].netns;
        tool(host, "ip route flush root 10.42.0.0/16 proto 73");
        let events = "document.getElementById('events').innerText";
        browser.wait_for(&format!("{events}.includes('repaired changes')"))?;
        tool(host, "sysctl -w net.ipv4.ip_forward=0");
        let problems = "document.getElementById('problems').innerText";
        browser.wait_for(&format!("{problems}.includes('sysctl -w net.ipv4.ip_forward=1')"))?;
        let verdict = "document.getElementById('verdict').innerText";
        browser
            .wait_for(&format!("{verdict}.startsWith('not ready: net.ipv4.ip_forward is 0')"))?;
        let explained =
            browser.ask("document.querySelector('#problems a').getAttribute('href')")?;
        assert_eq!(explained, "problems#forwarding-off");
        browser.ask("document.querySelector('#problems .copy').click()")?;
        browser.wait_for("document.querySelector('#problems .copy').innerText === 'Copied'")?;
        tool(host, "sysctl -w net.ipv4.ip_forward=1");
        browser.wait_for(&format!("{verdict} === 'healthy'"))?;
        cluster.agents[2].end(nix::sys::signal::Signal::SIGKILL)?;
        // A member that is down is a problem.
        browser.wait_for(&format!("{problems}.includes('n3 is down')"))?;
        browser.wait_for(&format!("{verdict} === 'degraded: 1 problem'"))?;
        browser.wait_for("document.getElementById('members').innerText.includes('down')")?;
        assert_eq!(browser.page_errors, [""; 0]);
        // The page reports when the agent no longer answers.
        cluster.agents[0].end(nix::sys::signal::Signal::SIGTERM)?;
        browser.wait_for("document.getElementById('stale').innerText.includes('No answer')")?;
        assert_eq!(browser.ask(rows)?, 3, "the last data stays visible");
        Ok(())
    });
}

#[test]
fn dashboard_of_a_hundred_members_is_usable_by_keyboard_and_on_a_phone() {
    if !has_browser("dashboard_of_a_hundred_members_is_usable_by_keyboard_and_on_a_phone") {
        return;
    }
    isolated(|_| {
        let netns = NetNs::new("page")?;
        let listener = netns.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)))?;
        thread::spawn(move || listener.incoming().flatten().for_each(serve));
        let mut browser = Browser::start(&netns)?;
        browser.set_screen(1600, 1200, "dark")?;
        browser.open(URL)?;
        // A member that was forgotten shows on request only.
        let rows = "document.querySelectorAll('#members tbody tr').length";
        assert_eq!(browser.ask(rows)?, 99);
        browser.ask("document.getElementById('with-past').click()")?;
        assert_eq!(browser.ask(rows)?, 100);
        let headings = browser.ask("document.querySelector('#members thead').innerText")?;
        assert!(!headings.as_str().is_some_and(|text| text.contains("MAC")), "{headings}");
        let summary = browser.ask("document.getElementById('matrix-summary').innerText")?;
        let summary = summary.as_str().unwrap_or_default();
        assert!(summary.contains("n7") && summary.contains("unanswered"), "{summary}");
        // The legends have the signs that occur, and the list of all signs has the others.
        let legend = browser.ask("document.getElementById('map-legend').textContent")?;
        let legend = legend.as_str().unwrap_or_default();
        assert!(legend.contains("suspect") && !legend.contains("asymmetric"), "{legend}");
        let signs = browser.ask("document.getElementById('all-signs').textContent")?;
        assert!(signs.as_str().is_some_and(|text| text.contains("asymmetric")), "{signs}");
        // The panel names the pods of this host. What few readers need is folded.
        let panel = browser.ask("document.getElementById('detail').innerText")?;
        let panel = panel.as_str().unwrap_or_default();
        assert!(
            panel.contains("0123456789ab eth0") && panel.contains("10.42.1.2; orphan"),
            "{panel}"
        );
        assert!(panel.contains("COUNTERS") && !panel.contains("grants"), "{panel}");
        // Names are shown as text, even if they contain markup.
        assert_eq!(browser.ask("document.querySelectorAll('#members b, #map b').length")?, 0);
        photograph(&mut browser, "dashboard.png")?;

        // Reach the map by keyboard alone, move along its hosts, and open the details of one.
        for _ in 0..12 {
            browser.press("Tab")?;
            if browser.ask("!!document.activeElement.closest('#map')")? == true {
                break;
            }
        }
        let focused = "document.activeElement.closest('#map') !== null";
        assert_eq!(browser.ask(focused)?, true, "the map is reached");
        browser.press("ArrowRight")?;
        browser.press("Enter")?;
        let detail = browser.ask("document.getElementById('detail').innerText")?;
        assert!(detail.as_str().is_some_and(|text| text.contains("10.42.")), "{detail}");
        // Read the matrix cell by cell.
        browser.ask("document.getElementById('matrix').focus()")?;
        browser.press("ArrowRight")?;
        browser.press("ArrowDown")?;
        let cell = browser.ask("document.getElementById('matrix-cursor').innerText")?;
        assert!(cell.as_str().is_some_and(|text| text.contains(" to ")), "{cell}");
        // The reader can choose the theme.
        let scheme = "getComputedStyle(document.documentElement).colorScheme";
        let before = browser.ask(scheme)?;
        browser.ask("document.getElementById('theme').click()")?;
        assert_ne!(browser.ask(scheme)?, before);
        for width in [360, 800, 1600] {
            assert_fits(&mut browser, width)?;
        }
        // On a phone the links to the sections stay in view.
        browser.set_screen(360, 800, "light")?;
        browser.ask("scrollTo(0, 2000)")?;
        browser.wait_for("scrollY > 1000")?;
        let top = browser.ask("document.querySelector('nav').getBoundingClientRect().top")?;
        assert_eq!(top, 0);
        // The panel has no scroll bar of its own beside that of the page.
        browser.set_screen(1600, 600, "light")?;
        let panel = "(panel => panel.scrollHeight - panel.clientHeight)\
                     (document.getElementById('detail'))";
        assert_eq!(browser.ask(panel)?, 0);
        assert_eq!(browser.page_errors, [""; 0]);
        browser.set_screen(360, 800, "light")?;
        photograph(&mut browser, "dashboard-phone.png")
    });
}

/// Serves the real files of the page, and an invented cluster.
fn serve(mut stream: TcpStream) {
    let mut request = [0; 4096];
    let length = stream.read(&mut request).unwrap_or(0);
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    let path = request.split(' ').nth(1).unwrap_or("/").to_owned();
    let (content_type, body) = match path.as_str() {
        "/v1/status" => ("application/json", status().to_string()),
        "/v1/matrix" => ("application/json", matrix().to_string()),
        "/v1/pods" => ("application/json", pods().to_string()),
        "/v1/samples" => ("application/json", samples().to_string()),
        "/v1/events" => {
            let event = json!({
                "number": 1, "at": 1_764_000_000.5, "kind": "member", "level": "warn",
                "text": "n7 is down",
            });
            ("text/event-stream", format!("id: 1\ndata: {event}\n\n"))
        }
        path => {
            let name = if path == "/" { "index.html" } else { path.trim_start_matches('/') };
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api/dashboard").join(name);
            let content_type = match name.rsplit('.').next() {
                Some("js") => "text/javascript",
                Some("css") => "text/css",
                _ => "text/html",
            };
            (content_type, fs::read_to_string(file).unwrap_or_default())
        }
    };
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {content_type}; charset=utf-8\r\nconnection: close\r\n\
         content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src \
         'self'; img-src 'self' data:\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
}

fn id(number: u32) -> String {
    format!("{:016x}", u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn name(number: u32) -> String {
    if number == 50 { "<b>n50</b>".to_owned() } else { format!("n{number}") }
}

/// Returns the status of n1 to n100: for n1, one peer is unanswered, one down and one suspect.
fn status() -> Value {
    let liveness = |number| match number {
        7 => "down",
        9 => "suspect",
        _ => "alive",
    };
    let members: Vec<Value> = (1..=100)
        .map(|number| {
            json!({
                "node": id(number), "name": name(number), "me": number == 1,
                "liveness": liveness(number), "left": false, "forgotten": number == 99,
                "heard": true, "address": format!("10.99.{}.{number}:8473", number % 3),
                "underlay": format!("10.99.{}.{number}", number % 3),
                "vtep_mac": format!("02:00:00:00:00:{number:02x}"),
                "subnets": [format!("10.42.{number}.0/24")], "free": u32::from(number == 2) * 155,
            })
        })
        .collect();
    let paths: Vec<Value> = path_list(1);
    json!({
        "version": "0.1.0", "converged": true, "node": id(1), "name": "n1", "phase": "member",
        "cluster": "0123456789abcdef", "subnet": "10.42.1.0/24", "subnet6": null,
        "settings": {
            "pool": {
                "network": "10.42.0.0/16", "network6": null, "subnet_len": 24, "first": 1,
                "last": 255, "subnet_len6": null,
            },
            "vni": 1, "vxlan_port": 8472,
        },
        "slots": { "total": 255, "leased": 100, "free": 155, "own_free": 0 },
        "settled": true, "synced": true, "members": members, "paths": paths,
        "free_slots": [{
            "first": "10.42.101.0/24", "last": "10.42.255.0/24", "count": 155, "node": id(2),
            "name": "n2", "liveness": "alive",
        }],
        "reclaiming": [{
            "node": id(99), "name": "n99", "successor": id(2), "slots": 1, "waits_for": ["n7"],
        }],
        "verdict": { "state": "degraded", "text": "degraded: 1 problem" },
        "problems": [{
            "code": "path-lost", "severity": "problem", "subject": "n7", "since": 1_764_000_000,
            "what": "no probe of n7 through the tunnel is answered, though its agent is alive",
            "fix": "allow UDP 8472 from 10.99.1.1 to 10.99.1.7",
        }],
        "notices": [],
        "counters": { "grants": 3, "downs": 1 },
        "kernel": {
            "device": "gossamer.1", "mtu": 1450, "underlay_interface": "eth0",
            "underlay_address": "10.99.1.1", "in_sync": true, "operations": 300,
            "repairs": { "route": 2 }, "checksum_offload": true, "non_members_dropped": 0,
            "peers_in_use": null, "misses_answered": 0, "misses_unknown": 0,
        },
        "pods": 4, "pods_outside": 0, "connections": 12,
    })
}

fn pods() -> Value {
    json!({ "pods": [{
        "container": "0123456789abcdef".repeat(4), "interface": "eth0", "owner": "cni/gossamer",
        "addresses": ["10.42.1.2"], "link": "gsmp1", "netns": "/run/netns/web", "orphan": true,
    }] })
}

fn path_list(from: u32) -> Vec<Value> {
    let others = (1..=100).filter(|to| *to != from);
    others
        .map(|to| {
            let state = if to == 7 || from == 7 { "unanswered" } else { "ok" };
            json!({
                "node": id(to), "name": name(to), "state": state, "problem": null,
                "round_trip_ms": 0.2 + f64::from((from * 31 + to * 17) % 40) / 50.0,
            })
        })
        .collect()
}

fn matrix() -> Value {
    let row = |from| {
        // One member does not answer.
        let paths = if from == 7 { Value::Null } else { Value::from(path_list(from)) };
        json!({
            "node": id(from), "name": name(from), "version": "0.1.0", "problems": 0,
            "paths": paths,
        })
    };
    json!({ "rows": (1..=100).map(row).collect::<Vec<_>>(), "omitted": 0 })
}

fn samples() -> Value {
    let sample = |number: u64| {
        json!({
            "at": 1_764_000_000 + number * 10, "members": 100, "alive": 100 - number % 3,
            "converged": !number.is_multiple_of(50), "round_trip_ms": 0.3, "worst_round_trip_ms": 1.2,
            "paths_ok": 98, "paths_bad": number % 2, "repairs": number / 40,
        })
    };
    json!({ "interval_seconds": 10, "samples": (0..360).map(sample).collect::<Vec<_>>() })
}
