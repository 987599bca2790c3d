//! The kernel's table of connections (`nf_conntrack`): once it is full, the kernel drops the packets of every
//! new connection, those of pods and tunnels too.

use std::fs;

use super::recent_loss::RecentLoss;

/// So many looks after the last packet that was dropped the table is taken for full.
const HOLD: u32 = 3;
/// Of a hundred entries, from which on a packet that the table dropped was dropped for want of room.
const FULL: u64 = 95;

/// What the kernel shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Table {
    entries: u64,
    most: u64,
    /// Packets that found no room, since the kernel has started.
    dropped: u64,
}

/// What was seen of the table over some looks.
#[derive(Debug, Default)]
pub struct Connections {
    dropped: Option<u64>,
    /// Packets that were dropped for want of room.
    recent: RecentLoss,
}

impl Connections {
    /// Looks at the table: a problem with what helps, as long as it drops packets.
    pub fn look(&mut self) -> Option<String> {
        self.judge(Table::read()?)
    }

    /// Whether it dropped packets of late.
    pub fn is_full(&self) -> bool {
        self.recent.lost().is_some()
    }

    fn judge(&mut self, table: Table) -> Option<String> {
        let before = self.dropped.replace(table.dropped)?;
        let new = table.dropped.saturating_sub(before);
        self.recent.note((new > 0 && table.is_full()).then_some(new), HOLD);
        let count = self.recent.lost()?;
        Some(format!("{}; {count} packets were dropped at the last count", table.sentence()))
    }
}

/// The same as an explanation of packets that are lost; none, if the table has room.
pub fn full() -> Option<String> {
    Table::read().filter(|table| table.is_full()).map(|table| table.sentence())
}

impl Table {
    /// None where connections are not tracked.
    fn read() -> Option<Self> {
        let number = |name: &str| {
            let text = fs::read_to_string(format!("/proc/sys/net/netfilter/nf_conntrack_{name}"));
            text.ok()?.trim().parse().ok()
        };
        let counters = fs::read_to_string("/proc/net/stat/nf_conntrack").ok()?;
        Some(Self { entries: number("count")?, most: number("max")?, dropped: dropped(&counters) })
    }

    const fn is_full(self) -> bool {
        self.entries.saturating_mul(100) >= self.most.saturating_mul(FULL)
    }

    fn sentence(self) -> String {
        let Self { entries, most, .. } = self;
        format!(
            "the kernel's table of connections is full ({entries} of {most}), so packets of new connections \
             are dropped: raise the limit (sysctl -w net.netfilter.nf_conntrack_max={}, and a file in \
             /etc/sysctl.d), and look for what fills it (conntrack -L)",
            most.saturating_mul(2)
        )
    }
}

/// The column `drop` of all processors (net/netfilter/nf_conntrack_standalone.c, `ct_cpu_seq_show`).
fn dropped(counters: &str) -> u64 {
    let mut lines = counters.lines();
    let names = lines.next().unwrap_or_default();
    let Some(column) = names.split_whitespace().position(|name| name == "drop") else { return 0 };
    let of_line = |line: &str| {
        let text = line.split_whitespace().nth(column)?;
        u64::from_str_radix(text, 16).ok()
    };
    lines.filter_map(of_line).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_packets_of_all_processors_are_counted() {
        let counters = "entries  clashres found new invalid ignore delete chainlength insert \
                        insert_failed drop early_drop icmp_error\n\
                        0000 0 0 0 0 0 0 0 0 0000 0000000a 0 0\n\
                        0000 0 0 0 0 0 0 0 0 0000 00000010 0 0\n";
        assert_eq!(dropped(counters), 26);
        assert_eq!(dropped("entries\n1\n") + dropped(""), 0);
    }

    #[test]
    fn full_table_is_told_while_it_drops_packets_and_a_little_longer() {
        let table = |entries, dropped| Table { entries, most: 100, dropped };
        let mut connections = Connections::default();
        let mut judge = |entries, dropped| connections.judge(table(entries, dropped));
        assert_eq!(judge(100, 7), None, "what was before is not known");
        assert_eq!(judge(100, 7), None, "full, and it drops nothing");
        let told = judge(99, 12).expect("it drops packets");
        assert!(told.contains("(99 of 100)") && told.contains("5 packets"), "{told}");
        assert!(told.contains("nf_conntrack_max=200"), "{told}");
        for _ in 0..HOLD {
            assert!(judge(60, 12).is_some());
        }
        assert_eq!(judge(60, 12), None);
        assert_eq!(judge(60, 20), None, "dropped for another reason");
    }
}
