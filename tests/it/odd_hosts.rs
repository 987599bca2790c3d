//! Hosts that work in an unusual way, and filters whose effect looks like another fault: the agent's words
//! and verdict must fit them.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
};

use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType},
};
use gossamer::lab::{Agent, Host};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::Signal,
};
use serde_json::Value;

use crate::{
    common::{
        Cluster, TIMEOUT, has_notice, has_problem, isolated, program, run, skipped, status_where,
        texts, tool, wait_until,
    },
    forwarding,
    underlay::{connect_to_switch, run_in_lab},
};

/// Returns the answer of the doctor, which runs on the host.
fn doctor(host: &Host, agent: &Agent) -> Value {
    let (program, socket) = (program().display(), agent.socket().display());
    let state_dir = host.dir.join("state");
    let state_dir = state_dir.display();
    let command = format!("{program} doctor -o json --socket {socket} --state-dir {state_dir}");
    serde_json::from_slice(&run(&host.netns, &command).stdout).expect("JSON")
}

/// Checks that status and doctor have the same verdict, and returns it.
fn one_verdict(host: &Host, agent: &mut Agent) -> String {
    let said = doctor(host, agent);
    let status = agent.ask("/v1/status", TIMEOUT).expect("a status");
    assert_eq!(said["verdict"], status["verdict"], "{said:#}");
    said["verdict"]["text"].as_str().expect("a text").to_owned()
}

#[test]
fn interface_without_carrier_is_a_notice_while_peers_answer_by_another() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        cluster.restart(1, &["--iface", "eth0"])?;
        let pods = cluster.pods()?;
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        connect_to_switch(host, "second", "eth1", "");
        tool(&host.netns, "ip route add 10.99.0.10/32 dev eth1 src 10.99.0.11");
        let ping = format!("ping -c 1 -W 5 {}", pods[0].ip);
        tool(&pods[1].netns, &ping);
        run_in_lab("ip link set port2 down");
        let words = "peers answer by another way than the interface that was chosen for tunnels: iface: \
                     eth0 has no carrier";
        status_where(agent, |status| {
            assert_ne!(status["verdict"]["state"], "not-ready", "{status:#}");
            texts(&status["notices"]).contains(words)
        });
        tool(&pods[1].netns, &ping);
        let status = status_where(agent, |status| status["problems"] == serde_json::json!([]));
        assert_eq!(status["verdict"]["state"], "healthy");
        assert_eq!(one_verdict(host, agent), "healthy");
        // Once the other way is dead, the missing carrier is the cause.
        run_in_lab("ip link set second down");
        let status = status_where(agent, |status| status["verdict"]["state"] == "not-ready");
        let said = texts(&status["problems"]);
        assert!(said.contains("no underlay: iface: eth0 has no carrier"), "{said}");
        assert!(!has_notice(agent, words));
        run_in_lab("ip link set port2 up");
        run_in_lab("ip link set second up");
        wait_until("it is still reported", TIMEOUT, || {
            !has_problem(agent, "carrier") && !has_notice(agent, "no carrier")
        });
        Ok(())
    });
}

#[test]
fn mtu_lowered_at_run_time_has_the_same_verdict_everywhere() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        forwarding::with_pods(&mut cluster, &mut spaces)?;
        // The overlay follows; a pod that runs learns the size from its host.
        tool(&cluster.hosts[1].netns, "ip link set eth0 mtu 1400");
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        status_where(agent, |status| status["kernel"]["mtu"] == 1350);
        wait_until("the device does not follow", TIMEOUT, || {
            tool(&host.netns, "ip link show gossamer.1").contains("mtu 1350")
        });
        assert_eq!(one_verdict(host, agent), "healthy");
        let said = doctor(host, agent).to_string();
        assert!(said.contains("has MTU 1450, the overlay 1350"), "{said}");

        // The setting does not fit any more.
        tool(&host.netns, "ip link set eth0 mtu 1500");
        cluster.restart(1, &["--mtu", "1450"])?;
        tool(&cluster.hosts[1].netns, "ip link set eth0 mtu 1400");
        let (host, agent) = (&cluster.hosts[1], &mut cluster.agents[1]);
        let words = "mtu: 1450 does not fit interface eth0 with MTU 1400: use at most 1350";
        let status = status_where(agent, |status| {
            assert_ne!(status["verdict"]["state"], "not-ready", "{status:#}");
            texts(&status["problems"]).contains(words)
        });
        assert_eq!(status["problems"][0]["code"], "underlay-mtu");
        assert_eq!(one_verdict(host, agent), "degraded: 1 problem");
        tool(&host.netns, "ip link set eth0 mtu 1500");
        wait_until("it is still reported", TIMEOUT, || !has_problem(agent, "mtu: "));
        assert_eq!(one_verdict(host, agent), "healthy");
        Ok(())
    });
}

