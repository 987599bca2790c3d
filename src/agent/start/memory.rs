//! Loads a node's memory from its state directory, even if its disk lost parts of it.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use tokio::sync::oneshot;

use crate::{
    agent::{StartFailure, listeners::PREDECESSOR_TIMEOUT, start::wait::StartupWait},
    config::Config,
    model::{ClusterId, NodeId},
    random::random,
    store::{Database, EssentialsContent, LoadedDatabase, LostPod, StateDir, StoreError},
    transport::NodeKey,
    wire::{Key, Keyring, Record, Token},
    worker::Thread,
};

/// Time after which an unreadable state directory is read again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Upper limit of a batch count read from the copy. No node writes this many batches, and the limit
/// leaves the counter room to grow if the copy contains a false number.
const MAX_BATCHES: u64 = 1 << 48;
/// Reads that take longer are reported in the status.
const SLOW_READ: Duration = Duration::from_secs(2);

/// The content of a node's state directory.
pub(in crate::agent) struct Memory {
    /// The open directory.
    pub(in crate::agent) state: Arc<StateDir>,
    /// The node's key pair.
    pub(in crate::agent) key: NodeKey,
    /// Whether the node starts for the first time.
    pub(super) is_fresh: bool,
    /// The saved token.
    pub(in crate::agent) saved: Option<Token>,
    /// The saved secrets.
    pub(in crate::agent) keyring: Option<Keyring>,
    /// The last known underlay address of this host and MTU of the overlay in bytes.
    pub(in crate::agent) underlay: Option<(IpAddr, u32)>,
    /// Whether the host has not been restarted since the last run.
    pub(super) is_same_boot: bool,
    /// Pods that lost their network when this host became a new node.
    pub(super) lost_pods: Vec<LostPod>,
    /// The database and its records.
    pub(in crate::agent) stored: StoredRecords,
}

/// Reads the state directory. For a known node it waits while the system cannot read or write the
/// directory. Returns `None` if a signal ends the agent first. A separate thread reads, so a hanging
/// disk blocks neither requests nor signals.
///
/// # Errors
/// Fails if the directory cannot belong to this node, has content that this program cannot use, or
/// belongs to a new node and cannot be read or written.
pub(in crate::agent) async fn load(
    config: &Config,
    waiting: &mut StartupWait<'_>,
) -> Result<Option<Memory>, StartFailure> {
    let path = config.state_dir.display();
    let begun = Instant::now();
    loop {
        let (reply, answer) = oneshot::channel();
        let thread_config = config.clone();
        // Not joined: a hanging disk would block the agent.
        let _thread = Thread::start("recall", move || _ = reply.send(read(&thread_config)))?;
        let mut answer = std::pin::pin!(answer);
        let read = loop {
            let turn = waiting.run(tokio::time::timeout(SLOW_READ, &mut answer)).await;
            match turn {
                None => return Ok(None),
                Some(Ok(answer)) => break answer,
                // The text is the same each time, so it is logged once.
                Some(Err(_)) => waiting.report_problem(format!(
                    "waiting for the state directory: {path} does not answer: look at its disk (dmesg)"
                )),
            }
        };
        // The thread has logged its panic.
        let read = read.map_err(|_| StoreError::Database("it could not be read".to_owned()))?;
        match read {
            Err(StartFailure::Store(error)) if is_temporary(config, &error) => {
                let path = config.state_dir.display();
                let remedy = match is_of_full_disk(&error) {
                    true => format!(": free space (df -h {path})"),
                    false => format!(": look at its disk (dmesg; findmnt -T {path})"),
                };
                waiting.report_problem(format!("waiting for the state directory: {error}{remedy}"));
            }
            Err(StartFailure::Store(error @ StoreError::InUse { .. }))
                if begun.elapsed() < PREDECESSOR_TIMEOUT =>
            {
                waiting.report_predecessor(&error);
            }
            read => return read.map(Some),
        }
        if waiting.run(tokio::time::sleep(RETRY_INTERVAL)).await.is_none() {
            return Ok(None);
        }
    }
}

/// Returns whether the file system has no space left.
fn is_of_full_disk(error: &StoreError) -> bool {
    let StoreError::Directory { error, .. } = error else { return false };
    matches!(error.raw_os_error().map(Errno::from_raw), Some(Errno::ENOSPC | Errno::EDQUOT))
}

/// Returns whether the failure comes from the disk or this host's resources and the state directory
/// belongs to a known node. The pods of such a node exist, and it continues as soon as the disk works.
fn is_temporary(config: &Config, error: &StoreError) -> bool {
    let StoreError::Directory { error, .. } = error else { return false };
    let is_of_disk = matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::ENOSPC
                | Errno::EDQUOT
                | Errno::EFBIG
                | Errno::EROFS
                | Errno::EIO
                | Errno::ESTALE
                | Errno::ETIMEDOUT
                | Errno::ENOMEM
                | Errno::EMFILE
                | Errno::ENFILE
        )
    );
    is_of_disk && StateDir::is_known(&config.state_dir)
}

fn read(config: &Config) -> Result<Memory, StartFailure> {
    let state = Arc::new(StateDir::open(&config.state_dir)?);
    let seed = state.node_key()?;
    let is_fresh = seed.is_none();
    let memory = read_node(config, state.clone(), seed);
    if is_fresh && memory.is_err() {
        state.wipe()?;
    }
    memory
}

