//! Questions about packets that policy rules select by addresses, protocol or ports: only some of a pod's
//! packets may take a wrong way.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Ground, Kind, Own, Question, Selected, between};
use crate::pods::gateway;

/// Addresses of a network that are tried until one is a pod's.
const TRIES: u32 = 4;

impl Selected {
    /// A question about packets of pods, asked of those that the rule selects; none, if it selects none of
    /// them.
    pub(super) fn of(&self, question: Question, own: &Own, ground: &Ground) -> Option<Question> {
        if self.ipv4 != question.to.is_ipv4()
            || self.input.is_some_and(|input| question.input != Some(input))
        {
            return None;
        }
        let (from, to) = match question.kind {
            Kind::Out => (own.subnet, question.subject),
            _ => (question.subject, own.subnet),
        };
        let of_pod = |within: IpNet, wanted: Option<IpNet>, asked: IpAddr| {
            let Some(wanted) = wanted.filter(|wanted| !wanted.contains(&asked)) else {
                return Some(asked);
            };
            let common = common(within, wanted)?;
            let is_of_pod = |ip: &IpAddr| {
                !ground.has.contains(ip) && *ip != gateway(within) && *ip != within.network()
            };
            (0..TRIES).map(|number| between(common, number)).find(is_of_pod)
        };
        let selector = self.selector;
        let asked = question.from?;
        Some(Question {
            from: Some(of_pod(from, selector.from, asked)?),
            to: of_pod(to, selector.to, question.to)?,
            selector: Some(selector),
            ..question
        })
    }
}

/// The smaller of two networks, one of which contains the other.
fn common(one: IpNet, other: IpNet) -> Option<IpNet> {
    if one.contains(&other) { Some(other) } else { other.contains(&one).then_some(one) }
}
