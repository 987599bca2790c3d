//! Follows packets through the chains of a table.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::rules::counted,
    Act, Base, Key, POSTROUTING, PREROUTING, Partial, Place, lines, reader,
    reading::{Change, Context, Marks, Reading, Verdict},
    selection::{ESTABLISHED, MarkedPackets, NEW, Selection, Traffic},
    sets::Sets,
};
use crate::netlink::{
    attributes,
    nftables::{Object, nfta},
};

/// Upper limit of nested chains.
const MAX_DEPTH: usize = 8;
/// What a limit of a rate says about the packets that it does not let pass.
const ABOVE_RATE: &str = "above a certain rate";

/// The rules of one table, by chain.
pub enum Rules<'a> {
    /// Rules of nftables.
    Nft(BTreeMap<&'a str, Vec<&'a Object>>),
    /// Lines of iptables-legacy.
    Legacy(&'a BTreeMap<String, Vec<String>>),
}

/// The state of a walk from one base chain.
pub struct Walk<'a> {
    /// The rules of the table.
    pub rules: &'a Rules<'a>,
    /// The packets that are followed.
    pub traffic: &'a Traffic<'a>,
    /// Access to sets.
    pub sets: Sets<'a>,
    /// Marks that rules may have set so far.
    pub marks: &'a mut Marks,
    /// The base chain.
    pub base: &'a Base,
    /// Number of rules that may still be read.
    pub left: &'a mut usize,
    /// Ways, as bits, whose established connections a rule has accepted.
    pub passes_established: u8,
    /// Ways, as bits, of which a rule has accepted some first packets of connections.
    pub accepts_new: u8,
    /// The same, without the rules that accept them up to a rate only.
    pub accepts_new_at_any_rate: u8,
    /// Packets that a rule accepts up to a rate.
    pub rated: Vec<Selection>,
    /// The findings.
    pub found: &'a mut BTreeMap<Key, Partial>,
}

