//! Conflicts with other programs that keep undoing repairs: how often, which program it may be, and the
//! sentence for operators.
//!
//! Each thread that repairs has its own instance. `dataplane::repair_conflict` decides what counts as a
//! conflict.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    dataplane::repair_conflict::{ConflictStart, Conflicts, Kind},
    files,
    model::{Problem, ProblemCode, Time},
};

/// Programs that change interfaces, addresses and routes of other programs, the most likely first.
const NETWORK_PROGRAMS: [&str; 20] = [
    "systemd-networkd",
    "NetworkManager",
    "connmand",
    "dhcpcd",
    "wickedd",
    "ifplugd",
    "flanneld",
    "calico-node",
    "cilium-agent",
    "kube-router",
    "bird",
    "zebra",
    "keepalived",
    "tailscaled",
    "ovs-vswitchd",
    "dockerd",
    "puppet",
    "salt-minion",
    "chef-client",
    "monit",
];
/// Programs that write or flush tables of nftables.
const FIREWALL_PROGRAMS: [&str; 12] = [
    "firewalld",
    "ufw",
    "shorewall",
    "fail2ban-server",
    "crowdsec",
    "kube-proxy",
    "calico-node",
    "cilium-agent",
    "dockerd",
    "puppet",
    "salt-minion",
    "chef-client",
];
/// Programs that write sysctls.
const SYSCTL_PROGRAMS: [&str; 9] = [
    "tuned",
    "systemd-networkd",
    "NetworkManager",
    "connmand",
    "kube-proxy",
    "kubelet",
    "puppet",
    "salt-minion",
    "chef-client",
];
/// Bytes of a program's name that the kernel keeps (`TASK_COMM_LEN` less the terminating zero).
const COMM_LEN: usize = 15;
/// Limit of programs named.
const MAX_NAMED: usize = 3;

/// The conflicts of one thread.
pub struct RepairConflicts {
    begun: Instant,
    conflicts: Conflicts,
    /// One problem for each present conflict.
    problems: BTreeMap<Kind, Problem>,
}

impl RepairConflicts {
    /// Returns an instance without conflicts.
    pub fn new() -> Self {
        Self { begun: Instant::now(), conflicts: Conflicts::default(), problems: BTreeMap::new() }
    }

    /// Counts a repair of `object`, which concerns the interface with index `link`, if any.
    pub fn note(&mut self, kind: Kind, object: &str, link: Option<u32>) {
        let now = self.now();
        if let Some(begun) = self.conflicts.note(now, kind) {
            let suspects = find_suspects(Path::new("/"), kind, link);
            self.problems.insert(kind, problem(kind, object, begun, &suspects));
        }
    }

    /// Returns how long the next repair of this kind has to wait after the last one.
    pub fn pause(&self, kind: Kind) -> Duration {
        self.conflicts.delay(kind)
    }

    /// Whether there is a conflict of this kind now.
    pub fn is_under_way(&mut self, kind: Kind) -> bool {
        let now = self.now();
        self.conflicts.is_under_way(now, kind)
    }

    /// Returns the problems of the present conflicts.
    pub fn problems(&mut self) -> Vec<Problem> {
        let now = self.now();
        self.problems.retain(|kind, _| self.conflicts.is_under_way(now, *kind));
        self.problems.values().cloned().collect()
    }

    fn now(&self) -> Time {
        Time::ZERO + self.begun.elapsed()
    }
}

fn problem(kind: Kind, object: &str, begun: ConflictStart, suspects: &Suspects) -> Problem {
    let (what, see) = match kind {
        Kind::Entries => ("gossamer's entries in the kernel", "ip monitor all"),
        Kind::Bridge => ("the pods' bridge and its ports", "ip monitor link address"),
        Kind::Firewall => {
            ("gossamer's table of nftables or policy rule", "nft monitor, ip monitor rule")
        }
        Kind::Spoofing => ("a table of nftables about pods' addresses", "nft monitor"),
        Kind::Sysctls => ("sysctls that gossamer sets", "grep -r net /etc/sysctl.d"),
    };
    let ConflictStart { repairs, within } = begun;
    let seconds = within.as_secs().max(1);
    let cause = match suspects {
        Suspects { managed: true, .. } => "systemd-networkd manages that interface: let it leave \
             gossamer's alone (the package's /usr/lib/systemd/network/05-gossamer.network)"
            .to_owned(),
        Suspects { running, .. } if running.is_empty() => {
            format!("no program known for this runs here: find the program ({see})")
        }
        Suspects { running, .. } => format!(
            "it may be {}, which runs here: make it ignore gossamer's interfaces, routes and tables \
             (docs/TROUBLESHOOTING.md), or find the program ({see})",
            running.join(" or ")
        ),
    };
    let what = format!(
        "another program keeps changing {what} ({object}): repaired {repairs} times in {seconds} s, and only \
         every few seconds from now on"
    );
    Problem::new(ProblemCode::RepairConflict, object, what, cause)
}

