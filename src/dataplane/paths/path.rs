//! The way to one peer: what was asked, who has answered, and what follows from that.

use std::{collections::VecDeque, net::IpAddr, time::Duration};

use super::{By, CALMED, DOUBTED, Kind, Queues, Tally, flows::Flows};
use crate::{
    core::Liveness,
    model::{NodeId, PathState, Time},
};

/// Between two requests to a peer with which all is well.
const CALM: Duration = Duration::from_secs(15);
/// The same while something is wrong: no answer, or gossip does not hold it as alive.
const ANXIOUS: Duration = Duration::from_secs(1);
/// The same once it is withdrawn.
const WITHDRAWN: Duration = Duration::from_secs(5);
/// Between two special requests of one kind to one peer.
const SPECIAL: Duration = Duration::from_secs(300);
/// The same after one was lost.
const SPECIAL_AGAIN: Duration = Duration::from_secs(3);
/// A request is lost when it has not been answered for twice the usual round trip, within these bounds.
const LOST_MIN: Duration = Duration::from_millis(900);
const LOST_MAX: Duration = Duration::from_secs(10);
/// The same where no round trip is known: a satellite's is 600 ms, a mobile network's may be 3 s.
const LOST_FIRST: Duration = Duration::from_millis(3_500);
/// An answer to one of so many last requests is an answer, however late.
const REMEMBERED: usize = 16;
/// Requests lost in a row that make a verdict.
pub(super) const VERDICT: u32 = 3;
/// A packet of the peer's own that was heard within this time shows that its packets get here. An agent that
/// gets no answers asks once a second, and less often where that is a thousand.
const HEARD: Duration = Duration::from_secs(40);
/// An agent that is heard so long after a witness fell silent has not gone with it.
const OUTLIVED: Duration = Duration::from_secs(4);
/// The same by gossip alone, which may hold a dead member as alive for a while.
const OUTLIVED_BY_GOSSIP: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Path {
    pub(super) address: IpAddr,
    pub(super) underlay: IpAddr,
    pub(super) ask: bool,
    pub(super) withdrawn: bool,
    pub(super) round_trip: Option<Duration>,
    pub(super) tally: Tally,
    liveness: Option<Liveness>,
    due: Time,
    /// The last requests that were not answered.
    open: VecDeque<Open>,
    asked: Option<Kind>,
    /// Requests lost since the last answer, but for special ones.
    lost: u32,
    echo: Witness,
    datagram: Witness,
    /// Echoes of full size, and datagrams, that are sent now and then while small echoes are answered.
    full: Special,
    /// How much smaller packets have to be, where those of full size are lost.
    narrow: Option<Narrow>,
    checksum: Special,
    flows: Flows,
    /// Datagrams that are still to be sent for the tally.
    trial: u32,
    /// The last sign of life of any kind, and since when there was none although one was asked for.
    life: Time,
    silent_since: Option<Time>,
    heard: Option<Time>,
    /// What was heard came from elsewhere.
    pub(super) is_diverted_inbound: bool,
    /// Of the underlay, as the transport has it.
    estimate: Option<Duration>,
    /// The last answer came from elsewhere.
    diverted: bool,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    sequence: u16,
    kind: Kind,
    sent: Time,
    lost: bool,
    /// Sent while small echoes were answered, to learn something else.
    special: bool,
    counted: bool,
}

/// A kind of question that a firewall may silence without any harm to the path.
#[derive(Clone, Copy, Debug, Default)]
struct Witness {
    /// Since the last answer.
    lost: u32,
    silent_since: Option<Time>,
    /// Its silence means something: it has answered, and has not fallen silent since while the peer lived.
    trusted: bool,
}

/// A search for the largest packets that get through: bytes less than the full size.
#[derive(Clone, Copy, Debug)]
struct Narrow {
    lost: u32,
    answered: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Special {
    due: Time,
    /// Since the last answer.
    lost: u32,
}

impl Path {
    pub(super) fn new(now: Time, address: IpAddr) -> Self {
        Self {
            address,
            underlay: address,
            liveness: None,
            ask: true,
            due: now,
            open: VecDeque::new(),
            asked: None,
            lost: 0,
            echo: Witness::default(),
            datagram: Witness::default(),
            full: Special { due: now, lost: 0 },
            narrow: None,
            checksum: Special { due: now, lost: 0 },
            flows: Flows::default(),
            tally: Tally::default(),
            trial: 0,
            life: now,
            silent_since: None,
            heard: None,
            is_diverted_inbound: false,
            round_trip: None,
            estimate: None,
            diverted: false,
            withdrawn: false,
        }
    }

