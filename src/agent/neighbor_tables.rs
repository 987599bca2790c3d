//! The kernel's tables of neighbors: once one is full, the kernel sends nothing to hosts and pods that are
//! not in it. Any namespace can fill them: a pod that asks for many addresses is enough.

use std::io;

use super::recent_loss::RecentLoss;
use crate::netlink::{Netlink, neighbour::NeighborTable};

/// So many looks after the last neighbor that found no room a table is taken for full.
const HOLD: u32 = 3;

/// What was seen of the tables over some looks.
#[derive(Debug, Default)]
pub struct NeighborTables {
    seen: [Seen; 2],
}

#[derive(Debug, Default)]
struct Seen {
    refused: Option<u64>,
    /// Neighbors that found no room.
    recent: RecentLoss,
}

impl NeighborTables {
    /// Looks at the tables: a problem with what helps for each that is full.
    pub fn look(&mut self, netlink: &mut Netlink) -> io::Result<Vec<String>> {
        let tables = netlink.neighbor_tables()?;
        Ok(tables.into_iter().filter_map(|table| self.judge(table)).collect())
    }

    fn judge(&mut self, table: NeighborTable) -> Option<String> {
        let seen = &mut self.seen[usize::from(table.is_ipv4)];
        let before = seen.refused.replace(table.refused)?;
        let new = table.refused.saturating_sub(before);
        seen.recent.note((new > 0).then_some(new), HOLD);
        let count = seen.recent.lost()?;
        let NeighborTable { is_ipv4, entries, most, .. } = table;
        let family = if is_ipv4 { "ipv4" } else { "ipv6" };
        let wanted = most.saturating_mul(4);
        Some(format!(
            "the kernel's table of {} neighbors was full ({count} neighbors found no room at the last count; \
             {entries} entries now, at most {most}), so hosts and pods that are not in it are not reached: \
             raise the limit on this host (sysctl -w net.{family}.neigh.default.gc_thresh3={wanted} \
             net.{family}.neigh.default.gc_thresh2={}, and a file in /etc/sysctl.d), and look for what asks \
             for many addresses, in pods' namespaces too (ip -s neigh)",
            if is_ipv4 { "IPv4" } else { "IPv6" },
            wanted / 2
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_of_this_kernel_are_read() {
        let tables = Netlink::open().and_then(|mut netlink| netlink.neighbor_tables());
        let tables = tables.expect("the kernel answers");
        let ipv4: Vec<_> = tables.iter().filter(|table| table.is_ipv4).collect();
        assert_eq!(ipv4.len(), 1, "{tables:?}");
        assert!(ipv4[0].most > 0, "{tables:?}");
    }

    #[test]
    fn full_table_is_told_while_neighbors_find_no_room_and_a_little_longer() {
        let table =
            |is_ipv4, refused| NeighborTable { is_ipv4, entries: 1000, most: 1024, refused };
        let mut tables = NeighborTables::default();
        let mut judge = |is_ipv4, refused| tables.judge(table(is_ipv4, refused));
        assert_eq!(judge(true, 7), None, "what was before is not known");
        assert_eq!(judge(true, 7), None);
        let told = judge(true, 12).expect("full");
        assert!(told.contains("IPv4") && told.contains("5 neighbors found no room"), "{told}");
        assert!(told.contains("net.ipv4.neigh.default.gc_thresh3=4096"), "{told}");
        assert_eq!(judge(false, 99), None, "the other one has a count of its own");
        for _ in 0..HOLD {
            assert!(judge(true, 12).is_some());
        }
        assert_eq!(judge(true, 12), None);
        assert!(judge(false, 100).is_some_and(|told| told.contains("net.ipv6.neigh")));
    }
}
