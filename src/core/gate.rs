//! Holds back outputs until the write that they depend on is durable. It sits between the node and the
//! program that carries out outputs, which is the agent or the simulator.

use std::collections::VecDeque;

use super::{Output, ReplyId, WriteSeq};

/// Limit of held outputs. Beyond it the oldest frame or reply is dropped; for peers that is a lost packet.
const MAX_HELD: usize = 8192;

/// Held outputs in order, each with the write it waits for.
#[derive(Default)]
pub struct Gate {
    durable: WriteSeq,
    held: VecDeque<(WriteSeq, Output)>,
    /// Dropped replies whose streams are not reset yet.
    shed: Vec<ReplyId>,
}

impl Gate {
    /// Returns the output if it may leave now; otherwise holds it.
    pub fn pass(&mut self, output: Output) -> Option<Output> {
        let after = match &output {
            Output::Send { after, .. }
            | Output::Call { after, .. }
            | Output::Reply { after, .. }
            | Output::Program { after, .. } => *after,
            Output::Write { .. }
            | Output::Withdraw
            | Output::SlotsChanged(_)
            | Output::CannotLeave(_)
            | Output::Stop(_) => 0,
        };
        // A held view must not reach the kernel after a withdrawal, and of several views only the newest is
        // current.
        if matches!(output, Output::Withdraw | Output::Program { .. }) {
            self.held.retain(|(_, held)| !matches!(held, Output::Program { .. }));
        }
        if after <= self.durable {
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

    /// Returns the replies dropped since the last call; the caller resets their streams.
    pub fn take_shed(&mut self) -> Vec<ReplyId> {
        std::mem::take(&mut self.shed)
    }

    /// Marks all writes up to `seq` as durable. Returns the outputs that may leave now, in order.
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
        super::{Own, View},
        *,
    };
    use crate::model::{ClusterSettings, Mac, Pool, PoolSpec, Slot, Vtep};

    fn reply(number: u64, after: WriteSeq) -> Output {
        Output::Reply { reply: ReplyId(number), bytes: Vec::new(), after }
    }

    #[test]
    fn outputs_wait_for_their_own_write_only() {
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
    fn newer_view_replaces_a_view_that_waits_for_the_disk() {
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
    fn replies_dropped_while_the_disk_is_stuck_are_returned_once() {
        let mut gate = Gate::default();
        for number in 0..MAX_HELD as u64 + 3 {
            assert!(gate.pass(reply(number, 1)).is_none());
        }
        assert_eq!(gate.take_shed(), [ReplyId(0), ReplyId(1), ReplyId(2)]);
        assert_eq!(gate.take_shed(), []);
    }

    /// Regression: a view held by a slow disk was programmed after the subnet had been handed over.
    #[test]
    fn withdrawal_removes_a_view_that_waits_for_the_disk() {
        let mut gate = Gate::default();
        assert!(gate.pass(Output::Program { view: view(1), after: 1 }).is_none());
        assert!(gate.pass(reply(1, 1)).is_none());
        assert!(gate.pass(Output::Withdraw).is_some());
        assert!(matches!(gate.open(1)[..], [Output::Reply { .. }]));
    }
}
