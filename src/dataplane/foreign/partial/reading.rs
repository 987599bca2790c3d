//! What a rule does, and with which packets, independent of the rule's format.

use super::selection::{MarkedPackets, Selection, Traffic};
use super::sets::Sets;

/// The state that the interpretation of a rule depends on.
pub struct Context<'a> {
    /// The packets that are followed.
    pub traffic: &'a Traffic<'a>,
    /// Marks that earlier rules may have set.
    pub marks: &'a Marks,
    /// Access to sets.
    pub sets: Sets<'a>,
}

/// Marks that packets may have because of earlier rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Marks of the packets themselves.
    pub packets: Vec<MarkedPackets>,
    /// Marks of their connections.
    pub connections: Vec<MarkedPackets>,
}

/// What a rule does.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Where matching packets go; several branches for a verdict map.
    pub branches: Vec<(Selection, Verdict)>,
    /// What it changes in all matching packets.
    pub changes: Vec<Change>,
}

/// Where packets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the next rule.
    Next,
    /// They are accepted.
    Accept,
    /// They are dropped.
    Drop,
    /// They are rejected.
    Reject,
    /// To a program that is not running.
    Queue,
    /// Back to the calling chain.
    Return,
    /// Through a chain, and then to the next rule.
    Jump(String),
    /// Through a chain, and then back to the caller of this one.
    Goto(String),
}

/// A change of packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Another destination.
    Destination,
    /// Another source.
    Source,
    /// A mark of the packets or of their connections.
    Mark { marked: MarkedPackets, of_connection: bool },
    /// The number of hops that remain.
    Ttl(u8),
}

/// Linux's default TTL, which packets of pods have.
const DEFAULT_TTL: u8 = 64;

impl Change {
    /// Interprets mode and number of `-j TTL` and `-j HL`: set (0), increase (1), decrease (2).
    pub fn ttl(mode: u8, number: u8) -> Option<Self> {
        match mode {
            0 => Some(Self::Ttl(number)),
            2 => Some(Self::Ttl(DEFAULT_TTL.saturating_sub(number))),
            _ => None,
        }
    }

    /// Returns the marks that follow from `change`, given the marks that packets may have before.
    pub fn marks(
        before: &[MarkedPackets],
        of_connection: bool,
        change: impl Fn(u32) -> u32,
    ) -> Vec<Self> {
        let unmarked = MarkedPackets { mark: 0, what: Vec::new() };
        let all = [unmarked].into_iter().chain(before.iter().cloned());
        let changed =
            all.map(|MarkedPackets { mark, what }| MarkedPackets { mark: change(mark), what });
        let marked = changed.filter(|marked| marked.mark != 0);
        marked.map(|marked| Self::Mark { marked, of_connection }).collect()
    }
}

impl Marks {
    /// Upper limit of the stored marks.
    const MAX_MARKS: usize = 16;

    /// Stores a mark.
    pub fn add(&mut self, marked: MarkedPackets, of_connection: bool) {
        let known = if of_connection { &mut self.connections } else { &mut self.packets };
        if let Some(known) = known.iter_mut().find(|known| known.mark == marked.mark) {
            // Once a rule marks all packets, the restriction no longer applies.
            known.what.retain(|_| !marked.what.is_empty());
        } else if known.len() < Self::MAX_MARKS {
            known.push(marked);
        }
    }

    /// Returns the marks of connections, as rules restore them to packets.
    pub fn restored(&self) -> Vec<MarkedPackets> {
        let restored = |MarkedPackets { mark, what }: &MarkedPackets| {
            let unnamed = || vec![format!("of connections with the mark {mark:#x}")];
            let what = if what.is_empty() { unnamed() } else { what.clone() };
            MarkedPackets { mark: *mark, what }
        };
        self.connections.iter().map(restored).collect()
    }
}
