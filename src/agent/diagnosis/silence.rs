//! The thread that finds out why a peer is silent: it captures packets at the interfaces for some seconds,
//! and queries how the kernel handles the packets of the peer.
//!
//! It works only while a peer is silent, and less often the longer that lasts. [`crate::dataplane::silence`]
//! draws the conclusions, which are sentences for operators and nothing else.

mod case;
mod doubtful;
mod hints;
mod ipsec_policies;
mod kernel_queries;
mod neighbor_queries;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
    sync::mpsc::TryRecvError,
    time::{Duration, Instant},
};

use self::{
    case::Named,
    hints::closed_gossip,
    kernel_queries::{
        PeerRoutes, SendOutcome, SentPackets, TestSender, congested, counted_packets,
    },
    neighbor_queries::{NeighborQueries, neighbors},
};
use crate::{
    agent::diagnosis::tap::Tap,
    dataplane::{
        foreign::{ClosedPort, trace::Trace},
        silence::{Cause, Facts, IN, Place, Suspect, Verdict, Watch},
    },
    model::{Mac, NodeId, Problem},
    netlink::Netlink,
    worker::{Order, Orders, Thread, Worker},
};

/// Limit of peers diagnosed at once.
const MAX_DIAGNOSED: usize = 8;
/// Limit of silent peers in a case.
const MAX_SUSPECTS: usize = 256;
/// How long to wait after a change of the case, so that peers that become silent together are diagnosed
/// together.
const SETTLE_TIME: Duration = Duration::from_millis(500);
/// How long packets and rules are watched: the probe sends to a silent peer once a second.
const CAPTURE_TIME: Duration = Duration::from_millis(2_500);
/// Time between test packets to a peer during a capture.
const TEST_PACKET_INTERVAL: Duration = Duration::from_millis(800);
/// Limit of packets read per capture.
const MAX_PACKETS: u32 = 20_000;
/// First pause between diagnoses of an unchanged case. It doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(8);
/// Longest pause between diagnoses of an unchanged case.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Pause before the first check whether another machine has this host's address.
const CLAIM_FIRST_CHECK: Duration = Duration::from_secs(3);
/// Time between these checks.
const CLAIM_CHECK_INTERVAL: Duration = Duration::from_secs(60);
/// Time between these checks while another machine has the address.
const CLAIMED_CHECK_INTERVAL: Duration = Duration::from_secs(10);
/// How long a verdict that may recur is kept after the peer has recovered, and reported at once if it falls
/// silent again: a rate limit drops its packets only under load.
const VERDICT_LIFETIME: Duration = Duration::from_secs(60);
/// How long to wait for an answer to the check: a host answers at once.
const CLAIM_CAPTURE_TIME: Duration = Duration::from_millis(250);
/// Number of queries of one such check.
const CLAIM_QUERIES: usize = 2;

/// The input of a diagnosis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// The interfaces and addresses of this host.
    pub place: Place,
    /// Whether packets leave by the underlay's interface whatever the main routing table says.
    pub pinned: bool,
    /// Whether no other member answers: the rules at the port of gossip are read.
    pub isolated: bool,
    /// The silent peers.
    pub suspects: Vec<Suspect>,
}

type Verdicts = BTreeMap<NodeId, Verdict>;

/// The findings of a diagnosis.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SilenceFindings {
    /// The sentence that another machine has this host's address.
    pub claim: Option<Problem>,
    /// Verdicts on the peers diagnosed last.
    pub verdicts: Verdicts,
    /// Chains that drop packets to the port of gossip; read while no other member answers.
    pub closed_gossip: Option<ClosedPort>,
}

/// The event loop's handle of the thread.
pub struct SilenceDiagnosis {
    /// The thread and its orders.
    pub(in crate::agent) worker: Worker<Option<Case>>,
    /// The case last ordered.
    ordered: Option<Case>,
    /// The peers to diagnose.
    named: Named,
    /// What is known about silent and recently recovered peers.
    findings: SilenceFindings,
    /// Peers with a verdict that are no longer silent, and since when.
    recovered: BTreeMap<NodeId, Instant>,
}

