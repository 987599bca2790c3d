//! The registers of an nftables rule, and what was loaded into them.

use std::collections::BTreeMap;

use super::selection::Side;

/// The meaning of a value in a register.
#[derive(Clone)]
pub enum Loaded {
    Unknown,
    Interface {
        side: Side,
        by_name: bool,
    },
    Source,
    Destination,
    Addresses,
    SourcePort,
    DestinationPort,
    DestinationType,
    Family,
    EtherType,
    Protocol,
    State,
    Mark {
        of_connection: bool,
    },
    Flags,
    Length,
    Content,
    Share,
    Amount,
    Time,
    /// The DSCP, with the bits beside it.
    Class,
}

/// A value in registers.
#[derive(Clone)]
pub struct Value<'a> {
    /// What was loaded.
    pub loaded: Loaded,
    /// Its length in bytes.
    pub bytes: usize,
    /// The mask that was applied.
    pub mask: Option<&'a [u8]>,
}

/// The loaded values, by the number of their first word.
#[derive(Default)]
pub struct Registers<'a>(BTreeMap<usize, Value<'a>>);

impl<'a> Registers<'a> {
    /// Stores a value in a register and the following words.
    pub fn load(&mut self, register: u32, value: Value<'a>) {
        let first = word_of(register);
        let words = first..first + value.bytes.div_ceil(4).max(1);
        self.0.retain(|at, _| !words.contains(at));
        self.0.insert(first, value);
    }

    /// Returns the value that begins at a register.
    pub fn value(&mut self, register: u32) -> Option<&mut Value<'a>> {
        self.0.get_mut(&word_of(register))
    }

    /// Returns the values that make up a key of this length, with their offsets in it.
    pub fn of_key(&self, register: u32, bytes: usize) -> Vec<(usize, &Value<'a>)> {
        let first = word_of(register);
        let words = first..first + bytes.div_ceil(4).max(1);
        self.0.range(words).map(|(at, value)| ((at - first) * 4, value)).collect()
    }
}

/// Returns the number of a register's first word: `NFT_REG_1` to `NFT_REG_4` have four words each,
/// from 8 on each has one.
const fn word_of(register: u32) -> usize {
    (match register {
        8.. => register - 8,
        number => number.saturating_sub(1) * 4,
    }) as usize
}
