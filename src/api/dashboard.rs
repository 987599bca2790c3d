//! The dashboard: a page that is part of the program, its stream of events, and who may open it.
//!
//! Everything it shows comes from the same answers as `gossamer status`; it changes nothing and needs nothing
//! from elsewhere.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use axum::{
    Router,
    extract::Request,
    http::{
        HeaderMap, StatusCode,
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

/// The page may load only what comes from here, and nothing may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Between two signs of life on a quiet stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, type, text.
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
const SCRIPTS: [File; 23] = scripts![
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
    "summary.js",
    "theme.js",
    "tile.js",
    "words.js",
];

/// The page's own files.
pub fn pages<S: Clone + Send + Sync + 'static>() -> Router<S> {
    PAGE.into_iter().chain(SCRIPTS).fold(Router::new(), |router, (path, content_type, text)| {
        let headers = [
            (CONTENT_TYPE, content_type),
            (CONTENT_SECURITY_POLICY, POLICY),
            (CACHE_CONTROL, "no-cache"),
            (REFERRER_POLICY, "no-referrer"),
        ];
        router.route(path, get(move || async move { (headers, text) }))
    })
}

/// Where only this host can ask, only pages of this host may. A page from elsewhere whose name is made to
/// lead here (DNS rebinding) still calls this server by that name.
pub fn only_for(address: SocketAddr, router: Router) -> Router {
    if !address.ip().is_loopback() {
        return router;
    }
    router.layer(middleware::from_fn(async |request: Request, next: Next| {
        if names_this_host(request.headers()) {
            next.run(request).await
        } else {
            let why = "this address answers only if it is called by its number, or localhost\n";
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

/// Those events that are kept and were not seen yet, then each as it happens.
pub fn stream(
    feed: EventFeed,
    seen: Option<u64>,
) -> Sse<impl Stream<Item = Result<sse::Event, Infallible>>> {
    let last = feed.past.last().map_or(0, |event| event.number);
    // A number from before the agent's start is of other events.
    let seen = seen.filter(|seen| *seen <= last).unwrap_or(0);
    let past = stream::iter(feed.past.into_iter().filter(move |event| event.number > seen));
    let live = stream::unfold(feed.live, async |mut live| {
        loop {
            match live.recv().await {
                Ok(event) => return Some((event, live)),
                // Whoever is too slow misses some, which the numbers tell.
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
    fn every_file_of_the_page_is_served_under_its_own_name() {
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
    fn only_numbers_and_localhost_are_names_of_this_host() {
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