fn read_node(
    config: &Config,
    state: Arc<StateDir>,
    seed: Option<[u8; 32]>,
) -> Result<Memory, StartFailure> {
    let is_fresh = seed.is_none();
    let key = match seed {
        Some(seed) => NodeKey::from_seed(seed)?,
        None => {
            let key = NodeKey::from_seed(random()?)?;
            state.save_node_key(key.seed())?;
            key
        }
    };
    let saved = state.token()?;
    let stored = open_database(&state, key.id(), config, saved.as_ref())?;
    let (keyring, underlay) = (state.keyring()?, state.underlay()?);
    let is_same_boot = state.is_same_boot();
    // A reboot ends all pods.
    let lost_pods = if is_same_boot { state.lost_pods()? } else { Vec::new() };
    Ok(Memory { state, key, is_fresh, saved, keyring, underlay, is_same_boot, lost_pods, stored })
}

/// The records that a node starts with.
pub(in crate::agent) struct StoredRecords {
    /// The open database.
    pub(in crate::agent) database: Database,
    /// The records of the database, completed from the second copy.
    pub(in crate::agent) records: Vec<(Key, Record)>,
    /// Whether the database is not the one of the last run.
    pub(in crate::agent) is_new: bool,
}

/// Opens the database. A damaged one is moved aside: the other members have most of its records. One of
/// another node is moved aside if the second copy is this node's. A node that knows no other member uses the
/// second copy of its essential records instead. If the database lost its last changes, the second copy
/// completes it.
fn open_database(
    state: &StateDir,
    me: NodeId,
    config: &Config,
    saved: Option<&Token>,
) -> Result<StoredRecords, StoreError> {
    let path = state.database();
    let is_absent = !path.exists();
    let copied = state.essentials().read();
    let opened = match Database::open(&path, me) {
        // Otherwise the key may be the one that belongs to another node.
        Err(error @ StoreError::OtherNode { .. }) if is_copy_of(me, &copied) => {
            Database::replace(&path, me, error.to_string())
        }
        opened => opened,
    };
    let LoadedDatabase { mut database, mut records, quarantined } = opened?;
    let counted = database.batches();
    let mut is_new = quarantined.is_some();
    if let Some((aside, why)) = quarantined {
        tracing::error!(%why, moved_to = %aside.display(), "database moved aside");
    }
    let has_cluster = |records: &[(Key, Record)]| {
        records.iter().any(|(_, record)| matches!(record, Record::Cluster(_)))
    };
    let batches = copied.as_ref().map_or(0, |copied| copied.batches.min(MAX_BATCHES));
    let Some(cluster) = saved.and_then(Token::known_cluster).filter(|_| !has_cluster(&records))
    else {
        database.raise_batches(batches);
        match copied {
            Ok(EssentialsContent { records: copy, .. })
                if batches > counted && has_cluster(&copy) =>
            {
                tracing::error!(
                    batches,
                    counted,
                    "database lost its last changes, completing it from the second copy"
                );
                restore_lost_changes(&database, &mut records, copy);
                is_new = true;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "second copy of the records unreadable"),
        }
        return Ok(StoredRecords { database, records, is_new });
    };
    if is_absent {
        log_absent_database(me, cluster, &copied);
        is_new = true;
    } else if !is_new {
        let (empty, aside) = database.set_aside(&path)?;
        (database, is_new) = (empty, true);
        tracing::error!(%cluster, moved_to = %aside.display(), "database lost records, moved aside");
    }
    database.raise_batches(batches);
    let knows_others =
        !config.seeds.is_empty() || saved.is_some_and(|token| !token.seeds.is_empty());
    if !knows_others {
        let EssentialsContent { records: copy, .. } =
            copied.map_err(|error| StoreError::Directory { path, error })?;
        let is_of_cluster =
            |record: &Record| matches!(record, Record::Cluster(known) if known.id == cluster);
        if copy.iter().any(|(_, record)| is_of_cluster(record)) {
            tracing::warn!(records = copy.len(), "using the second copy of the records");
            records = copy;
        }
    }
    Ok(StoredRecords { database, records, is_new })
}

/// Logs that a member of a cluster has no database. A new identity starts without one, and then the second
/// copy is that of the node which this host was before.
fn log_absent_database(me: NodeId, cluster: ClusterId, copied: &io::Result<EssentialsContent>) {
    match copied.as_ref().ok().and_then(writer_of) {
        Some(before) if before != me => {
            tracing::info!(%cluster, %before, "new identity: the database begins empty");
        }
        _ => tracing::error!(%cluster, "database missing"),
    }
}

/// Returns whether a second copy has this node's own record.
fn is_copy_of(me: NodeId, copied: &io::Result<EssentialsContent>) -> bool {
    copied.as_ref().ok().and_then(writer_of) == Some(me)
}

/// Returns the node that wrote a second copy: the only member in it.
fn writer_of(copied: &EssentialsContent) -> Option<NodeId> {
    copied.records.iter().find_map(|(_, record)| match record {
        Record::Member(member) => Some(member.node),
        _ => None,
    })
}

/// Adds to the database and to `records` the lost changes that the copy contains.
fn restore_lost_changes(
    database: &Database,
    records: &mut Vec<(Key, Record)>,
    copy: Vec<(Key, Record)>,
) {
    // A pod that the copy lacks was disconnected. Slots and members are merged.
    let is_pod = |(key, _): &mut (Key, Record)| matches!(key, Key::Pod(_));
    let pods = records.extract_if(.., is_pod).map(|(key, _)| (key, Vec::new()));
    let mut lost_changes: BTreeMap<Key, Vec<u8>> = pods.collect();
    // The database also has slots of other nodes, so the copy's slots do not replace its slots.
    let is_whole = |(key, _): &&(Key, Record)| !matches!(key, Key::Slots(_));
    lost_changes.extend(copy.iter().filter(is_whole).map(|(key, record)| (*key, record.encode())));
    if let Err(error) = database.write(&lost_changes) {
        tracing::warn!(%error, "lost changes not yet written to the database");
    }
    records.extend(copy);
}
