//! Problems and notices of a node, from the part that finds them to every operator's view.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::visible;

/// How much a finding affects pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Packets of pods are lost, or the node cannot do its work.
    Problem,
    /// Some packets may be affected, or a check is not possible.
    Notice,
}

impl Severity {
    /// Returns the name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Problem => "problem",
            Self::Notice => "notice",
        }
    }
}

/// A problem or notice: what is wrong, since when, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
pub struct Problem {
    /// The kind of problem.
    pub code: ProblemCode,
    /// How much it affects pods.
    pub severity: Severity,
    /// What it is about: a peer, pod, interface, setting or file; "host" for this host as a whole.
    pub subject: String,
    /// When it was first seen, in seconds since 1970 by this host's clock. `None` until the agent has
    /// recorded it.
    pub since: Option<u64>,
    /// What is wrong.
    pub what: String,
    /// The likely cause and the remedy; empty if there is nothing to do.
    pub fix: String,
}

/// Identifies a problem while its measurements change.
pub type ProblemKey = (ProblemCode, String);

impl Problem {
    /// Subject of problems of this host as a whole.
    pub const HOST: &'static str = "host";

    /// Returns a problem.
    pub fn new(
        code: ProblemCode,
        subject: impl fmt::Display,
        what: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            code,
            severity: Severity::Problem,
            subject: subject.to_string(),
            since: None,
            what: what.into(),
            fix: fix.into(),
        }
    }

    /// Returns the same finding as a notice.
    #[must_use]
    pub fn notice(self) -> Self {
        Self { severity: Severity::Notice, ..self }
    }

    /// Returns the problem with control characters replaced: texts may come from other hosts.
    #[must_use]
    pub fn visible(self) -> Self {
        let Self { subject, what, fix, .. } = &self;
        let [subject, what, fix] = [subject, what, fix].map(|text| visible(text));
        Self { subject, what, fix, ..self }
    }

    /// Returns whether the text contains these words.
    #[cfg(test)]
    pub fn contains(&self, words: &str) -> bool {
        self.to_string().contains(words)
    }

    /// Returns whether the text starts with these words.
    #[cfg(test)]
    pub fn starts_with(&self, words: &str) -> bool {
        self.to_string().starts_with(words)
    }

    /// Returns the code and the subject.
    pub fn key(&self) -> ProblemKey {
        (self.code, self.subject.clone())
    }
}

/// What is wrong and the remedy, in one line.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, fix, .. } = self;
        match fix.as_str() {
            "" => f.write_str(what),
            fix => write!(f, "{what}: {fix}"),
        }
    }
}

/// Defines the codes with their names, which are part of the API.
macro_rules! codes {
    ($($(#[doc = $doc:literal])+ $code:ident = $name:literal),* $(,)?) => {
        /// The kind of a problem. The names are stable; docs/TROUBLESHOOTING.md lists them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(all(test, feature = "agent"), derive(schemars::JsonSchema))]
        pub enum ProblemCode {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $code),*
        }

        impl ProblemCode {
            /// All codes.
            pub const ALL: &'static [Self] = &[$(Self::$code),*];

            /// Returns the stable name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$code => $name),*
                }
            }

            /// Returns what the code stands for.
            pub const fn description(self) -> &'static str {
                match self {
                    $(Self::$code => concat!($($doc),+).trim_ascii()),*
                }
            }
        }
    };
}

