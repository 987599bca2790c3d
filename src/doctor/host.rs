//! Checks of the host without an agent: privileges, kernel, interfaces, sysctls, ports, other overlays,
//! MTUs.

use std::{
    fs, io,
    net::{Ipv4Addr, UdpSocket},
};

use nix::sched::{CloneFlags, unshare};
use rtnetlink::{LinkBridge, LinkVeth, LinkVxlan};

use super::{Examination, Finding, NEEDS_ROOT, Numbers, Verdict};
use crate::{
    dataplane::{
        desired::{IPV6_MTU_MIN, Mode, device_name, overhead},
        firewall::Firewall,
        kernel::{FirewallTable, Kernel, KernelError, overlaps, required_sysctls},
    },
    model::{Pool, PoolSpec},
    netlink::{Netlink, in_thread, link::Link},
    pods::{agent_pod::OWN_ALIAS, obstacle::obstacle},
    store::StateDir,
    sysctl,
    underlay::{self, UnderlayError},
};

/// Prefixes of device names of other overlays, with the program.
const OVERLAY_PREFIXES: [(&str, &str); 6] = [
    ("flannel", "flannel"),
    ("weave", "Weave Net"),
    ("cilium", "Cilium"),
    ("vxlan.calico", "Calico"),
    ("vxlan-", "Docker Swarm"),
    ("genev_sys", "Open vSwitch"),
];

/// Runs the checks of the host.
pub fn examine(examination: &Examination, findings: &mut Vec<Finding>) {
    let numbers = examination.numbers();
    privileges(examination, findings);
    if missing_capabilities(effective_capabilities("self")).is_empty() {
        findings.push(kernel());
    } else {
        findings.push(Finding::skipped("kernel", NEEDS_ROOT));
    }
    let mode = examination.config.as_ref().map_or(Mode::Vxlan, |config| config.mode);
    let before = findings.len();
    let underlay = underlay(examination, findings);
    let is_mtu_refused = findings[before..].iter().any(|finding| finding.check == "mtu");
    sysctls(examination, &numbers, mode, underlay.as_deref(), findings);
    let conflict = conflict(examination, underlay.as_deref());
    ports(examination, &numbers, conflict.as_ref(), findings);
    match Netlink::open().and_then(|mut netlink| netlink.links()) {
        Ok(links) => {
            findings.extend(overlays(&links, &numbers));
            findings.extend(bridge(examination, &links, &numbers));
            if !is_mtu_refused {
                findings.extend(mtu(examination, &links, mode, underlay.as_deref()));
            }
        }
        Err(error) => {
            let skipped = Finding::skipped("overlays", format!("netlink: {error}"));
            findings.push(skipped.refused_by(&error));
        }
    }
    overlap(examination, &numbers, findings);
    let is_told =
        |finding: &Finding| finding.check == "overlays" && finding.verdict == Verdict::Problem;
    if let Some(conflict @ KernelError::Overlap { .. }) = conflict
        && !findings.iter().any(is_told)
    {
        findings.push(Finding::sentence("overlays", &conflict.to_string()));
    }
}

/// Returns why the agent would refuse to start on this host. A running one has started.
fn conflict(examination: &Examination, underlay: Option<&str>) -> Option<KernelError> {
    let config = examination.config.as_ref().ok().filter(|_| examination.agent.is_none())?;
    let local = Netlink::open().ok().zip(underlay).and_then(|(mut netlink, name)| {
        let link = netlink.link(name).ok()??;
        let all = netlink.addresses().ok()?;
        all.iter().find(|address| address.link == link.index).map(|address| address.ip)
    });
    let mut plan = config.planned_overlay(None, local);
    // The settings of the cluster of a known node are in its database.
    if StateDir::is_known(&config.state_dir) {
        (plan.creates, plan.pool) = (false, None);
    } else if plan.pool.is_none() {
        plan.pool = config.wish.network.and_then(|network| Pool::new(&PoolSpec::of(network)).ok());
    }
    Kernel::open().ok()?.refuse_conflicts(&plan).err()
}

/// Required capabilities: number in linux/capability.h, name, and what fails without it.
const REQUIRED_CAPABILITIES: [(u8, &str, &str); 3] = [
    (12, "CAP_NET_ADMIN", "it cannot program the kernel"),
    (13, "CAP_NET_RAW", "it cannot probe the overlay, and withdraws no path"),
    (21, "CAP_SYS_ADMIN", "it cannot connect pods (CNI, Docker)"),
];

