//! The host without any agent: rights, kernel, interfaces, sysctls, ports, other overlays, MTUs.

use std::{
    fs, io,
    net::{Ipv4Addr, UdpSocket},
};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkBridge, LinkVeth, LinkVxlan};

use super::{Finding, Numbers, Patient};
use crate::{
    agent::{LACKS_IPV6, choose_underlay},
    dataplane::{
        desired::{IPV6_MTU_MIN, Mode, device_name},
        firewall::Firewall,
        kernel::{FirewallTable, Kernel, overlaps, sysctl},
    },
    netlink::{Netlink, in_thread, link::Link},
    pods::{obstacle::obstacle, standin::OWN_ALIAS},
};

/// Devices and ports of other overlays.
const OTHERS: [(&str, &str); 6] = [
    ("flannel", "flannel"),
    ("weave", "Weave Net"),
    ("cilium", "Cilium"),
    ("vxlan.calico", "Calico"),
    ("vxlan-", "Docker Swarm"),
    ("genev_sys", "Open vSwitch"),
];

pub fn examine(patient: &Patient, findings: &mut Vec<Finding>) {
    let numbers = patient.numbers();
    privileges(patient, findings);
    if lacking(held("self")).is_empty() {
        findings.push(kernel());
    } else {
        findings.push(Finding::skipped("kernel", "takes root"));
    }
    let mode = patient.config.as_ref().map_or(Mode::Vxlan, |config| config.mode);
    let underlay = underlay(patient, findings);
    sysctls(&numbers, mode, underlay.as_deref(), findings);
    ports(patient, &numbers, findings);
    match Netlink::open().and_then(|mut netlink| netlink.links()) {
        Ok(links) => {
            findings.extend(overlays(&links, &numbers));
            findings.extend(bridge(patient, &links, &numbers));
            findings.extend(mtu(patient, &links, underlay.as_deref()));
        }
        Err(error) => findings.push(Finding::skipped("overlays", format!("netlink: {error}"))),
    }
    overlap(patient, &numbers, findings);
}

/// Number in linux/capability.h, name, and what the agent cannot do without it.
const NEEDED: [(u8, &str, &str); 3] = [
    (12, "CAP_NET_ADMIN", "it cannot program the kernel"),
    (13, "CAP_NET_RAW", "it cannot probe the overlay, and withdraws no path"),
    (21, "CAP_SYS_ADMIN", "it cannot connect pods (CNI, Docker)"),
];

/// What the agent may do, or where none runs, what this process may.
fn privileges(patient: &Patient, findings: &mut Vec<Finding>) {
    // A process of another namespace has no number here.
    let agent = patient.agent_pid().filter(|pid| *pid > 0);
    let (held, holder) = match agent {
        Some(pid) => (held(&pid.to_string()), format!("the agent (process {pid})")),
        None => (held("self"), "this process".to_owned()),
    };
    let lacking = lacking(held);
    for (_, name, consequence) in &lacking {
        let fix = format!("run it as root, or with {name} (AmbientCapabilities= of its unit)");
        let seen = format!("{name} is not held by {holder}");
        findings.push(Finding::problem(
            "privileges",
            seen,
            format!("without it {consequence}"),
            fix,
        ));
    }
    if lacking.is_empty() {
        let names = NEEDED.map(|(_, name, _)| name).join(", ");
        findings.push(Finding::ok("privileges", names));
    }
}

/// The effective capabilities of a process: `CapEff` of proc_pid_status(5).
fn held(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0)
}

fn lacking(held: u64) -> Vec<&'static (u8, &'static str, &'static str)> {
    NEEDED.iter().filter(|(bit, ..)| held & 1 << bit == 0).collect()
}

