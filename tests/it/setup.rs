//! `gossamer init`, `join` and `uninstall` on hosts with their own files, with and without systemd.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    process::{Child, Command, Output, Stdio},
};

use gossamer::lab::{Host, Lab};

use crate::{
    common::{TIMEOUT, isolated, program, tool, wait_until},
    docs::{create_host_files, enter, install_systemctl},
};

/// A host with its own files.
struct Own {
    host: Host,
    keeper: Child,
}

impl Own {
    fn new(lab: &mut Lab, number: u16) -> anyhow::Result<Self> {
        let host = lab.host(number, &format!("host{number}"))?;
        let keeper = create_host_files(&host)?;
        Ok(Self { host, keeper })
    }

    fn with_systemd(lab: &mut Lab, number: u16) -> anyhow::Result<Self> {
        let own = Self::new(lab, number)?;
        install_systemctl(&own.host, &own.keeper)?;
        // Only the program was copied to this host.
        own.ok("rm /run/systemd/system/gossamer.service");
        Ok(own)
    }

    fn run(&self, command: &str) -> Output {
        let mut shell = enter(&self.keeper, command);
        shell.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.host.netns.spawn(&mut shell).expect("a shell");
        child.wait_with_output().expect("a shell")
    }

    /// Runs a command that must succeed. Returns what it printed.
    fn ok(&self, command: &str) -> String {
        let output = self.run(command);
        let said = both(&output);
        assert!(output.status.success(), "{}: {command}: {said}", self.host.name);
        said
    }

    /// Runs a command that must fail. Returns what it printed.
    fn refused(&self, command: &str) -> String {
        let output = self.run(command);
        let said = both(&output);
        assert_eq!(output.status.code(), Some(1), "{}: {command}: {said}", self.host.name);
        said
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn both(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    text(&output.stdout) + &text(&output.stderr)
}

fn assert_contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in\n{text}");
    }
}

#[test]
fn init_join_and_uninstall_under_systemd_form_and_leave_a_cluster() {
    isolated(|lab| {
        let (one, two) = (Own::with_systemd(lab, 1)?, Own::with_systemd(lab, 2)?);
        let planned = one.ok("gossamer init --dry-run --network 10.50.0.0/16");
        assert_contains(&planned, &["would write", "network = \"10.50.0.0/16\"", "would run"]);
        one.refused("! test -e /etc/gossamer && exit 1");
        let done = one.ok("gossamer init --network 10.50.0.0/16");
        assert_contains(
            &done,
            &["init = true", "enable --now gossamer.service", "ready", "10.50."],
        );
        one.ok("test $(stat -c %a /etc/gossamer/gossamer.toml) = 640");

        // The same again changes nothing; another value is refused.
        let again = one.ok("gossamer init --network 10.50.0.0/16");
        assert_contains(&again, &["unchanged   /etc/gossamer/gossamer.toml", "ready"]);
        let said = one.refused("gossamer init --network 10.60.0.0/16");
        assert_contains(&said, &["has network = \"10.50.0.0/16\", not \"10.60.0.0/16\""]);

        let token = one.ok("gossamer token");
        let token = token.trim();
        let done = two.ok(&format!("gossamer join {token} --http 127.0.0.1:9473"));
        assert_contains(&done, &["/etc/gossamer/token (mode 0600)", "http = ", "ready", "host2"]);
        two.ok("test $(stat -c %a /etc/gossamer/token) = 600");
        two.ok("gossamer status --wait=30 --members 2");
        let again = two.ok(&format!("gossamer join {token}"));
        assert_contains(&again, &["unchanged   /etc/gossamer/token"]);
        let other = two.ok("gossamer token --new");
        assert_contains(
            &two.refused(&format!("gossamer join {} 10.99.0.10", other.trim())),
            &["the token of another cluster", "gossamer uninstall"],
        );
        assert_contains(&two.refused("gossamer init"), &["lets this host join a cluster"]);

        two.ok("gossamer cni install");
        let listed = two.ok("gossamer uninstall --dry-run");
        let words =
            ["leave ", "gives up 10.50.", "stop ", "/opt/cni/bin/gossamer", "conflist", "token"];
        assert_contains(&listed, &words);
        two.ok("gossamer status");
        let done = two.ok("gossamer uninstall");
        assert_contains(
            &done,
            &["host1 owns the subnets", "stopped ", "removed ", "rm /mnt/gossamer"],
        );
        for gone in [
            "/etc/gossamer",
            "/etc/systemd/system/gossamer.service",
            "/opt/cni/bin/gossamer",
            "/etc/cni/net.d/10-gossamer.conflist",
            "/var/lib/gossamer",
            "/run/gossamer/gossamer.sock",
        ] {
            two.ok(&format!("! test -e {gone} && ! test -L {gone}"));
        }
        two.ok("! ip link show gossamer.1 2> /dev/null");
        assert_contains(&two.ok("gossamer uninstall"), &["has left nothing"]);
        assert_contains(&one.ok("gossamer members -o json"), &["\"left\": true"]);
        one.ok("gossamer uninstall");
        Ok(())
    });
}

