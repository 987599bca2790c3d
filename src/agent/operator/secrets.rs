//! Rotation of the cluster's secret without interrupting communication.
//!
//! The operator requests a step from one agent, which first queries whether all members are ready for it
//! and then requests the step from them. If a member is not ready, the step is refused with the member's
//! name, and nothing changes.

use std::collections::{BTreeSet, VecDeque};

use tokio::sync::oneshot::Sender;

use crate::{
    agent::{Agent, operator::survey::Findings, workers::archive::SavedFile},
    api::{ApiError, EventKind, EventLevel, SecretStatus, SecretStep, Secrets},
    core::ReplyId,
    model::{NodeId, Text},
    transport::{Credentials, NodeKey},
    wire::{Inquiry, InquiryAnswer, Keyring, Report, SecretId, SecretOrder, Token},
};

type Reply = Sender<Result<Secrets, ApiError>>;

/// Refusal of secret changes with subnets assigned from outside.
const REFUSED_WITH_POD_CIDR: &str = "with lease_source = \"podcidr\" the cluster id is derived from the \
                                     secret: change the secret at its source, and restart all agents \
                                     together";

/// Maximum number of saved seeds: configured seeds first, then members.
const MAX_SAVED_SEEDS: usize = 8;

/// Maximum number of steps that wait for the disk.
const MAX_STEPS: usize = 64;

/// Runs after a step.
type Then = Box<dyn FnOnce(&mut Agent, Result<(), String>) + Send>;

/// The secrets that this node knows, and changes of them.
pub(in crate::agent) struct KnownSecrets {
    /// The secrets in use and accepted.
    pub(in crate::agent) keyring: Keyring,
    /// The last saved token.
    pub(in crate::agent) saved_token: Option<Token>,
    /// Changes of the keyring that are not on disk yet, in order of arrival.
    queue: VecDeque<(SecretOrder, Then)>,
    /// The step that is being written, and the keyring after it.
    written: Option<(Keyring, SecretOrder, Then)>,
}

impl KnownSecrets {
    /// Returns the secrets of the state directory.
    pub(in crate::agent) const fn new(keyring: Keyring, saved_token: Option<Token>) -> Self {
        Self { keyring, saved_token, queue: VecDeque::new(), written: None }
    }
}

/// A change of secrets that is sent to all members.
struct Rotation {
    members: Vec<NodeId>,
    /// The steps that are still to be sent, the next one last.
    orders: Vec<SecretOrder>,
    /// Members that refused a step, with the reason.
    refused: Vec<String>,
    reply: Reply,
}

impl Agent {
    /// Saves the token, so that a restart of a node in the cluster needs neither `--token` nor `--join`,
    /// even if the database is lost.
    pub(in crate::agent) fn save_token(&mut self) {
        let mut seeds = self.config.seeds.clone();
        seeds.extend(self.node.member_addresses().map(|address| address.to_string()));
        let mut known = BTreeSet::new();
        seeds.retain(|seed| known.insert(seed.clone()));
        seeds.truncate(MAX_SAVED_SEEDS);
        let token = self.token(seeds);
        if token.is_none() || token == self.secrets.saved_token {
            return;
        }
        if let Some(token) = &token {
            self.storage.archive.save(SavedFile::Token(token.clone()));
        }
        self.secrets.saved_token = token;
    }

    /// Returns the token of the cluster with these seeds; `None` outside a cluster.
    pub(in crate::agent) fn token(&self, seeds: Vec<String>) -> Option<Token> {
        let cluster = self.node.cluster()?.id;
        Some(Token { cluster, secret: self.secrets.keyring.in_use().clone(), seeds })
    }