/// Makes one of each in a network namespace that is gone afterwards.
fn kernel() -> Finding {
    let trial = in_thread(|| {
        // Nothing in the kernel is missing then: a limit is reached (user_namespaces(7)).
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
            return Ok(Err(error));
        }
        let mut netlink = Netlink::open()?;
        let fail =
            |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
        netlink
            .create_link(LinkVeth::new("a", "b").build())
            .map_err(|error| fail("veth (module veth)", error))?;
        netlink
            .create_link(LinkBridge::new("c").build())
            .map_err(|error| fail("bridge (module bridge)", error))?;
        netlink
            .create_link(LinkVxlan::new("d", 1).port(8472).build())
            .map_err(|error| fail("VXLAN (module vxlan)", error))?;
        let network = "10.42.0.0/16".parse().map_err(io::Error::other)?;
        let firewall = Firewall {
            table: "doctor".to_owned(),
            guard: None,
            port: 8472,
            masquerade: vec![(network, network)],
            leases: None,
        };
        FirewallTable::open()
            .and_then(|mut table| table.write(&firewall))
            .map_err(|error| fail("nftables (modules nf_tables, nf_nat, nft_masq)", error))?;
        Ok(Ok(()))
    });
    match trial {
        Ok(Ok(())) => Finding::ok("kernel", "VXLAN, veth, bridge and nftables can be made"),
        Ok(Err(error)) => Finding::warning(
            "kernel",
            format!("no network namespace can be made: {error}"),
            "neither this check nor the agent's trials of forwarding can be made, so a firewall that drops \
             packets of pods is only guessed at",
            "sysctl user.max_net_namespaces user.max_user_namespaces, and raise what is 0",
        ),
        Err(error) => Finding::problem(
            "kernel",
            error.to_string(),
            "the overlay is made of these",
            "load the module it names (modprobe), or install the kernel's extra modules",
        ),
    }
}

/// Gives the interface's name.
fn underlay(patient: &Patient, findings: &mut Vec<Finding>) -> Option<String> {
    let kernel = patient.status().map(|status| &status["kernel"]);
    if let Some((name, address)) = kernel.and_then(|kernel| {
        let name = kernel["underlay_interface"].as_str().filter(|name| !name.is_empty());
        Some((name?, kernel["underlay_address"].as_str()?))
    }) {
        // What is wrong with it the agent says itself.
        findings.push(Finding::ok("underlay", format!("{address} on {name}")));
        return Some(name.to_owned());
    }
    let config = patient.config.as_ref().ok()?;
    let chosen = Netlink::open().map_err(|error| error.to_string()).and_then(|mut netlink| {
        choose_underlay(&mut netlink, config, std::iter::empty()).map_err(|error| error.to_string())
    });
    match chosen {
        Ok(chosen) => {
            let seen = format!("{} on {}", chosen.local, chosen.name);
            findings.push(Finding::ok("underlay", seen));
            Some(chosen.name)
        }
        Err(error) => {
            findings.push(Finding::problem(
                "underlay",
                error,
                "members reach this host by the address of that interface",
                "name it: iface = \"eth0\" (a name, an address or a regex), or give the host a default route",
            ));
            None
        }
    }
}

fn sysctls(numbers: &Numbers, mode: Mode, underlay: Option<&str>, findings: &mut Vec<Finding>) {
    let device = device_name(numbers.vni);
    let wanted = sysctl::wanted(&numbers.networks, &device, mode, underlay.unwrap_or("all"));
    let wrong: Vec<_> = wanted.iter().filter_map(|setting| setting.wrong()).collect();
    if wrong.is_empty() {
        findings.push(Finding::ok("sysctls", "forwarding is on"));
    }
    findings.extend(wrong.into_iter().map(|(seen, why, command)| {
        let fix = format!("{command} (and a file in /etc/sysctl.d), or set_sysctls = true");
        Finding::problem("sysctls", seen, why, fix)
    }));
}

/// With an agent both ports are its own.
fn ports(patient: &Patient, numbers: &Numbers, findings: &mut Vec<Finding>) {
    let before = findings.len();
    if patient.agent.is_none() {
        if let Err(error) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, numbers.gossip_port)) {
            findings.push(Finding::problem(
                "ports",
                format!("UDP {}: {error}", numbers.gossip_port),
                "the agent listens there for gossip",
                format!(
                    "see who has it (ss -lunp 'sport = :{}'), and stop that, or set listen",
                    numbers.gossip_port
                ),
            ));
        }
        let name = device_name(numbers.vni);
        let free = Kernel::open()
            .map_err(Into::into)
            .and_then(|mut kernel| kernel.preflight(&name, numbers.vni, numbers.vxlan_port));
        if let Err(error) = free {
            findings.push(Finding::sentence("ports", &error.to_string()));
        }
    }
    if findings.len() == before {
        let seen =
            format!("UDP {} and {} are free or ours", numbers.gossip_port, numbers.vxlan_port);
        findings.push(Finding::ok("ports", seen));
    }
}