    /// Whatever changes, this path stands in the queue where it belongs.
    pub(super) fn change<T>(
        &mut self,
        node: NodeId,
        queues: &mut Queues,
        what: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let before = self.place();
        let result = what(self);
        let after = self.place();
        if before != after {
            before.map(|(queue, due)| queues[queue].remove(&(due, node)));
            after.map(|(queue, due)| queues[queue].insert((due, node)));
        }
        result
    }

    /// In which queue it waits, and until when.
    pub(super) fn place(&self) -> Option<(usize, Time)> {
        self.ask.then(|| (if self.is_calm() { CALMED } else { DOUBTED }, self.due))
    }

    /// What gossip holds of it.
    pub(super) fn opine(&mut self, now: Time, liveness: Option<Liveness>) {
        if liveness != self.liveness && liveness != Some(Liveness::Alive) {
            self.due = self.due.min(now);
        }
        self.liveness = liveness;
    }

    /// Takes note of a request that is sent now, and says of which kind it is to be.
    pub(super) fn ask(&mut self, now: Time, sequence: u16) -> Kind {
        self.lose(now);
        let kind = self.kind_due(now);
        let is_flow = matches!(kind, Kind::Flow { .. });
        let special = self.lost == 0 && self.echo.lost == 0 && kind != Kind::Small || is_flow;
        let is_datagram = matches!(kind, Kind::Datagram { .. });
        let counted = self.trial > 0 && self.lost == 0 && is_datagram;
        self.trial -= u32::from(counted);
        if matches!(kind, Kind::Full { .. }) || self.full.due <= now && self.echo.is_silent() {
            self.full.due = now + SPECIAL;
        }
        if is_datagram {
            self.checksum.due = now + SPECIAL;
        }
        match kind {
            Kind::Flow { flow } => self.flows.on_asked(flow),
            _ if !special && self.is_alive() && !self.flows.is_doubted() => self.flows.grant(),
            _ => {}
        }
        if self.open.len() == REMEMBERED
            && let Some(Open { kind: Kind::Flow { flow }, lost: false, .. }) = self.open.pop_front()
        {
            self.flows.on_forgotten(flow);
        }
        self.open.push_back(Open { sequence, kind, sent: now, lost: false, special, counted });
        self.asked = Some(kind);
        self.due = now + self.pause();
        kind
    }

    fn kind_due(&self, now: Time) -> Kind {
        let special_is_due = |special: Special| special.due <= now;
        let datagram = Kind::Datagram { flow: self.flows.current() };
        let flow = self.flows.due().filter(|_| !self.flows.is_doubted());
        match self.lost {
            // In doubt both witnesses are asked in turn.
            1.. if self.asked == Some(Kind::Small) => datagram,
            1.. => Kind::Small,
            0 if self.round_trip.is_none() => Kind::Small,
            0 if self.trial > 0 => datagram,
            0 if self.echo.is_silent() => match (special_is_due(self.full), flow) {
                (true, _) => Kind::Small,
                (_, Some(flow)) => Kind::Flow { flow },
                _ => datagram,
            },
            0 if self.echo.lost > 0 || self.flows.is_doubted() => Kind::Small,
            0 if special_is_due(self.full) => {
                Kind::Full { less: self.narrow.and_then(Narrow::next).unwrap_or(0) }
            }
            0 if special_is_due(self.checksum) => datagram,
            0 => flow.map_or(Kind::Small, |flow| Kind::Flow { flow }),
        }
    }

    pub(super) fn on_echo(&mut self, now: Time, sequence: u16, elsewhere: bool) {
        let answer = self.on_answer(now, sequence, elsewhere, |kind| !kind.is_datagram());
        let Some(kind) = answer else { return };
        self.echo = Witness { trusted: true, ..Witness::default() };
        match kind {
            Kind::Full { less: 0 } => (self.full.lost, self.narrow) = (0, None),
            Kind::Full { less } => self.narrow_down(now, |narrow| narrow.answered = Some(less)),
            _ => {}
        }
    }

    /// Goes on with the search, or begins it.
    fn narrow_down(&mut self, now: Time, step: impl FnOnce(&mut Narrow)) {
        let narrow = self.narrow.get_or_insert(Narrow { lost: 0, answered: None });
        step(narrow);
        // Whether the full size gets through again is asked as long as it does not.
        let pause = if narrow.next().is_some() { Duration::ZERO } else { CALM };
        self.full.due = now + pause;
        self.due = self.due.min(self.full.due);
    }

    /// Large packets of others were lost: whether full ones get through is asked now.
    pub(super) fn doubt_size(&mut self, now: Time) {
        if self.full.lost == 0 && self.narrow.is_none() {
            self.full.due = self.full.due.min(now);
            self.due = self.due.min(now);
        }
    }