#[test]
fn init_without_systemd_says_what_to_run_and_the_agent_finds_its_settings() {
    isolated(|lab| {
        let one = Own::new(lab, 1)?;
        let done = one.ok("gossamer init --prefer-subnet 10.42.9.0 --log info");
        assert_contains(&done, &["no systemd", "gossamer agent\n"]);
        one.host.netns.spawn(&mut enter(&one.keeper, "gossamer agent > log 2>&1 &"))?.wait()?;
        assert_contains(&one.ok("gossamer status --wait=30"), &["10.42.9.0/24"]);
        let listed = one.ok("gossamer uninstall --dry-run");
        assert_contains(&listed, &["leave ", "gossamer.toml"]);
        one.ok("gossamer uninstall");
        one.ok("! test -e /var/lib/gossamer && ! test -e /etc/gossamer");
        Ok(())
    });
}

#[test]
fn uninstall_ends_agents_that_join_or_wait_to_start_and_removes_everything() {
    isolated(|lab| {
        let one = Own::new(lab, 1)?;
        let token = one.ok("gossamer token --new");
        one.ok(&format!("gossamer join {} 10.99.0.77", token.trim()));
        let start = |arguments: &str| {
            let mut shell = enter(&one.keeper, &format!("gossamer agent {arguments} > log 2>&1 &"));
            one.host.netns.spawn(&mut shell).and_then(|mut shell| shell.wait()).expect("a shell");
        };
        let assert_uninstalled = || {
            assert_contains(
                &one.ok("gossamer uninstall --dry-run"),
                &["stop", "the agent at /run/"],
            );
            assert_contains(&one.ok("gossamer uninstall"), &["stopped     the agent at /run/"]);
            for gone in ["/etc/gossamer", "/var/lib/gossamer", "/run/gossamer/gossamer.sock"] {
                one.ok(&format!("! test -e {gone}"));
            }
            assert_contains(&one.ok("gossamer uninstall"), &["has left nothing"]);
        };
        start("");
        // --wait says what it waits for.
        let why = "not ready: no member has admitted it yet (it joins through 10.99.0.77:8473)";
        let gave_up = one.run("gossamer status --wait=2");
        assert_contains(&both(&gave_up), &[&format!("gave up after 2 s: {why}")]);
        assert_eq!(gave_up.status.code(), Some(3));
        assert_uninstalled();

        tool(&one.host.netns, "ip addr flush dev eth0");
        start("--init");
        wait_until("the agent does not wait", TIMEOUT, || {
            both(&one.run("gossamer status")).contains("waiting for the network")
        });
        assert_uninstalled();
        Ok(())
    });
}

#[test]
fn refused_join_or_init_writes_nothing_and_names_the_cause() {
    isolated(|lab| {
        let (one, two) = (Own::new(lab, 1)?, Own::new(lab, 2)?);
        let token = one.ok("gossamer token --new");
        let token = token.trim();
        let assert_refused = |own: &Own, command: &str, words: &[&str]| {
            let said = own.refused(command);
            assert_contains(&said, words);
            assert!(!said.contains("wrote"), "{said}");
            own.ok("! test -e /etc/gossamer/gossamer.toml");
        };
        // A stopped member of another cluster, whose agent had no settings file.
        let run = "gossamer agent --init > log 2>&1 & echo $! > pid";
        one.host.netns.spawn(&mut enter(&one.keeper, run))?.wait()?;
        one.ok("gossamer status --wait=30");
        one.ok("kill $(cat pid); flock /var/lib/gossamer/lock true");
        let words = ["/var/lib/gossamer holds the state of another cluster", "gossamer uninstall"];
        assert_refused(&one, &format!("gossamer join {token} 10.99.0.99"), &words);
        let words = ["10.99.0.0/16 of the overlay", "interface eth0 overlap"];
        assert_refused(&two, "gossamer init --network 10.99.0.0/16", &words);
        let words = ["this host has no interface nosuch0", "eth0"];
        assert_refused(&two, "gossamer init --iface nosuch0", &words);
        assert_refused(&two, &format!("gossamer join {token} h --iface 10.99.7.7"), &["10.99.7.7"]);
        let words = ["listen: this host has no address 10.99.0.88; it has 10.99.0.11"];
        assert_refused(&two, "gossamer init --listen 10.99.0.88", &words);
        Ok(())
    });
}