/// Checks the capabilities of the agent, or of this process if no agent runs.
fn privileges(examination: &Examination, findings: &mut Vec<Finding>) {
    // A process of another PID namespace has no number here.
    let agent = examination.agent_pid();
    let (effective_capabilities, holder) = match agent {
        Some(pid) => {
            (effective_capabilities(&pid.to_string()), format!("the agent (process {pid})"))
        }
        None => (effective_capabilities("self"), "this process".to_owned()),
    };
    let missing_capabilities = missing_capabilities(effective_capabilities);
    for (_, name, consequence) in &missing_capabilities {
        let fix = format!("run it as root, or with {name} (AmbientCapabilities= of its unit)");
        let seen = format!("{name} is not held by {holder}");
        findings.push(Finding::problem(
            "privileges",
            seen,
            format!("without it {consequence}"),
            fix,
        ));
    }
    if missing_capabilities.is_empty() {
        let names = REQUIRED_CAPABILITIES.map(|(_, name, _)| name).join(", ");
        findings.push(Finding::ok("privileges", names));
    }
}

/// Returns the effective capabilities of a process: `CapEff` of `proc_pid_status(5)`.
fn effective_capabilities(process: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    line.and_then(|text| u64::from_str_radix(text.trim(), 16).ok()).unwrap_or(0)
}

fn missing_capabilities(
    effective_capabilities: u64,
) -> Vec<&'static (u8, &'static str, &'static str)> {
    REQUIRED_CAPABILITIES
        .iter()
        .filter(|(bit, ..)| effective_capabilities & 1 << bit == 0)
        .collect()
}

/// Creates one object of each kind in a temporary network namespace.
fn kernel() -> Finding {
    let trial = in_thread(|| {
        // A failure here means that a limit is reached (user_namespaces(7)), not that the kernel lacks
        // anything.
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
        Ok(Ok(())) => Finding::ok("kernel", "VXLAN, veth, bridge and nftables work"),
        Ok(Err(error)) => Finding::notice(
            "kernel",
            format!("no network namespace can be created: {error}"),
            "neither this check nor the agent's tests of forwarding are possible, so a firewall that drops \
             packets of pods can only be guessed",
            "sysctl user.max_net_namespaces user.max_user_namespaces, and raise what is 0",
        )
        .refused_by(&error.into()),
        Err(error) => Finding::problem(
            "kernel",
            error.to_string(),
            "the overlay needs these",
            "load the module it names (modprobe), or install the kernel's extra modules",
        )
        .refused_by(&error),
    }
}

/// Checks the underlay and returns the interface's name.
fn underlay(examination: &Examination, findings: &mut Vec<Finding>) -> Option<String> {
    let kernel = examination.status().map(|status| &status.kernel);
    let kernel = kernel.filter(|kernel| !kernel.underlay_interface.is_empty());
    if let Some((address, kernel)) =
        kernel.and_then(|kernel| Some((kernel.underlay_address?, kernel)))
    {
        // The agent reports problems of the underlay itself.
        let name = kernel.underlay_interface.clone();
        if !examination.has_report("underlay") {
            findings.push(Finding::ok("underlay", format!("{address} on {name}")));
        }
        return Some(name);
    }
    let config = examination.config.as_ref().ok()?;
    let chosen = Netlink::open()
        .map(|mut netlink| underlay::choose(&mut netlink, config, std::iter::empty()));
    let is_refused = chosen.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
    match chosen.unwrap_or_else(|error| Err(error.into())) {
        Err(ref error @ UnderlayError::Mtu { ref iface, .. }) => {
            findings.push(Finding::sentence("mtu", &error.to_string()));
            findings.push(Finding::ok("underlay", iface.as_str()));
            Some(iface.clone())
        }
        Ok(chosen) => {
            if !examination.has_report("underlay") {
                let seen = format!("{} on {}", chosen.local, chosen.name);
                findings.push(Finding::ok("underlay", seen));
            }
            Some(chosen.name)
        }
        Err(_) if examination.has_report("underlay") => None,
        Err(error) => {
            findings.push(Finding::problem(
                "underlay",
                error.to_string(),
                "members reach this host by the address of that interface",
                "name it: iface = \"eth0\" (a name, an address or a regex), or give the host a default route",
            )
            .refused_if(is_refused));
            None
        }
    }
}

fn sysctls(
    examination: &Examination,
    numbers: &Numbers,
    mode: Mode,
    underlay: Option<&str>,
    findings: &mut Vec<Finding>,
) {
    if examination.has_report("sysctls") {
        return;
    }
    if examination.is_host_checked() {
        return findings.push(Finding::ok("sysctls", "forwarding is on"));
    }
    let device = device_name(numbers.vni);
    let wanted =
        required_sysctls::wanted(&numbers.networks, &device, mode, underlay.unwrap_or("all"));
    let wrong: Vec<_> = wanted.iter().filter_map(|setting| setting.wrong()).collect();
    if let Some(unreadable) = sysctl::unreadable() {
        findings.push(Finding::of("sysctls", &unreadable));
    } else if wrong.is_empty() {
        findings.push(Finding::ok("sysctls", "forwarding is on"));
    }
    findings.extend(wrong.into_iter().map(|(seen, why, command)| {
        if !examination.is_set_up() {
            return Finding::notice("sysctls", seen, why, "gossamer init and gossamer join set it");
        }
        if examination.config.as_ref().is_ok_and(|config| config.set_sysctls) {
            return Finding::notice("sysctls", seen, why, "the agent sets it when it starts");
        }
        let fix = format!("{command} (and a file in /etc/sysctl.d), or set_sysctls = true");
        Finding::problem("sysctls", seen, why, fix)
    }));
}

/// Checks the ports. With an agent, both ports are its own.
fn ports(
    examination: &Examination,
    numbers: &Numbers,
    conflict: Option<&KernelError>,
    findings: &mut Vec<Finding>,
) {
    let before = findings.len();
    if examination.agent.is_none() {
        if !examination.is_agent_absent {
            let unknown = "it is not known whether an agent runs, which listens there";
            return findings.push(Finding::skipped("ports", unknown));
        }
        if let Err(error) = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, numbers.gossip_port)) {
            findings.push(Finding::problem(
                "ports",
                format!("UDP {}: {error}", numbers.gossip_port),
                "the agent listens there for gossip",
                format!(
                    "find the program (ss -lunp 'sport = :{}') and stop it, or set listen",
                    numbers.gossip_port
                ),
            ));
        }
        if let Some(error) = conflict.filter(|error| !matches!(error, KernelError::Overlap { .. }))
        {
            findings.push(Finding::sentence("ports", &error.to_string()));
        }
    }
    if findings.len() == before {
        let seen = format!(
            "UDP {} and {} are free or gossamer's",
            numbers.gossip_port, numbers.vxlan_port
        );
        findings.push(Finding::ok("ports", seen));
    }
}

