//! The thread that asks the pods of this host, by turns, whether they answer ARP or neighbor discovery, and
//! finds out what drops the packets of one that does not.
//!
//! What follows from what it sees is decided in [`crate::dataplane::answers`]. Nothing waits for it, and each
//! step is bounded.

mod explain;
mod ports;

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::AsFd as _,
    sync::mpsc::TryRecvError,
    time::{Duration, Instant},
};

use self::{explain::Explained, ports::Ports};
use super::{
    Agent,
    pods::mac_of,
    tap::{Asker, Tap},
};
use crate::{
    api::{CheckState, CheckStatus},
    dataplane::answers::{PodResults, Round},
    docker,
    model::{Mac, Pod, Subnets},
    netlink::{Netlink, link::Link},
    pods::{gateway, port, wiring::Wiring, wiring::link_name},
    worker::{Order, Orders, Thread, Worker},
};

/// So often it is asked in a round: a queue may be full.
const TURNS: u32 = 3;
/// An answer is waited for so long each time, counted from when the question is sent: a kernel answers at
/// once.
const TURN: Duration = Duration::from_millis(150);
/// The same where no answer came in the round before: on a machine under load packets wait for a CPU.
const LONG_TURN: Duration = Duration::from_millis(500);
/// Packets that are read at most until it is asked again.
const PACKETS: u32 = 10_000;
/// From one look at who is there to the next: a pod that is new need not be asked at once.
const LOOK: Duration = Duration::from_secs(10);
/// Pods that are named, each with its cause.
const NAMED: usize = 3;

/// Whom to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    pub bridge: String,
    pub subnets: Subnets,
    /// By the names of their interfaces on this host.
    pub pods: BTreeMap<String, Asked>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub pod: Pod,
    /// None where another program has given it one that is not known here.
    pub mac: Option<Mac>,
}

/// What is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Pods that have answered when they were last asked.
    answering: usize,
    /// Pods that do not answer.
    silent: usize,
    /// As sentences with what helps.
    pub problems: Vec<String>,
    /// What may drop some packets of single pods, the same.
    pub warnings: Vec<String>,
}

pub struct Asking {
    pub(super) worker: Worker<Option<Roster>>,
    told: Option<Roster>,
    looked: Option<Instant>,
}

impl Order for Option<Roster> {
    fn supersedes(&self, _: &Self) -> bool {
        true
    }
}

impl Asking {
    pub fn start(tell: impl Fn(Answers) + Send + 'static) -> io::Result<Self> {
        let netlink = Netlink::open()?;
        let worker = Worker::start("answers", move |orders| {
            // It belongs to the thread that uses it.
            match Wiring::open() {
                Ok(wiring) => PodAsker::new(netlink, wiring, orders, tell).run(),
                Err(error) => tracing::error!(%error, "no pod is asked whether it answers"),
            }
        })?;
        Ok(Self { worker, told: None, looked: None })
    }

    fn set(&mut self, roster: Option<Roster>) {
        if self.told == roster {
            return;
        }
        self.told.clone_from(&roster);
        self.worker.order(roster);
    }

    /// Ends it after the round under way.
    pub fn end(self) -> Thread {
        self.worker.end()
    }
}

struct PodAsker<F> {
    netlink: Netlink,
    wiring: Wiring,
    orders: Orders<Option<Roster>>,
    tell: F,
    roster: Option<Roster>,
    results: PodResults,
    /// With the index of the bridge at which it asks.
    asker: Option<(u32, Asker)>,
    due: Instant,
    explained: Explained,
    ports: Ports,
    told: Answers,
}

impl<F: Fn(Answers)> PodAsker<F> {
    fn new(netlink: Netlink, wiring: Wiring, orders: Orders<Option<Roster>>, tell: F) -> Self {
        Self {
            netlink,
            wiring,
            orders,
            tell,
            roster: None,
            results: PodResults::default(),
            asker: None,
            due: Instant::now(),
            explained: Explained::default(),
            ports: Ports::default(),
            told: Answers::default(),
        }
    }

    fn run(mut self) {
        while self.take_orders() {
            let now = Instant::now();
            if self.due <= now {
                if let Some(roster) = self.roster.clone() {
                    if let Err(error) = self.ask(&roster) {
                        tracing::debug!(%error, "pods were not asked whether they answer");
                    }
                    if let Err(error) = self.ports.look(&mut self.netlink, &roster) {
                        tracing::debug!(%error, "ports of pods were not read");
                    }
                    self.report(&roster);
                }
                self.due = now + self.results.pause();
            }
            let pause = self.roster.as_ref().map(|_| self.due.saturating_duration_since(now));
            self.orders.sleeper.wait([], pause);
        }
    }