    /// Full packets have been lost, and what gets through is not known yet.
    pub(super) fn is_measured(&self) -> bool {
        (1..VERDICT).contains(&self.full.lost) || self.narrow.and_then(Narrow::next).is_some()
    }

    pub(super) fn narrower_by(&self) -> Option<u32> {
        let narrow = self.narrow.filter(|narrow| narrow.next().is_none())?;
        narrow.answered.filter(|_| self.full.lost >= VERDICT)
    }

    /// A datagram has arrived. An agent that has answered it says nothing once it is gone; a kernel that has
    /// refused it will do so for as long as it runs.
    pub(super) fn on_arrival(&mut self, now: Time, sequence: u16, by: By, elsewhere: bool) {
        if self.on_answer(now, sequence, elsewhere, Kind::is_datagram).is_some() {
            self.datagram = Witness { trusted: by == By::Kernel, ..Witness::default() };
            self.checksum.lost = 0;
        }
    }

    /// An answer to a request of the right kind: gives its kind.
    fn on_answer(
        &mut self,
        now: Time,
        sequence: u16,
        elsewhere: bool,
        is_right: impl Fn(Kind) -> bool,
    ) -> Option<Kind> {
        let asked = |open: &Open| open.sequence == sequence && is_right(open.kind);
        let position = self.open.iter().position(asked)?;
        let open = self.open.remove(position)?;
        // What was asked before in the same way may have been overtaken, and is no proof of a loss.
        self.open
            .retain(|other| other.kind != open.kind || other.sent > open.sent || other.counted);
        self.round_trip = Some(now.since(open.sent));
        self.diverted = elsewhere;
        (self.lost, self.life, self.silent_since) = (0, now, None);
        self.withdrawn = false;
        if open.counted {
            self.tally.answered += 1;
            self.tally.lost -= u32::from(open.lost);
        }
        match open.kind {
            Kind::Flow { flow } => self.flows.on_answer(flow),
            Kind::Datagram { flow } => self.flows.on_arrival(flow),
            Kind::Small | Kind::Full { .. } => self.echo.lost = 0,
        }
        if !open.special {
            self.flows.confirm(open.sent);
        }
        let next = self.full.due.min(self.checksum.due);
        let next = if self.flows.due().is_some() { now } else { next };
        self.due = (now + self.pause()).min(next.max(now));
        Some(open.kind)
    }

    /// A packet of the peer's own: its kernel lives, whatever becomes of ours.
    pub(super) fn hear(&mut self, now: Time, elsewhere: bool) {
        self.is_diverted_inbound = elsewhere;
        (self.heard, self.life, self.silent_since) = (Some(now), now, None);
        self.withdrawn = false;
    }

    /// News of the peer's agent, over the underlay.
    pub(super) fn on_agent(&mut self, now: Time, spoke: bool, round_trip: Option<Duration>) {
        self.estimate = round_trip;
        if spoke {
            self.distrust(now, OUTLIVED);
        }
    }

    fn distrust(&mut self, now: Time, outlived: Duration) {
        for witness in [&mut self.echo, &mut self.datagram] {
            witness.trusted &= witness.silent_since.is_none_or(|at| now.since(at) < outlived);
        }
    }

    /// Draws conclusions from what was not answered in time.
    pub(super) fn judge(&mut self, now: Time, withdraw_after: Option<Duration>) {
        self.lose(now);
        if self.is_alive() {
            self.distrust(now, OUTLIVED_BY_GOSSIP);
        }
        let silence = self.silent_since.map(|since| now.since(since));
        let is_over = withdraw_after.is_some_and(|patience| silence.is_some_and(|s| s >= patience));
        let is_dead = self.withdrawn || is_over && self.has_trusted();
        self.withdrawn = self.is_down() && self.lost > 0 && is_dead;
    }

    fn lose(&mut self, now: Time) {
        let patience = self.patience();
        for index in 0..self.open.len() {
            let open = &mut self.open[index];
            if !open.lost && now.since(open.sent) >= patience {
                open.lost = true;
                let open = *open;
                self.on_loss(now, open);
            }
        }
    }