impl Case {
    /// Whether there is something to find out.
    const fn is_due(&self) -> bool {
        self.isolated || !self.suspects.is_empty()
    }
}

impl Order for Option<Case> {
    fn supersedes(&self, _: &Self) -> bool {
        true
    }
}

impl SilenceDiagnosis {
    /// Starts the thread; `report` is called with new findings.
    ///
    /// # Errors
    /// Fails when the system refuses a netlink socket or the thread.
    pub fn start(report: impl Fn(SilenceFindings) + Send + 'static) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let begin = |orders| Diagnoser {
            netlink,
            orders,
            report,
            case: None,
            group: 0,
            pause: FIRST_PAUSE,
            due: None,
            claim_due: None,
            claim: None,
            closed_gossip: None,
            duplicates: BTreeMap::new(),
            gateways: BTreeSet::new(),
        };
        let worker = Worker::start("silence", move |orders| begin(orders).run())?;
        Ok(Self {
            worker,
            ordered: None,
            named: Named::default(),
            findings: SilenceFindings::default(),
            recovered: BTreeMap::new(),
        })
    }

    /// Ends the thread after the present step. The ended thread leaves no nftables table behind.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

/// The state of the thread.
struct Diagnoser<F> {
    netlink: Netlink,
    orders: Orders<Option<Case>>,
    report: F,
    case: Option<Case>,
    /// Number of the next group of peers, if there are more than [`MAX_DIAGNOSED`].
    group: usize,
    /// Pause before the diagnosis after the next.
    pause: Duration,
    /// When the next diagnosis is due.
    due: Option<Instant>,
    /// When the next check is due whether another machine has this host's address.
    claim_due: Option<Instant>,
    /// The sentence that another machine has it.
    claim: Option<Problem>,
    /// A chain that drops packets to the port of gossip, if the last diagnosis read it.
    closed_gossip: Option<ClosedPort>,
    /// Silent peers that were seen with a hardware address of this host.
    duplicates: BTreeMap<NodeId, Mac>,
    /// IPv4 routers to the peers diagnosed last. Another machine may have the address of one.
    gateways: BTreeSet<IpAddr>,
}

impl<F: Fn(SilenceFindings)> Diagnoser<F> {
    fn run(mut self) {
        while self.apply_orders() {
            let now = Instant::now();
            if self.due.is_some_and(|due| due <= now) {
                self.run_diagnosis(now);
                continue;
            }
            if self.claim_due.is_some_and(|due| due <= now) {
                self.check_claims(now);
                continue;
            }
            let due = self.due.into_iter().chain(self.claim_due).min();
            self.orders.sleeper.wait([], due.map(|due| due.saturating_duration_since(now)));
        }
    }

