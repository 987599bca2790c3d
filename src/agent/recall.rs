//! What a node knows when it starts, whatever has become of its disk.

use crate::{
    config::Config,
    store::{Database, Opened, StateDir, StoreError},
    wire::{Key, Record, Token},
};

/// What a node begins with.
pub(super) struct Recalled {
    pub(super) database: Database,
    pub(super) records: Vec<(Key, Record)>,
    /// The database is another one than that of the last run.
    pub(super) is_new: bool,
}

/// Opens the database. One that was damaged is moved aside: the other members know most of what was in it. A
/// node that knows none of them takes the second copy of what makes a node.
pub(super) fn recall(
    state: &StateDir,
    config: &Config,
    saved: Option<&Token>,
) -> Result<Recalled, StoreError> {
    let path = state.database();
    let Opened { mut database, mut records, quarantined } = Database::open(&path)?;
    let mut is_new = quarantined.is_some();
    if let Some((aside, why)) = quarantined {
        tracing::error!(%why, moved_to = %aside.display(), "database damaged, moved aside");
    }
    let has_cluster = |records: &[(Key, Record)]| {
        records.iter().any(|(_, record)| matches!(record, Record::Cluster(_)))
    };
    let Some(cluster) = saved.and_then(Token::known_cluster).filter(|_| !has_cluster(&records))
    else {
        return Ok(Recalled { database, records, is_new });
    };
    if !is_new {
        let (empty, aside) = database.set_aside(&path)?;
        (database, is_new) = (empty, true);
        tracing::error!(%cluster, moved_to = %aside.display(), "database lost records, moved aside");
    }
    let knows_others =
        !config.seeds.is_empty() || saved.is_some_and(|token| !token.seeds.is_empty());
    if !knows_others {
        let essentials = state.essentials().read();
        let copy = essentials.map_err(|error| StoreError::Directory { path, error })?;
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
