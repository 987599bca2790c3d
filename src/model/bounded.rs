//! Deserializers for lists in messages, bounded by what a cluster can need.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, SeqAccess, Visitor},
};

use super::MAX_SLOTS;

/// Greatest number of member records in a cluster, departed members included.
pub const MAX_MEMBERS: usize = 1 << 14;
/// Greatest number of runs in a table: one for each slot.
const MAX_RUNS: usize = MAX_SLOTS as usize;

/// Deserializes a list with at most [`MAX_MEMBERS`] elements.
///
/// # Errors
/// If the list is longer, or an element is malformed.
pub fn members<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    list::<D, T, MAX_MEMBERS>(deserializer)
}

/// Deserializes a list with at most [`MAX_SLOTS`] elements.
///
/// # Errors
/// If the list is longer, or an element is malformed.
pub fn runs<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    list::<D, T, MAX_RUNS>(deserializer)
}

/// Deserializes a list with at most `MAX` elements. Stops at the first element beyond that.
///
/// # Errors
/// If the list is longer, or an element is malformed.
pub fn list<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    deserializer.deserialize_seq(Bounded::<T, MAX>(PhantomData))
}

/// Visits a list with at most `MAX` elements.
struct Bounded<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Bounded<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<T>, A::Error> {
        let announced = elements.size_hint().unwrap_or(0);
        if announced > MAX {
            return Err(A::Error::invalid_length(announced, &self));
        }
        // The announced length is not trusted: it could cause an allocation for elements that never come.
        let mut list = Vec::with_capacity(announced.min(64));
        while let Some(element) = elements.next_element()? {
            if list.len() == MAX {
                return Err(A::Error::invalid_length(MAX + 1, &self));
            }
            list.push(element);
        }
        Ok(list)
    }
}
