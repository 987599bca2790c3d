//! What a rule of any program does, and with which packets.

use super::selection::{Marked, Selection, Traffic};
use super::sets::Sets;

/// All that the reading of a rule depends on.
pub struct Context<'a> {
    pub traffic: &'a Traffic<'a>,
    pub marks: &'a Marks,
    pub sets: Sets<'a>,
}

/// Marks that packets may have by earlier rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Of the packets themselves.
    pub packets: Vec<Marked>,
    /// Of their connections.
    pub connections: Vec<Marked>,
}

/// What a rule does.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// Where the packets go that it takes: several by a map of verdicts.
    pub branches: Vec<(Selection, Verdict)>,
    /// What else it does with all that it takes.
    pub changes: Vec<Change>,
}

/// Where packets go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the next rule.
    Next,
    Accept,
    Drop,
    Reject,
    /// To a program that does not run.
    Queue,
    /// Back to the chain that has led to this one.
    Return,
    /// Through a chain, and back.
    Jump(String),
    /// Through a chain, and back to the one before this.
    Goto(String),
}

/// How packets are changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Destination,
    Source,
    /// They, or their connections, get a mark; some of them by what they are, in words.
    Mark {
        marked: Marked,
        of_connection: bool,
    },
    /// They live so many hops more.
    Ttl(u8),
}

/// As long as packets of pods live, by Linux's own setting.
const USUAL_TTL: u8 = 64;

impl Change {
    /// By mode and number of `-j TTL` and `-j HL`: set, increase, decrease.
    pub fn ttl(mode: u8, number: u8) -> Option<Self> {
        match mode {
            0 => Some(Self::Ttl(number)),
            2 => Some(Self::Ttl(USUAL_TTL.saturating_sub(number))),
            _ => None,
        }
    }

    /// By what a mark was, and how it is changed.
    pub fn marks(before: &[Marked], of_connection: bool, change: impl Fn(u32) -> u32) -> Vec<Self> {
        let unmarked = Marked { mark: 0, what: Vec::new() };
        let all = [unmarked].into_iter().chain(before.iter().cloned());
        let changed = all.map(|Marked { mark, what }| Marked { mark: change(mark), what });
        let marked = changed.filter(|marked| marked.mark != 0);
        marked.map(|marked| Self::Mark { marked, of_connection }).collect()
    }
}

impl Marks {
    /// Marks that are known at once.
    const MOST: usize = 16;

    pub fn add(&mut self, marked: Marked, of_connection: bool) {
        let known = if of_connection { &mut self.connections } else { &mut self.packets };
        if let Some(known) = known.iter_mut().find(|known| known.mark == marked.mark) {
            // All packets have it, then.
            known.what.retain(|_| !marked.what.is_empty());
        } else if known.len() < Self::MOST {
            known.push(marked);
        }
    }

    /// Of connections, as packets get them.
    pub fn restored(&self) -> Vec<Marked> {
        let restored = |Marked { mark, what }: &Marked| {
            let unnamed = || vec![format!("of connections with the mark {mark:#x}")];
            let what = if what.is_empty() { unnamed() } else { what.clone() };
            Marked { mark: *mark, what }
        };
        self.connections.iter().map(restored).collect()
    }
}
