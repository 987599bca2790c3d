//! SIGHUP: what can be changed while the agent runs is read again.
//!
//! That is the log's filter, the seeds and the token. All other settings take effect at the next start, which
//! costs no packet. Settings that cannot be used change nothing.

use super::Agent;
use crate::{
    api::{EventKind, EventLevel},
    config::Config,
    wire::SecretOrder,
};

/// Reads the settings again, and has the log follow them; says what is wrong with them.
pub type Reread = Box<dyn Fn() -> Result<Config, String> + Send + Sync>;

impl Agent {
    pub(super) fn reload(&mut self, reread: &Reread) {
        let config = match reread() {
            Ok(config) => config,
            Err(why) => {
                tracing::error!(%why, "the settings cannot be used, and nothing was changed");
                let text = format!("the settings cannot be used, and nothing was changed: {why}");
                return self.journal.note(EventKind::Agent, EventLevel::Warn, text);
            }
        };
        if config.seeds != self.given_seeds {
            // Those of the saved token and of Kubernetes stay.
            let given = std::mem::replace(&mut self.given_seeds, config.seeds);
            let others = self.config.seeds.iter().filter(|seed| !given.contains(seed));
            let seeds = self.given_seeds.iter().chain(others).cloned().collect();
            self.config.seeds = seeds;
            self.node.set_seeds(self.clock.now(), self.config.seeds.len());
        }
        if let Some(token) = config.token
            && self.config.pod_cidr.is_none()
        {
            let id = token.secret.id();
            // A token that has not changed since before a rotation says nothing new.
            if self.keyring.is_news(id) {
                let not_taken =
                    |why| tracing::error!(why, "the token of the settings was not taken");
                self.obey(
                    SecretOrder::Add(token.secret.clone()),
                    move |agent, added| match added {
                        Ok(()) => agent.obey(SecretOrder::Use(id), move |_, used| {
                            let _ = used.map_err(not_taken);
                        }),
                        Err(why) => not_taken(why),
                    },
                );
            }
            self.config.token = Some(token);
        }
        tracing::info!(seeds = self.config.seeds.len(), "log, seeds and token were read again");
        let text = "log, seeds and token were read again".to_owned();
        self.journal.note(EventKind::Agent, EventLevel::Info, text);
    }
}
