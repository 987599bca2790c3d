//! The kernel's neighbor tables. When one is full, the kernel sends nothing to hosts and pods without an
//! entry. Any network namespace can fill them; a pod that looks up many addresses is enough.

use std::io;

use crate::{
    agent::host::recent_loss::RecentLoss,
    model::{Problem, ProblemCode, family_name},
    netlink::{Netlink, neighbour::NeighborTable},
};

/// Number of checks for which a table counts as full after the last entry that it refused.
const HOLD_CHECKS: u32 = 3;

/// Follows both tables over successive checks.
#[derive(Debug, Default)]
pub struct NeighborTables {
    /// Entries refused for lack of room: IPv6, then IPv4.
    families: [RecentLoss; 2],
}

impl NeighborTables {
    /// Reads the tables. Returns a problem for each table that is full.
    ///
    /// # Errors
    /// Fails when the kernel does not report the tables.
    pub fn check(&mut self, netlink: &mut Netlink) -> io::Result<Vec<Problem>> {
        let tables = netlink.neighbor_tables()?;
        Ok(tables.into_iter().filter_map(|table| self.update(table)).collect())
    }

    fn update(&mut self, table: NeighborTable) -> Option<Problem> {
        let recent = &mut self.families[usize::from(table.is_ipv4)];
        let count = recent.update(table.refused, HOLD_CHECKS, |new| new > 0)?;
        let NeighborTable { is_ipv4, entries, most, .. } = table;
        let family = if is_ipv4 { "ipv4" } else { "ipv6" };
        let wanted = most.saturating_mul(4);
        let name = family_name(is_ipv4);
        let what = format!(
            "the kernel's table of {name} neighbors was full, so hosts and pods without an entry cannot be \
             reached ({count} neighbors did not fit at the last count; {entries} entries now, at most \
             {most})"
        );
        let fix = format!(
            "raise the limit on this host: sysctl -w net.{family}.neigh.default.gc_thresh3={wanted} \
             net.{family}.neigh.default.gc_thresh2={}, and a file in /etc/sysctl.d. Find the program \
             that looks up many addresses, also in pods' namespaces (ip -s neigh)",
            wanted / 2
        );
        Some(Problem::new(ProblemCode::NeighborTableFull, name, what, fix))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbor_tables_of_this_kernel_are_read() {
        let tables = Netlink::open().and_then(|mut netlink| netlink.neighbor_tables());
        let tables = tables.expect("the kernel answers");
        let ipv4: Vec<_> = tables.iter().filter(|table| table.is_ipv4).collect();
        assert_eq!(ipv4.len(), 1, "{tables:?}");
        assert!(ipv4[0].most > 0, "{tables:?}");
    }

    #[test]
    fn update_full_table_reports_until_refusals_have_ceased_for_some_checks() {
        let table =
            |is_ipv4, refused| NeighborTable { is_ipv4, entries: 1000, most: 1024, refused };
        let mut tables = NeighborTables::default();
        let mut update = |is_ipv4, refused| tables.update(table(is_ipv4, refused));
        assert_eq!(update(true, 7), None, "no earlier count");
        assert_eq!(update(true, 7), None);
        let problem = update(true, 12).expect("full");
        assert!(
            problem.contains("IPv4") && problem.contains("5 neighbors did not fit"),
            "{problem}"
        );
        assert!(problem.contains("net.ipv4.neigh.default.gc_thresh3=4096"), "{problem}");
        assert_eq!(update(false, 99), None, "each family has its own count");
        for _ in 0..HOLD_CHECKS {
            assert!(update(true, 12).is_some());
        }
        assert_eq!(update(true, 12), None);
        assert!(update(false, 100).is_some_and(|problem| problem.contains("net.ipv6.neigh")));
    }
}
