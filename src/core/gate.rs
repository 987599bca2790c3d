//! Holds back what may not leave before a write is durable: between the node and whoever carries out
//! what it asks for, in production and in simulation alike.

use std::collections::VecDeque;

use super::{
    Output, ReplyId, WriteSeq,
    planted::{Bug, planted},
};

/// Outputs held while the disk is slow or full; then the oldest frames and answers are dropped, which
/// peers take as lost on the way.
const MAX_HELD: usize = 8192;

/// Outputs in order, each with the write it waits for.
#[derive(Default)]
pub struct Gate {
    durable: WriteSeq,
    held: VecDeque<(WriteSeq, Output)>,
    /// Answers that were dropped, and whose askers do not know yet.
    shed: Vec<ReplyId>,
}

impl Gate {
    /// Gives the output back if it may leave now, or keeps it.
    pub fn pass(&mut self, output: Output) -> Option<Output> {
        let after = match &output {
            Output::Send { after, .. }
            | Output::Call { after, .. }
            | Output::Reply { after, .. }
            | Output::Program { after, .. } => *after,
            Output::Write { .. }
            | Output::Withdraw
            | Output::Owned(_)
            | Output::CannotLeave(_)
            | Output::Answered { .. }
            | Output::Inquired { .. }
            | Output::Reported { .. }
            | Output::Stop(_) => 0,
        };
        // The kernel must not be given back what it has just been told to let go of. Of several views that
        // wait the newest is the only one that will be true.
        if matches!(output, Output::Withdraw | Output::Program { .. }) {
            self.held.retain(|(_, held)| !matches!(held, Output::Program { .. }));
        }
        if after <= self.durable || planted(Bug::AnswerBeforeFlush) {
            return Some(output);
        }
        if self.held.len() >= MAX_HELD
            && let Some(lossy) = self
                .held
                .iter()
                .position(|(_, held)| matches!(held, Output::Send { .. } | Output::Reply { .. }))
            && let Some((_, Output::Reply { reply, .. })) = self.held.remove(lossy)
        {
            self.shed.push(reply);
        }
        self.held.push_back((after, output));
        None
    }

    /// Answers that were dropped since this was last asked: their streams are to be reset.
    pub fn take_shed(&mut self) -> Vec<ReplyId> {
        std::mem::take(&mut self.shed)
    }

    /// Everything up to this write is on disk: what may leave now, in order.
    pub fn open(&mut self, seq: WriteSeq) -> Vec<Output> {
        self.durable = self.durable.max(seq);
        let (free, held) =
            std::mem::take(&mut self.held).into_iter().partition(|(after, _)| *after <= seq);
        self.held = held;
        let free: VecDeque<(WriteSeq, Output)> = free;
        free.into_iter().map(|(_, output)| output).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{
        super::{View, view::Own},
        *,
    };
    use crate::model::{ClusterSettings, Mac, Pool, PoolSpec, Slot, Vtep};

    fn reply(number: u64, after: WriteSeq) -> Output {
        Output::Reply { reply: ReplyId(number), bytes: Vec::new(), after }
    }

    #[test]
    fn outputs_wait_for_their_own_write_and_no_other() {
        let mut gate = Gate::default();
        assert!(gate.pass(reply(1, 0)).is_some());
        assert!(gate.pass(reply(2, 2)).is_none());
        assert!(gate.pass(reply(3, 1)).is_none());
        assert!(matches!(gate.open(1)[..], [Output::Reply { reply: ReplyId(3), .. }]));
        assert!(matches!(gate.open(2)[..], [Output::Reply { reply: ReplyId(2), .. }]));
        assert!(gate.pass(reply(4, 2)).is_some());
    }

    fn view(vni: u32) -> View {
        let settings = ClusterSettings {
            pool: Pool::new(&PoolSpec::of("10.42.0.0/16".parse().expect("a network")))
                .expect("a pool"),
            vni,
            vxlan_port: 8472,
        };
        let subnets = settings.pool.subnets(Slot(*settings.pool.slots().start()));
        let vtep = Vtep { mac: Mac::from_bytes([2; 6]), underlay: [192, 0, 2, 1].into() };
        let own = Own { subnets, vtep };
        View { settings, own, peers: BTreeMap::new(), unconfirmed: Vec::new() }
    }

    #[test]
    fn newer_view_replaces_one_that_waits_for_the_disk() {
        let mut gate = Gate::default();
        for vni in 1..=10_000 {
            assert!(gate.pass(Output::Program { view: view(vni), after: 1 }).is_none());
            assert!(gate.held.len() == 1, "views gather while a write is stuck");
        }
        let freed = gate.open(1);
        let [Output::Program { view, .. }] = &freed[..] else { panic!("{freed:?}") };
        assert_eq!(view.settings.vni, 10_000);
    }

    #[test]
    fn answers_that_are_dropped_while_the_disk_is_stuck_are_named_once() {
        let mut gate = Gate::default();
        for number in 0..MAX_HELD as u64 + 3 {
            assert!(gate.pass(reply(number, 1)).is_none());
        }
        assert_eq!(gate.take_shed(), [ReplyId(0), ReplyId(1), ReplyId(2)]);
        assert_eq!(gate.take_shed(), []);
    }

    /// A view that waited on a slow disk was programmed after the subnet had been given away.
    #[test]
    fn what_the_kernel_lets_go_of_does_not_come_back_when_the_disk_is_ready() {
        let mut gate = Gate::default();
        assert!(gate.pass(Output::Program { view: view(1), after: 1 }).is_none());
        assert!(gate.pass(reply(1, 1)).is_none());
        assert!(gate.pass(Output::Withdraw).is_some());
        assert!(matches!(gate.open(1)[..], [Output::Reply { .. }]));
    }
}
