//! A chain that drops packets, as the kernel's trace shows it.

use std::fmt;

/// The rule or the policy of an nftables chain that drops packets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DroppedBy {
    /// Family, table and name of the chain.
    pub chain: String,
    /// The handle of the rule; `None` if the chain's policy drops the packets.
    pub handle: Option<u64>,
    /// The rule passes packets to a program in user space, which does not let them pass.
    pub queued: bool,
}

impl DroppedBy {
    /// Returns what the rule does with tunnel packets.
    pub const fn action(&self) -> &'static str {
        if self.queued {
            "hands tunnel packets to a program that does not let them pass"
        } else {
            "drops tunnel packets"
        }
    }
}

/// The rule, or the policy, and its chain.
impl fmt::Display for DroppedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chain, handle, .. } = self;
        match handle {
            Some(handle) => {
                write!(f, "a rule of chain {chain} (handle {handle}: nft -a list chain {chain})")
            }
            None => write!(f, "the policy of chain {chain}"),
        }
    }
}
