//! The thread that finds out why a peer is silent: it watches the interfaces for some seconds, and asks the
//! kernel what it does with the peer's packets.
//!
//! It works only while something is silent, and less often the longer that lasts. What follows from what it
//! sees is decided in [`crate::dataplane::silence`]; nothing but sentences comes of it.

mod ask;
mod case;
mod questions;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    sync::mpsc::TryRecvError,
    time::{Duration, Instant},
};

use self::{
    ask::{Knock, Knocked, Ways, at_device, congested, nothing_found},
    questions::Questions,
};
use crate::{
    agent::{legacy, tap::Tap},
    dataplane::{
        kernel::{FirewallTable, trace::Trace},
        silence::{Cause, Facts, IN, OUT, Place, Suspect, Verdict, Watch},
    },
    model::{Mac, NodeId},
    netlink::Netlink,
    worker::{Order, Orders, Thread, Worker},
};

/// Peers about which is asked at once.
const ASKED: usize = 8;
/// Peers that are remembered as silent.
const SUSPECTS: usize = 256;
/// What becomes silent together should have done so.
const SETTLE: Duration = Duration::from_millis(500);
/// How long the interfaces are watched, and the rules: a silent peer is asked once a second.
const WATCH: Duration = Duration::from_millis(2_500);
/// Between packets of our own to a peer meanwhile.
const KNOCK: Duration = Duration::from_millis(800);
/// Packets that are read at most in one watch.
const PACKETS: u32 = 20_000;
/// From one inquest to the next, where nothing has changed; each time twice as long as before.
const FIRST_PAUSE: Duration = Duration::from_secs(8);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Whether another machine has this host's address is asked once its network is known, then so often, and
/// more often while one has. An answer comes at once.
const CLAIM_FIRST: Duration = Duration::from_secs(3);
const CLAIM_PAUSE: Duration = Duration::from_secs(60);
const CLAIM_AGAIN: Duration = Duration::from_secs(10);
/// What was found of a peer is told at once where it falls silent again so soon: a limit of packets drops
/// them under load alone.
const KEPT: Duration = Duration::from_secs(60);
const LISTEN: Duration = Duration::from_millis(500);

/// All that an inquest depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    pub place: Place,
    /// Packets are to leave by the underlay's interface, whatever the main table says.
    pub pinned: bool,
    pub suspects: Vec<Suspect>,
}

type Verdicts = BTreeMap<NodeId, Verdict>;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Another machine has this host's address, as a sentence.
    pub claim: Option<String>,
    /// Of the peers that were asked about last.
    pub verdicts: Verdicts,
}

pub struct Inquest {
    pub(super) worker: Worker<Option<Case>>,
    told: Option<Case>,
    found: Found,
    /// Peers of which something was found, and which are silent no longer.
    recovered: BTreeMap<NodeId, Instant>,
}

impl Order for Option<Case> {
    fn supersedes(&self, _: &Self) -> bool {
        true
    }
}

impl Inquest {
    pub fn start(tell: impl Fn(Found) + Send + 'static) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let begin = |orders| Inquirer {
            netlink,
            orders,
            tell,
            case: None,
            turn: 0,
            pause: FIRST_PAUSE,
            due: None,
            claim_due: None,
            claim: None,
            duplicates: BTreeMap::new(),
        };
        let worker = Worker::start("inquest", move |orders| begin(orders).run())?;
        Ok(Self { worker, told: None, found: Found::default(), recovered: BTreeMap::new() })
    }

    /// Ends it after the step under way. Once the thread has ended no table of it is left.
    pub fn end(self) -> Thread {
        self.worker.end()
    }

    /// What was found so far is not known any more.
    pub fn forget(&mut self) {
        (self.found, self.recovered) = (Found::default(), BTreeMap::new());
    }

    /// What was found of a silent peer.
    pub fn found(&self, node: NodeId) -> Option<&Verdict> {
        self.found.verdicts.get(&node)
    }

    /// That another machine has this host's address, as a sentence.
    pub const fn claim(&self) -> Option<&String> {
        self.found.claim.as_ref()
    }

    fn set(&mut self, case: Option<Case>) {
        if self.told == case {
            return;
        }
        let suspects = case.iter().flat_map(|case| &case.suspects);
        let silent: BTreeSet<NodeId> = suspects.map(|suspect| suspect.node).collect();
        let Self { found, recovered, .. } = self;
        let is_kept = |at: &Instant| at.elapsed() < KEPT;
        found.verdicts.retain(|node, _| recovered.get(node).is_none_or(is_kept));
        recovered.retain(|node, _| !silent.contains(node) && found.verdicts.contains_key(node));
        for node in found.verdicts.keys().filter(|node| !silent.contains(node)) {
            recovered.entry(*node).or_insert_with(Instant::now);
        }
        self.told.clone_from(&case);
        self.worker.order(case);
    }
}

