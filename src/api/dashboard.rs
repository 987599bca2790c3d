//! What the dashboard needs beside the answers of the control socket: its stream of events, and who may ask.
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
    http::{HeaderMap, StatusCode, header::HOST},
    middleware::{self, Next},
    response::{
        IntoResponse,
        sse::{self, KeepAlive, Sse},
    },
};
use futures_util::stream::{self, Stream, StreamExt as _};
use tokio::sync::broadcast::error::RecvError;

use super::{Event, EventFeed};

/// Between two signs of life on a quiet stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

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
    use super::*;

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
