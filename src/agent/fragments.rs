//! The kernel's memory for packets that come in fragments: once it is full, the kernel drops fragments of all
//! others, tunnel packets among them. A pod that sends many first fragments to its host is enough.

use std::fs;

use super::recent::Recent;

/// So many looks after it was last seen full the memory is taken for that.
const HOLD: u32 = 3;
/// Of a hundred bytes, from which on it is full: a packet takes some thousands.
const FULL: u64 = 90;
/// Bytes below which fragments of a few packets at the same time find no room. Kernels have 4 MiB.
const SMALL: u64 = 256 << 10;
const USUAL: u64 = 4 << 20;

/// What the kernel shows of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    is_ipv4: bool,
    used: u64,
    most: u64,
    /// Fragments that were dropped otherwise than for want of the rest, since the kernel has started.
    refused: u64,
}

/// What was seen over some looks.
#[derive(Debug, Default)]
pub struct Fragments {
    seen: [Seen; 2],
}

#[derive(Debug, Default)]
struct Seen {
    refused: Option<u64>,
    recent: Recent,
}

impl Fragments {
    /// Looks at the memory: a problem with what helps for each family that has too little.
    pub fn look(&mut self) -> Vec<String> {
        memories().filter_map(|memory| self.judge(memory)).collect()
    }

    fn judge(&mut self, memory: Memory) -> Option<String> {
        let seen = &mut self.seen[usize::from(memory.is_ipv4)];
        let before = seen.refused.replace(memory.refused)?;
        let new = memory.refused.saturating_sub(before);
        let is_scarce = memory.is_full() || memory.is_small() && new > 0;
        seen.recent.note(is_scarce.then_some(new), HOLD);
        let count = seen.recent.lost()?;
        Some(format!("{}; {count} found no room at the last count", memory.sentence()))
    }
}

/// The same as an explanation of fragments that are lost.
pub fn scarce() -> impl Iterator<Item = String> {
    let scarce = memories().filter(|memory| memory.is_full() || memory.is_small());
    scarce.map(|memory| memory.sentence())
}

fn memories() -> impl Iterator<Item = Memory> {
    [true, false].into_iter().filter_map(Memory::read)
}

impl Memory {
    fn read(is_ipv4: bool) -> Option<Self> {
        let read = |path: &str| fs::read_to_string(path).ok();
        let [sockets, counters, limit] = match is_ipv4 {
            true => ["/proc/net/sockstat", "/proc/net/snmp", "ipv4/ipfrag_high_thresh"],
            false => ["/proc/net/sockstat6", "/proc/net/snmp6", "ipv6/ip6frag_high_thresh"],
        };
        let most = read(&format!("/proc/sys/net/{limit}"))?.trim().parse().ok()?;
        let (used, refused) = (used(&read(sockets)?)?, refused(&read(counters)?)?);
        Some(Self { is_ipv4, used, most, refused })
    }

    const fn is_full(self) -> bool {
        self.used > 0 && self.used.saturating_mul(100) >= self.most.saturating_mul(FULL)
    }

    const fn is_small(self) -> bool {
        self.most < SMALL
    }

    fn sentence(self) -> String {
        let Self { is_ipv4, used, most, .. } = self;
        let how = if self.is_full() { "full" } else { "small" };
        let (family, sysctl, filter) = match is_ipv4 {
            true => ("IPv4", "net.ipv4.ipfrag_high_thresh", "ip[6:2] & 0x3fff != 0"),
            false => ("IPv6", "net.ipv6.ip6frag_high_thresh", "ip6[6] == 44"),
        };
        format!(
            "the kernel's memory for {family} fragments is {how} ({used} of {most} bytes), so packets that \
             come to this host in fragments are dropped: raise the limit (sysctl -w {sysctl}={}, and a file \
             in /etc/sysctl.d), and look for what sends fragments (tcpdump -ni any '{filter}')",
            most.saturating_mul(4).max(USUAL)
        )
    }
}

/// Bytes that fragments take (net/ipv4/proc.c, `sockstat_seq_show`).
fn used(sockets: &str) -> Option<u64> {
    let line = sockets.lines().find(|line| line.starts_with("FRAG"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "memory");
    words.nth(1)?.parse().ok()
}

/// Packets that failed to be put together, but for those whose rest did not come. The kernel lists counters
/// of IPv4 by lines of names and of values, and those of IPv6 each on a line of its own.
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
        assert!(memories().any(|memory| memory.is_ipv4 && memory.most > 0));
    }

    #[test]
    fn full_memory_is_told_and_small_memory_while_fragments_find_no_room() {
        let memory = |is_ipv4, used, most, refused| Memory { is_ipv4, used, most, refused };
        let mut fragments = Fragments::default();
        let mut judge =
            |is_ipv4, used, most, refused| fragments.judge(memory(is_ipv4, used, most, refused));
        assert_eq!(judge(true, 4_000_000, USUAL, 7), None, "what was before is not known");
        let told = judge(true, 4_000_000, USUAL, 12).expect("it is full");
        assert!(told.contains("IPv4") && told.contains("full (4000000 of 4194304"), "{told}");
        assert!(told.contains("ipfrag_high_thresh=16777216"), "{told}");
        assert!(told.contains("5 found no room"), "{told}");
        for _ in 0..HOLD {
            assert!(judge(true, 9, USUAL, 12).is_some());
        }
        assert_eq!(judge(true, 9, USUAL, 20), None, "dropped for another reason");
        assert_eq!(judge(false, 0, 9_000, 3), None);
        assert_eq!(judge(false, 0, 9_000, 3), None, "small, and nothing is dropped");
        let told = judge(false, 0, 9_000, 5).expect("it is small");
        assert!(told.contains("IPv6") && told.contains("small (0 of 9000"), "{told}");
        assert!(told.contains("ip6frag_high_thresh=4194304"), "{told}");
    }
}