codes! {
    /// The agent is starting, and waits for something.
    Starting = "starting",
    /// A seed did not admit this node.
    SeedUnreachable = "seed-unreachable",
    /// A seed is an address of this host.
    OwnAddressSeed = "own-address-seed",
    /// The node has no subnet.
    NoSubnet = "no-subnet",
    /// The node has another subnet than the preferred one.
    PreferredSubnet = "preferred-subnet",
    /// A subnet was assigned to two nodes.
    SubnetAssignedTwice = "subnet-assigned-twice",
    /// Kubernetes assigns this node no usable subnet, or does not list the nodes.
    Kubernetes = "kubernetes",
    /// A member is down.
    MemberDown = "member-down",
    /// No other member answers this host.
    Isolated = "isolated",
    /// The address of this host has changed, and no member answers at the address known for it.
    AddressChanged = "address-changed",
    /// The key of this node is in use on two hosts.
    DuplicateIdentity = "duplicate-identity",
    /// The state directory was rolled back.
    RolledBack = "rolled-back",
    /// A subnet has two different records of one epoch.
    OwnershipConflict = "ownership-conflict",
    /// A member sends records in the name of this node.
    ForgedRecords = "forged-records",
    /// A member sends facts that cannot be true.
    InvalidFacts = "invalid-facts",
    /// The state of a member differs from this node's after several comparisons.
    StateDiffers = "state-differs",
    /// The vote of a voter does not count: its settings differ, or no single member has its name.
    Voting = "voting",
    /// The state directory cannot be written.
    Disk = "disk",
    /// A file cannot be written.
    FileNotWritten = "file-not-written",
    /// Lines of the agent's log wait for its reader, or were lost.
    LogLost = "log-lost",
    /// A socket or address of the agent is not open.
    Listener = "listener",
    /// A monitoring thread of the agent has ended.
    ThreadEnded = "thread-ended",
    /// Non-members flood the gossip port.
    HandshakeFlood = "handshake-flood",
    /// A program uses up the capacity for handshakes.
    HandshakeOverload = "handshake-overload",
    /// The agent does not read packets in time.
    PacketsUnread = "packets-unread",
    /// No network of this host can carry tunnels.
    NoUnderlay = "no-underlay",
    /// The carrier of the underlay interface flaps.
    LinkFlapping = "link-flapping",
    /// The MTU of the underlay interface has become too small for the setting mtu.
    UnderlayMtu = "underlay-mtu",
    /// The MTU of the underlay is too small for gossip.
    GossipMtu = "gossip-mtu",
    /// The MTU is too small for IPv6 in the overlay.
    Ipv6LeftOut = "ipv6-left-out",
    /// Another machine has the address of this host, or of its router.
    AddressTaken = "address-taken",
    /// The kernel refused entries, or cannot be programmed.
    KernelRefused = "kernel-refused",
    /// The kernel refused entries of one peer.
    PeerRefused = "peer-refused",
    /// This host cannot send to the underlay address of a peer.
    UnusableAddress = "unusable-address",
    /// Forwarding is off.
    ForwardingOff = "forwarding-off",
    /// Another program turns forwarding off again and again.
    ForwardingSwitched = "forwarding-switched",
    /// A sysctl has a value that drops packets.
    Sysctl = "sysctl",
    /// Sysctls cannot be read.
    SysctlsUnreadable = "sysctls-unreadable",
    /// This host does not forward packets of pods.
    NotForwarding = "not-forwarding",
    /// This host drops tunnel packets that it passes on between other members.
    Transit = "transit",
    /// Pods cannot resolve the address of their gateway.
    GatewayUnresolved = "gateway-unresolved",
    /// Pods of this host do not reach each other.
    PodsApart = "pods-apart",
    /// Packets of pods do not leave inside tunnel packets.
    TunnelOutput = "tunnel-output",
    /// A chain drops incoming tunnel packets.
    TunnelInput = "tunnel-input",
    /// Pods do not learn that their packets are too large.
    TooLargeUnreported = "too-large-unreported",
    /// Packets of pods get another source address.
    SourceTranslated = "source-translated",
    /// Pods and their own host do not reach each other.
    HostAndPods = "host-and-pods",
    /// Rules may affect some packets of pods.
    PartialRule = "partial-rule",
    /// eBPF programs may drop packets of pods.
    ForeignProgram = "foreign-program",
    /// Forwarding cannot be tested.
    Untested = "untested",
    /// Packets are lost between pods of this host and pods of others.
    RemotePods = "remote-pods",
    /// A part of the packets to or from pods of other hosts is lost at random.
    RandomLoss = "random-loss",
    /// A pod does not answer its host.
    PodSilent = "pod-silent",
    /// Other programs' queueing disciplines or filters are at the interface of a pod.
    PodFilter = "pod-filter",
    /// Pods have addresses outside this node's subnet.
    PodsOutside = "pods-outside",
    /// No pod can be connected.
    PodsRefused = "pods-refused",
    /// Ports of other programs are on the pods' bridge.
    ForeignPort = "foreign-port",
    /// A pod can use addresses of others, or sends too many broadcasts.
    AntiSpoofing = "anti-spoofing",
    /// Pods can install routes on this host.
    RoutesOfPods = "routes-of-pods",
    /// The kernel routes packets of pods another way.
    Diverted = "diverted",
    /// Addresses of this host are in the network of the overlay.
    Overlap = "overlap",
    /// Packets through the tunnel to a peer are not answered.
    PathLost = "path-lost",
    /// Packets to a peer and its answers take different ways.
    PathAsymmetric = "path-asymmetric",
    /// Packets of some flows to a peer are lost.
    PathPartlyLost = "path-partly-lost",
    /// Large packets to a peer are lost, or the kernel assumes a path MTU that is too small.
    PathMtu = "path-mtu",
    /// The mode of this host allows no route to a peer.
    PathUnreachable = "path-unreachable",
    /// The table of nftables cannot be written.
    FirewallTable = "firewall-table",
    /// Users of this host can send tunnel packets.
    UsersUnblocked = "users-unblocked",
    /// Docker drops what other hosts send to its containers.
    DockerDirectAccess = "docker-direct-access",
    /// The kernel's table of connections is full.
    ConnectionTableFull = "connection-table-full",
    /// The kernel's table of neighbors is full.
    NeighborTableFull = "neighbor-table-full",
    /// The kernel's memory for fragments is full or small.
    FragmentMemory = "fragment-memory",
    /// Another program keeps changing what gossamer sets.
    RepairConflict = "repair-conflict",
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_have_distinct_kebab_case_names_that_serde_uses() {
        let names: BTreeSet<&str> = ProblemCode::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), ProblemCode::ALL.len());
        for code in ProblemCode::ALL {
            let name = code.name();
            assert!(
                name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            );
            assert_eq!(serde_json::to_value(code).expect("JSON"), name);
            assert!(code.description().ends_with('.'), "{name}");
        }
    }

    #[test]
    fn documentation_lists_all_codes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/TROUBLESHOOTING.md");
        let page = std::fs::read_to_string(path).expect("the page");
        for code in ProblemCode::ALL {
            let row = format!("\n| `{}` | {} |", code.name(), code.description());
            assert!(page.contains(&row), "{row}");
        }
    }

    #[test]
    fn problem_is_shown_with_its_remedy_if_it_has_one() {
        let problem = Problem::new(ProblemCode::MemberDown, "n2", "n2 is down", "start it");
        assert_eq!(problem.to_string(), "n2 is down: start it");
        let problem = Problem { fix: String::new(), ..problem.notice() };
        assert_eq!(
            (problem.to_string().as_str(), problem.severity),
            ("n2 is down", Severity::Notice)
        );
    }
}