impl Walk<'_> {
    /// Follows the packets of these ways through the base chain, up to its policy.
    pub fn base_chain(&mut self, ways: u8) {
        let base = self.base;
        let ways = self.chain(&base.name, MAX_DEPTH, &Selection::of_ways(ways));
        let all = Selection::of_ways(ways);
        // If rules accept some connections, only trials show whether the policy takes all others. Chains
        // that close a host without trials are reported as a whole.
        let ways = ways & !self.accepts_new;
        let is_unknown = self.traffic.tunnel.is_none() && !self.traffic.is_tested();
        if !base.drops || is_unknown {
            return;
        }
        let whole = (ways != 0).then(|| Selection::of_ways(ways));
        let above = self.above_rate(&[], &Verdict::Drop, &all);
        for dropped in whole.into_iter().chain(above) {
            for act in self.acts(&Verdict::Drop, &[], &dropped) {
                self.add_finding(act, (&base.name, None));
            }
        }
    }

    /// Returns those of the dropped packets that earlier rules let pass up to a rate. `rated` are the rules
    /// of the same chain.
    fn above_rate(
        &self,
        rated: &[Selection],
        verdict: &Verdict,
        dropped: &Selection,
    ) -> Option<Selection> {
        let is_loss = matches!(verdict, Verdict::Drop | Verdict::Reject);
        if !is_loss || self.traffic.tunnel.is_some() {
            return None;
        }
        rated.iter().find_map(|rated| rated.above_rate(dropped)).or_else(|| {
            // A rule of another chain may have accepted the others.
            let mut open = dropped.clone();
            open.ways &= !self.accepts_new_at_any_rate;
            self.rated.iter().find_map(|rated| rated.above_rate(&open))
        })
    }

    /// Notes that a rule accepts these packets.
    fn note_accepted(&mut self, accepted: &Selection) {
        let ways = if accepted.takes(NEW) { accepted.ways } else { 0 };
        self.accepts_new |= ways;
        match accepted.is_rated {
            true => self.rated.push(accepted.clone()),
            false => self.accepts_new_at_any_rate |= ways,
        }
    }

    /// Follows the packets `into` through a chain. Returns the ways, as bits, of which some packets
    /// may reach what follows the chain.
    fn chain(&mut self, name: &str, depth: usize, into: &Selection) -> u8 {
        let rules = self.rules;
        let count = rules.count(name);
        let mut into = into.clone();
        let mut back = 0;
        // Selections, in words, of which no packet continues.
        let mut ended: BTreeSet<Vec<String>> = BTreeSet::new();
        // Ways of which no packet of an established connection continues, of those that reach this
        // chain.
        let mut settled_here = 0;
        // Packets that return up to a rate.
        let mut rated: Vec<Selection> = Vec::new();
        for at in 0..count {
            if *self.left == 0 {
                return 0;
            }
            *self.left -= 1;
            let mut context =
                Context { traffic: self.traffic, marks: &*self.marks, sets: &mut *self.sets };
            let Some(Reading { branches, changes }) = rules.read(&mut context, name, at) else {
                continue;
            };
            for (own, verdict) in branches {
                let Some(all) = into.and(&own) else { continue };
                let settled = self.passes_established | settled_here;
                let has_passed = all.is_late && all.ways & !settled == 0;
                let above = self.above_rate(&rated, &verdict, &all);
                if !has_passed && !ended.contains(&own.what) {
                    for act in self.acts(&verdict, &changes, above.as_ref().unwrap_or(&all)) {
                        self.add_finding(act, (name, Some(at)));
                    }
                    self.store_marks(&changes, &all);
                }
                // The ways of which it takes all packets.
                let whole = if own.is_all() { all.ways } else { 0 };
                match verdict {
                    Verdict::Next => {}
                    Verdict::Jump(target) if depth > 0 => {
                        let returned = self.chain(&target, depth - 1, &all);
                        into.ways &= !(whole & !returned);
                    }
                    Verdict::Goto(target) if depth > 0 => {
                        back |= self.chain(&target, depth - 1, &all) & whole;
                        into.ways &= !whole;
                    }
                    Verdict::Jump(_) | Verdict::Goto(_) => {}
                    Verdict::Return if all.is_rated => rated.push(all),
                    Verdict::Return => {
                        back |= whole;
                        into.ways &= !whole;
                        settled_here |= own.settled();
                        ended.extend(own.takes(NEW).then_some(own.what));
                    }
                    Verdict::Accept if all.is_rated => {
                        self.note_accepted(&all);
                        rated.push(all);
                    }
                    Verdict::Accept => {
                        settled_here |= own.settled();
                        self.note_accepted(&all);
                        if !all.is_partial && own.takes(ESTABLISHED) {
                            self.passes_established |= all.ways;
                        } else {
                            ended.extend(own.takes(NEW).then_some(own.what));
                        }
                        into.ways &= !whole;
                    }
                    Verdict::Drop | Verdict::Reject | Verdict::Queue => into.ways &= !whole,
                }
                if into.ways == 0 {
                    return back;
                }
            }
        }
        back | into.ways
    }

    /// Adds a finding about a rule, or about the policy of the chain.
    fn add_finding(&mut self, (act, what): (Act, Vec<String>), (name, at): (&str, Option<usize>)) {
        let base = self.base;
        let (label, chain) = (base.label(&base.name), base.shown(name));
        let is_of_rate = what.last().is_some_and(|what| what.ends_with(ABOVE_RATE));
        let counted = at.and_then(|at| self.rules.counted(name, at)).filter(|_| is_of_rate);
        // Usual limits are far above what pods send.
        if counted == Some(0) {
            return;
        }
        let new = || Partial {
            act,
            base: label.clone(),
            chain: chain.clone(),
            rule: at.map(|at| self.rules.identify(name, at)),
            what: what.join(" "),
            counted,
            more: 0,
            is_early: base.place.is_early(),
        };
        let key = (act, label.clone(), chain.clone());
        match self.found.get_mut(&key) {
            Some(known) => known.more += 1,
            None => _ = self.found.insert(key, new()),
        }
    }

    /// Stores the marks that a rule sets, for the following rules.
    fn store_marks(&mut self, changes: &[Change], taken: &Selection) {
        for change in changes {
            if let Change::Mark { marked: MarkedPackets { mark, what }, of_connection } = change {
                let what = [taken.what.clone(), what.clone()].concat();
                self.marks.add(MarkedPackets { mark: *mark, what }, *of_connection);
            }
        }
    }

    /// Returns what a rule does with these packets that a trial would not show, each with the
    /// matched packets in words.
    fn acts(
        &self,
        verdict: &Verdict,
        changes: &[Change],
        taken: &Selection,
    ) -> Vec<(Act, Vec<String>)> {
        let Place { hook, .. } = self.base.place;
        let is_of_pods = self.traffic.tunnel.is_none();
        let mut what = taken.what.clone();
        let mut acts = Vec::new();
        for change in changes {
            match change {
                Change::Destination if hook == PREROUTING && is_of_pods => {
                    acts.push((Act::Redirects(taken.port), what.clone()));
                }
                Change::Ttl(ttl) if *ttl <= self.hops_ahead(taken.ways) => {
                    acts.push((Act::Shortens(*ttl), what.clone()));
                }
                _ => {}
            }
        }
        let is_of_beginnings = taken.is_above && taken.is_of_beginnings();
        if taken.is_limited || is_of_beginnings && !is_of_pods {
            return acts;
        }
        if taken.is_above {
            let of = if is_of_beginnings { "that begin connections " } else { "" };
            what.push(format!("{of}{ABOVE_RATE}"));
        }
        let of_verdict = match verdict {
            Verdict::Drop => Some(Act::Drops),
            Verdict::Reject => Some(Act::Rejects),
            Verdict::Queue => Some(Act::Queues),
            _ => None,
        };
        let untested = self.traffic.untested_inputs(taken.ways & self.traffic.all_ways());
        if !what.is_empty() || !self.traffic.is_tested() {
            acts.extend(of_verdict.map(|act| (act, what.clone())));
            if hook == POSTROUTING && is_of_pods && changes.contains(&Change::Source) {
                acts.push((Act::Translates, what.clone()));
            }
        } else if !untested.is_empty() {
            let what = format!("that arrive by {}", untested.join(" or "));
            acts.extend(of_verdict.map(|act| (act, vec![what])));
        }
        for change in changes {
            if let Change::Mark { marked, of_connection: false } = change {
                let what = [what.clone(), marked.what.clone()].concat();
                if !what.is_empty() && is_of_pods {
                    acts.push((Act::Marks(marked.mark), what));
                }
            }
        }
        acts
    }

    /// Returns the number of hosts that forward packets behind this place. Packets with at most
    /// this number of remaining hops do not arrive.
    fn hops_ahead(&self, ways: u8) -> u8 {
        let leads_out = u8::from(ways & 1 != 0);
        match self.traffic.tunnel {
            // This host, and the host at the other end of the tunnel.
            None => u8::from(self.base.place.is_early()) + leads_out,
            // A router.
            Some(_) => u8::from(self.traffic.is_own()),
        }
    }
}

