//! The path to one peer: pending probes, answers, and the resulting state.

use std::{collections::VecDeque, net::IpAddr, time::Duration};

use super::{
    HEALTHY, Kind, Queues, Responder, SUSPECT, Tally,
    flows::Flows,
    replies::{LOSSES_UNTIL_LOST, Replies},
    size_search::SizeSearch,
};
use crate::model::{Liveness, NodeId, PathState, Time};

/// Interval of probes to a healthy peer.
const HEALTHY_INTERVAL: Duration = Duration::from_secs(15);
/// Interval of probes to a suspect peer: answers are missing, or gossip does not report it as alive.
const SUSPECT_INTERVAL: Duration = Duration::from_secs(1);
/// Interval of probes to a withdrawn peer.
const WITHDRAWN_INTERVAL: Duration = Duration::from_secs(5);
/// Interval of full-size echoes, and of datagrams, to one peer.
const SIDE_CHECK_INTERVAL: Duration = Duration::from_secs(300);
/// The same after one of them was lost.
const SIDE_CHECK_RETRY: Duration = Duration::from_secs(3);
/// Minimum timeout of a probe. The timeout is twice the usual round trip.
const MIN_TIMEOUT: Duration = Duration::from_millis(900);
/// Maximum timeout of a probe.
const MAX_TIMEOUT: Duration = Duration::from_secs(10);
/// The timeout before a round trip is known. A satellite link takes 600 ms, a mobile network up to 3 s.
const INITIAL_TIMEOUT: Duration = Duration::from_millis(3_500);
/// Number of unanswered probes that are stored. A late answer to one of them still counts.
const MAX_PENDING: usize = 16;
/// Time for which a packet that the peer sent unprompted shows that its packets arrive. An agent without
/// answers probes once a second, and more rarely in a cluster of a thousand nodes.
const PACKET_VALIDITY: Duration = Duration::from_secs(40);
/// A peer whose agent still sends this long after a kind of probe went unanswered is alive, so a filter drops
/// the probes.
const SURVIVAL_PROOF: Duration = Duration::from_secs(4);
/// The same if only gossip reports the peer as alive, which it may do for a while after its death.
const SURVIVAL_PROOF_BY_GOSSIP: Duration = Duration::from_secs(10);

/// The path to one peer.
#[derive(Debug)]
pub(super) struct Path {
    pub(super) address: IpAddr,
    pub(super) underlay: IpAddr,
    pub(super) may_probe: bool,
    pub(super) withdrawn: bool,
    pub(super) round_trip: Option<Duration>,
    pub(super) tally: Tally,
    liveness: Option<Liveness>,
    pub(super) due: Time,
    /// The last probes without an answer.
    pending: VecDeque<PendingProbe>,
    last_kind: Option<Kind>,
    /// Losses since the last answer, without those of side checks.
    lost: u32,
    echo: Replies,
    datagram: Replies,
    /// Full-size echoes, sent occasionally while small echoes are answered.
    full_size: SideCheck,
    /// The search for the largest size that passes, while full-size echoes are lost.
    size_search: Option<SizeSearch>,
    /// Datagrams, sent occasionally while small echoes are answered.
    checksum: SideCheck,
    flows: Flows,
    /// Datagrams still to be sent for the tally.
    trial_remaining: u32,
    /// When the probe was sent that was answered last.
    pub(super) answered_probe: Option<Time>,
    /// The last answer or packet of any kind.
    pub(super) last_sign_of_life: Time,
    /// Since when probes are unanswered and no packet arrives.
    silent_since: Option<Time>,
    /// When a packet of the peer's agent arrived last while probes were unanswered.
    agent_sent: Option<Time>,
    /// The last packet that the peer sent unprompted.
    last_packet: Option<Time>,
    /// That packet arrived by another way than packets to the peer take.
    pub(super) is_diverted_inbound: bool,
    /// Round trip over the underlay, as measured by the transport.
    underlay_round_trip: Option<Duration>,
    /// The last answer arrived by another way than packets to the peer take.
    diverted: bool,
}

