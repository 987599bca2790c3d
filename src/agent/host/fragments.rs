//! The kernel's memory for reassembling fragments. Once it is full, the kernel drops all further fragments,
//! including those of tunnel packets. One pod that sends many first fragments to its host can fill it.

use std::fs;

use crate::{
    agent::host::recent_loss::RecentLoss,
    model::{Problem, ProblemCode},
    sysctl,
};

/// Number of checks for which a shortage stays reported.
const HOLD_CHECKS: u32 = 3;
/// Usage in percent from which the memory counts as full: one packet uses some thousand bytes.
const FULL_PERCENT: u64 = 90;
/// Limit in bytes below which fragments of a few simultaneous packets may not fit.
const SMALL_LIMIT: u64 = 256 << 10;
/// The kernel's default limit in bytes.
const DEFAULT_LIMIT: u64 = 4 << 20;

/// The kernel's values for one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    is_ipv4: bool,
    /// Bytes in use.
    used: u64,
    /// Limit in bytes.
    limit: u64,
    /// Reassembly failures since the kernel started, without those for missing fragments.
    refused: u64,
}

/// Follows the memory over successive checks.
#[derive(Debug, Default)]
pub struct Fragments {
    /// Fragments without room: IPv6, then IPv4.
    families: [RecentLoss; 2],
}

impl Fragments {
    /// Checks the memory. Returns a problem for each family that has too little.
    pub fn check(&mut self) -> Vec<Problem> {
        memories().filter_map(|memory| self.update(memory)).collect()
    }

    fn update(&mut self, memory: Memory) -> Option<Problem> {
        let recent = &mut self.families[usize::from(memory.is_ipv4)];
        let is_scarce = |new| memory.is_full() || memory.is_small() && new > 0;
        let count = recent.update(memory.refused, HOLD_CHECKS, is_scarce)?;
        let problem = memory.problem();
        let what = format!("{}; {count} did not fit at the last count", problem.what);
        Some(Problem { what, ..problem })
    }
}

/// Returns the same problems as possible causes of lost fragments.
pub fn scarce() -> impl Iterator<Item = Problem> {
    let scarce = memories().filter(|memory| memory.is_full() || memory.is_small());
    scarce.map(Memory::problem)
}

fn memories() -> impl Iterator<Item = Memory> {
    [true, false].into_iter().filter_map(Memory::read)
}

impl Memory {
    fn read(is_ipv4: bool) -> Option<Self> {
        let read = |path: &str| fs::read_to_string(path).ok();
        let [sockets, counters, limit_path] = match is_ipv4 {
            true => ["/proc/net/sockstat", "/proc/net/snmp", "net/ipv4/ipfrag_high_thresh"],
            false => ["/proc/net/sockstat6", "/proc/net/snmp6", "net/ipv6/ip6frag_high_thresh"],
        };
        let limit = sysctl::read(limit_path)?.parse().ok()?;
        let (used, refused) = (used(&read(sockets)?)?, refused(&read(counters)?)?);
        Some(Self { is_ipv4, used, limit, refused })
    }

    const fn is_full(self) -> bool {
        self.used > 0 && self.used.saturating_mul(100) >= self.limit.saturating_mul(FULL_PERCENT)
    }

    const fn is_small(self) -> bool {
        self.limit < SMALL_LIMIT
    }

    fn problem(self) -> Problem {
        let Self { is_ipv4, used, limit, .. } = self;
        let how = if self.is_full() { "full" } else { "small" };
        let (family, sysctl, filter) = match is_ipv4 {
            true => ("IPv4", "net.ipv4.ipfrag_high_thresh", "ip[6:2] & 0x3fff != 0"),
            false => ("IPv6", "net.ipv6.ip6frag_high_thresh", "ip6[6] == 44"),
        };
        let what = format!(
            "the kernel's memory for {family} fragments is {how} ({used} of {limit} bytes), so packets that \
             arrive here in fragments are dropped"
        );
        let fix = format!(
            "raise the limit (sysctl -w {sysctl}={}, and a file in /etc/sysctl.d), and find the sender of \
             the fragments (tcpdump -ni any '{filter}')",
            limit.saturating_mul(4).max(DEFAULT_LIMIT)
        );
        Problem::new(ProblemCode::FragmentMemory, family, what, fix)
    }
}

