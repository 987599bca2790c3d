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
        let seeds = config.seeds;
        let token = config.token.filter(|_| self.config.pod_cidr.is_none());
        // A token that has not changed since before a rotation says nothing new.
        let new = token.as_ref().map(|token| token.secret.clone());
        let new = new.filter(|secret| self.keyring.is_new_secret(secret.id()));
        if token.is_some() {
            self.config.token = token;
        }
        let Some(secret) = new else { return self.take_seeds(seeds) };
        let id = secret.id();
        // Seeds are not asked with the secret of before: one of another cluster would refuse this node.
        self.obey(SecretOrder::Add(secret), move |agent, added| match added {
            Ok(()) => agent.obey(SecretOrder::Use(id), |agent, used| agent.end_reload(used, seeds)),
            Err(why) => agent.end_reload(Err(why), seeds),
        });
    }

    fn end_reload(&mut self, token_taken: Result<(), String>, seeds: Vec<String>) {
        if let Err(why) = token_taken {
            tracing::error!(why, "the token of the settings was not taken");
        }
        self.take_seeds(seeds);
    }

    /// Asks these seeds from now on.
    fn take_seeds(&mut self, seeds: Vec<String>) {
        if seeds != self.given_seeds {
            // Those of the saved token and of Kubernetes stay.
            let given = std::mem::replace(&mut self.given_seeds, seeds);
            let others = self.config.seeds.iter().filter(|seed| !given.contains(seed));
            let seeds = self.given_seeds.iter().chain(others).cloned().collect();
            self.config.seeds = seeds;
            self.node.set_seeds(self.clock.now(), self.config.seeds.len());
        }
        tracing::info!(seeds = self.config.seeds.len(), "log, seeds and token were read again");
        let text = "log, seeds and token were read again".to_owned();
        self.journal.note(EventKind::Agent, EventLevel::Info, text);
    }
}
