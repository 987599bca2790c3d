//! Where questions come in: the control socket, Docker's plugin and the `http` listener.

use std::{net::TcpListener, os::unix::net};

use tokio::{net::UnixListener, sync::mpsc};

use super::{News, StartFailure};
use crate::{api, config::Config, docker};

/// The listeners of an agent. They are open before the agent waits for anything outside, its disk included:
/// an agent that cannot begin says why. The socket files are removed with it.
pub(super) struct Doors {
    _control: api::Socket,
    _plugin: Option<api::Socket>,
}

impl Doors {
    /// Opens them; questions are sent to `news`. `plugin` is the socket of Docker's plugin, if the service
    /// manager has opened it.
    ///
    /// # Errors
    /// Fails if an address is in use, or if a socket file cannot be made.
    pub(super) fn open(
        config: &Config,
        plugin: Option<net::UnixListener>,
        news: &mpsc::UnboundedSender<News>,
    ) -> Result<Self, StartFailure> {
        let questions = || {
            let report = news.clone();
            move |question| report.send(News::Api(question)).is_ok()
        };
        let control = api::serve(&config.socket, questions())?;
        let report = news.clone();
        let ask = move |request| report.send(News::Docker(request)).is_ok();
        let plugin = match (plugin, &config.docker_plugin) {
            (Some(listener), _) => {
                docker::handle(UnixListener::from_std(listener)?, ask);
                None
            }
            (None, Some(path)) => {
                let (socket, listener) = api::Socket::listen(path)?;
                docker::handle(listener, ask);
                Some(socket)
            }
            (None, None) => None,
        };
        if let Some(address) = config.http {
            let bound =
                TcpListener::bind(address).and_then(|listener| api::observe(listener, questions()));
            bound.map_err(|error| StartFailure::Http { address, error })?;
        }
        Ok(Self { _control: control, _plugin: plugin })
    }
}