/// A cgroup like that of a systemd unit. Its programs drop packets of its processes as `IPAddressDeny=` does.
struct Unit {
    /// Where cgroups are mounted.
    root: PathBuf,
    dir: PathBuf,
    filter: Option<Ebpf>,
}

impl Unit {
    fn new(host: &Host) -> io::Result<Self> {
        let root = host.dir.join("cgroup");
        fs::create_dir(&root)?;
        mount(Some("none"), &root, Some("cgroup2"), MsFlags::empty(), None::<&str>)?;
        let dir = root.join(format!("gossamer-test-{}", std::process::id()));
        fs::create_dir(&dir)?;
        Ok(Self { root, dir, filter: None })
    }

    /// Starts the agent of a host in this cgroup: the programs apply to sockets that are opened in it.
    fn start(&self, host: &Host) -> io::Result<Agent> {
        let script = host.dir.join("unit");
        let (processes, program) = (self.dir.join("cgroup.procs"), program());
        let lines = format!(
            "#!/bin/sh\necho $$ > {}\nexec {} \"$@\"\n",
            processes.display(),
            program.display()
        );
        fs::write(&script, lines)?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Agent::start(&script, host, &[])
    }

    /// Drops packets from and to addresses of the overlay.
    fn deny_overlay(&mut self) -> anyhow::Result<()> {
        let mut filter = Ebpf::load(&object_file(&DENY_OVERLAY))?;
        let program: &mut CgroupSkb = filter.program_mut("deny").expect("it").try_into()?;
        program.load()?;
        let group = File::open(&self.dir)?;
        for side in [CgroupSkbAttachType::Ingress, CgroupSkbAttachType::Egress] {
            program.attach(&group, side, CgroupAttachMode::Single)?;
        }
        self.filter = Some(filter);
        Ok(())
    }
}

/// The kernel removes no cgroup with processes.
impl Drop for Unit {
    fn drop(&mut self) {
        let processes = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        for process in processes.lines() {
            let _ = fs::write(self.root.join("cgroup.procs"), process);
        }
        let _ = fs::remove_dir(&self.dir);
    }
}

/// The eBPF program: returns 0 if the first two bytes of the source or the destination are 10.42, else 1.
const DENY_OVERLAY: [[u8; 8]; 13] = [
    [0x61, 0x12, 76, 0, 0, 0, 0, 0],      // r2 = skb->data
    [0x61, 0x13, 80, 0, 0, 0, 0, 0],      // r3 = skb->data_end
    [0xbf, 0x24, 0, 0, 0, 0, 0, 0],       // r4 = r2
    [0x07, 0x04, 0, 0, 20, 0, 0, 0],      // r4 += 20
    [0x2d, 0x34, 4, 0, 0, 0, 0, 0],       // if r4 > r3, pass
    [0x69, 0x25, 12, 0, 0, 0, 0, 0],      // r5 = the source
    [0x15, 0x05, 4, 0, 0x0a, 0x2a, 0, 0], // if it is 10.42, drop
    [0x69, 0x25, 16, 0, 0, 0, 0, 0],      // r5 = the destination
    [0x15, 0x05, 2, 0, 0x0a, 0x2a, 0, 0], // if it is 10.42, drop
    [0xb7, 0, 0, 0, 1, 0, 0, 0],          // pass: r0 = 1
    [0x95, 0, 0, 0, 0, 0, 0, 0],          // exit
    [0xb7, 0, 0, 0, 0, 0, 0, 0],          // drop: r0 = 0
    [0x95, 0, 0, 0, 0, 0, 0, 0],          // exit
];