#[derive(Clone, Copy, Debug)]
struct PendingProbe {
    sequence: u16,
    kind: Kind,
    sent: Time,
    lost: bool,
    /// Sent while small echoes were answered, to check something else than the path.
    is_side_check: bool,
    /// Counts for the tally.
    is_counted: bool,
}

/// A kind of probe that is sent occasionally to check something else than the path.
#[derive(Clone, Copy, Debug)]
struct SideCheck {
    due: Time,
    /// Losses since the last answer.
    lost: u32,
}

impl Path {
    pub(super) fn new(now: Time, address: IpAddr) -> Self {
        Self {
            address,
            underlay: address,
            liveness: None,
            may_probe: true,
            due: now,
            pending: VecDeque::new(),
            last_kind: None,
            lost: 0,
            echo: Replies::default(),
            datagram: Replies::default(),
            full_size: SideCheck { due: now, lost: 0 },
            size_search: None,
            checksum: SideCheck { due: now, lost: 0 },
            flows: Flows::default(),
            tally: Tally::default(),
            trial_remaining: 0,
            answered_probe: None,
            last_sign_of_life: now,
            silent_since: None,
            agent_sent: None,
            last_packet: None,
            is_diverted_inbound: false,
            round_trip: None,
            underlay_round_trip: None,
            diverted: false,
            withdrawn: false,
        }
    }

    /// Applies `change`, and moves this path to the right place in the queues.
    pub(super) fn update_path<T>(
        &mut self,
        node: NodeId,
        queues: &mut Queues,
        change: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let before = self.queue_position();
        let result = change(self);
        let after = self.queue_position();
        if before != after {
            before.map(|(queue, due)| queues[queue].remove(&(due, node)));
            after.map(|(queue, due)| queues[queue].insert((due, node)));
        }
        result
    }

    /// Returns the queue and the time of the next probe; `None` if the peer must not be probed.
    pub(super) fn queue_position(&self) -> Option<(usize, Time)> {
        self.may_probe.then(|| (if self.is_healthy() { HEALTHY } else { SUSPECT }, self.due))
    }

    /// Records the liveness reported by gossip.
    pub(super) fn set_liveness(&mut self, now: Time, liveness: Option<Liveness>) {
        if liveness != self.liveness && liveness != Some(Liveness::Alive) {
            self.due = self.due.min(now);
        }
        self.liveness = liveness;
    }

    /// Records that a probe is sent now, and returns its kind.
    pub(super) fn next_probe(&mut self, now: Time, sequence: u16) -> Kind {
        self.mark_lost(now);
        let kind = self.kind_of_next_probe(now);
        let is_flow = matches!(kind, Kind::Flow { .. });
        let is_side_check = self.lost == 0 && self.echo.lost == 0 && kind != Kind::Small || is_flow;
        let is_datagram = matches!(kind, Kind::Datagram { .. });
        let is_counted = self.trial_remaining > 0 && self.lost == 0 && is_datagram;
        self.trial_remaining -= u32::from(is_counted);
        if matches!(kind, Kind::Full { .. }) || self.full_size.due <= now && self.echo.is_silent() {
            self.full_size.due = now + SIDE_CHECK_INTERVAL;
        }
        if is_datagram {
            self.checksum.due = now + SIDE_CHECK_INTERVAL;
        }
        match kind {
            Kind::Flow { flow } => self.flows.on_sent(flow),
            _ if !is_side_check && self.is_alive() && !self.flows.has_unconfirmed_loss() => {
                self.flows.renew_allowance()
            }
            _ => {}
        }
        if self.pending.len() == MAX_PENDING
            && let Some(PendingProbe { kind: Kind::Flow { flow }, lost: false, .. }) =
                self.pending.pop_front()
        {
            self.flows.on_abandoned(flow);
        }
        self.pending.push_back(PendingProbe {
            sequence,
            kind,
            sent: now,
            lost: false,
            is_side_check,
            is_counted,
        });
        self.last_kind = Some(kind);
        self.due = now + self.pause();
        kind
    }

