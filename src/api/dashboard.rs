//! The dashboard: the embedded page, its stream of events, and access control.
//!
//! The page shows the same data as `gossamer status`. It changes nothing and loads nothing from other
//! servers.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use axum::{
    Router,
    extract::Request,
    http::{
        HeaderMap, HeaderName, StatusCode,
        header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, REFERRER_POLICY},
    },
    middleware::{self, Next},
    response::{
        IntoResponse,
        sse::{self, KeepAlive, Sse},
    },
    routing::get,
};
use futures_util::stream::{self, Stream, StreamExt as _};
use tokio::sync::broadcast::error::RecvError;

use super::{Event, EventFeed};
use crate::model::ProblemCode;

/// Allows the page to load only its own files, and forbids framing it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Interval of keep-alive comments on a stream without events.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, content type and content of a file.
type File = (&'static str, &'static str, &'static str);

macro_rules! scripts {
    ($($name:literal),+ $(,)?) => {
        [$((concat!("/", $name), SCRIPT, include_str!(concat!("dashboard/", $name)))),+]
    };
}

const PAGE: [File; 2] = [
    ("/", HTML, include_str!("dashboard/index.html")),
    ("/dashboard.css", CSS, include_str!("dashboard/dashboard.css")),
];
const SCRIPTS: [File; 24] = scripts![
    "addresses.js",
    "cells.js",
    "chart.js",
    "detail.js",
    "dom.js",
    "events.js",
    "feed.js",
    "history.js",
    "icon.js",
    "layout.js",
    "main.js",
    "map.js",
    "matrix.js",
    "members.js",
    "model.js",
    "owners.js",
    "paint.js",
    "pathwords.js",
    "pool.js",
    "problems.js",
    "summary.js",
    "theme.js",
    "tile.js",
    "words.js",
];

/// Serves the page's files.
pub fn pages<S: Clone + Send + Sync + 'static>() -> Router<S> {
    PAGE.into_iter().chain(SCRIPTS).fold(Router::new(), |router, (path, content_type, text)| {
        router.route(path, get(move || async move { (headers(content_type), text) }))
    })
}

/// Returns the page that explains the codes of problems, with an anchor for each.
pub async fn problem_codes() -> impl IntoResponse {
    let mut page = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>gossamer: problem \
         codes</title><link rel=\"stylesheet\" href=\"dashboard.css\"><main class=\"codes\"><h1>Problem \
         codes</h1><p>docs/TROUBLESHOOTING.md says more about each.</p><dl>",
    );
    for code in ProblemCode::ALL {
        let (name, means) = (code.name(), code.description());
        // Names and descriptions are constants without markup.
        page.push_str(&format!("<dt id=\"{name}\"><code>{name}</code></dt><dd>{means}</dd>"));
    }
    page.push_str("</dl></main></html>\n");
    (headers(HTML), page)
}

/// Returns the headers of every page of the dashboard.
const fn headers(content_type: &'static str) -> [(HeaderName, &'static str); 4] {
    [
        (CONTENT_TYPE, content_type),
        (CONTENT_SECURITY_POLICY, POLICY),
        (CACHE_CONTROL, "no-cache"),
        (REFERRER_POLICY, "no-referrer"),
    ]
}

/// On a loopback address, answers only requests whose `Host` is a number or `localhost`. A page of
/// another site whose name is made to resolve to this host (DNS rebinding) still sends that name as
/// `Host`.
pub fn only_for(address: SocketAddr, router: Router) -> Router {
    if !address.ip().is_loopback() {
        return router;
    }
    router.layer(middleware::from_fn(async |request: Request, next: Next| {
        if names_this_host(request.headers()) {
            next.run(request).await
        } else {
            let why = "misdirected request: use an IP address or localhost as the host name\n";
            (StatusCode::MISDIRECTED_REQUEST, why).into_response()
        }
    }))
}

fn names_this_host(headers: &HeaderMap) -> bool {
    let Some(host) = headers.get(HOST) else { return true };
    let Ok(host) = host.to_str() else { return false };
    host.parse::<SocketAddr>().is_ok()
        || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
        || host.split(':').next() == Some("localhost")
}

/// Streams the past events that the client has not seen, then new ones.
pub fn stream(
    feed: EventFeed,
    seen: Option<u64>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let last = feed.past.last().map_or(0, |event| event.number);
    // A larger number is from before the agent's start and counts other events.
    let seen = seen.filter(|seen| *seen <= last).unwrap_or(0);
    let past = stream::iter(feed.past.into_iter().filter(move |event| event.number > seen));
    let live = stream::unfold(feed.live, async |mut live| {
        loop {
            match live.recv().await {
                Ok(event) => return Some((event, live)),
                // A slow reader misses events. Gaps in the numbers show that.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    });
    let message = |event: Event| {
        let text = serde_json::to_string(&event).unwrap_or_default();
        Ok(sse::Event::default().id(event.number.to_string()).data(text))
    };
    Sse::new(past.chain(live).map(message)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn pages_serve_every_file_of_the_directory() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/src/api/dashboard");
        let there = std::fs::read_dir(directory).expect("a directory");
        let there: BTreeSet<String> = there
            .map(|entry| format!("/{}", entry.expect("an entry").file_name().display()))
            .collect();
        let served = PAGE.into_iter().chain(SCRIPTS).map(|(path, ..)| match path {
            "/" => "/index.html".to_owned(),
            path => path.to_owned(),
        });
        assert_eq!(served.collect::<BTreeSet<_>>(), there);
    }

    #[test]
    fn names_this_host_accepts_only_numbers_and_localhost() {
        let called = |host: &str| {
            let headers = HeaderMap::from_iter([(HOST, host.parse().expect("a value"))]);
            names_this_host(&headers)
        };
        for fine in ["127.0.0.1", "127.0.0.1:9473", "[::1]:9473", "[::1]", "localhost:9473"] {
            assert!(called(fine), "{fine}");
        }
        for foreign in ["evil.example", "evil.example:9473", "127.0.0.1.evil.example", ""] {
            assert!(!called(foreign), "{foreign}");
        }
    }
}