fn overlays(links: &[Link], numbers: &Numbers) -> Vec<Finding> {
    let mut findings = Vec::new();
    let own = device_name(numbers.vni);
    for link in links.iter().filter(|link| link.name != own) {
        let known = OVERLAY_PREFIXES.iter().find(|(prefix, _)| link.name.starts_with(prefix));
        if let Some((_, whose)) = known {
            findings.push(Finding::notice(
                "overlays",
                format!("interface {} belongs to {whose}", link.name),
                "two overlays on one host give pods two networks, and often use the same UDP port",
                format!("remove {whose} once its pods are gone (ip link del {})", link.name),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok("overlays", "no other overlay"));
    }
    findings
}

/// Checks for another interface with the name of the pods' bridge. An agent reports that itself.
fn bridge(examination: &Examination, links: &[Link], numbers: &Numbers) -> Option<Finding> {
    let config = examination.config.as_ref().ok().filter(|_| examination.agent.is_none())?;
    let name = config.bridge_name(numbers.vni);
    let obstacle = obstacle(links.iter().find(|link| link.name == name)?, None)?;
    Some(Finding::of("overlays", &obstacle))
}

/// Checks for interfaces whose networks overlap the overlay's.
fn overlap(examination: &Examination, numbers: &Numbers, findings: &mut Vec<Finding>) {
    if examination.is_host_checked() || examination.has_report("overlays") {
        return;
    }
    // A host that joins learns the network from the cluster.
    let joins = examination.agent.is_some()
        || examination.config.as_ref().is_ok_and(|config| {
            config.create.is_none() && (config.token.is_some() || !config.seeds.is_empty())
        });
    if numbers.are_networks_assumed && joins {
        return;
    }
    let Ok(mut netlink) = Netlink::open() else { return };
    let status = examination.status();
    let own = status.into_iter().flat_map(|status| status.subnet.iter().chain(&status.subnet6));
    let own: Vec<ipnet::IpNet> = own.copied().collect();
    let has_all_routes = status.is_none_or(|status| status.kernel.peers_in_use.is_none());
    let pool = status.and_then(|status| status.settings).map(|settings| settings.pool);
    let problems = overlaps(&mut netlink, &numbers.networks, pool.as_ref(), &own, has_all_routes);
    let problems = problems.unwrap_or_default();
    findings.extend(problems.iter().map(|problem| Finding::of("overlays", problem)));
}

/// Returns the bytes that a tunnel adds to each packet on this host's underlay; none without tunnels.
fn tunnel_overhead(examination: &Examination, mode: Mode) -> u32 {
    if mode == Mode::HostGw {
        return 0;
    }
    let address = examination.status().and_then(|status| status.kernel.underlay_address);
    overhead(address.unwrap_or(Ipv4Addr::UNSPECIFIED.into()))
}

/// Returns the MTU of pods in bytes. Without tunnels it is larger than that of the overlay device.
fn mtu_of_pods(examination: &Examination, device: u32, carrier: Option<&Link>, mode: Mode) -> u32 {
    // 0: the agent has not programmed the device yet.
    let told = examination.status().map(|status| status.kernel.mtu).filter(|mtu| *mtu > 0);
    let without_tunnels = carrier.map(|carrier| carrier.mtu).filter(|_| mode == Mode::HostGw);
    told.or(without_tunnels).unwrap_or(device)
}

/// Checks the chain of MTUs from the underlay to the pods.
fn mtu(
    examination: &Examination,
    links: &[Link],
    mode: Mode,
    underlay: Option<&str>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let vni = examination.numbers().vni;
    let device = links.iter().find(|link| link.name == device_name(vni));
    let carrier = underlay.and_then(|name| links.iter().find(|link| link.name == name));
    let own = device.map(|device| device.mtu);
    let overhead = tunnel_overhead(examination, mode);
    if let (Some(mtu), Some(carrier)) = (own, carrier)
        && mtu + overhead > carrier.mtu
        && !examination.has_problem("mtu")
    {
        findings.push(Finding::problem(
            "mtu",
            format!("the overlay carries {mtu} bytes, {} only {}", carrier.name, carrier.mtu),
            "large packets are lost, small ones pass: connections are established and then hang",
            format!(
                "set mtu = {} or less, or raise the MTU of {}",
                carrier.mtu.saturating_sub(overhead),
                carrier.name
            ),
        ));
    }
    let has_ipv6 = examination.numbers().networks.iter().any(|network| network.addr().is_ipv6());
    let is_unreported = examination.agent.is_none() && has_ipv6;
    if let Some(mtu) = own.filter(|mtu| is_unreported && *mtu < IPV6_MTU_MIN) {
        findings.push(Finding::problem(
            "mtu",
            format!("the overlay carries {mtu} bytes"),
            format!("the kernel disables IPv6 on interfaces below {IPV6_MTU_MIN} bytes"),
            "raise the underlay's MTU, or the setting mtu",
        ));
    }
    let bridge = examination.config.as_ref().ok().map(|config| config.bridge_name(vni));
    // Another interface, such as a modem, may have that name.
    let is_it = |link: &&Link, name: &str| link.name == name && link.kind == "bridge";
    let bridge = bridge.and_then(|name| links.iter().find(|link| is_it(link, &name)));
    let pods = bridge.into_iter().flat_map(|bridge| {
        let is_own_pod = |link: &&Link| link.alias == OWN_ALIAS;
        let ports = links.iter().filter(|link| link.is_plugged_into(bridge.index));
        // The MTU of the agent's own pod is larger, to test the handling of large packets.
        ports.filter(move |link| !is_own_pod(link)).chain([bridge])
    });
    if let Some(largest) = own.map(|own| mtu_of_pods(examination, own, carrier, mode)) {
        findings.extend(pods.filter(|link| link.mtu > largest).map(|link| {
            // A test of the agent shows whether this host reports the size to pods.
            Finding::notice(
                "mtu",
                format!("{} has MTU {}, the overlay {largest}", link.name, link.mtu),
                "large packets of that pod are lost on their way to other hosts until it learns the path MTU",
                format!(
                    "ip link set {} mtu {largest} (in the pod too), or restart the pod",
                    link.name
                ),
            )
        }));
    }
    if findings.is_empty() && !examination.has_report("mtu") {
        findings.push(match (own, carrier) {
            (Some(mtu), Some(carrier)) => {
                Finding::ok("mtu", format!("{mtu} in {} of {}", carrier.mtu, carrier.name))
            }
            (Some(mtu), None) => {
                let seen = format!("the overlay carries {mtu}; its underlay is not known");
                Finding::ok("mtu", seen)
            }
            (None, _) => Finding::skipped("mtu", "no overlay device yet"),
        });
    }
    findings
}