    fn kind_of_next_probe(&self, now: Time) -> Kind {
        let is_due = |check: SideCheck| check.due <= now;
        let datagram = Kind::Datagram { flow: self.flows.current() };
        let flow = self.flows.next_flow().filter(|_| !self.flows.has_unconfirmed_loss());
        match self.lost {
            // Alternate between both kinds, because a firewall may drop one of them.
            1.. if self.last_kind == Some(Kind::Small) => datagram,
            1.. => Kind::Small,
            0 if self.round_trip.is_none() => Kind::Small,
            0 if self.trial_remaining > 0 => datagram,
            0 if self.echo.is_silent() => match (is_due(self.full_size), flow) {
                (true, _) => Kind::Small,
                (_, Some(flow)) => Kind::Flow { flow },
                _ => datagram,
            },
            0 if self.echo.lost > 0 || self.flows.has_unconfirmed_loss() => Kind::Small,
            0 if is_due(self.full_size) => {
                Kind::Full { less: self.size_search.and_then(SizeSearch::next).unwrap_or(0) }
            }
            0 if is_due(self.checksum) => datagram,
            0 => flow.map_or(Kind::Small, |flow| Kind::Flow { flow }),
        }
    }

    pub(super) fn on_echo(&mut self, now: Time, sequence: u16, diverted: bool) {
        let answer = self.on_answer(now, sequence, diverted, |kind| !kind.is_datagram());
        let Some(kind) = answer else { return };
        self.echo = Replies { trusted: true, ..Replies::default() };
        match kind {
            Kind::Full { less: 0 } => (self.full_size.lost, self.size_search) = (0, None),
            Kind::Full { less } => {
                self.continue_size_search(now, |size_search| size_search.answered = Some(less))
            }
            _ => {}
        }
    }

    /// Continues or begins the search for the largest size.
    fn continue_size_search(&mut self, now: Time, step: impl FnOnce(&mut SizeSearch)) {
        let size_search = self.size_search.get_or_insert(SizeSearch { lost: 0, answered: None });
        step(size_search);
        // While the full size does not pass, it is tried again at intervals.
        let pause = if size_search.next().is_some() { Duration::ZERO } else { HEALTHY_INTERVAL };
        self.full_size.due = now + pause;
        self.due = self.due.min(self.full_size.due);
    }

    /// Requests an immediate full-size probe.
    pub(super) fn request_size_check(&mut self, now: Time) {
        if self.full_size.lost == 0 && self.size_search.is_none() {
            self.full_size.due = self.full_size.due.min(now);
            self.due = self.due.min(now);
        }
    }

    /// Returns whether full-size packets were lost, and the size that passes is not known yet.
    pub(super) fn is_measuring_size(&self) -> bool {
        (1..LOSSES_UNTIL_LOST).contains(&self.full_size.lost)
            || self.size_search.and_then(SizeSearch::next).is_some()
    }

    pub(super) fn mtu_reduction(&self) -> Option<u32> {
        let size_search = self.size_search.filter(|size_search| size_search.next().is_none())?;
        size_search.answered.filter(|_| self.full_size.lost >= LOSSES_UNTIL_LOST)
    }

    /// Records the answer to a datagram. An agent's answers stop when the agent ends, so their absence proves
    /// nothing; a kernel that refuses datagrams does so as long as it runs.
    pub(super) fn on_arrival(&mut self, now: Time, sequence: u16, by: Responder, diverted: bool) {
        if self.on_answer(now, sequence, diverted, Kind::is_datagram).is_some() {
            self.datagram = Replies { trusted: by == Responder::Kernel, ..Replies::default() };
            self.checksum.lost = 0;
        }
    }

    /// Records the answer to a probe of the right kind. Returns the kind.
    fn on_answer(
        &mut self,
        now: Time,
        sequence: u16,
        diverted: bool,
        is_right: impl Fn(Kind) -> bool,
    ) -> Option<Kind> {
        let is_match =
            |pending: &PendingProbe| pending.sequence == sequence && is_right(pending.kind);
        let position = self.pending.iter().position(is_match)?;
        let pending = self.pending.remove(position)?;
        // Older probes of the same kind may have been overtaken, so they are not evidence of a loss.
        self.pending.retain(|other| {
            other.kind != pending.kind || other.sent > pending.sent || other.is_counted
        });
        self.round_trip = Some(now.since(pending.sent));
        self.diverted = diverted;
        self.answered_probe = Some(pending.sent);
        (self.lost, self.last_sign_of_life, self.silent_since) = (0, now, None);
        self.withdrawn = false;
        if pending.is_counted {
            self.tally.answered += 1;
            self.tally.lost -= u32::from(pending.lost);
        }
        match pending.kind {
            Kind::Flow { flow } => self.flows.on_answer(flow),
            Kind::Datagram { flow } => self.flows.on_arrival(flow),
            Kind::Small | Kind::Full { .. } => self.echo.lost = 0,
        }
        if !pending.is_side_check {
            self.flows.confirm_losses(pending.sent);
        }
        let next = self.full_size.due.min(self.checksum.due);
        let next = if self.flows.next_flow().is_some() { now } else { next };
        self.due = (now + self.pause()).min(next.max(now));
        Some(pending.kind)
    }