    /// Carries out an operator's step on all members.
    pub(in crate::agent) fn change_secret(&mut self, step: SecretStep, force: bool, reply: Reply) {
        if self.config.pod_cidr.is_some() {
            return drop(reply.send(Err(REFUSED_WITH_POD_CIDR.to_owned().into())));
        }
        let members: Vec<NodeId> = self.node.peers().collect();
        let rotation = |orders, reply| Rotation { members, orders, refused: Vec::new(), reply };
        match step {
            SecretStep::List => self.list_secrets(Vec::new(), reply),
            SecretStep::Add(secret) => {
                // Without a new secret, every member receives the secrets that this node accepts.
                let all = self.secrets.keyring.accepted();
                let orders = secret.map_or_else(|| all.to_vec(), |secret| vec![secret]);
                let orders: Vec<SecretOrder> = orders.into_iter().map(SecretOrder::Add).collect();
                self.send_orders(rotation(orders, reply));
            }
            SecretStep::Use(id) => {
                if !self.secrets.keyring.accepts(id) {
                    let why =
                        format!("secret {id} is unknown on this node: see `gossamer secret list`");
                    return drop(reply.send(Err(why.into())));
                }
                let ready = move |report: &Report| report.secrets.contains(&id);
                let lack = format!("do not have secret {id} (run `gossamer secret add` again)");
                self.send_if_ready(rotation(vec![SecretOrder::Use(id)], reply), ready, lack, force);
            }
            SecretStep::Drop(id) => {
                if self.secrets.keyring.in_use().id() == id {
                    let why = format!("secret {id} is in use: switch to another one first");
                    return drop(reply.send(Err(why.into())));
                }
                let ready = move |report: &Report| report.secrets.first() != Some(&id);
                let lack = format!("still use secret {id} (run `gossamer secret use` again)");
                self.send_if_ready(
                    rotation(vec![SecretOrder::Drop(id)], reply),
                    ready,
                    lack,
                    force,
                );
            }
        }
    }

    /// Answers a query of another member's agent.
    pub(in crate::agent) fn on_inquiry(&mut self, reply: ReplyId, from: NodeId, inquiry: Inquiry) {
        let refused = match inquiry {
            Inquiry::Report => None,
            Inquiry::Ping => return self.answer_inquiry(reply, &InquiryAnswer::Pong),
            Inquiry::Arrivals(round) => {
                return self.threads.monitors.remote_pods.testify(reply, from, round);
            }
            Inquiry::Secret(_) if self.config.pod_cidr.is_some() => {
                Some(REFUSED_WITH_POD_CIDR.to_owned())
            }
            Inquiry::Secret(order) => {
                return self.apply_order(order, move |agent, done| {
                    agent.send_own_report(reply, done.err())
                });
            }
        };
        self.send_own_report(reply, refused);
    }

    fn send_own_report(&mut self, reply: ReplyId, refused: Option<String>) {
        let refused = refused.map(Text::from);
        let report = Report { refused, ..self.own_report() };
        self.send_report(reply, report);
    }

    /// Sends a step to all members if all are ready for it.
    fn send_if_ready(
        &mut self,
        rotation: Rotation,
        ready: impl Fn(&Report) -> bool + Send + 'static,
        lack: String,
        force: bool,
    ) {
        let members = rotation.members.clone();
        let then = move |agent: &mut Self, found: Findings| {
            let names = |which: &dyn Fn(&Option<Report>) -> bool| {
                let labels = agent.node.labels();
                let names = found.iter().filter(|(_, report)| which(report));
                names.map(|(node, _)| labels.of(*node)).collect::<Vec<_>>().join(", ")
            };
            let silent = names(&|report| report.is_none());
            let lacking = names(&|report| report.as_ref().is_some_and(|report| !ready(report)));
            let mut why = Vec::new();
            if !lacking.is_empty() {
                why.push(format!("{lacking} {lack}"));
            }
            if !silent.is_empty() {
                why.push(format!(
                    "{silent} did not answer (a member that misses this step needs a new token to reconnect; \
                     --force continues without it)"
                ));
            }
            if !why.is_empty() && !force {
                let why = format!("not all members are ready: {}", why.join("; "));
                return drop(rotation.reply.send(Err(why.into())));
            }
            agent.send_orders(rotation);
        };
        self.survey(members, Inquiry::Report, then);
    }

    /// Sends the steps to all members one after the other, carries them out here, and answers with the
    /// result.
    fn send_orders(&mut self, mut rotation: Rotation) {
        let Some(order) = rotation.orders.pop() else {
            return self.list_secrets(rotation.refused, rotation.reply);
        };
        if !matches!(order, SecretOrder::Add(_)) {
            return self.send_order(order, rotation);
        }
        self.apply_order(order.clone(), move |agent, done| match done {
            Ok(()) => agent.send_order(order, rotation),
            Err(why) => drop(rotation.reply.send(Err(why.into()))),
        });
    }