/// Returns the bytes that fragments use (net/ipv4/proc.c, `sockstat_seq_show`).
fn used(sockets: &str) -> Option<u64> {
    let line = sockets.lines().find(|line| line.starts_with("FRAG"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "memory");
    words.nth(1)?.parse().ok()
}

/// Returns the number of packets that could not be reassembled, without those whose fragments were missing.
/// The kernel lists IPv4 counters as a line of names and a line of values, and each IPv6 counter on a line.
fn refused(counters: &str) -> Option<u64> {
    let lines = || counters.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut ipv4 = lines().filter(|words| words.first() == Some(&"Ip:"));
    let (names, values) = (ipv4.next(), ipv4.next());
    let number = |name: &str| -> Option<u64> {
        let text = match (&names, &values) {
            (Some(names), Some(values)) => {
                *values.get(names.iter().position(|other| *other == name)?)?
            }
            _ => lines().find(|words| words.first() == Some(&&*format!("Ip6{name}")))?.get(1)?,
        };
        text.parse().ok()
    };
    Some(number("ReasmFails")?.saturating_sub(number("ReasmTimeout")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_fragments_without_room_are_read_for_both_families() {
        let sockets = "sockets: used 75\nUDP: inuse 1 mem 2\nFRAG: inuse 5462 memory 4194816\n";
        assert_eq!(used(sockets), Some(4_194_816));
        assert_eq!(used("FRAG6: inuse 0 memory 7\n"), Some(7));
        assert_eq!(used("UDP6: inuse 8\n"), None);
        let ipv4 = "Ip: Forwarding ReasmTimeout ReasmReqds ReasmOKs ReasmFails\nIp: 1 3 20 5 10\n\
                    Icmp: InMsgs\nIcmp: 4\n";
        assert_eq!(refused(ipv4), Some(7));
        let ipv6 = "Ip6InReceives 9\nIp6ReasmTimeout \t4\nIp6ReasmFails    \t6\n";
        assert_eq!(refused(ipv6), Some(2));
        assert_eq!(refused("Ip6InReceives 9\n").or(refused("Ip:\n")), None);
        assert!(memories().any(|memory| memory.is_ipv4 && memory.limit > 0));
    }

    #[test]
    fn full_memory_is_reported_and_small_memory_only_with_losses() {
        let memory = |is_ipv4, used, limit, refused| Memory { is_ipv4, used, limit, refused };
        let mut fragments = Fragments::default();
        let mut update =
            |is_ipv4, used, limit, refused| fragments.update(memory(is_ipv4, used, limit, refused));
        assert_eq!(update(true, 4_000_000, DEFAULT_LIMIT, 7), None, "the first value is no loss");
        let problem = update(true, 4_000_000, DEFAULT_LIMIT, 12).expect("it is full");
        assert!(
            problem.contains("IPv4") && problem.contains("full (4000000 of 4194304"),
            "{problem}"
        );
        assert!(problem.contains("ipfrag_high_thresh=16777216"), "{problem}");
        assert!(problem.contains("5 did not fit"), "{problem}");
        for _ in 0..HOLD_CHECKS {
            assert!(update(true, 9, DEFAULT_LIMIT, 12).is_some());
        }
        assert_eq!(update(true, 9, DEFAULT_LIMIT, 20), None, "dropped for another reason");
        assert_eq!(update(false, 0, 9_000, 3), None);
        assert_eq!(update(false, 0, 9_000, 3), None, "small, and nothing is dropped");
        let problem = update(false, 0, 9_000, 5).expect("it is small");
        assert!(problem.contains("IPv6") && problem.contains("small (0 of 9000"), "{problem}");
        assert!(problem.contains("ip6frag_high_thresh=4194304"), "{problem}");
    }
}
