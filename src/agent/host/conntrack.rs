//! The kernel's table of connections (`nf_conntrack`). When it is full, the kernel drops the packets of every
//! new connection, including those of pods and tunnels.

use std::fs;

use crate::{
    agent::host::recent_loss::RecentLoss,
    model::{Problem, ProblemCode},
    sysctl,
};

/// Number of checks for which the table counts as full after the last packet that it dropped.
const HOLD_CHECKS: u32 = 3;
/// Fill level, in percent, from which a dropped packet counts as dropped for lack of room.
const FULL_PERCENT: u64 = 95;

/// The state of the table as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TableState {
    /// Entries now.
    entries: u64,
    /// Limit of entries.
    most: u64,
    /// Packets dropped since the kernel started, summed over all processors.
    dropped: u64,
}

/// Follows the table over successive checks.
#[derive(Debug, Default)]
pub struct Conntrack {
    /// Packets dropped for lack of room.
    recent: RecentLoss,
}

impl Conntrack {
    /// Reads the table. Returns a problem while the table drops packets.
    pub fn check(&mut self) -> Option<Problem> {
        self.update(TableState::read()?)
    }

    /// Whether the table dropped packets at one of the last checks.
    pub fn is_full(&self) -> bool {
        self.recent.lost().is_some()
    }

    fn update(&mut self, table: TableState) -> Option<Problem> {
        let is_relevant = |new| new > 0 && table.is_full();
        let count = self.recent.update(table.dropped, HOLD_CHECKS, is_relevant)?;
        let problem = table.problem();
        let what = format!("{}; {count} were dropped at the last count", problem.what);
        Some(Problem { what, ..problem })
    }
}

/// Returns the same problem as an explanation of lost packets; `None` if the table has room.
pub fn full_table_problem() -> Option<Problem> {
    TableState::read().filter(|table| table.is_full()).map(|table| table.problem())
}

impl TableState {
    /// Returns `None` if the kernel does not track connections.
    fn read() -> Option<Self> {
        let number =
            |name: &str| sysctl::read(&format!("net/netfilter/nf_conntrack_{name}"))?.parse().ok();
        let counters = fs::read_to_string("/proc/net/stat/nf_conntrack").ok()?;
        Some(Self { entries: number("count")?, most: number("max")?, dropped: dropped(&counters) })
    }

    const fn is_full(self) -> bool {
        self.entries.saturating_mul(100) >= self.most.saturating_mul(FULL_PERCENT)
    }

    fn problem(self) -> Problem {
        let Self { entries, most, .. } = self;
        let what = format!(
            "the kernel's table of connections is full ({entries} of {most}), so packets of new connections \
             are dropped"
        );
        let fix = format!(
            "raise the limit (sysctl -w net.netfilter.nf_conntrack_max={}, and a file in /etc/sysctl.d), and \
             look for what fills it (conntrack -L)",
            most.saturating_mul(2)
        );
        Problem::new(ProblemCode::ConnectionTableFull, Problem::HOST, what, fix)
    }
}

/// Sums the column `drop` over all processors (`net/netfilter/nf_conntrack_standalone.c`, `ct_cpu_seq_show`).
fn dropped(counters: &str) -> u64 {
    let mut lines = counters.lines();
    let names = lines.next().unwrap_or_default();
    let Some(column) = names.split_whitespace().position(|name| name == "drop") else { return 0 };
    let drops_of_line = |line: &str| {
        let text = line.split_whitespace().nth(column)?;
        u64::from_str_radix(text, 16).ok()
    };
    lines.filter_map(drops_of_line).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_several_processors_returns_the_sum() {
        let counters = "entries  clashres found new invalid ignore delete chainlength insert \
                        insert_failed drop early_drop icmp_error\n\
                        0000 0 0 0 0 0 0 0 0 0000 0000000a 0 0\n\
                        0000 0 0 0 0 0 0 0 0 0000 00000010 0 0\n";
        assert_eq!(dropped(counters), 26);
        assert_eq!(dropped("entries\n1\n") + dropped(""), 0);
    }

    #[test]
    fn update_full_table_reports_until_drops_have_ceased_for_some_checks() {
        let table = |entries, dropped| TableState { entries, most: 100, dropped };
        let mut connections = Conntrack::default();
        let mut update = |entries, dropped| connections.update(table(entries, dropped));
        assert_eq!(update(100, 7), None, "no earlier count");
        assert_eq!(update(100, 7), None, "full, but nothing dropped");
        let problem = update(99, 12).expect("a problem");
        assert!(problem.contains("(99 of 100)") && problem.contains("5 were dropped"), "{problem}");
        assert!(problem.contains("nf_conntrack_max=200"), "{problem}");
        for _ in 0..HOLD_CHECKS {
            assert!(update(60, 12).is_some());
        }
        assert_eq!(update(60, 12), None);
        assert_eq!(update(60, 20), None, "dropped for another reason");
    }
}
