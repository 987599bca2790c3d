//! IPsec policies that match packets of pods: all of them, if those of trials are lost, or some.

use ipnet::IpNet;

use super::TrialInput;
use crate::{
    model::{Problem, ProblemCode},
    netlink::xfrm::{self, Policy},
};

/// Maximum number of policies named.
const NAMED: usize = 3;

/// Describes the policies that may match all packets between pods, with remedies.
pub fn taking(networks: &[IpNet]) -> Vec<String> {
    let mut sentences = sentences_of_taking(policies().iter(), networks);
    sentences.extend(blocking_defaults(&["fwd", "out"]));
    sentences
}

/// Describes the default policies of these directions that drop packets, with remedies.
pub fn blocking_defaults(directions: &[&str]) -> Vec<String> {
    // Kernels before 5.15 have no default policies.
    let blocked = xfrm::blocked_by_default().unwrap_or_default().into_iter();
    blocked.filter(|direction| directions.contains(direction)).map(blocking_default).collect()
}

fn blocking_default(direction: &str) -> String {
    format!(
        "IPsec drops packets that no policy matches (ip xfrm policy getdefault: {direction} block): ip xfrm \
         policy setdefault {direction} accept, or add policies that let them pass"
    )
}

/// The same for packets that leave by the VXLAN device.
pub fn taking_out(network: IpNet) -> Vec<String> {
    let policies = policies();
    let leaving = policies.iter().filter(|policy| policy.direction == "out");
    let mut sentences = sentences_of_taking(leaving, &[network]);
    sentences.extend(blocking_defaults(&["out"]));
    sentences
}

fn sentences_of_taking<'a>(
    policies: impl Iterator<Item = &'a Policy>,
    networks: &[IpNet],
) -> Vec<String> {
    let taking = policies.filter(|policy| !policy.lets_pass()).filter_map(|policy| {
        let network = networks.iter().find(|network| meets(policy, **network))?;
        let Policy { from, to, direction, priority, .. } = policy;
        Some(format!(
            "an IPsec policy matches packets from {from} to {to} (ip xfrm policy: dir {direction}, priority \
             {priority}): exempt packets from {network} to {network} in the IPsec configuration"
        ))
    });
    taking.take(NAMED).collect()
}

/// Returns a notice for each policy that matches some packets between pods but no trial.
pub fn selecting(setting: &TrialInput) -> Vec<Problem> {
    notices(&policies(), &setting.networks.iter().collect::<Vec<_>>())
}

fn notices(policies: &[Policy], networks: &[IpNet]) -> Vec<Problem> {
    let is_forwarded = |policy: &&Policy| policy.direction != "in" && !policy.lets_pass();
    let found = policies.iter().filter(is_forwarded).filter_map(|policy| {
        let network = networks.iter().find(|network| meets(policy, **network))?;
        let is_exempt = policies.iter().any(|other| {
            other.lets_pass()
                && other.direction == policy.direction
                && other.priority < policy.priority
                && covers(other, policy, *network)
        });
        (!is_exempt).then(|| notice(policy, *network))
    });
    found.take(NAMED).collect()
}

fn notice(policy: &Policy, network: IpNet) -> Problem {
    let Policy { from, to, direction, priority, what, .. } = policy;
    let does = if policy.blocks { "drops" } else { "encrypts or drops" };
    let what = if what.is_empty() { String::new() } else { format!(" {what}") };
    let subject = format!("IPsec policy from {from} to {to}{what}");
    let fix = format!(
        "if that is not intended: ip xfrm policy delete src {from} dst {to}{what} dir {direction}, or exempt \
         packets from {network} to {network} in the IPsec configuration"
    );
    let what = format!(
        "an IPsec policy {does} some packets between pods: those from {from} to {to}{what} (ip xfrm policy: \
         dir {direction}, priority {priority})"
    );
    Problem::new(ProblemCode::PartialRule, subject, what, fix).notice()
}

/// Returns the kernel's policies. A kernel without IPsec has none.
fn policies() -> Vec<Policy> {
    xfrm::policies().unwrap_or_default()
}

/// Returns whether the policy may match packets between addresses of a network.
fn meets(policy: &Policy, network: IpNet) -> bool {
    let meets = |other: IpNet| network.contains(&other) || other.contains(&network);
    meets(policy.from) && meets(policy.to)
}

/// Returns whether the first policy matches everything in this network that the second one matches.
fn covers(first: &Policy, second: &Policy, network: IpNet) -> bool {
    let covers = |first: IpNet, second: IpNet| first.contains(&second) || first.contains(&network);
    let is_wide = first.what.is_empty() || first.what == second.what;
    is_wide && covers(first.from, second.from) && covers(first.to, second.to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(from: &str, to: &str, action: (bool, bool), priority: u32) -> Policy {
        let net = |text: &str| text.parse().expect("a network");
        let (blocks, transforms) = action;
        let (from, to, what) = (net(from), net(to), String::new());
        Policy { from, to, direction: "fwd", priority, blocks, transforms, what }
    }

    const BLOCK: (bool, bool) = (true, false);
    const PASS: (bool, bool) = (false, false);
    const TUNNEL: (bool, bool) = (false, true);

    #[test]
    fn default_that_drops_packets_comes_with_both_commands() {
        let said = blocking_default("fwd");
        assert!(said.contains("(ip xfrm policy getdefault: fwd block)"), "{said}");
        assert!(said.contains(": ip xfrm policy setdefault fwd accept"), "{said}");
    }

    #[test]
    fn policy_for_some_pod_packets_is_reported_unless_earlier_policy_exempts_them() {
        let network: IpNet = "10.42.0.0/16".parse().expect("a network");
        let told = |policies: &[Policy]| notices(policies, &[network]);
        let block = policy("10.42.1.3/32", "10.42.0.0/16", BLOCK, 20);
        let said = told(std::slice::from_ref(&block));
        assert!(
            said[0].starts_with(
                "an IPsec policy drops some packets between pods: those from 10.42.1.3/32 to 10.42.0.0/16 \
                 (ip xfrm policy: dir fwd, priority 20)"
            ),
            "{said:?}"
        );
        for (other, is_exempt) in [
            (policy("10.42.0.0/16", "10.42.0.0/16", PASS, 10), true),
            (policy("0.0.0.0/0", "10.42.0.0/16", PASS, 10), true),
            (policy("10.42.0.0/16", "10.42.0.0/16", PASS, 30), false),
            (policy("10.42.1.0/24", "10.42.2.0/24", PASS, 10), false),
            (Policy { direction: "out", ..policy("0.0.0.0/0", "0.0.0.0/0", PASS, 10) }, false),
            (
                Policy { what: "proto tcp".into(), ..policy("0.0.0.0/0", "0.0.0.0/0", PASS, 10) },
                false,
            ),
        ] {
            assert_eq!(told(&[other.clone(), block.clone()]).is_empty(), is_exempt, "{other:?}");
        }
        assert_eq!(told(&[policy("10.42.0.0/16", "192.168.0.0/16", BLOCK, 1)]), []);
        let own = Policy { direction: "in", ..block };
        assert_eq!(told(&[own]), [], "what comes to this host itself");
        let ports = policy("10.0.0.0/8", "10.42.2.0/24", TUNNEL, 0);
        let said = told(&[Policy { what: "proto tcp dport 80".into(), ..ports }]);
        assert!(said[0].contains("encrypts or drops some packets"), "{said:?}");
        assert!(
            said[0].contains(
                "ip xfrm policy delete src 10.0.0.0/8 dst 10.42.2.0/24 proto tcp dport 80 dir fwd"
            ),
            "{said:?}"
        );
    }
}