    /// Applies waiting orders. Returns false once the agent has ended.
    fn apply_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(case) => {
                    let place = |case: &Option<Case>| case.as_ref().map(|case| case.place.clone());
                    let before = place(&self.case);
                    self.case = case;
                    let now = Instant::now();
                    if place(&self.case) != before {
                        self.claim_due = self.case.is_some().then_some(now + CLAIM_FIRST_CHECK);
                    }
                    let is_due = self.case.as_ref().is_some_and(Case::is_due);
                    let suspects = self.case.as_ref().map(|case| &case.suspects);
                    let is_silent = |node: &NodeId| {
                        suspects
                            .is_some_and(|list| list.iter().any(|suspect| suspect.node == *node))
                    };
                    self.duplicates.retain(|node, _| is_silent(node));
                    self.pause = FIRST_PAUSE;
                    self.due = is_due.then(|| now + SETTLE_TIME);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Diagnoses the next group of peers, and reports the verdicts.
    fn run_diagnosis(&mut self, now: Instant) {
        let Some(case) = self.case.clone() else { return };
        let count = case.suspects.len();
        let first = (self.group * MAX_DIAGNOSED) % count.max(1);
        let diagnosed = case.suspects.iter().cycle().skip(first).take(count.min(MAX_DIAGNOSED));
        let diagnosed: Vec<Suspect> = diagnosed.cloned().collect();
        // The next diagnosis takes the next group.
        self.group = if count > MAX_DIAGNOSED { self.group + 1 } else { 0 };
        self.due = Some(now + self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.closed_gossip = if case.isolated { closed_gossip(&case.place) } else { None };
        let verdicts = match diagnosed.is_empty() {
            true => Ok(Some(Verdicts::new())),
            false => self.diagnose(&case, &diagnosed),
        };
        match verdicts {
            Ok(Some(verdicts)) => self.report(verdicts),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "silent peers not diagnosed"),
        }
    }

    /// Reports new verdicts, and what is known of this host.
    fn report(&self, verdicts: Verdicts) {
        let (claim, closed_gossip) = (self.claim.clone(), self.closed_gossip.clone());
        (self.report)(SilenceFindings { claim, verdicts, closed_gossip });
    }

    /// Checks whether another machine has this host's address: that can affect some packets and not others.
    fn check_claims(&mut self, now: Instant) {
        let pause =
            if self.claim.is_some() { CLAIMED_CHECK_INTERVAL } else { CLAIM_CHECK_INTERVAL };
        self.claim_due = Some(now + pause);
        let Some(Case { place, .. }) = self.case.clone() else { return };
        let mut neighbors: BTreeSet<IpAddr> =
            neighbors(&mut self.netlink, place.link).into_iter().collect();
        neighbors.extend(&self.gateways);
        let queries = NeighborQueries::new(&place, neighbors.iter().copied());
        let Some(neighbor_queries) = queries else { return };
        let before = self.claim.clone();
        match self.capture_claims(&place, &neighbors, &neighbor_queries) {
            Ok(()) if self.claim != before => self.report(Verdicts::new()),
            Ok(()) => {}
            Err(error) => tracing::debug!(%error, "own address not checked"),
        }
    }

    /// Queries this host's address by ARP, and those of neighbors, and reads the answers.
    fn capture_claims(
        &mut self,
        place: &Place,
        neighbors: &BTreeSet<IpAddr>,
        neighbor_queries: &NeighborQueries,
    ) -> io::Result<()> {
        let routes = PeerRoutes::find(&mut self.netlink, place, false, &[])?;
        let mut watch = Watch::new(place.local, place.port, routes.own_macs(), &[]);
        watch.expect_answers(neighbors.iter().copied());
        let tap = Tap::of_arp()?;
        // Two machines that have the same address both answer each query.
        for _ in 0..CLAIM_QUERIES {
            neighbor_queries.send();
            if !self.read_answers(&tap, &mut watch)? {
                return Ok(());
            }
        }
        self.claim = self.claim_in(&watch, place);
        Ok(())
    }

    /// Reads the answers to queries. Returns false once the agent has ended.
    fn read_answers(&mut self, tap: &Tap, watch: &mut Watch) -> io::Result<bool> {
        let begun = Instant::now();
        while begun.elapsed() < CLAIM_CAPTURE_TIME {
            let mut packets = 0;
            while packets < MAX_PACKETS && tap.next(|packet| watch.on_packet(packet))?.is_some() {
                packets += 1;
            }
            let remaining = CLAIM_CAPTURE_TIME.saturating_sub(begun.elapsed());
            self.orders.sleeper.wait([tap.as_fd()], Some(remaining));
            if !self.apply_orders() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Returns the problem that another machine has this host's address or that of a router to a peer.
    fn claim_in(&self, watch: &Watch, place: &Place) -> Option<Problem> {
        let own = watch.claim().map(|mac| Cause::AddressTaken { mac });
        let contested = self.gateways.iter().find_map(|gateway| {
            let macs = watch.contestants(*gateway);
            let gateway = *gateway;
            (!macs.is_empty()).then_some(Cause::GatewayClaimed { gateway, macs })
        });
        own.or(contested).map(|cause| cause.problem(&[], place))
    }

    /// Runs one diagnosis. Returns `None` if the case changed or the agent ended meanwhile.
    fn diagnose(&mut self, case: &Case, diagnosed: &[Suspect]) -> io::Result<Option<Verdicts>> {
        let place = &case.place;
        let routes = PeerRoutes::find(&mut self.netlink, place, case.pinned, diagnosed)?;
        let mut watch = Watch::new(place.local, place.port, routes.own_macs(), diagnosed);
        watch.add_known_duplicates(&self.duplicates);
        let mut hops = routes.hops(place);
        hops.extend(neighbors(&mut self.netlink, place.link));
        watch.expect_answers(hops.iter().copied());
        let neighbor_queries = NeighborQueries::new(place, hops);
        let before = counted_packets(case);
        let errors = congested(&mut self.netlink, &place.device);
        let refusals = ipsec_policies::ipsec_refusals();
        let Some(sent) =
            self.capture(case, diagnosed, neighbor_queries.as_ref(), None, &mut watch)?
        else {
            return Ok(None);
        };
        routes.verify_hops(&mut self.netlink, diagnosed, |hop| {
            watch.answered_at(hop).next().is_some()
        });
        self.duplicates.extend(watch.duplicates());
        let gateway = |suspect: &Suspect| routes.gateway(place, suspect.address);
        // The later checks ask by ARP.
        self.gateways = diagnosed.iter().filter_map(gateway).filter(IpAddr::is_ipv4).collect();
        self.claim = self.claim_in(&watch, place);
        let after = counted_packets(case);
        let errors = errors.zip(congested(&mut self.netlink, &place.device));
        let refuses =
            refusals.zip(ipsec_policies::ipsec_refusals()).is_none_or(|(old, new)| new > old);
        let mut facts: BTreeMap<NodeId, Facts> = BTreeMap::new();
        for suspect in diagnosed {
            let traces = &watch.traces[&suspect.node];
            let count = |counted: &Option<BTreeMap<IpAddr, u64>>| {
                counted.as_ref().and_then(|counted| counted.get(&suspect.address).copied())
            };
            let counts = count(&before).zip(count(&after));
            let known = Facts {
                sent: sent.past_device.contains(&suspect.node),
                entered: sent.into_device.contains(&suspect.node)
                    && routes.routes_to_device(&mut self.netlink, place, suspect.vtep),
                filtered: routes.filtered(&mut self.netlink, place, suspect.address, &traces.came),
                congested: errors.is_some_and(|(before, after)| after > before),
                elsewhere: routes.elsewhere(&mut self.netlink, case, suspect.address, &traces.left),
                xdp: routes.has_xdp(place),
                passthru: routes.passthru(place),
                uncounted: counts.is_some_and(|(before, after)| before == after),
                ipsec: match refuses {
                    true => ipsec_policies::ipsec_policies(place, IN, Some(suspect.address)),
                    false => Vec::new(),
                },
                ..routes.hop_facts(&mut self.netlink, place, suspect.address, &watch)
            };
            facts.insert(suspect.node, known);
        }
        self.read_device_hints(place, diagnosed, &watch, &mut facts);
        if self
            .diagnose_neighbor_answers(case, diagnosed, &routes, &mut watch, &mut facts)?
            .is_none()
        {
            return Ok(None);
        }
        let doubtful = doubtful::suspects(place, diagnosed, &watch, &facts, &sent);
        if !doubtful.is_empty()
            && watch.claim().is_none()
            && self.trace(case, &doubtful, &routes, &sent, (&mut watch, &mut facts))?.is_none()
        {
            return Ok(None);
        }
        Ok(Some(watch.conclude(diagnosed, &facts, place)))
    }

    /// Finds out what drops answers for next hops that arrive and that the kernel does not receive. Returns
    /// `None` if the case changed or the agent ended meanwhile.
    fn diagnose_neighbor_answers(
        &mut self,
        case: &Case,
        diagnosed: &[Suspect],
        routes: &PeerRoutes,
        watch: &mut Watch,
        facts: &mut BTreeMap<NodeId, Facts>,
    ) -> io::Result<Option<()>> {
        let mut refused = BTreeMap::new();
        for suspect in diagnosed {
            let unresolved = facts.get(&suspect.node).and_then(|facts| facts.unresolved.as_ref());
            let Some((hop, _)) = unresolved else { continue };
            if routes.has_next_hop_at(suspect.address, watch.answered_at(*hop)) {
                refused.insert(suspect.node, *hop);
            }
        }
        if refused.is_empty() {
            return Ok(Some(()));
        }
        let Case { place, .. } = case;
        let hops: BTreeSet<IpAddr> = refused.values().copied().collect();
        let neighbor_queries = NeighborQueries::new(place, hops.iter().copied());
        let mut trace = Trace::of_answers(&place.device, &place.interface, &hops)?;
        if self
            .capture(case, diagnosed, neighbor_queries.as_ref(), Some(&mut trace), watch)?
            .is_none()
        {
            return Ok(None);
        }
        for (node, hop) in refused {
            let Some(facts) = facts.get_mut(&node) else { continue };
            facts.refused = Some(trace.report().dropped_from(hop));
        }
        Ok(Some(()))
    }

    /// Captures packets, and sends test packets meanwhile: to the tunnels' port with a header that every
    /// device drops, and through the tunnel. Returns the peers to which packets were sent; `None` if the case
    /// changed or the agent ended meanwhile.
    fn capture(
        &mut self,
        case: &Case,
        diagnosed: &[Suspect],
        neighbor_queries: Option<&NeighborQueries>,
        mut trace: Option<&mut Trace>,
        watch: &mut Watch,
    ) -> io::Result<Option<SentPackets>> {
        let tap = Tap::open(case.place.port)?;
        let sender = TestSender::open(&case.place, case.pinned)?;
        let mut sent = SentPackets::default();
        let (begun, mut next_test_at, mut packets) = (Instant::now(), Instant::now(), 0);
        loop {
            let now = Instant::now();
            if next_test_at <= now {
                next_test_at = now + TEST_PACKET_INTERVAL;
                // Not to a peer without a tunnel: it would take the packet for one that a pod of this host
                // sent through a tunnel.
                let tunneled = diagnosed.iter().filter(|suspect| suspect.tunnelled);
                for suspect in tunneled {
                    let outcome = sender.send_past_device(suspect.address);
                    sent.past_device
                        .extend((outcome != SendOutcome::NoRoute).then_some(suspect.node));
                    sent.forbidden
                        .extend((outcome == SendOutcome::Forbidden).then_some(suspect.node));
                }
                let sent_to = diagnosed
                    .iter()
                    .filter(|suspect| suspect.tunnelled && sender.send_through_tunnel(suspect));
                sent.into_device.extend(sent_to.map(|suspect| suspect.node));
                neighbor_queries.into_iter().for_each(NeighborQueries::send);
            }
            while packets < MAX_PACKETS && tap.next(|packet| watch.on_packet(packet))?.is_some() {
                packets += 1;
            }
            if let Some(trace) = &mut trace {
                trace.read()?;
            }
            let remaining = CAPTURE_TIME.saturating_sub(begun.elapsed());
            if remaining.is_zero() {
                return Ok(Some(sent));
            }
            let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
            fds.extend((packets < MAX_PACKETS).then(|| tap.as_fd()));
            fds.extend(trace.as_ref().map(|trace| trace.as_fd()));
            let until = next_test_at.saturating_duration_since(Instant::now());
            self.orders.sleeper.wait(fds, Some(remaining.min(until)));
            let case_before = self.case.clone();
            if !self.apply_orders() || self.case != case_before {
                return Ok(None);
            }
        }
    }
}