/// The programs that may cause the conflict.
#[derive(Debug, Default, PartialEq, Eq)]
struct Suspects {
    /// Whether systemd-networkd reports that it manages the interface.
    managed: bool,
    /// Known programs that run here.
    running: Vec<&'static str>,
}

/// Finds known programs that run in this network namespace; `root` is the root of the file system.
fn find_suspects(root: &Path, kind: Kind, link: Option<u32>) -> Suspects {
    let known = match kind {
        Kind::Entries | Kind::Bridge => &NETWORK_PROGRAMS[..],
        Kind::Firewall | Kind::Spoofing => &FIREWALL_PROGRAMS[..],
        Kind::Sysctls => &SYSCTL_PROGRAMS[..],
    };
    let concerns_links = matches!(kind, Kind::Entries | Kind::Bridge);
    let managed = concerns_links && link.is_some_and(|index| is_managed(root, index));
    let comms = comms(root);
    let runs = |program: &&&str| comms.contains(&program[..program.len().min(COMM_LEN)]);
    let running = known.iter().filter(runs).take(MAX_NAMED).copied().collect();
    Suspects { managed, running }
}

/// Returns the names of the processes in this network namespace, as far as /proc shows them.
fn comms(root: &Path) -> BTreeSet<String> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/net")).ok();
    let ours = namespace(&root.join("proc/thread-self"));
    let processes = fs::read_dir(root.join("proc")).into_iter().flatten().flatten();
    processes
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        })
        .filter(|path| namespace(path).is_none_or(|theirs| ours.as_ref() == Some(&theirs)))
        .filter_map(|path| Some(fs::read_to_string(path.join("comm")).ok()?.trim().to_owned()))
        .collect()
}

/// Whether systemd-networkd manages the interface, by its `ADMIN_STATE` (sd-network(3)).
fn is_managed(root: &Path, index: u32) -> bool {
    let path = root.join(format!("run/systemd/netif/links/{index}"));
    let state = files::read_text(&path, files::SMALL).unwrap_or_default();
    let state = state.lines().find_map(|line| line.strip_prefix("ADMIN_STATE="));
    state.is_some_and(|state| state != "unmanaged" && state != "pending")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_suspects_returns_running_programs_and_networkd_state() {
        let root = std::env::temp_dir().join(format!("gossamer-suspects-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("a directory")).expect("made");
            fs::write(path, text).expect("written");
        };
        put("proc/17/comm", "systemd-network\n");
        put("proc/18/comm", "firewalld\n");
        put("proc/19/comm", "sh\n");
        put("proc/self/comm", "keepalived\n");
        put("run/systemd/netif/links/7", "# private\nADMIN_STATE=configured\n");
        put("run/systemd/netif/links/8", "ADMIN_STATE=unmanaged\n");
        let entries = find_suspects(&root, Kind::Bridge, Some(8));
        assert_eq!(entries, Suspects { managed: false, running: vec!["systemd-networkd"] });
        assert!(find_suspects(&root, Kind::Bridge, Some(7)).managed);
        assert_eq!(find_suspects(&root, Kind::Firewall, None).running, ["firewalld"]);
        assert_eq!(
            find_suspects(&root.join("nothing"), Kind::Bridge, Some(7)),
            Suspects::default()
        );
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn problem_of_a_conflict_names_object_rate_and_program() {
        let begun = ConflictStart { repairs: 10, within: Duration::from_secs(12) };
        let text_for = |managed, running: &[&'static str]| {
            let suspects = Suspects { managed, running: running.to_vec() };
            problem(Kind::Bridge, "port gsm1", begun, &suspects)
        };
        let text = text_for(false, &["NetworkManager"]);
        for part in ["bridge", "port gsm1", "10 times in 12 s", "NetworkManager"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text_for(true, &[]).contains("systemd-networkd manages"));
        assert!(text_for(false, &[]).contains("ip monitor"));
    }
}