fn overlays(links: &[Link], numbers: &Numbers) -> Vec<Finding> {
    let mut findings = Vec::new();
    let own = device_name(numbers.vni);
    for link in links.iter().filter(|link| link.name != own) {
        let known = OTHERS.iter().find(|(prefix, _)| link.name.starts_with(prefix));
        if let Some((_, whose)) = known {
            findings.push(Finding::warning(
                "overlays",
                format!("interface {} is of {whose}", link.name),
                "two overlays on one host give pods two networks, and often want the same UDP port",
                format!("remove {whose} once its pods are gone (ip link del {})", link.name),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("overlays", "no other overlay"));
    }
    findings
}

/// Another interface that has the name of the pods' bridge. With an agent, that says so itself.
fn bridge(patient: &Patient, links: &[Link], numbers: &Numbers) -> Option<Finding> {
    let config = patient.config.as_ref().ok().filter(|_| patient.agent.is_none())?;
    let name = config.bridge_name(numbers.vni);
    let obstacle = obstacle(links.iter().find(|link| link.name == name)?, None)?;
    Some(Finding::sentence("overlays", &obstacle))
}

/// Networks of interfaces that are also the overlay's.
fn overlap(patient: &Patient, numbers: &Numbers, findings: &mut Vec<Finding>) {
    let Ok(mut netlink) = Netlink::open() else { return };
    let own: Vec<ipnet::IpNet> = ["subnet", "subnet6"]
        .into_iter()
        .filter_map(|key| patient.status()?[key].as_str()?.parse().ok())
        .collect();
    let has_all_routes =
        patient.status().is_none_or(|status| status["kernel"]["peers_in_use"].is_null());
    let sentences = overlaps(&mut netlink, &numbers.networks, &own, has_all_routes);
    let sentences = sentences.unwrap_or_default();
    findings.extend(sentences.iter().map(|sentence| {
        let (seen, rest) = sentence.split_once(": ").unwrap_or((sentence, ""));
        let (why, fix) = rest.split_once("; ").unwrap_or((rest, ""));
        Finding::problem("overlays", seen, why, fix)
    }));
}

fn mtu(patient: &Patient, links: &[Link], underlay: Option<&str>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let vni = patient.numbers().vni;
    let device = links.iter().find(|link| link.name == device_name(vni));
    let carrier = underlay.and_then(|name| links.iter().find(|link| link.name == name));
    let own = device.map(|device| device.mtu);
    if let (Some(mtu), Some(carrier)) = (own, carrier)
        && mtu + 50 > carrier.mtu
    {
        findings.push(Finding::problem(
            "mtu",
            format!("the overlay carries {mtu} bytes, {} only {}", carrier.name, carrier.mtu),
            "large packets are lost, small ones get through: connections begin and then hang",
            format!(
                "set mtu = {} or less, or raise that of {}",
                carrier.mtu.saturating_sub(50),
                carrier.name
            ),
        ));
    }
    let told = patient.problems().filter(|problem| problem.contains(LACKS_IPV6));
    findings.extend(told.map(|problem| Finding::sentence("mtu", problem)));
    let has_ipv6 = patient.numbers().networks.iter().any(|network| network.addr().is_ipv6());
    let is_unheard = patient.agent.is_none() && has_ipv6;
    if let Some(mtu) = own.filter(|mtu| is_unheard && *mtu < IPV6_MTU_MIN) {
        findings.push(Finding::problem(
            "mtu",
            format!("the overlay carries {mtu} bytes"),
            format!("the kernel turns IPv6 off on interfaces below {IPV6_MTU_MIN} bytes"),
            "raise the underlay's MTU, or the setting mtu",
        ));
    }
    let bridge = patient.config.as_ref().ok().map(|config| config.bridge_name(vni));
    // A modem may have that name.
    let is_it = |link: &&Link, name: &str| link.name == name && link.kind == "bridge";
    let bridge = bridge.and_then(|name| links.iter().find(|link| is_it(link, &name)));
    let pods = bridge.into_iter().flat_map(|bridge| {
        let is_trials = |link: &&Link| link.alias == OWN_ALIAS;
        let ports = links.iter().filter(|link| link.is_plugged_into(bridge.index));
        // What the agent tries with is larger, to find out what becomes of large packets.
        ports.filter(move |link| !is_trials(link)).chain([bridge])
    });
    for link in pods.filter(|link| own.is_some_and(|mtu| link.mtu > mtu)) {
        findings.push(Finding::problem(
            "mtu",
            format!("{} has MTU {}, the overlay {}", link.name, link.mtu, own.unwrap_or_default()),
            "large packets of that pod are lost on their way to other hosts",
            format!(
                "ip link set {} mtu {} (in the pod too), or start the pod anew",
                link.name,
                own.unwrap_or_default()
            ),
        ));
    }
    if findings.is_empty() {
        let seen = match (own, carrier) {
            (Some(mtu), Some(carrier)) => format!("{mtu} in {} of {}", carrier.mtu, carrier.name),
            _ => "no overlay device yet".to_owned(),
        };
        findings.push(Finding::ok("mtu", seen));
    }
    findings
}
