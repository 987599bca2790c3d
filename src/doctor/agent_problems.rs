//! Which check shows what the agent reports: each of its problems and notices, exactly once.

use super::{Examination, Finding};
use crate::model::{Problem, ProblemCode, Severity};

/// Returns the check, one of [`CHECKS`](super::CHECKS), that shows problems and notices of a code.
pub(super) const fn check_of(code: ProblemCode) -> &'static str {
    use ProblemCode as Code;
    match code {
        Code::SeedUnreachable | Code::OwnAddressSeed => "seeds",
        Code::MemberDown | Code::Isolated => "members",
        Code::DuplicateIdentity | Code::RolledBack | Code::OwnershipConflict => "identity",
        Code::Disk | Code::FileNotWritten => "state",
        Code::NoUnderlay | Code::LinkFlapping | Code::AddressChanged | Code::AddressTaken => {
            "underlay"
        }
        Code::UnderlayMtu | Code::GossipMtu | Code::Ipv6LeftOut => "mtu",
        Code::ForwardingOff | Code::ForwardingSwitched | Code::Sysctl | Code::SysctlsUnreadable => {
            "sysctls"
        }
        Code::NotForwarding
        | Code::Transit
        | Code::GatewayUnresolved
        | Code::PodsApart
        | Code::TunnelOutput
        | Code::TooLargeUnreported
        | Code::SourceTranslated
        | Code::HostAndPods
        | Code::PartialRule
        | Code::ForeignProgram
        | Code::Untested
        | Code::RemotePods
        | Code::RandomLoss
        | Code::PodSilent
        | Code::PodFilter => "forwarding",
        Code::TunnelInput => "firewall",
        Code::Diverted => "routing",
        Code::Overlap => "overlays",
        Code::PathLost
        | Code::PathAsymmetric
        | Code::PathPartlyLost
        | Code::PathMtu
        | Code::PathUnreachable
        | Code::UnusableAddress => "paths",
        Code::DockerDirectAccess => "docker",
        Code::Starting
        | Code::NoSubnet
        | Code::PreferredSubnet
        | Code::SubnetAssignedTwice
        | Code::Kubernetes
        | Code::ForgedRecords
        | Code::InvalidFacts
        | Code::StateDiffers
        | Code::Voting
        | Code::LogLost
        | Code::Listener
        | Code::ThreadEnded
        | Code::HandshakeFlood
        | Code::HandshakeOverload
        | Code::PacketsUnread
        | Code::KernelRefused
        | Code::PeerRefused
        | Code::PodsOutside
        | Code::PodsRefused
        | Code::ForeignPort
        | Code::AntiSpoofing
        | Code::RoutesOfPods
        | Code::FirewallTable
        | Code::UsersUnblocked
        | Code::ConnectionTableFull
        | Code::NeighborTableFull
        | Code::FragmentMemory
        | Code::RepairConflict => "agent",
    }
}

/// Returns a finding for each problem and notice of the agent.
pub(super) fn findings(examination: &Examination) -> Vec<Finding> {
    examination.all_reported().map(finding).collect()
}

fn finding(problem: &Problem) -> Finding {
    let why = match problem.code {
        _ if problem.severity == Severity::Notice => None,
        ProblemCode::SourceTranslated => {
            Some("other containers identify a container by its address")
        }
        ProblemCode::TooLargeUnreported => {
            Some("small packets pass, but connections hang at the first large one")
        }
        ProblemCode::NotForwarding
        | ProblemCode::GatewayUnresolved
        | ProblemCode::PodsApart
        | ProblemCode::TunnelOutput
        | ProblemCode::RemotePods
        | ProblemCode::PodSilent => {
            Some("pods here do not reach other pods, or other pods do not reach them")
        }
        _ => None,
    };
    Finding { why: why.map(str::to_owned), ..Finding::of(check_of(problem.code), problem) }
}

impl Examination {
    /// Returns all that the agent reports.
    fn all_reported(&self) -> impl Iterator<Item = &Problem> {
        let status = self.status().into_iter();
        status.flat_map(|status| status.problems.iter().chain(&status.notices))
    }

    /// Returns what the agent reports that this check shows.
    pub(super) fn reported_by_agent<'a>(
        &'a self,
        check: &'a str,
    ) -> impl Iterator<Item = &'a Problem> {
        self.all_reported().filter(move |problem| check_of(problem.code) == check)
    }

    /// Whether the agent reports a problem, and not only notices, that this check shows.
    pub(super) fn has_problem(&self, check: &str) -> bool {
        self.reported_by_agent(check).any(|problem| problem.severity == Severity::Problem)
    }

    /// Whether the agent reports something that this check shows.
    pub(super) fn has_report(&self, check: &str) -> bool {
        self.reported_by_agent(check).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::CHECKS, *};

    #[test]
    fn check_of_names_only_known_checks() {
        for code in ProblemCode::ALL {
            let check = check_of(*code);
            assert!(CHECKS.iter().any(|(name, _)| *name == check), "{code:?}: {check}");
        }
    }
}