    fn on_loss(&mut self, now: Time, Open { kind, sent, special, counted, .. }: Open) {
        match kind {
            Kind::Small => self.echo.lose(sent),
            Kind::Datagram { flow } => {
                self.datagram.lose(sent);
                self.flows.on_loss(flow, sent);
            }
            Kind::Flow { flow } => self.flows.on_loss(flow, sent),
            Kind::Full { .. } => {}
        }
        if self.echo.is_silent() {
            // It says nothing about sizes and checksums any more.
            (self.full.lost, self.checksum.lost, self.narrow) = (0, 0, None);
        }
        self.tally.lost += u32::from(counted);
        if special {
            match kind {
                Kind::Flow { .. } => {}
                _ if self.echo.lost > 0 => {}
                Kind::Full { less: 0 } => {
                    self.full.lost += 1;
                    self.full.due = now + SPECIAL_AGAIN;
                    if self.full.lost >= VERDICT {
                        self.narrow_down(now, |_| {});
                    }
                }
                Kind::Full { less } => self.narrow_down(now, |narrow| narrow.lost = less),
                _ => {
                    self.checksum.lost += 1;
                    let again = self.checksum.lost < VERDICT;
                    // A firewall may drop them for ever.
                    self.checksum.due = now + if again { SPECIAL_AGAIN } else { SPECIAL };
                }
            }
            // A small one follows, which tells whether it was the kind.
            self.due = self.due.min(now);
            return;
        }
        self.lost += 1;
        self.flows.forgive();
        self.silent_since.get_or_insert(sent.max(self.life));
        self.due = self.due.min(sent + self.pause());
    }

    /// Whether datagrams are lost where echoes are not.
    pub(super) const fn is_deaf(&self) -> bool {
        self.checksum.lost >= VERDICT && self.lost == 0 && self.echo.lost == 0
    }

    pub(super) fn flows(&self) -> Option<(usize, usize)> {
        self.flows.tally()
    }

    /// Datagrams of which each counts are to be sent, and those under way do not count any more.
    pub(super) fn begin_trial(&mut self, now: Time, count: u32) {
        (self.tally, self.trial) = (Tally::default(), count);
        self.open.iter_mut().for_each(|open| open.counted = false);
        self.due = self.due.min(now);
    }

    /// How long an answer is waited for.
    fn patience(&self) -> Duration {
        let usual = self.round_trip.max(self.estimate);
        usual.map_or(LOST_FIRST, |usual| (usual * 2).clamp(LOST_MIN, LOST_MAX))
    }

    pub(super) const fn is_doubted(&self) -> bool {
        self.round_trip.is_none() || self.lost > 0 || self.echo.lost > 0 && self.echo.trusted
    }

    pub(super) fn is_alive(&self) -> bool {
        self.liveness == Some(Liveness::Alive)
    }

    fn is_down(&self) -> bool {
        matches!(self.liveness, None | Some(Liveness::Down))
    }

    const fn has_trusted(&self) -> bool {
        self.echo.trusted || self.datagram.trusted
    }

    pub(super) fn is_calm(&self) -> bool {
        let is_open = |lost: u32| (1..VERDICT).contains(&lost);
        let is_clear = self.round_trip.is_some() && self.lost == 0 && self.trial == 0;
        let is_decided = !self.is_measured() && !is_open(self.checksum.lost);
        let is_decided = is_decided && !is_open(self.echo.lost) && !self.flows.is_open();
        self.is_alive() && is_clear && is_decided
    }

    fn pause(&self) -> Duration {
        let is_well = self.lost == 0 && self.trial == 0 && self.round_trip.is_some();
        let is_well = is_well && (self.echo.lost == 0 || self.echo.is_silent());
        match self.liveness {
            _ if self.withdrawn => WITHDRAWN,
            Some(Liveness::Alive) if is_well => CALM,
            _ => ANXIOUS,
        }
    }

    pub(super) fn state(&self, now: Time) -> PathState {
        let heard = self.heard.is_some_and(|at| now.since(at) < HEARD);
        match self.round_trip {
            _ if self.withdrawn => PathState::Withdrawn,
            _ if self.lost >= VERDICT && heard => PathState::OneWay,
            _ if self.lost >= VERDICT && self.is_down() && self.has_trusted() => PathState::Dead,
            _ if self.lost >= VERDICT => PathState::Unanswered,
            _ if self.flows.tally().is_some() => PathState::PartlyLost,
            _ if self.full.lost >= VERDICT => PathState::MtuTooLarge,
            Some(_) if self.diverted => PathState::Asymmetric,
            Some(_) => PathState::Ok,
            None => PathState::Unknown,
        }
    }
}

impl Narrow {
    /// No link is known to carry more than so much less than others.
    const MOST: u32 = 512;
    const EXACT: u32 = 8;

    /// What is to be tried next; none, when the answer is known, or there is none.
    fn next(self) -> Option<u32> {
        match self.answered {
            None => (self.lost < Self::MOST).then_some(Self::MOST),
            Some(answered) if answered - self.lost <= Self::EXACT => None,
            Some(answered) => Some(self.lost.midpoint(answered)),
        }
    }
}

impl Witness {
    fn lose(&mut self, sent: Time) {
        self.lost += 1;
        self.silent_since.get_or_insert(sent);
    }

    const fn is_silent(&self) -> bool {
        self.lost >= VERDICT
    }
}
