//! The use of this node's key by others: another process that runs with it, because the state directory was
//! copied, and records in this node's name that it did not write.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use crate::model::{BootId, Time};

/// While a duplicate identity exists, how often this node publishes its own record above the other one.
const DUPLICATE_PUBLISH_INTERVAL: Duration = Duration::from_secs(10);
/// Minimum time between two versions that exceed one that a peer sent.
const OUTBID_INTERVAL: Duration = Duration::from_secs(1);
/// Limit of remembered processes with this node's key.
const MAX_OUTRANKED: usize = 1024;
/// A duplicate identity ends when no record of the other process has arrived for this long.
const DUPLICATE_TIMEOUT: Duration = Duration::from_secs(120);

/// What is known of other uses of this node's key.
#[derive(Default)]
pub(super) struct KeyUse {
    /// Another running process with this node's key, if one was detected lately.
    duplicate: Option<DuplicateIdentity>,
    /// Processes with this node's key whose version this node has exceeded; at most `MAX_OUTRANKED`.
    outranked: BTreeSet<BootId>,
    /// Earliest time at which this node may again publish a version above one that a peer sent.
    outbid_at: Option<Time>,
}

/// Another process with this node's key.
struct DuplicateIdentity {
    address: SocketAddr,
    at: Time,
}

/// How a record of a duplicate identity relates to earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sighting {
    /// The other process was not known.
    First,
    /// It was known, and this node publishes its own record again.
    Again,
    /// It was known, and this node has published its own record lately.
    TooSoon,
}

impl KeyUse {
    /// Returns whether no other running process with this node's key is known.
    pub(super) const fn is_unique(&self) -> bool {
        self.duplicate.is_none()
    }

    /// Returns the address of another running process with this node's key.
    pub(super) fn duplicate(&self) -> Option<SocketAddr> {
        self.duplicate.as_ref().map(|duplicate| duplicate.address)
    }

    /// Notes a record of another running process. Two processes that outbid each other would never stop, so
    /// each publishes rarely.
    pub(super) fn note_duplicate(&mut self, now: Time, address: SocketAddr) -> Sighting {
        let sighting = match &self.duplicate {
            None => Sighting::First,
            Some(seen) if now.since(seen.at) < DUPLICATE_PUBLISH_INTERVAL => {
                return Sighting::TooSoon;
            }
            Some(_) => Sighting::Again,
        };
        self.duplicate = Some(DuplicateIdentity { address, at: now });
        sighting
    }

    /// Ends a duplicate identity after a time without records of the other process. Returns whether it ended.
    pub(super) fn end_duplicate(&mut self, now: Time) -> bool {
        let is_over = |seen: &mut DuplicateIdentity| now.since(seen.at) > DUPLICATE_TIMEOUT;
        self.duplicate.take_if(is_over).is_some()
    }

    /// Returns whether this node has exceeded the version of a process with its key.
    pub(super) fn has_outranked(&self, boot: BootId) -> bool {
        self.outranked.contains(&boot)
    }

    /// Notes that this node exceeds the version of a process with its key.
    pub(super) fn note_outranked(&mut self, boot: BootId) {
        if self.outranked.len() < MAX_OUTRANKED {
            self.outranked.insert(boot);
        }
    }

    /// Returns whether this node may exceed a peer's version now. The rate is bounded; a suppressed attempt
    /// is repeated when the record arrives again.
    pub(super) fn may_outbid(&mut self, now: Time) -> bool {
        let may = self.outbid_at.is_none_or(|at| now >= at);
        if may {
            self.outbid_at = Some(now + OUTBID_INTERVAL);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn duplicate_identity_ends_two_minutes_after_the_last_counted_record() {
        let at = |seconds| Time::ZERO + Duration::from_secs(seconds);
        let address = "192.0.2.7:8473".parse().expect("an address");
        let mut key_use = KeyUse::default();
        assert_eq!(key_use.note_duplicate(at(0), address), Sighting::First);
        assert_eq!(key_use.note_duplicate(at(9), address), Sighting::TooSoon);
        assert_eq!(key_use.note_duplicate(at(10), address), Sighting::Again);
        assert!(!key_use.end_duplicate(at(130)) && !key_use.is_unique());
        assert!(key_use.end_duplicate(at(131)) && key_use.is_unique());
        assert!(!key_use.end_duplicate(at(132)), "it has ended once");
    }

    #[test]
    fn may_outbid_is_bounded_to_once_a_second() {
        let mut key_use = KeyUse::default();
        let times = (0..3_000)
            .filter(|millis| key_use.may_outbid(Time::ZERO + Duration::from_millis(*millis)));
        assert_eq!(times.collect::<Vec<_>>(), [0, 1_000, 2_000]);
    }
}
