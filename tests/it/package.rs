//! The Debian package, installed with its own scripts into a temporary copy of this machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::{isolated, skipped};

/// Returns the package that `packaging/build-deb` has built.
fn package() -> Option<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/debian");
    let entries = fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|end| end == "deb")).max()
}

/// Runs a script that must succeed, and returns its output.
fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().expect("sh runs");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (status, out, error) = (output.status, text(output.stdout), text(output.stderr));
    assert!(status.success(), "{script}: {status}\n{out}\n{error}");
    out
}

/// Names of gossamer's interfaces.
const GOSSAMER_INTERFACES: [&str; 9] = [
    "gossamer.1",
    "gossamer.999999",
    "gossam.16777215",
    "gsm0",
    "gsm16777215",
    "gsm0123456789",
    "gsp.1",
    "gsp.1b",
    "gsp.16777215",
];

/// Matches a pattern in which `*` stands for any text; these files use no other wildcards.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        Some((before, "")) => name.starts_with(before),
        Some(_) => panic!("{pattern}"),
        None => pattern == name,
    }
}

#[test]
fn network_manager_settings_exclude_all_gossamer_interfaces() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).expect(path);
    let installed = read("packaging/debian/install");
    let networkd = read("packaging/network/05-gossamer.network");
    let manager = read("packaging/network/10-gossamer.conf");
    let value = |text: &str, key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.expect(key).to_owned()
    };
    assert_eq!(value(&networkd, "Unmanaged="), "yes");
    let names = value(&networkd, "Name=");
    let devices = value(&manager, "unmanaged-devices+=");
    for name in GOSSAMER_INTERFACES {
        assert!(names.split(' ').any(|pattern| matches(pattern, name)), "{name}");
        let mut patterns = devices.split(';').filter_map(|d| d.strip_prefix("interface-name:"));
        assert!(patterns.any(|pattern| matches(pattern, name)), "{name}");
    }
    for other in ["eth0", "wlan0", "docker0", "cni0"] {
        assert!(!names.split(' ').any(|pattern| matches(pattern, other)), "{other}");
    }
    for directory in ["usr/lib/systemd/network", "usr/lib/NetworkManager/conf.d"] {
        assert!(installed.lines().any(|line| line.ends_with(directory)), "{directory}");
    }
}

#[test]
fn package_is_installed_upgraded_and_removed_without_leftovers() {
    let test = "package_is_installed_upgraded_and_removed_without_leftovers";
    let Some(package) = package() else {
        return skipped(test, "there is no package: run packaging/build-deb");
    };
    isolated(|_| {
        // An overlay of this machine's files: changes of the package stay in memory.
        shell(
            "mkdir -p /run/copy; mount -t tmpfs tmpfs /run/copy; cd /run/copy; mkdir up work root; \
             mount -t overlay overlay -o lowerdir=/,upperdir=up,workdir=work root; \
             mount --rbind /proc root/proc; mount --rbind /dev root/dev",
        );
        let inside = |command: &str| shell(&format!("chroot /run/copy/root {command}"));
        fs::copy(&package, "/run/copy/root/root/gossamer.deb")?;
        inside("dpkg -i /root/gossamer.deb");
        assert!(inside("/usr/bin/gossamer version").contains("no agent runs"));
        for file in [
            "/lib/systemd/system/gossamer.service",
            "/lib/systemd/system/gossamer-docker.socket",
            "/usr/share/man/man1/gossamer-doctor.1.gz",
            "/usr/share/bash-completion/completions/gossamer",
            "/usr/share/doc/gossamer/examples/grafana.json",
            "/usr/share/doc/gossamer/decisions/0001-fdb-before-neighbor.md",
            "/usr/libexec/netavark/gossamer",
            "/usr/lib/systemd/network/05-gossamer.network",
            "/usr/lib/NetworkManager/conf.d/10-gossamer.conf",
            "/usr/share/gossamer/kubernetes/kubernetes.yaml",
            "/usr/share/gossamer/kubernetes/kustomization.yaml",
            "/usr/share/gossamer/kubernetes/chart/Chart.yaml",
            "/usr/share/gossamer/kubernetes/chart/values.schema.json",
            "/usr/share/gossamer/kubernetes/chart/templates/_daemonset.tpl",
        ] {
            inside(&format!("test -s {file}"));
        }
        // The network driver of Podman 5, where netavark looks for it.
        let link = inside("readlink -f /usr/libexec/netavark/gossamer");
        assert_eq!(link.trim(), "/usr/bin/gossamer");
        assert!(inside("/usr/libexec/netavark/gossamer info").contains("api_version"));
        // The agent reports the missing setting, and is not enabled before its cluster is configured.
        let agent =
            "sh -c '/usr/bin/gossamer agent --config /etc/gossamer/gossamer.toml 2>&1 || true'";
        let said = inside(agent);
        assert!(said.contains("--init") && said.contains("--join"), "{said}");
        assert!(inside("sh -c 'systemctl is-enabled gossamer || true'").contains("disabled"));
        // Settings survive an upgrade and a removal.
        inside("sh -c 'echo mtu = 1400 >> /etc/gossamer/gossamer.toml'");
        inside("dpkg -i /root/gossamer.deb");
        inside("dpkg -r gossamer");
        inside("grep -q 'mtu = 1400' /etc/gossamer/gossamer.toml");
        inside("test ! -e /usr/bin/gossamer -a ! -L /usr/libexec/netavark/gossamer");
        inside("dpkg -P gossamer");
        inside("test ! -e /etc/gossamer");
        Ok(())
    });
}
