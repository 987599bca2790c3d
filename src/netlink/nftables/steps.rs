//! Steps of nftables transactions.

use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL};

use super::{super::attributes::Attributes, Kind, Rule, Step, nfta};

/// Creates a table; no error if it exists.
pub fn create_table(table: &str) -> Step {
    let attributes = Attributes::new().text(nfta::TABLE_NAME, table).be32(nfta::TABLE_FLAGS, 0);
    Step { kind: Kind::NewTable, flags: NLM_F_CREATE, attributes }
}

/// Deletes a table with everything in it.
pub fn delete_table(table: &str) -> Step {
    let attributes = Attributes::new().text(nfta::TABLE_NAME, table);
    Step { kind: Kind::DelTable, flags: 0, attributes }
}

/// Creates an object that must not exist.
pub const fn create(kind: Kind, attributes: Attributes) -> Step {
    Step { kind, flags: NLM_F_CREATE | NLM_F_EXCL, attributes }
}

/// Appends a rule to a chain.
pub fn append(table: &str, chain: &str, rule: &Rule) -> Step {
    let place = Attributes::new().text(nfta::RULE_TABLE, table).text(nfta::RULE_CHAIN, chain);
    let attributes = place.nest(nfta::RULE_EXPRESSIONS, rule.expressions());
    Step { kind: Kind::NewRule, flags: NLM_F_CREATE | NLM_F_APPEND, attributes }
}
