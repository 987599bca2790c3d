//! Foreign chains that translate addresses.

use std::{collections::BTreeSet, io};

use super::{
    chains::MAX_CHAINS_NAMED,
    rules::{base_of, is_conditional, translates_destination, translates_source},
};
use crate::{
    dataplane::desired::is_own_table,
    netlink::{
        attributes::Attributes,
        nftables::{ANY, INET, IP, IP6, Kind, Nftables, Object, family_name, name_of, nfta},
    },
};

/// `NF_INET_PRE_ROUTING`
const PREROUTING: u32 = 0;
/// `NF_INET_POST_ROUTING`
const POSTROUTING: u32 = 4;

/// Returns foreign chains that translate the source of packets that leave this host. If
/// unconditional rules do so, only their chains.
///
/// # Errors
/// When chains or rules cannot be listed.
pub fn translating_chains(nftables: &mut Nftables, ipv4: bool) -> io::Result<Vec<String>> {
    chains_with(nftables, ipv4, POSTROUTING, translates_source)
}

/// Like [`translating_chains`], for chains that give incoming packets another destination.
///
/// # Errors
/// When chains or rules cannot be listed.
pub fn redirecting_chains(nftables: &mut Nftables, ipv4: bool) -> io::Result<Vec<String>> {
    chains_with(nftables, ipv4, PREROUTING, translates_destination)
}

/// Returns foreign chains at or below base chains of a hook with a rule that matches; only those
/// with an unconditional one, if there are any.
fn chains_with(
    nftables: &mut Nftables,
    ipv4: bool,
    hook: u32,
    matches: impl Fn(&Object) -> bool,
) -> io::Result<Vec<String>> {
    let families = [INET, if ipv4 { IP } else { IP6 }];
    let mut found = BTreeSet::new();
    for chain in nftables.dump(Kind::GetChain, ANY, &Attributes::new())? {
        let is_base = base_of(&chain).is_some_and(|base| base.hook == hook);
        let table = name_of(&chain, nfta::CHAIN_TABLE);
        if !is_base || !families.contains(&chain.family) || is_own_table(table) {
            continue;
        }
        let filter = Attributes::new().text(nfta::RULE_TABLE, table);
        for rule in nftables.dump(Kind::GetRule, chain.family, &filter)? {
            if matches(&rule) {
                let name = format!(
                    "{} {table} {}",
                    family_name(chain.family),
                    name_of(&rule, nfta::RULE_CHAIN)
                );
                found.insert((is_conditional(&rule), name));
            }
        }
    }
    let first = found.first().is_some_and(|(is_conditional, _)| *is_conditional);
    let likeliest = found.into_iter().filter(|(is_conditional, _)| *is_conditional == first);
    Ok(likeliest.map(|(_, name)| name).take(MAX_CHAINS_NAMED).collect())
}