    /// Records a packet that the peer sent unprompted: its kernel is alive, even if probes are lost.
    pub(super) fn on_packet(&mut self, now: Time, diverted: bool) {
        self.is_diverted_inbound = diverted;
        (self.last_packet, self.last_sign_of_life, self.silent_since) = (Some(now), now, None);
        self.withdrawn = false;
    }

    /// Records what is known of the peer's agent over the underlay.
    pub(super) fn on_agent(&mut self, now: Time, has_sent: bool, round_trip: Option<Duration>) {
        self.underlay_round_trip = round_trip;
        if has_sent {
            self.agent_sent = Some(now);
            self.distrust(now, SURVIVAL_PROOF);
        }
    }

    /// Returns since when neither the kernel nor the agent of the peer has sent anything.
    pub(super) fn silent_since(&self) -> Option<Time> {
        let is_after = |since: &Time| self.agent_sent.is_none_or(|sent| sent <= *since);
        self.silent_since.filter(is_after)
    }

    fn distrust(&mut self, now: Time, survival: Duration) {
        for replies in [&mut self.echo, &mut self.datagram] {
            replies.trusted &= replies.silent_since.is_none_or(|at| now.since(at) < survival);
        }
    }

    /// Evaluates the probes whose timeout has passed.
    pub(super) fn update_withdrawn(&mut self, now: Time, withdraw_after: Option<Duration>) {
        self.mark_lost(now);
        if self.is_alive() {
            self.distrust(now, SURVIVAL_PROOF_BY_GOSSIP);
        }
        let silence = self.silent_since.map(|since| now.since(since));
        let is_over = withdraw_after.is_some_and(|timeout| silence.is_some_and(|s| s >= timeout));
        let is_dead = self.withdrawn || is_over && self.has_trusted_kind();
        self.withdrawn = self.is_down() && self.lost > 0 && is_dead;
    }

    fn mark_lost(&mut self, now: Time) {
        let timeout = self.timeout();
        for index in 0..self.pending.len() {
            let pending = &mut self.pending[index];
            if !pending.lost && now.since(pending.sent) >= timeout {
                pending.lost = true;
                let pending = *pending;
                self.on_loss(now, pending);
            }
        }
    }

    fn on_loss(
        &mut self,
        now: Time,
        PendingProbe { kind, sent, is_side_check, is_counted, .. }: PendingProbe,
    ) {
        match kind {
            Kind::Small => self.echo.mark_lost(sent),
            Kind::Datagram { flow } => {
                self.datagram.mark_lost(sent);
                self.flows.on_loss(flow, sent);
            }
            Kind::Flow { flow } => self.flows.on_loss(flow, sent),
            Kind::Full { .. } => {}
        }
        if self.echo.is_silent() {
            // Losses of full-size echoes and datagrams mean nothing without small echoes for comparison.
            (self.full_size.lost, self.checksum.lost, self.size_search) = (0, 0, None);
        }
        self.tally.lost += u32::from(is_counted);
        if is_side_check {
            match kind {
                Kind::Flow { .. } => {}
                _ if self.echo.lost > 0 => {}
                Kind::Full { less: 0 } => {
                    self.full_size.lost += 1;
                    self.full_size.due = now + SIDE_CHECK_RETRY;
                    if self.full_size.lost >= LOSSES_UNTIL_LOST {
                        self.continue_size_search(now, |_| {});
                    }
                }
                Kind::Full { less } => {
                    self.continue_size_search(now, |size_search| size_search.lost = less)
                }
                _ => {
                    self.checksum.lost += 1;
                    let again = self.checksum.lost < LOSSES_UNTIL_LOST;
                    // A firewall may drop datagrams permanently.
                    self.checksum.due =
                        now + if again { SIDE_CHECK_RETRY } else { SIDE_CHECK_INTERVAL };
                }
            }
            // The next small echo shows whether only this kind was lost.
            self.due = self.due.min(now);
            return;
        }
        self.lost += 1;
        self.flows.discard_unconfirmed();
        self.silent_since.get_or_insert(sent.max(self.last_sign_of_life));
        self.due = self.due.min(sent + self.pause());
    }