#[test]
fn join_names_a_host_that_does_not_resolve_at_once() {
    isolated(|lab| {
        let one = Own::new(lab, 1)?;
        let token = one.ok("gossamer token --new");
        let said = one.ok(&format!("gossamer join {} host.invalid", token.trim()));
        assert!(said.contains("the name host.invalid does not resolve ("), "{said}");
        one.host.netns.spawn(&mut enter(&one.keeper, "gossamer agent > log 2>&1 &"))?.wait()?;
        wait_until("the status does not name it", TIMEOUT, || {
            let said = both(&one.run("gossamer status --wait=1"));
            said.contains("the name host.invalid does not resolve (") && !said.contains("firewalls")
        });
        let said = both(&one.run("gossamer doctor"));
        assert!(!said.contains("0 connections to members"), "{said}");
        Ok(())
    });
}

#[test]
fn second_join_corrects_the_address_and_says_whether_to_restart() {
    isolated(|lab| {
        let one = Own::new(lab, 1)?;
        let token = one.ok("gossamer token --new");
        let token = token.trim();
        one.ok(&format!("gossamer join {token} 10.99.0.77"));
        one.host.netns.spawn(&mut enter(&one.keeper, "gossamer agent > log 2>&1 &"))?.wait()?;
        one.run("gossamer status --wait=1");
        let corrected = one.ok(&format!("gossamer join {token} 10.99.0.99"));
        let words = ["join = [\"10.99.0.99\"]", "restart it to apply changed settings"];
        assert_contains(&corrected, &words);
        let text = one.ok("cat /etc/gossamer/gossamer.toml");
        assert!(!text.contains("10.99.0.77"), "{text}");
        let again = one.ok(&format!("gossamer join {token} 10.99.0.99"));
        assert_contains(&again, &["its settings are unchanged"]);
        assert!(!again.contains("restart it"), "{again}");
        // The token as well, because this host is no member yet.
        let other = one.ok("gossamer token --new");
        let corrected = one.ok(&format!("gossamer join {} 10.99.0.99", other.trim()));
        assert_contains(&corrected, &["/etc/gossamer/token (mode 0600)", "restart it to apply"]);
        assert_eq!(one.ok("cat /etc/gossamer/token"), other);
        one.ok("gossamer uninstall");
        Ok(())
    });
}

#[test]
fn destructive_commands_ask_on_a_terminal_and_do_nothing_unless_confirmed() {
    isolated(|lab| {
        let one = Own::new(lab, 1)?;
        one.host.netns.spawn(&mut enter(&one.keeper, "gossamer agent --init &"))?.wait()?;
        one.ok("gossamer status --wait=30");
        let typed = |answer: &str, command: &str| {
            one.run(&format!(
                "echo {answer} | script --quiet --return --command '{command}' /dev/null"
            ))
        };
        for command in ["leave", "reset-identity", "uninstall", "cleanup"] {
            let output = typed("n", &format!("gossamer {command}"));
            assert_contains(
                &both(&output),
                &["gives up 10.42.", "Continue? [y/N]", "nothing was done"],
            );
            assert_eq!(output.status.code(), Some(1), "{command}");
        }
        one.ok("gossamer status");
        // On a terminal, the token is printed as the command to type.
        assert_contains(
            &both(&typed("", "gossamer token")),
            &["gossamer join gsm1.", "does not expire"],
        );
        let output = typed("y", "gossamer leave");
        assert_contains(&both(&output), &["left the cluster"]);
        assert!(output.status.success(), "{}", both(&output));
        wait_until("the agent has not ended", TIMEOUT, || {
            one.run("gossamer cleanup --dry-run").status.success()
        });
        // Without an agent there is nothing to ask.
        let output = both(&typed("n", "gossamer leave"));
        assert!(output.contains("no agent at") && !output.contains("Continue?"), "{output}");
        let said = one.refused("mkdir -p /var/lib/gossamer; gossamer reset-identity");
        assert_contains(&said, &["contains no identity of a cluster member"]);
        Ok(())
    });
}