    /// Says whether the agent still runs.
    fn take_orders(&mut self) -> bool {
        loop {
            match self.orders.take() {
                Ok(roster) => {
                    if self.roster.is_none() {
                        self.due = Instant::now();
                    }
                    self.roster = roster;
                    let pods = self.roster.as_ref().map(|roster| &roster.pods);
                    self.results.retain(|port| pods.is_some_and(|pods| pods.contains_key(port)));
                    if let Some(roster) = self.roster.clone() {
                        self.report(&roster);
                    } else {
                        self.tell_of(Answers::default());
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// One round of questions.
    fn ask(&mut self, roster: &Roster) -> io::Result<()> {
        let Some(bridge) = self.netlink.link(&roster.bridge)?.filter(|bridge| bridge.up) else {
            return Ok(());
        };
        let mut asked: BTreeMap<IpAddr, (&str, Option<Mac>)> = BTreeMap::new();
        let mut ports = BTreeMap::new();
        for name in self.results.select_pods(roster.pods.keys()) {
            let link = self.netlink.link(&name)?.filter(|link| can_be_asked(link, &bridge));
            match (link, roster.pods.get_key_value(&name)) {
                (Some(link), Some((name, Asked { pod, mac }))) => {
                    asked.insert(pod.addresses.first, (name, *mac));
                    ports.insert(pod.addresses.first, link.index);
                }
                _ => self.results.clear_misses(&name),
            }
        }
        if asked.is_empty() {
            return Ok(());
        }
        let watches_ports = asked.values().any(|(name, _)| self.results.is_suspect(name));
        // One that has never answered may have another MAC than the one that is known here.
        for (name, mac) in asked.values_mut() {
            mac.take_if(|_| self.results.is_suspect(name) && !self.results.has_answered(name));
        }
        // Answers go to the bridge that asks.
        let watched = bridge.mac.filter(|_| watches_ports);
        let taps = taps(asked.keys(), watched)?;
        let mut round = Round::new(bridge.index, ports);
        let turn = if watches_ports { LONG_TURN } else { TURN };
        for _ in 0..TURNS {
            for (address, (_, mac)) in &asked {
                if !round.is_answered(*address) {
                    self.question(roster, &bridge, *address, *mac)?;
                }
            }
            self.listen(&taps, &mut round, turn)?;
            if round.is_over() {
                break;
            }
        }
        if taps.iter().any(Tap::has_missed) {
            round.note_overflow();
        }
        for (address, (name, _)) in asked {
            self.results.note(name, round.reply(address, watched.is_some()));
        }
        Ok(())
    }

    /// Asks for a pod's address under that of its gateway.
    fn question(
        &mut self,
        roster: &Roster,
        bridge: &Link,
        address: IpAddr,
        mac: Option<Mac>,
    ) -> io::Result<()> {
        let is_it = |(index, asker): &(u32, Asker)| {
            *index == bridge.index && Some(asker.mac()) == bridge.mac
        };
        let asker = match self.asker.take().filter(is_it) {
            Some(known) => known,
            None => (bridge.index, Asker::open(&bridge.name)?),
        };
        let (_, asker) = self.asker.insert(asker);
        let gateways = roster.subnets.iter().map(gateway);
        for gateway in gateways {
            match (gateway, address) {
                (IpAddr::V4(gateway), IpAddr::V4(pod)) => {
                    asker.ask(mac, gateway.octets(), pod.octets())?;
                }
                (IpAddr::V6(gateway), IpAddr::V6(pod)) => asker.solicit(mac, gateway, pod)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Whatever has come in by the end of the pause is seen, even if this thread gets a CPU late.
    fn listen(&self, taps: &[Tap], round: &mut Round, pause: Duration) -> io::Result<()> {
        let until = Instant::now() + pause;
        let mut packets = 0;
        loop {
            for tap in taps {
                while packets < PACKETS && tap.next(|packet| round.on_packet(packet))?.is_some() {
                    packets += 1;
                }
            }
            let rest = until.saturating_duration_since(Instant::now());
            if packets >= PACKETS {
                round.note_overflow();
            }
            if rest.is_zero() || round.is_over() {
                return Ok(());
            }
            // What is not read any more must not keep it awake.
            let fds = taps.iter().filter(|_| packets < PACKETS).map(|tap| tap.as_fd());
            self.orders.sleeper.wait(fds, Some(rest));
        }
    }

    fn report(&mut self, roster: &Roster) {
        let silent: Vec<_> =
            self.results.silent().map(|(port, loss)| (port.to_owned(), loss)).collect();
        let sentences =
            self.explained.sentences(&mut self.netlink, &mut self.wiring, roster, &silent);
        let warnings = self.ports.warnings(roster, silent.iter().map(|(port, _)| port.as_str()));
        let more = sentences.len().saturating_sub(NAMED);
        let silent = sentences.len();
        let mut problems: Vec<String> = sentences.into_iter().take(NAMED).collect();
        if more > 0 {
            problems.push(format!(
                "{more} more pods of this host do not answer ARP or neighbor discovery: the causes are \
                 likely those of the others"
            ));
        }
        self.tell_of(Answers { answering: self.results.answering(), silent, problems, warnings });
    }

    fn tell_of(&mut self, now: Answers) {
        if now != self.told {
            self.told.clone_from(&now);
            (self.tell)(now);
        }
    }
}

impl Answers {
    /// What is known of packets of pods, with this.
    pub fn added_to(&self, forwarding: &CheckStatus) -> CheckStatus {
        let CheckStatus { state, detail } = forwarding.clone();
        match (self.silent, self.answering) {
            (0, 0) => CheckStatus { state, detail },
            (0, count) => {
                let pods =
                    if count == 1 { "1 pod answers" } else { &format!("{count} pods answer") };
                CheckStatus { state, detail: format!("{detail}; {pods} when asked") }
            }
            (silent, answering) => CheckStatus {
                state: CheckState::Failing,
                detail: format!(
                    "{detail}; {silent} of {} pods do not answer when asked",
                    silent + answering
                ),
            },
        }
    }
}

/// Where all its answers come in at the bridge; those to this MAC that were lost before are seen at the
/// ports.
fn taps<'a>(
    mut addresses: impl Iterator<Item = &'a IpAddr> + Clone,
    watched: Option<Mac>,
) -> io::Result<Vec<Tap>> {
    if let Some(bridge) = watched {
        return Ok(vec![Tap::of_neighbors(bridge)?]);
    }
    let mut taps = Vec::new();
    if addresses.clone().any(IpAddr::is_ipv4) {
        taps.push(Tap::of_arp()?);
    }
    if addresses.any(IpAddr::is_ipv6) {
        taps.push(Tap::of_discovery()?);
    }
    Ok(taps)
}

/// Whether both ends of a pod's veth pair are up, and it is plugged in as it should be.
fn can_be_asked(port: &Link, bridge: &Link) -> bool {
    port.up && port.carrier && port.is_plugged_into(bridge.index) && port::is_right(port)
}

impl Agent {
    /// Looks from time to time whom the thread is to ask.
    pub(super) fn look_for_pods(&mut self) {
        if self.asking.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            self.update_roster();
        }
    }

    /// Tells the thread whom to ask, if that has changed.
    pub(super) fn update_roster(&mut self) {
        self.asking.looked = Some(Instant::now());
        let roster = self.roster();
        self.asking.set(roster);
    }

    fn roster(&self) -> Option<Roster> {
        let bridge = self.pods.bridge.as_ref()?;
        let is_connected = |pod: &&Pod| {
            let is_held = pod.owner == docker::OWNER && pod.netns.is_empty();
            !is_held && self.is_present(pod) && !self.pods.is_attaching(&pod.attachment)
        };
        // What has an address of an earlier subnet is told of elsewhere.
        let is_inside =
            |pod: &&Pod| bridge.subnets.iter().any(|subnet| subnet.contains(&pod.addresses.first));
        let pods = self.pods.table.iter().filter(is_connected).filter(is_inside);
        let asked = |pod: &Pod| {
            let asked = Asked { pod: pod.clone(), mac: mac_of(pod) };
            (link_name(&pod.attachment), asked)
        };
        let pods: BTreeMap<String, Asked> = pods.map(asked).collect();
        let (bridge, subnets) = (bridge.name.clone(), bridge.subnets);
        (!pods.is_empty()).then_some(Roster { bridge, subnets, pods })
    }

    pub(super) fn on_answers(&mut self, state: Answers) {
        let words = |answers: &Answers| [&answers.problems[..], &answers.warnings].concat();
        let before = words(&self.kernel.answers);
        let new = words(&state).into_iter().filter(|words| !before.contains(words));
        new.for_each(|words| tracing::warn!("{words}"));
        self.kernel.answers = state;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_pods_make_the_check_fail_and_answering_ones_do_not_make_it_pass() {
        let status = |state| CheckStatus { state, detail: "packets pass".to_owned() };
        let answers = |answering, silent| Answers { answering, silent, ..Answers::default() };
        for state in [CheckState::Ok, CheckState::Failing, CheckState::Skipped] {
            assert_eq!(answers(0, 0).added_to(&status(state)), status(state));
            assert_eq!(answers(2, 0).added_to(&status(state)).state, state);
            let failing = answers(2, 1).added_to(&status(state));
            assert_eq!(failing.state, CheckState::Failing);
            assert_eq!(failing.detail, "packets pass; 1 of 3 pods do not answer when asked");
        }
    }
}