    /// Returns whether datagrams are lost while echoes are answered.
    pub(super) const fn is_losing_datagrams(&self) -> bool {
        self.checksum.lost >= LOSSES_UNTIL_LOST && self.lost == 0 && self.echo.lost == 0
    }

    pub(super) fn flows(&self) -> Option<(usize, usize)> {
        self.flows.tally()
    }

    /// Requests datagrams that count for a new tally. Those already sent no longer count.
    pub(super) fn begin_trial(&mut self, now: Time, count: u32) {
        (self.tally, self.trial_remaining) = (Tally::default(), count);
        self.pending.iter_mut().for_each(|pending| pending.is_counted = false);
        self.due = self.due.min(now);
    }

    /// Returns how long an answer may take.
    fn timeout(&self) -> Duration {
        let usual_round_trip = self.round_trip.max(self.underlay_round_trip);
        usual_round_trip
            .map_or(INITIAL_TIMEOUT, |round_trip| (round_trip * 2).clamp(MIN_TIMEOUT, MAX_TIMEOUT))
    }

    pub(super) const fn is_suspect(&self) -> bool {
        self.round_trip.is_none() || self.lost > 0 || self.echo.lost > 0 && self.echo.trusted
    }

    pub(super) fn is_alive(&self) -> bool {
        self.liveness == Some(Liveness::Alive)
    }

    fn is_down(&self) -> bool {
        matches!(self.liveness, None | Some(Liveness::Down))
    }

    const fn has_trusted_kind(&self) -> bool {
        self.echo.trusted || self.datagram.trusted
    }

    pub(super) fn is_healthy(&self) -> bool {
        let is_undecided = |lost: u32| (1..LOSSES_UNTIL_LOST).contains(&lost);
        let is_answered = self.round_trip.is_some() && self.lost == 0 && self.trial_remaining == 0;
        let is_certain = !self.is_measuring_size() && !is_undecided(self.checksum.lost);
        let is_certain = is_certain && !is_undecided(self.echo.lost) && !self.flows.is_undecided();
        self.is_alive() && is_answered && is_certain
    }

    fn pause(&self) -> Duration {
        let is_well = self.lost == 0 && self.trial_remaining == 0 && self.round_trip.is_some();
        let is_well = is_well && (self.echo.lost == 0 || self.echo.is_silent());
        match self.liveness {
            _ if self.withdrawn => WITHDRAWN_INTERVAL,
            Some(Liveness::Alive) if is_well => HEALTHY_INTERVAL,
            _ => SUSPECT_INTERVAL,
        }
    }

    pub(super) fn state(&self, now: Time) -> PathState {
        let has_recent_packet = self.last_packet.is_some_and(|at| now.since(at) < PACKET_VALIDITY);
        match self.round_trip {
            _ if self.withdrawn => PathState::Withdrawn,
            _ if self.lost >= LOSSES_UNTIL_LOST && has_recent_packet => PathState::OneWay,
            _ if self.lost >= LOSSES_UNTIL_LOST && self.is_down() && self.has_trusted_kind() => {
                PathState::Dead
            }
            _ if self.lost >= LOSSES_UNTIL_LOST => PathState::Unanswered,
            _ if self.flows.tally().is_some() => PathState::PartlyLost,
            _ if self.full_size.lost >= LOSSES_UNTIL_LOST => PathState::MtuTooLarge,
            Some(_) if self.diverted => PathState::Asymmetric,
            Some(_) => PathState::Ok,
            None => PathState::Unknown,
        }
    }
}
