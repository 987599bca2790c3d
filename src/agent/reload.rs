//! SIGHUP: re-reads the settings that can change while the agent runs.
//!
//! These are the log filter, the seeds and the token. All other settings take effect at the next start,
//! which interrupts no traffic. Invalid settings change nothing.

use crate::{
    agent::Agent,
    api::{EventKind, EventLevel},
    config::Config,
    wire::SecretOrder,
};

/// Re-reads the settings and applies the log filter; returns what is wrong with the settings if they are
/// invalid.
pub type SettingsReader = Box<dyn Fn() -> Result<Config, String> + Send + Sync>;

impl Agent {
    /// Handles SIGHUP.
    pub(super) fn reload(&mut self, read_settings: &SettingsReader) {
        let config = match read_settings() {
            Ok(config) => config,
            Err(why) => {
                tracing::error!(%why, "settings invalid, nothing changed");
                let text = format!("the settings cannot be used, and nothing was changed: {why}");
                return self.journal.note(EventKind::Agent, EventLevel::Warn, text);
            }
        };
        let seeds = config.seeds;
        let token = config.token.filter(|_| self.config.pod_cidr.is_none());
        // A token that is unchanged since before a secret rotation must not bring the old secret back.
        let new = token.as_ref().map(|token| token.secret.clone());
        let new = new.filter(|secret| self.secrets.keyring.is_new_secret(secret.id()));
        if token.is_some() {
            self.config.token = token;
        }
        let Some(secret) = new else { return self.take_seeds(seeds) };
        let id = secret.id();
        // The new seeds are used only after the new secret: a seed of another cluster would refuse this
        // node.
        self.apply_order(SecretOrder::Add(secret), move |agent, added| match added {
            Ok(()) => {
                agent.apply_order(SecretOrder::Use(id), |agent, used| agent.end_reload(used, seeds))
            }
            Err(why) => agent.end_reload(Err(why), seeds),
        });
    }

    fn end_reload(&mut self, token_taken: Result<(), String>, seeds: Vec<String>) {
        if let Err(why) = token_taken {
            tracing::error!(why, "token of the settings not applied");
        }
        self.take_seeds(seeds);
    }

    /// Replaces the configured seeds.
    fn take_seeds(&mut self, seeds: Vec<String>) {
        if seeds != self.sources.seeds {
            // Seeds of the saved token and of Kubernetes remain.
            let given = std::mem::replace(&mut self.sources.seeds, seeds);
            let others = self.config.seeds.iter().filter(|seed| !given.contains(seed));
            let seeds = self.sources.seeds.iter().chain(others).cloned().collect();
            self.config.seeds = seeds;
            self.node.set_seeds(self.clock.now(), self.config.seeds.len());
        }
        tracing::info!(seeds = self.config.seeds.len(), "log filter, seeds and token re-read");
        let text = "log, seeds and token were read again".to_owned();
        self.journal.note(EventKind::Agent, EventLevel::Info, text);
    }
}
