//! Elements of the sets in gossamer's nftables tables.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use rtnetlink::packet_core::NLM_F_CREATE;

use crate::netlink::{
    attributes::{self, Attributes},
    nftables::{Kind, Nftables, Step},
};

/// Elements per message: the payload of an attribute is limited to 65,531 bytes.
const MAX_ELEMENTS_PER_MESSAGE: usize = 500;

/// Elements of sets, by set name.
pub(super) type Elements = BTreeMap<&'static str, BTreeSet<Vec<u8>>>;

/// Returns the steps that add or remove elements of a table's sets.
pub(super) fn steps(table: &str, kind: Kind, elements: &Elements) -> Vec<Step> {
    let mut steps = Vec::new();
    let flags = if kind == Kind::NewElements { NLM_F_CREATE } else { 0 };
    for (set, keys) in elements {
        let keys: Vec<&Vec<u8>> = keys.iter().collect();
        for some in keys.chunks(MAX_ELEMENTS_PER_MESSAGE) {
            let list = some.iter().fold(Attributes::new(), |list, key| {
                let value = Attributes::new().put(1, key);
                list.nest(1, &Attributes::new().nest(1, &value))
            });
            let attributes = Attributes::new().text(1, table).text(2, set).nest(3, &list);
            steps.push(Step { kind, flags, attributes });
        }
    }
    steps
}

/// Returns what `what` makes of each element of a set, given the element's key and its attributes.
pub(super) fn read<T: FromIterator<E>, E>(
    nftables: &mut Nftables,
    family: u8,
    (table, set): (&str, &str),
    what: impl Fn(&[u8], &[u8]) -> Option<E>,
) -> io::Result<T> {
    let filter = Attributes::new().text(1, table).text(2, set);
    let objects = nftables.dump(Kind::GetElements, family, &filter)?;
    let lists = objects.iter().filter_map(|object| attributes::find(&object.attributes, 3));
    let elements = lists.flat_map(attributes::read).filter_map(|(_, element)| {
        what(attributes::find(attributes::find(element, 1)?, 1)?, element)
    });
    Ok(elements.collect())
}

/// Returns the present elements of these sets.
pub(super) fn keys_in(
    nftables: &mut Nftables,
    family: u8,
    table: &str,
    sets: impl Iterator<Item = &'static str>,
) -> io::Result<Elements> {
    let mut keys = |set| read(nftables, family, (table, set), |key, _| Some(key.to_vec()));
    sets.map(|set| Ok((set, keys(set)?))).collect()
}
