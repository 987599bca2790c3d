//! Second phase: to which cluster this node belongs, with which secret, and which subnet it was assigned.

use std::net::IpAddr;

use sha2::{Digest as _, Sha256};

use super::{StartFailure, memory::Memory, pod_cidr, wait::StartupWait};
use crate::{
    agent::{LoopEvent, threads},
    config::Config,
    core::StartError,
    kubernetes::{self, PodCidrSource},
    model::{ClusterId, ClusterRecord, ClusterSettings},
    random::random,
    store::StateDir,
    wire::{Keyring, Record, Secret, Token},
};

/// Length of a new secret in bytes.
const SECRET_LEN: usize = 32;

/// What the node is, before the host is examined.
pub(super) struct Identity {
    /// Seeds of the configuration only.
    pub(super) configured_seeds: Vec<String>,
    /// The cluster of the records.
    pub(super) known_cluster: Option<ClusterRecord>,
    /// The configured or saved token.
    pub(super) token: Option<Token>,
    /// The cluster's secret.
    pub(super) secret: Secret,
    /// All secrets that are accepted.
    pub(super) keyring: Keyring,
    /// An address of the subnet that was assigned from outside, with the cluster's settings.
    pub(super) assigned: Option<(IpAddr, ClusterSettings)>,
    /// Where an assigned subnet comes from, if it may change.
    pub(super) source: Option<PodCidrSource>,
}

impl Identity {
    /// Completes the configuration from the last run, and finds secret and assigned subnet. Waits for
    /// Kubernetes. Returns `None` if a signal ends the agent first.
    ///
    /// # Errors
    /// Fails if configuration, token and records contradict each other, or the node has no cluster.
    pub(super) async fn resolve(
        config: &mut Config,
        memory: &mut Memory,
        waiting: &mut StartupWait<'_>,
        sender: &threads::Sender,
    ) -> Result<Option<Self>, StartFailure> {
        let configured_seeds = config.seeds.clone();
        let known_cluster = memory.stored.records.iter().find_map(|(_, record)| match record {
            Record::Cluster(cluster) => Some(*cluster),
            _ => None,
        });
        if config.pod_cidr.is_none() {
            complete_config(config, memory.saved.as_ref(), known_cluster.is_some())?;
        } else if config.seeds.is_empty() {
            config.seeds.extend(memory.saved.iter().flat_map(|token| token.seeds.clone()));
        }
        let token = config.token.clone().or_else(|| memory.saved.take());
        let secret = secret(config, memory, token.as_ref(), known_cluster.is_some())?;
        let keyring = keyring(config, memory.keyring.take(), &secret);
        let Some((assigned, source)) =
            assigned_subnet(config, &memory.state, waiting, sender).await?
        else {
            return Ok(None);
        };
        Ok(Some(Self { configured_seeds, known_cluster, token, secret, keyring, assigned, source }))
    }

    /// Returns the id of the cluster that this node enters, if it is known.
    pub(super) fn cluster_id(&self) -> Option<ClusterId> {
        match self.assigned {
            Some((_, settings)) => Some(common_id(&self.secret, settings)),
            None => self.token.as_ref().and_then(Token::known_cluster),
        }
    }
}

/// Returns the secret of the token, or a new one for a new cluster.
fn secret(
    config: &Config,
    memory: &Memory,
    token: Option<&Token>,
    knows_cluster: bool,
) -> Result<Secret, StartFailure> {
    if let Some(token) = token {
        return Ok(token.secret.clone());
    }
    if config.pod_cidr.is_some() {
        return Err(StartFailure::NoToken);
    }
    if config.create.is_none() {
        return Err(match config.seeds.is_empty() && !knows_cluster {
            true => StartError::NoCluster.into(),
            false => StartFailure::NoToken,
        });
    }
    // A cluster is being created: the secret must be on disk before the database.
    let secret = Secret::new(random::<SECRET_LEN>()?.to_vec())?;
    let (cluster, seeds) = (ClusterId::UNKNOWN, Vec::new());
    memory.state.save_token(&Token { cluster, secret: secret.clone(), seeds })?;
    Ok(secret)
}

/// Returns the saved secrets together with this one.
fn keyring(config: &Config, saved: Option<Keyring>, secret: &Secret) -> Keyring {
    let keyring = Keyring::with_token(saved, secret);
    if let Some(given) =
        config.token.as_ref().filter(|token| keyring.has_dropped(token.secret.id()))
    {
        tracing::warn!(
            secret = %given.secret.id(),
            "the configured token has a secret that the cluster no longer uses: replace it \
             (gossamer token)"
        );
    }
    keyring
}

/// An address of the assigned subnet with the cluster's settings, and where the subnet comes from.
type Assigned = (Option<(IpAddr, ClusterSettings)>, Option<PodCidrSource>);

/// Finds the subnet that is assigned from outside, if the settings want one, and adds the other nodes to the
/// seeds. Returns `None` if a signal ends the agent first.
async fn assigned_subnet(
    config: &mut Config,
    state: &StateDir,
    waiting: &mut StartupWait<'_>,
    sender: &threads::Sender,
) -> Result<Option<Assigned>, StartFailure> {
    let (Some(from), Some(settings)) = (&config.pod_cidr, config.create) else {
        return Ok(Some((None, None)));
    };
    let (name, pool) = (config.name.as_str(), settings.pool);
    let found = pod_cidr::find(from, name, &pool, state, waiting).await?;
    let Some(given) = found else { return Ok(None) };
    let seeds = kubernetes::seeds(given.others.as_deref().unwrap_or_default(), config.port);
    let report = sender.clone();
    let source = PodCidrSource::new(from, name, pool, &given, seeds.clone(), move |answer| {
        let _ = report.send(LoopEvent::Node(answer));
    });
    config.seeds.extend(seeds);
    Ok(Some((Some((given.address, settings)), source)))
}

/// Completes the configuration from the last run. A host that was in a cluster never creates another
/// one, even if its database is gone: it finds the cluster again.
///
/// # Errors
/// Fails if the configuration contradicts the saved token, or no seed is known although the database is
/// lost.
fn complete_config(
    config: &mut Config,
    saved: Option<&Token>,
    knows_cluster: bool,
) -> Result<(), StartFailure> {
    if let (Some(given), Some(_), false) =
        (config.token.as_ref().and_then(Token::known_cluster), config.create, knows_cluster)
    {
        return Err(StartFailure::TokenOfACluster(given));
    }
    if config.seeds.is_empty()
        && let Some(saved) = saved
    {
        config.seeds.clone_from(&saved.seeds);
    }
    if let (Some(cluster), false) = (saved.and_then(Token::known_cluster), knows_cluster) {
        if config.seeds.is_empty() {
            return Err(StartFailure::LostDatabase(cluster));
        }
        config.create = None;
    }
    Ok(())
}

/// Derives the id of a cluster whose subnets are assigned from outside. Such a cluster has no creator
/// that could draw an id. Nodes with other settings compute another id, and are refused with the reason.
fn common_id(secret: &Secret, settings: ClusterSettings) -> ClusterId {
    let record = Record::Cluster(ClusterRecord { id: ClusterId::UNKNOWN, settings }).encode();
    let mut hash = Sha256::new();
    hash.update(b"gossamer: a cluster without a creator");
    hash.update(secret.as_bytes());
    hash.update(record);
    let hash = hash.finalize();
    ClusterId::from_bytes(std::array::from_fn(|i| hash[i]))
}
