//! Fights with other programs: which there are, who the other side may be, and how that is said.
//!
//! Each of the threads that repair has its own. What is a fight is decided in `dataplane::fight`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    dataplane::fight::{FightStart, Fights, Kind},
    files,
    model::Time,
};

/// Programs that change interfaces, addresses and routes of others, the likeliest first.
const NETWORK: [&str; 20] = [
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
const FIREWALL: [&str; 12] = [
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
const SYSCTLS: [&str; 9] = [
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
/// The kernel keeps so much of a program's name (`TASK_COMM_LEN` less the zero at the end).
const COMM: usize = 15;
/// More names help no reader.
const NAMED: usize = 3;

/// The fights of one thread.
pub struct Opponents {
    begun: Instant,
    fights: Fights,
    /// Of each fight that is under way.
    sentences: BTreeMap<Kind, String>,
}

impl Opponents {
    pub fn new() -> Self {
        Self { begun: Instant::now(), fights: Fights::default(), sentences: BTreeMap::new() }
    }

    /// Counts a repair of `object`, which is about the interface with index `link`, if about any.
    pub fn note(&mut self, kind: Kind, object: &str, link: Option<u32>) {
        let now = self.now();
        if let Some(begun) = self.fights.note(now, kind) {
            let who = likely(Path::new("/"), kind, link);
            self.sentences.insert(kind, sentence(kind, object, begun, &who));
        }
    }

    /// How long after the last repair the next one of this kind waits.
    pub fn pause(&self, kind: Kind) -> Duration {
        self.fights.delay(kind)
    }

    /// Whether one of this kind is under way.
    pub fn is_under_way(&mut self, kind: Kind) -> bool {
        let now = self.now();
        self.fights.is_under_way(now, kind)
    }

    /// The fights that are under way, as sentences.
    pub fn problems(&mut self) -> Vec<String> {
        let now = self.now();
        self.sentences.retain(|kind, _| self.fights.is_under_way(now, *kind));
        self.sentences.values().cloned().collect()
    }

    fn now(&self) -> Time {
        Time::ZERO + self.begun.elapsed()
    }
}

fn sentence(kind: Kind, object: &str, begun: FightStart, who: &Suspects) -> String {
    let (what, see) = match kind {
        Kind::Entries => ("gossamer's entries in the kernel", "ip monitor all"),
        Kind::Bridge => ("the pods' bridge and its ports", "ip monitor link address"),
        Kind::Firewall => {
            ("gossamer's table of nftables or policy rule", "nft monitor, ip monitor rule")
        }
        Kind::Spoofing => ("a table of nftables about pods' addresses", "nft monitor"),
        Kind::Sysctls => ("sysctls that gossamer sets", "grep -r net /etc/sysctl.d"),
    };
    let FightStart { repairs, within } = begun;
    let seconds = within.as_secs().max(1);
    let who = match who {
        Suspects { managed: true, .. } => "systemd-networkd manages that interface: let it leave \
             gossamer's alone (the package's /usr/lib/systemd/network/05-gossamer.network)"
            .to_owned(),
        Suspects { running, .. } if running.is_empty() => {
            format!("no program that is known for this runs here: see who it is ({see})")
        }
        Suspects { running, .. } => format!(
            "it may be {}, which runs here: make it leave gossamer's interfaces, routes and tables alone \
             (docs/TROUBLESHOOTING.md), or see who it is ({see})",
            running.join(" or ")
        ),
    };
    format!(
        "another program keeps changing {what} ({object}): repaired {repairs} times in {seconds} s, and only \
         every few seconds from now on; {who}"
    )
}

/// Who the other side may be.
#[derive(Debug, Default, PartialEq, Eq)]
struct Suspects {
    /// systemd-networkd says that it manages the interface.
    managed: bool,
    running: Vec<&'static str>,
}

/// Looks at the programs that run in this network namespace, below `root`.
fn likely(root: &Path, kind: Kind, link: Option<u32>) -> Suspects {
    let known = match kind {
        Kind::Entries | Kind::Bridge => &NETWORK[..],
        Kind::Firewall | Kind::Spoofing => &FIREWALL[..],
        Kind::Sysctls => &SYSCTLS[..],
    };
    let about_links = matches!(kind, Kind::Entries | Kind::Bridge);
    let managed = about_links && link.is_some_and(|index| is_managed(root, index));
    let comms = comms(root);
    let runs = |program: &&&str| comms.contains(&program[..program.len().min(COMM)]);
    let running = known.iter().filter(runs).take(NAMED).copied().collect();
    Suspects { managed, running }
}

/// Names of the processes that are in this process's network namespace, as far as that is shown.
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

/// See sd-network(3); "unmanaged" is what it should be.
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
    fn the_other_side_is_named_by_what_runs_and_by_what_networkd_says() {
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
        let entries = likely(&root, Kind::Bridge, Some(8));
        assert_eq!(entries, Suspects { managed: false, running: vec!["systemd-networkd"] });
        assert!(likely(&root, Kind::Bridge, Some(7)).managed);
        assert_eq!(likely(&root, Kind::Firewall, None).running, ["firewalld"]);
        assert_eq!(likely(&root.join("nothing"), Kind::Bridge, Some(7)), Suspects::default());
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn a_fight_is_said_with_what_how_often_and_who() {
        let begun = FightStart { repairs: 10, within: Duration::from_secs(12) };
        let say = |managed, running: &[&'static str]| {
            let who = Suspects { managed, running: running.to_vec() };
            sentence(Kind::Bridge, "port gsm1", begun, &who)
        };
        let text = say(false, &["NetworkManager"]);
        for part in ["bridge", "port gsm1", "10 times in 12 s", "NetworkManager"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(say(true, &[]).contains("systemd-networkd manages"));
        assert!(say(false, &[]).contains("ip monitor"));
    }
}
