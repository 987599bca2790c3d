//! Elements of sets.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use rtnetlink::packet_core::NLM_F_CREATE;

use super::{
    super::attributes::{self, Attributes},
    Kind, Nftables, Step, nfta,
};

/// Elements per message: the payload of an attribute is limited to 65,531 bytes.
const MAX_ELEMENTS_PER_MESSAGE: usize = 500;

/// Elements of sets, by set name.
pub type Elements = BTreeMap<&'static str, BTreeSet<Vec<u8>>>;

/// Returns the steps that add or remove elements of a table's sets.
pub fn steps(table: &str, kind: Kind, elements: &Elements) -> Vec<Step> {
    let mut steps = Vec::new();
    let flags = if kind == Kind::NewElements { NLM_F_CREATE } else { 0 };
    for (set, keys) in elements {
        let keys: Vec<&Vec<u8>> = keys.iter().collect();
        for some in keys.chunks(MAX_ELEMENTS_PER_MESSAGE) {
            let list = some.iter().fold(Attributes::new(), |list, key| {
                let value = Attributes::new().put(nfta::DATA_VALUE, key);
                list.nest(nfta::LIST_ELEM, &Attributes::new().nest(nfta::SET_ELEM_KEY, &value))
            });
            let attributes = elements_in(table, set).nest(nfta::SET_ELEM_LIST_ELEMENTS, &list);
            steps.push(Step { kind, flags, attributes });
        }
    }
    steps
}

/// Returns the attributes of a new set, whose elements have this type, as the `nft` program encodes
/// it, and this length in bytes. `id` identifies the set within the transaction.
pub fn definition(table: &str, set: &str, (kind, length): (u32, u32), id: u32) -> Attributes {
    Attributes::new()
        .text(nfta::SET_TABLE, table)
        .text(nfta::SET_NAME, set)
        .be32(nfta::SET_FLAGS, 0)
        .be32(nfta::SET_KEY_TYPE, kind)
        .be32(nfta::SET_KEY_LEN, length)
        .be32(nfta::SET_ID, id)
}

/// Returns the attributes that name a set.
pub fn elements_in(table: &str, set: &str) -> Attributes {
    let named = Attributes::new().text(nfta::SET_ELEM_LIST_TABLE, table);
    named.text(nfta::SET_ELEM_LIST_SET, set)
}

/// Returns what `what` makes of each element of a set, given the element's key and its attributes.
///
/// # Errors
/// When the set cannot be read.
pub fn read<T: FromIterator<E>, E>(
    nftables: &mut Nftables,
    family: u8,
    (table, set): (&str, &str),
    what: impl Fn(&[u8], &[u8]) -> Option<E>,
) -> io::Result<T> {
    let objects = nftables.dump(Kind::GetElements, family, &elements_in(table, set))?;
    let lists = objects
        .iter()
        .filter_map(|object| attributes::find(&object.attributes, nfta::SET_ELEM_LIST_ELEMENTS));
    let elements = lists.flat_map(attributes::read).filter_map(|(_, element)| {
        let key = attributes::find(element, nfta::SET_ELEM_KEY)?;
        what(attributes::find(key, nfta::DATA_VALUE)?, element)
    });
    Ok(elements.collect())
}

/// Returns the present elements of these sets.
///
/// # Errors
/// When a set cannot be read.
pub fn keys_in(
    nftables: &mut Nftables,
    family: u8,
    table: &str,
    sets: impl Iterator<Item = &'static str>,
) -> io::Result<Elements> {
    let mut keys = |set| read(nftables, family, (table, set), |key, _| Some(key.to_vec()));
    sets.map(|set| Ok((set, keys(set)?))).collect()
}