/// Returns an ELF file with the program "deny".
fn object_file(program: &[[u8; 8]]) -> Vec<u8> {
    const HEADER_LEN: u16 = 64;
    let code = program.concat();
    // With zeros at the end, so that all parts are aligned.
    let names = b"\0deny\0cgroup/skb\0symtab\0strtab\0\0\0\0\0\0\0\0\0\0";
    let position = |of: &str| names.windows(of.len()).position(|part| part == of.as_bytes());
    let name = |of: &str| u32::try_from(position(of).expect("a name")).expect("short names");
    // An empty symbol, and a global function in section 1.
    let mut symbols = vec![0; 24];
    symbols.extend(name("deny").to_le_bytes());
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend([0, code.len() as u64].iter().flat_map(|number| number.to_le_bytes()));
    // Type, flags, link and info, and the size of an entry.
    let kinds = [
        ("cgroup/skb", 1_u32, 6_u64, [0_u32, 0], 0_u64),
        ("symtab", 2, 0, [3, 1], 24),
        ("strtab", 3, 0, [0, 0], 0),
    ];
    let parts = [&code[..], &symbols, names];
    let mut offset = u64::from(HEADER_LEN);
    let mut sections = vec![0; 64];
    for ((section, kind, flags, links, entry), part) in kinds.into_iter().zip(parts) {
        sections.extend([name(section), kind].iter().flat_map(|number| number.to_le_bytes()));
        let numbers = [flags, 0, offset, part.len() as u64];
        sections.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        sections.extend(links.iter().flat_map(|number| number.to_le_bytes()));
        sections.extend([8, entry].iter().flat_map(|number| number.to_le_bytes()));
        offset += part.len() as u64;
    }
    // 64 bits, little endian, relocatable, for eBPF.
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0\xf7\0\x01\0\0\0".to_vec();
    file.extend([0, 0, offset].iter().flat_map(|number| number.to_le_bytes()));
    file.extend([0; 4]);
    let lengths = [HEADER_LEN, 0, 0, 64, 4, 3];
    file.extend(lengths.iter().flat_map(|number| number.to_le_bytes()));
    [file, parts.concat(), sections].concat()
}

#[test]
fn filter_of_the_units_cgroup_is_the_named_cause_of_lost_probes() {
    const TEST: &str = "filter_of_the_units_cgroup_is_the_named_cause_of_lost_probes";
    isolated(|lab| {
        let mut unit;
        let mut cluster = Cluster::start(lab, 2)?;
        let mut spaces = Vec::new();
        forwarding::with_pods(&mut cluster, &mut spaces)?;
        unit = match Unit::new(&cluster.hosts[1]) {
            Ok(unit) => unit,
            Err(error) => {
                skipped(TEST, &format!("no cgroup: {error}"));
                return Ok(());
            }
        };
        cluster.agents[1].end(Signal::SIGTERM)?;
        cluster.agents[1] = unit.start(&cluster.hosts[1])?;
        cluster.converge()?;
        status_where(&mut cluster.agents[1], |status| status["paths"][0]["state"] == "ok");
        if let Err(error) = unit.deny_overlay() {
            skipped(TEST, &format!("eBPF programs cannot be loaded: {error}"));
            return Ok(());
        }
        let agent = &mut cluster.agents[1];
        let words = "packets of the agent through the tunnel do not leave this host, although those of pods \
                     may: the kernel refuses packets that the agent sends (EPERM): IPAddressDeny= of its \
                     unit (systemctl show gossamer -p IPAddressDeny), or another eBPF program of its cgroup \
                     (bpftool cgroup tree), forbids it";
        status_where(agent, |status| {
            let said = texts(&status["problems"]);
            assert!(said.is_empty() || said.starts_with(words), "{said}");
            // Inside the agent's own pod no rule of the host applies.
            said == words
        });
        Ok(())
    });
}