#[test]
fn init_with_a_root_directory_writes_only_there() {
    let root = tempfile::tempdir().expect("a directory");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(program());
        command.args(arguments).arg("--root").arg(root.path());
        let output = command.output().expect("gossamer runs");
        assert!(output.status.success(), "{}", both(&output));
        both(&output)
    };
    let token = Command::new(program()).args(["token", "--new"]).output().expect("runs").stdout;
    let token = String::from_utf8(token).expect("UTF-8");
    let said = run(&["join", token.trim(), "10.0.0.1", "edge:9000"]);
    assert_contains(&said, &["join = [\"10.0.0.1\", \"edge:9000\"]"]);
    let settings = root.path().join("etc/gossamer/gossamer.toml");
    let text = fs::read_to_string(&settings).expect("written");
    assert_contains(&text, &["token_file = \"/etc/gossamer/token\"", "set_sysctls = true"]);
    let mode = fs::metadata(root.path().join("etc/gossamer/token")).expect("written");
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    assert_contains(&run(&["uninstall", "--dry-run"]), &["etc/gossamer/token"]);
    assert!(settings.exists());
    run(&["uninstall"]);
    assert!(!settings.exists() && !root.path().join("etc/gossamer").exists());
}

#[test]
fn token_out_writes_a_private_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("token");
    let made = Command::new(program()).args(["token", "--new", "--out"]).arg(&path).output();
    let made = made.expect("gossamer runs");
    assert!(made.status.success() && made.stdout.is_empty(), "{}", both(&made));
    let mode = fs::metadata(&path).expect("written").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(fs::read_to_string(&path).expect("text").starts_with("gsm1."));
}

/// What an agent would refuse at its start is refused before settings are written.
#[test]
fn init_refuses_what_the_agent_would_refuse() {
    isolated(|lab| {
        let one = Own::new(lab, 1)?;
        one.ok("mkdir /var/lib/theirs && touch /var/lib/theirs/file");
        for (options, prepare, undo, words) in [
            ("--log verbose", "true", "true", "\"verbose\" is not a valid filter"),
            ("--mtu 9000", "true", "true", "mtu: 9000 does not fit interface"),
            ("--state-dir /var/lib/theirs", "true", "true", "is in use by something else"),
            ("--prefer-subnet 10.42.0.0", "true", "true", "in no subnet that may be leased"),
            (
                "",
                "ip link add flannel.1 type vxlan id 1 dstport 8472",
                "ip link del flannel.1",
                "VNI 1 on UDP port 8472 is in use by device flannel.1",
            ),
        ] {
            one.ok(prepare);
            assert_contains(&one.refused(&format!("gossamer init {options}")), &[words]);
            one.ok("! test -e /etc/gossamer/gossamer.toml");
            // The doctor says the same.
            let said = both(&one.run(&format!("gossamer doctor --init {options}")));
            assert_contains(&said, &[words]);
            assert!(!said.contains("name it: iface"), "{said}");
            one.ok(undo);
        }
        one.ok("gossamer init");
        one.host.netns.spawn(&mut enter(&one.keeper, "gossamer agent > log 2>&1 &"))?.wait()?;
        one.ok("gossamer status --wait=30");
        let blue = "--instance blue2 --network 10.42.64.0/18";
        let said = one.refused(&format!("gossamer init {blue}"));
        assert_contains(&said, &["of the overlay and", "overlap"]);
        let said = both(&one.run(&format!("gossamer doctor {blue}")));
        assert_contains(&said, &["of the overlay and", "overlap"]);
        one.ok("! test -e /etc/gossamer/blue2.toml");
        let done = one.ok("gossamer init --instance blue2 --network 10.60.0.0/18");
        assert_contains(&done, &["gossamer status --instance blue2 --wait"]);
        Ok(())
    });
}
