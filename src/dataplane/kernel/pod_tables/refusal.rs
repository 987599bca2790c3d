//! The problem of a table that the kernel refuses.

use std::io;

use super::{Shape, family_name, tables_in};
use crate::{
    model::{Problem, ProblemCode},
    netlink::nftables::Nftables,
};

/// Describes the consequence, the reason and the remedy. A table of an earlier agent, or of this one, may
/// still be in the kernel, and refuse what it does not contain.
pub(super) fn problem(
    nftables: &mut io::Result<Nftables>,
    shape: &Shape,
    table: &str,
    error: &io::Error,
) -> Problem {
    let is_left = match nftables {
        Ok(nftables) => tables_in(nftables, shape.family).ok(),
        Err(_) => None,
    };
    let is_left = is_left.map(|tables| tables.iter().any(|name| name == table));
    of_refusal(shape, table, error, is_left)
}

/// `is_left` is `None` if the tables cannot be listed.
fn of_refusal(shape: &Shape, table: &str, error: &io::Error, is_left: Option<bool>) -> Problem {
    let family = family_name(shape.family);
    let (what, takes) = shape.requirement;
    let kernel = format!("use a kernel with {takes}, or set anti_spoofing = false");
    let (what, fix) = match (shape.stale, is_left) {
        (Some(stale), Some(true)) => (
            format!(
                "{stale}: the table {family} {table} in the kernel rejects packets to them, and the kernel \
                 refuses to change it ({error})"
            ),
            format!(
                "let the agent change nftables (its unit, profile or namespace may forbid it), or remove the \
                 table: nft delete table {family} {table}"
            ),
        ),
        (Some(stale), None) => (
            format!("either {what}, or {stale}: nftables, family {family}: {error}"),
            format!(
                "let the agent use nftables (its unit, profile or namespace may forbid it). If nft list \
                 table {family} {table} shows a table, an earlier agent left it, and it rejects packets \
                 to new pods: nft delete table {family} {table}. Otherwise {kernel}"
            ),
        ),
        _ => (format!("{what}: nftables, family {family}: {error}"), kernel),
    };
    Problem::new(ProblemCode::AntiSpoofing, family, what, fix)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{super::unused, spoofing},
        *,
    };

    #[test]
    fn table_that_stays_is_said_to_refuse_new_pods() {
        let error = io::Error::from_raw_os_error(1);
        let of_unused =
            |is_left| of_refusal(&unused::SHAPE, "gossamer.1-pods", &error, is_left).to_string();
        let stays = of_unused(Some(true));
        assert!(
            stays.starts_with("pods that start now are not reached: the table inet"),
            "{stays}"
        );
        assert!(stays.ends_with("nft delete table inet gossamer.1-pods"), "{stays}");
        assert!(!stays.contains("neighbor table"), "{stays}");
        let unknown = of_unused(None);
        assert!(unknown.contains("or pods that start now are not reached"), "{unknown}");
        assert!(unknown.contains("nft list table inet gossamer.1-pods"), "{unknown}");
        let missing = of_unused(Some(false));
        assert!(missing.starts_with("packets to unused addresses"), "{missing}");
        assert!(!missing.contains("nft delete"), "{missing}");
        let other = of_refusal(&spoofing::SHAPE, "gossamer.1", &error, Some(true)).to_string();
        assert!(other.starts_with("pods can use addresses"), "new pods pass it: {other}");
    }
}
