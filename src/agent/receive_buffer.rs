//! Packets of gossip that this host has taken in and the agent has not read in time.

use std::time::{Duration, Instant};

use super::recent::Recent;
use crate::transport::ReceiveBuffer;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(10);
/// Packets between two looks that are no problem: a burst on a busy host.
const USUAL: u64 = 100;
/// So many looks after the last loss it is told.
const HOLD: u32 = 6;

/// What was seen of the socket's buffer over some looks.
#[derive(Debug, Default)]
pub(super) struct Unread {
    looked: Option<Instant>,
    dropped: u64,
    /// Packets that were lost, where they were many.
    recent: Recent,
}

impl Unread {
    /// Packets lost since the start.
    pub(super) const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Looks at the socket, if it is time to.
    pub(super) fn look(&mut self, now: Instant, buffer: ReceiveBuffer) {
        if self.looked.is_none_or(|at| now.duration_since(at) >= LOOK) {
            self.looked = Some(now);
            self.count(buffer.dropped().unwrap_or_default());
        }
    }

    fn count(&mut self, dropped: u64) {
        let new = dropped.saturating_sub(self.dropped);
        self.dropped = dropped;
        self.recent.note((new > USUAL).then_some(new), HOLD);
    }

    /// As a sentence with what helps.
    pub(super) fn problem(&self, port: u16, capped: Option<usize>) -> Option<String> {
        let count = self.recent.lost()?;
        let (seconds, wanted) = (LOOK.as_secs(), ReceiveBuffer::wanted());
        let helps = match capped {
            Some(size) => format!(
                "its buffer has {size} bytes: sysctl -w net.core.rmem_max={wanted}, and a file in \
                 /etc/sysctl.d, then restart the agent"
            ),
            None => "see what floods it (gossamer status), or give the agent more CPU".to_owned(),
        };
        Some(format!(
            "{count} packets to UDP {port} were lost within {seconds} s, because the agent did not read them \
             in time: {helps}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_lost_packets_are_told_for_a_while_and_a_few_are_not() {
        let mut unread = Unread::default();
        unread.count(USUAL);
        assert_eq!(unread.problem(8473, None), None);
        unread.count(USUAL * 3);
        let told = unread.problem(8473, Some(212_992)).expect("many");
        assert!(told.contains("200 packets to UDP 8473") && told.contains("rmem_max"), "{told}");
        assert!(unread.problem(8473, None).is_some_and(|told| !told.contains("rmem_max")));
        for _ in 0..HOLD {
            unread.count(USUAL * 3);
            assert!(unread.problem(8473, None).is_some());
        }
        unread.count(USUAL * 3);
        assert_eq!((unread.problem(8473, None), unread.dropped()), (None, USUAL * 3));
    }
}
