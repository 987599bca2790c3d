//! What a node knows when it starts, whatever has become of its disk.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use tokio::sync::oneshot;

use super::{
    StartFailure,
    start::random,
    waiting::{PREDECESSOR_PATIENCE, Waiting},
};
use crate::{
    config::Config,
    model::NodeId,
    store::{Database, EssentialsContent, LoadedDatabase, StateDir, StoreError},
    transport::NodeKey,
    wire::{Key, Keyring, Record, Token},
    worker::Thread,
};

/// A state directory that could not be read is read again after this.
const RETRY: Duration = Duration::from_secs(1);
/// No node writes as many batches; a copy that says so does not keep the count from rising.
const MAX_BATCHES: u64 = 1 << 48;
/// What takes longer is said in the status.
const USUAL: Duration = Duration::from_secs(2);

/// What a node finds in its state directory.
pub(super) struct Memory {
    pub(super) state: Arc<StateDir>,
    pub(super) key: NodeKey,
    /// The node has started for the first time.
    pub(super) is_fresh: bool,
    pub(super) saved: Option<Token>,
    pub(super) keyring: Option<Keyring>,
    /// The address of this host and the MTU of its overlay, as they last were.
    pub(super) underlay: Option<(IpAddr, u32)>,
    pub(super) is_same_boot: bool,
    pub(super) recalled: Recalled,
}

/// Reads the state directory, and waits for it while the system does not let a known node read or write it:
/// none if a signal ends the agent first. A thread reads, so a disk that hangs keeps neither questions nor
/// signals waiting.
///
/// # Errors
/// The directory cannot be this node's, or has what this program cannot use, or is of a new node and fails.
pub(super) async fn memory(
    config: &Config,
    waiting: &mut Waiting<'_>,
) -> Result<Option<Memory>, StartFailure> {
    let path = config.state_dir.display();
    let begun = Instant::now();
    loop {
        let (reply, answer) = oneshot::channel();
        let of_thread = config.clone();
        // Not waited for: a disk that hangs would keep the agent.
        let _thread = Thread::start("recall", move || _ = reply.send(read(&of_thread)))?;
        let mut answer = std::pin::pin!(answer);
        let read = loop {
            let turn = waiting.until(tokio::time::timeout(USUAL, &mut answer)).await;
            match turn {
                None => return Ok(None),
                Some(Ok(answer)) => break answer,
                // In the same words each time: the log has it once.
                Some(Err(_)) => waiting.say(format!(
                    "waiting for the state directory: {path} does not answer: look at its disk (dmesg)"
                )),
            }
        };
        // A thread that panicked has logged it.
        let read = read.map_err(|_| StoreError::Database("it could not be read".to_owned()))?;
        match read {
            Err(StartFailure::Store(error)) if may_pass(config, &error) => {
                waiting.say(format!("waiting for the state directory: {error}"));
            }
            Err(StartFailure::Store(error @ StoreError::InUse { .. }))
                if begun.elapsed() < PREDECESSOR_PATIENCE =>
            {
                waiting.say_predecessor(&error);
            }
            read => return read.map(Some),
        }
        if waiting.until(tokio::time::sleep(RETRY)).await.is_none() {
            return Ok(None);
        }
    }
}

/// Whether a failure is of the disk or of this host's resources, and the state directory of a node that is
/// known: its pods are there, and it goes on once the disk does.
fn may_pass(config: &Config, error: &StoreError) -> bool {
    let StoreError::Directory { error, .. } = error else { return false };
    let is_of_disk = matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(
            Errno::ENOSPC
                | Errno::EDQUOT
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
    let recalled = recall(&state, key.id(), config, saved.as_ref())?;
    let (keyring, underlay) = (state.keyring()?, state.underlay()?);
    let is_same_boot = state.is_same_boot();
    Ok(Memory { state, key, is_fresh, saved, keyring, underlay, is_same_boot, recalled })
}

/// What a node begins with.
pub(super) struct Recalled {
    pub(super) database: Database,
    pub(super) records: Vec<(Key, Record)>,
    /// The database is another one than that of the last run.
    pub(super) is_new: bool,
}

/// Opens the database. One that was damaged, or is another node's, is moved aside: the other members know
/// most of what was in it. A node that knows none of them takes the second copy of what makes a node. So does
/// a node whose database has lost its last changes, for these.
fn recall(
    state: &StateDir,
    me: NodeId,
    config: &Config,
    saved: Option<&Token>,
) -> Result<Recalled, StoreError> {
    let path = state.database();
    let LoadedDatabase { mut database, mut records, quarantined } = Database::open(&path, me)?;
    let counted = database.batches();
    let mut is_new = quarantined.is_some();
    if let Some((aside, why)) = quarantined {
        tracing::error!(%why, moved_to = %aside.display(), "the database is moved aside");
    }
    let has_cluster = |records: &[(Key, Record)]| {
        records.iter().any(|(_, record)| matches!(record, Record::Cluster(_)))
    };
    let copied = state.essentials().read();
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
                    "the database has lost its last changes: this node goes on with the second copy of them"
                );
                complete(&database, &mut records, copy);
                is_new = true;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "the second copy of the records cannot be read"),
        }
        return Ok(Recalled { database, records, is_new });
    };
    if !is_new {
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
            tracing::warn!(
                records = copy.len(),
                "this node goes on with the second copy of its records"
            );
            records = copy;
        }
    }
    Ok(Recalled { database, records, is_new })
}

/// Adds to a database and to its records what the copy has of changes that were lost.
fn complete(database: &Database, records: &mut Vec<(Key, Record)>, copy: Vec<(Key, Record)>) {
    // A pod that the copy lacks was disconnected. Slots and members merge.
    let is_pod = |(key, _): &mut (Key, Record)| matches!(key, Key::Pod(_));
    let pods = records.extract_if(.., is_pod).map(|(key, _)| (key, Vec::new()));
    let mut missed: BTreeMap<Key, Vec<u8>> = pods.collect();
    // The database has the slots of others beside this node's own.
    let is_whole = |(key, _): &&(Key, Record)| !matches!(key, Key::Slots(_));
    missed.extend(copy.iter().filter(is_whole).map(|(key, record)| (*key, record.encode())));
    if let Err(error) = database.write(&missed) {
        tracing::warn!(%error, "the lost changes are not in the database yet");
    }
    records.extend(copy);
}