impl Rules<'_> {
    fn count(&self, chain: &str) -> usize {
        match self {
            Self::Nft(chains) => chains.get(chain).map_or(0, Vec::len),
            Self::Legacy(chains) => chains.get(chain).map_or(0, Vec::len),
        }
    }

    fn read(&self, context: &mut Context<'_>, chain: &str, at: usize) -> Option<Reading> {
        match self {
            Self::Nft(chains) => reader::read(context, chains.get(chain)?.get(at)?),
            Self::Legacy(chains) => {
                let line = chains.get(chain)?.get(at)?;
                lines::read(context, line, |name| chains.contains_key(name))
            }
        }
    }

    /// Returns how many packets a rule has matched, if it counts them.
    fn counted(&self, chain: &str, at: usize) -> Option<u64> {
        match self {
            Self::Nft(chains) => counted(chains.get(chain)?.get(at)?),
            Self::Legacy(_) => None,
        }
    }

    /// Identifies a rule in the words of a message.
    fn identify(&self, chain: &str, at: usize) -> String {
        match self {
            Self::Nft(chains) => {
                let rule = chains.get(chain).and_then(|rules| rules.get(at));
                let handle = rule.and_then(|rule| {
                    attributes::find(&rule.attributes, nfta::RULE_HANDLE)?.first_chunk().copied()
                });
                format!("with handle {}", handle.map_or(0, u64::from_be_bytes))
            }
            Self::Legacy(chains) => {
                let line = chains.get(chain).and_then(|rules| rules.get(at));
                format!("`{}`", line.map_or("", String::as_str))
            }
        }
    }
}