struct Inquirer<F> {
    netlink: Netlink,
    orders: Orders<Option<Case>>,
    tell: F,
    case: Option<Case>,
    turn: usize,
    pause: Duration,
    due: Option<Instant>,
    /// When it is asked again whether another machine has this host's address.
    claim_due: Option<Instant>,
    claim: Option<String>,
    /// Silent peers that had a hardware address of this host.
    duplicates: BTreeMap<NodeId, Mac>,
}

impl<F: Fn(Found)> Inquirer<F> {
    fn run(mut self) {
        while self.take_orders() {
            let now = Instant::now();
            if self.due.is_some_and(|due| due <= now) {
                self.look(now);
                continue;
            }
            if self.claim_due.is_some_and(|due| due <= now) {
                self.look_for_claims(now);
                continue;
            }
            let due = self.due.into_iter().chain(self.claim_due).min();
            self.orders.sleeper.wait([], due.map(|due| due.saturating_duration_since(now)));
        }
    }

    /// Says whether the agent still runs.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(case) => {
                    let place = |case: &Option<Case>| case.as_ref().map(|case| case.place.clone());
                    let before = place(&self.case);
                    self.case = case;
                    let now = Instant::now();
                    if place(&self.case) != before {
                        self.claim_due = self.case.is_some().then_some(now + CLAIM_FIRST);
                    }
                    let suspects = self.case.as_ref().map(|case| &case.suspects);
                    let is_silent = |node: &NodeId| {
                        suspects.is_some_and(|all| all.iter().any(|one| one.node == *node))
                    };
                    self.duplicates.retain(|node, _| is_silent(node));
                    self.pause = FIRST_PAUSE;
                    self.due = suspects.filter(|all| !all.is_empty()).map(|_| now + SETTLE);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn look(&mut self, now: Instant) {
        let Some(case) = self.case.clone() else { return };
        let count = case.suspects.len();
        let first = (self.turn * ASKED) % count.max(1);
        let asked = case.suspects.iter().cycle().skip(first).take(count.min(ASKED));
        let asked: Vec<Suspect> = asked.cloned().collect();
        // Those that are not asked about this time are next.
        self.turn = if count > ASKED { self.turn + 1 } else { 0 };
        self.due = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        match self.inquire(&case, &asked) {
            Ok(Some(verdicts)) => (self.tell)(Found { claim: self.claim.clone(), verdicts }),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "it was not found out why a peer is silent"),
        }
    }

    /// Asks whether another machine has this host's address: that may harm some packets and not others.
    fn look_for_claims(&mut self, now: Instant) {
        let pause = if self.claim.is_some() { CLAIM_AGAIN } else { CLAIM_PAUSE };
        self.claim_due = Some(now + pause);
        let Some(Case { place, .. }) = self.case.clone() else { return };
        let Some(questions) = Questions::new(&place, []) else { return };
        let before = self.claim.clone();
        match self.listen_for_claims(&place, &questions) {
            Ok(()) if self.claim != before => {
                let claim = self.claim.clone();
                (self.tell)(Found { claim, verdicts: BTreeMap::new() });
            }
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "it was not asked for this host's own address"),
        }
    }

    fn listen_for_claims(&mut self, place: &Place, questions: &Questions) -> io::Result<()> {
        let ways = Ways::find(&mut self.netlink, place, false, &[])?;
        let mut watch = Watch::new(place.local, place.port, ways.own_macs(), &[]);
        let tap = Tap::of_arp()?;
        questions.ask();
        let begun = Instant::now();
        while begun.elapsed() < LISTEN && watch.claim().is_none() {
            let mut packets = 0;
            while packets < PACKETS && tap.next(|packet| watch.on_packet(packet))?.is_some() {
                packets += 1;
            }
            let rest = LISTEN.saturating_sub(begun.elapsed());
            self.orders.sleeper.wait([tap.as_fd()], Some(rest));
            if !self.take_orders() {
                return Ok(());
            }
        }
        self.claim = watch.claim().map(|mac| claimed(mac, place));
        Ok(())
    }

    /// One watch; none if something else is to be done before it ends.
    fn inquire(&mut self, case: &Case, asked: &[Suspect]) -> io::Result<Option<Verdicts>> {
        let place = &case.place;
        let ways = Ways::find(&mut self.netlink, place, case.pinned, asked)?;
        let mut watch = Watch::new(place.local, place.port, ways.own_macs(), asked);
        watch.add_known_duplicates(&self.duplicates);
        let hops = ways.hops(place);
        watch.expect_answers(hops.iter().copied());
        let questions = Questions::new(place, hops);
        let before = counted(case);
        let errors = congested(&mut self.netlink, &place.device);
        let Some(sent) = self.watch(case, asked, questions.as_ref(), None, &mut watch)? else {
            return Ok(None);
        };
        self.duplicates.extend(watch.duplicates());
        self.claim = watch.claim().map(|mac| claimed(mac, place));
        let after = counted(case);
        let errors = errors.zip(congested(&mut self.netlink, &place.device));
        let mut facts: BTreeMap<NodeId, Facts> = BTreeMap::new();
        for suspect in asked {
            let traces = &watch.traces[&suspect.node];
            let count = |counted: &Option<BTreeMap<IpAddr, u64>>| {
                counted.as_ref().and_then(|counted| counted.get(&suspect.address).copied())
            };
            let counts = count(&before).zip(count(&after));
            let of_suspect = Facts {
                sent: sent.past.contains(&suspect.node),
                entered: sent.into.contains(&suspect.node)
                    && ways.leads_into(&mut self.netlink, place, suspect.vtep),
                unresolved: ways.unresolved(&mut self.netlink, suspect.address),
                filtered: ways.filtered(&mut self.netlink, place, suspect.address, &traces.came),
                pinned: ways.pinned(&mut self.netlink, suspect.address, |hop| watch.answering(hop)),
                congested: errors.is_some_and(|(before, after)| after > before),
                xdp: ways.has_xdp(place),
                passthru: ways.passthru(place),
                uncounted: counts.is_some_and(|(before, after)| before == after),
                ..Facts::default()
            };
            facts.insert(suspect.node, of_suspect);
        }
        self.read_about_device(place, asked, &watch, &mut facts);
        if self.ask_about_answers(case, asked, &ways, &mut watch, &mut facts)?.is_none() {
            return Ok(None);
        }
        // Rules are looked at only for packets that are known to be lost here, or may be.
        let is_doubtful = |suspect: &&Suspect| {
            let (traces, facts) = (&watch.traces[&suspect.node], &facts[&suspect.node]);
            let is_translated = traces.left.values().any(|from| *from != place.source);
            let is_known = facts.unresolved.is_some() || facts.filtered.is_some();
            let is_known = is_known || facts.pinned.is_some();
            let is_lost_here = facts.sent && traces.left.is_empty() || is_translated;
            let is_lost_here = is_lost_here || sent.forbidden.contains(&suspect.node);
            // Of one that lives, packets may come by another way, without a tunnel.
            !is_known && (is_lost_here || !traces.came.is_empty() || suspect.lives)
        };
        let doubtful: Vec<Suspect> = asked.iter().filter(is_doubtful).cloned().collect();
        if !doubtful.is_empty() && watch.claim().is_none() {
            let addresses: Vec<IpAddr> = doubtful.iter().map(|suspect| suspect.address).collect();
            let overlay: Vec<IpAddr> = doubtful.iter().map(|suspect| suspect.vtep).collect();
            let (device, interface) = (&place.device, &place.interface);
            let begun = Trace::begin(device, interface, place.port, &addresses, &overlay);
            let trace = begun.inspect_err(|error| tracing::debug!(%error, "no packets are traced"));
            let mut trace = trace.ok();
            if trace.is_some()
                && self.watch(case, &doubtful, None, trace.as_mut(), &mut watch)?.is_none()
            {
                return Ok(None);
            }
            for suspect in &doubtful {
                let Some(facts) = facts.get_mut(&suspect.node) else { continue };
                if let Some(trace) = &trace {
                    facts.dropped = trace.told().dropped(place.local, suspect.address);
                    facts.translating = trace.told().translating(suspect.address);
                    let diverted = trace.told().dropped_at(suspect.vtep);
                    facts.diverted = diverted.and_then(|(by, at)| {
                        ways.diverted(&mut self.netlink, suspect.vtep, by, at)
                    });
                }
                let left = &watch.traces[&suspect.node].left;
                if facts.translating.is_none() && left.values().any(|from| *from != place.source) {
                    facts.translating_legacy =
                        legacy::translating(place.local.is_ipv4(), place.port);
                }
                for way in [OUT, IN] {
                    facts.hints[way] = ways.hints(&mut self.netlink, place, way);
                }
                let is_unexplained = trace.is_some() && facts.hints[OUT].is_empty();
                facts.forbidden = is_unexplained && sent.forbidden.contains(&suspect.node);
                for way in [OUT, IN] {
                    if facts.hints[way].is_empty() {
                        facts.hints[way].push(nothing_found(&place.interface, way));
                    }
                }
            }
        }
        Ok(Some(watch.conclude(asked, &facts, place)))
    }

    /// Reads what may drop packets at the VXLAN device, where some may be lost there.
    fn read_about_device(
        &mut self,
        place: &Place,
        asked: &[Suspect],
        watch: &Watch,
        facts: &mut BTreeMap<NodeId, Facts>,
    ) {
        let mut read = [None, None];
        for suspect in asked {
            let Some(facts) = facts.get_mut(&suspect.node) else { continue };
            let carried = watch.traces[&suspect.node].carried;
            for (way, may_be_lost) in [(OUT, facts.entered && !carried[OUT]), (IN, carried[IN])] {
                if may_be_lost {
                    let hints =
                        read[way].get_or_insert_with(|| at_device(&mut self.netlink, place, way));
                    facts.device_hints[way].clone_from(hints);
                }
            }
        }
    }

    /// Finds out what drops answers for next hops that come in, and which the kernel does not get. Gives
    /// nothing if something else is to be done first.
    fn ask_about_answers(
        &mut self,
        case: &Case,
        asked: &[Suspect],
        ways: &Ways,
        watch: &mut Watch,
        facts: &mut BTreeMap<NodeId, Facts>,
    ) -> io::Result<Option<()>> {
        let mut refused = BTreeMap::new();
        for suspect in asked {
            let unresolved = facts.get(&suspect.node).and_then(|facts| facts.unresolved.as_ref());
            let Some((hop, _)) = unresolved else { continue };
            if ways.leads_by(suspect.address, watch.answered_at(*hop)) {
                refused.insert(suspect.node, *hop);
            }
        }
        if refused.is_empty() {
            return Ok(Some(()));
        }
        let Case { place, .. } = case;
        let hops: BTreeSet<IpAddr> = refused.values().copied().collect();
        let questions = Questions::new(place, hops.iter().copied());
        let mut trace = Trace::of_answers(&place.device, &place.interface, &hops)?;
        if self.watch(case, asked, questions.as_ref(), Some(&mut trace), watch)?.is_none() {
            return Ok(None);
        }
        for (node, hop) in refused {
            let Some(facts) = facts.get_mut(&node) else { continue };
            facts.refused = Some(trace.told().dropped_from(hop));
        }
        Ok(Some(()))
    }

    /// Watches the interfaces, and sends packets of our own: to the port of tunnels, which no device there
    /// takes, and through the tunnel. Gives the peers to which some were sent; none if something else is to
    /// be done first.
    fn watch(
        &mut self,
        case: &Case,
        asked: &[Suspect],
        questions: Option<&Questions>,
        mut trace: Option<&mut Trace>,
        watch: &mut Watch,
    ) -> io::Result<Option<Sent>> {
        let tap = Tap::open(case.place.port)?;
        let knock = Knock::open(&case.place, case.pinned)?;
        let mut sent = Sent::default();
        let (begun, mut knock_at, mut packets) = (Instant::now(), Instant::now(), 0);
        loop {
            let now = Instant::now();
            if knock_at <= now {
                knock_at = now + KNOCK;
                // A peer without a tunnel would take it for one of this host's pods' packets in a tunnel.
                let tunnelled = asked.iter().filter(|suspect| suspect.tunnelled);
                for suspect in tunnelled {
                    let knocked = knock.at(suspect.address);
                    sent.past.extend((knocked != Knocked::NoWay).then_some(suspect.node));
                    sent.forbidden.extend((knocked == Knocked::Forbidden).then_some(suspect.node));
                }
                let sent_to =
                    asked.iter().filter(|suspect| suspect.tunnelled && knock.inside(suspect));
                sent.into.extend(sent_to.map(|suspect| suspect.node));
                questions.into_iter().for_each(Questions::ask);
            }
            while packets < PACKETS && tap.next(|packet| watch.on_packet(packet))?.is_some() {
                packets += 1;
            }
            if let Some(trace) = &mut trace {
                trace.read()?;
            }
            let rest = WATCH.saturating_sub(begun.elapsed());
            if rest.is_zero() {
                return Ok(Some(sent));
            }
            let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
            fds.extend((packets < PACKETS).then(|| tap.as_fd()));
            fds.extend(trace.as_ref().map(|trace| trace.as_fd()));
            let until = knock_at.saturating_duration_since(Instant::now());
            self.orders.sleeper.wait(fds, Some(rest.min(until)));
            let case_before = self.case.clone();
            if !self.take_orders() || self.case != case_before {
                return Ok(None);
            }
        }
    }
}

/// Peers to which packets were sent.
#[derive(Debug, Default)]
struct Sent {
    /// Past the VXLAN device.
    past: BTreeSet<NodeId>,
    /// Of these, what was refused.
    forbidden: BTreeSet<NodeId>,
    /// By the VXLAN device.
    into: BTreeSet<NodeId>,
}

/// Tunnel packets that the guard has seen, by address; none where they are not counted.
fn counted(case: &Case) -> Option<BTreeMap<IpAddr, u64>> {
    let mut table = FirewallTable::open().ok().filter(|_| case.place.guard)?;
    table.packets_of_members(&case.place.device).ok()
}

fn claimed(mac: Mac, place: &Place) -> String {
    Cause::AddressTaken { mac }.sentence(&[], place)
}