    fn send_order(&mut self, order: SecretOrder, mut rotation: Rotation) {
        let (members, inquiry) = (rotation.members.clone(), Inquiry::Secret(order.clone()));
        self.survey(members, inquiry, move |agent, found| {
            rotation.refused.extend(found.iter().filter_map(|(node, report)| {
                let why = report.as_ref()?.refused.as_ref()?;
                Some(format!("{}: {why}", agent.node.label(*node)))
            }));
            // This node carries out the step after the members: until the last node has done so, all
            // nodes still understand each other.
            agent.apply_order(order, move |agent, done| match done {
                Ok(()) => agent.send_orders(rotation),
                Err(why) => drop(rotation.reply.send(Err(why.into()))),
            });
        });
    }

    /// Carries out a step on this node after all earlier ones: on disk first, then on the network.
    pub(in crate::agent) fn apply_order(
        &mut self,
        order: SecretOrder,
        then: impl FnOnce(&mut Self, Result<(), String>) + Send + 'static,
    ) {
        if self.secrets.queue.len() >= MAX_STEPS {
            let why = "earlier changes of secrets are not on disk yet".to_owned();
            return then(self, Err(why));
        }
        self.secrets.queue.push_back((order, Box::new(then)));
        self.run_next_step();
    }

    fn run_next_step(&mut self) {
        while self.secrets.written.is_none()
            && let Some((order, then)) = self.secrets.queue.pop_front()
        {
            let mut keyring = self.secrets.keyring.clone();
            match keyring.apply(&order) {
                Ok(true) => {
                    self.storage.archive.save_secrets(keyring.clone());
                    self.secrets.written = Some((keyring, order, then));
                }
                Ok(false) => then(self, Ok(())),
                Err(why) => then(self, Err(why)),
            }
        }
    }

    /// Handles the result of writing the pending keyring. `kept` contains the seed of the node's key.
    pub(in crate::agent) fn on_secrets_saved(&mut self, kept: Result<[u8; 32], String>) {
        let Some((keyring, order, then)) = self.secrets.written.take() else { return };
        let done = kept.and_then(|seed| self.use_keyring(keyring, &order, seed));
        then(self, done);
        self.run_next_step();
    }

    fn use_keyring(
        &mut self,
        keyring: Keyring,
        order: &SecretOrder,
        seed: [u8; 32],
    ) -> Result<(), String> {
        let credentials = NodeKey::from_seed(seed)
            .and_then(|key| Credentials::new(keyring.accepted(), &key))
            .map_err(|error| error.to_string())?;
        self.transport.use_credentials(&credentials);
        self.secrets.keyring = keyring;
        self.save_token();
        let (id, what) = match order {
            SecretOrder::Add(secret) => (secret.id(), "is accepted"),
            SecretOrder::Use(id) => (*id, "is in use"),
            SecretOrder::Drop(id) => (*id, "is no longer accepted"),
        };
        let text = format!("secret {id} {what}");
        tracing::info!("{text}");
        self.journal.note(EventKind::Agent, EventLevel::Info, text);
        Ok(())
    }

    /// Sends which members accept and use which secrets.
    fn list_secrets(&mut self, refused: Vec<String>, reply: Reply) {
        let members = self.node.peers().collect();
        self.survey(members, Inquiry::Report, move |agent, mut found| {
            found.insert(agent.node.id(), Some(agent.own_report()));
            let labels = agent.node.labels();
            let name = |node: &NodeId| labels.of(*node);
            let members_where = |which: &dyn Fn(&Report) -> bool| -> Vec<String> {
                let fits = found.iter().filter(|(_, r)| r.as_ref().is_some_and(which));
                fits.map(|(node, _)| name(node)).collect()
            };
            let mut ids: Vec<SecretId> =
                found.values().flatten().flat_map(|report| report.secrets.clone()).collect();
            ids.sort();
            ids.dedup();
            let secret = |id: &SecretId| SecretStatus {
                secret: id.to_string(),
                used_by: members_where(&|report| report.secrets.first() == Some(id)),
                accepted_by: members_where(&|report| report.secrets.contains(id)),
                lacked_by: members_where(&|report| !report.secrets.contains(id)),
            };
            let silent =
                found.iter().filter(|(_, r)| r.is_none()).map(|(node, _)| name(node)).collect();
            let secrets = ids.iter().map(secret).collect();
            let _ = reply.send(Ok(Secrets { secrets, silent, refused }));
        });
    }
}
