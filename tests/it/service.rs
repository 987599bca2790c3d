//! What an agent reports to systemd, read from the test's own socket; and systemd's checks of the unit.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixDatagram},
    process::Command,
    time::Duration,
};

use gossamer::lab::Agent;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::common::{
    Cluster, TIMEOUT, isolated, new_token, program, resume, skipped, suspend, wait_until,
};

const UNIT: &str = "config/gossamer.service";

#[test]
fn systemd_is_notified_of_readiness_status_and_watchdog() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let path = host.dir.join("notify");
        let systemd = UnixDatagram::bind(&path)?;
        systemd.set_read_timeout(Some(TIMEOUT))?;
        let variables =
            [("NOTIFY_SOCKET", path.display().to_string()), ("WATCHDOG_USEC", "400000".to_owned())];
        let mut agent = Agent::start_with(program(), &host, &["--init"], &variables)?;
        let receive = || -> anyhow::Result<Vec<String>> {
            let mut buffer = [0; 4096];
            let length = systemd.recv(&mut buffer)?;
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            Ok(text.lines().map(str::to_owned).collect())
        };
        let mut received: BTreeSet<String> = receive()?.into_iter().collect();
        assert!(received.contains("READY=1"), "{received:?}");
        let mut beats = 0;
        while beats < 3 || !received.iter().any(|line| line.contains("1 of 1 members alive")) {
            let lines = receive()?;
            assert!(!lines.contains(&"READY=1".to_owned()), "once is enough");
            beats += usize::from(lines.contains(&"WATCHDOG=1".to_owned()));
            received.extend(lines);
        }
        // A hanging event loop sends no watchdog message.
        suspend(&agent)?;
        systemd.set_read_timeout(Some(Duration::from_secs(1)))?;
        while receive().is_ok() {}
        resume(&agent)?;
        systemd.set_read_timeout(Some(TIMEOUT))?;
        assert!(receive()?.contains(&"WATCHDOG=1".to_owned()));
        agent.end(Signal::SIGTERM)?;
        while !receive()?.contains(&"STOPPING=1".to_owned()) {}
        Ok(())
    });
}

#[test]
fn agent_answers_and_ends_while_systemd_does_not_read() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let path = host.dir.join("notify");
        let systemd = UnixDatagram::bind(&path)?;
        let filler = UnixDatagram::unbound()?;
        filler.set_nonblocking(true)?;
        while filler.send_to(b"STATUS=full\n", &path).is_ok() {}
        let variables = [("NOTIFY_SOCKET", path.display().to_string())];
        let mut agent = Agent::start_with(program(), &host, &["--init"], &variables)?;
        agent.wait_converged(1, TIMEOUT)?;
        agent.end(Signal::SIGTERM)?;
        drop(systemd);
        Ok(())
    });
}

#[test]
fn sighup_reloads_log_level_seeds_and_token() {
    isolated(|lab| {
        let mut cluster = Cluster::start(lab, 1)?;
        let host = lab.host(2, "n2")?;
        let settings = host.dir.join("gossamer.toml");
        let write = |text: &str| -> anyhow::Result<()> {
            fs::write(&settings, text)?;
            fs::set_permissions(&settings, fs::Permissions::from_mode(0o600))?;
            Ok(())
        };
        let token = new_token()?;
        // An unreachable seed, and the secret of another cluster.
        write(&format!("join = [\"10.99.0.99\"]\ntoken = \"{token}\"\n"))?;
        let config = settings.display().to_string();
        let mut agent = Agent::start(program(), &host, &["--config", &config])?;
        agent.ask("/v1/status", TIMEOUT)?;
        assert!(!agent.log().contains("DEBUG"));
        let hangup = |agent: &Agent| kill(Pid::from_raw(agent.pid().cast_signed()), Signal::SIGHUP);
        write("mtu = \"many\"\n")?;
        hangup(&agent)?;
        wait_until("not refused", TIMEOUT, || agent.log().contains("nothing changed"));

        let right = &cluster.token;
        write(&format!("join = [\"10.99.0.10\"]\ntoken = \"{right}\"\nlog = \"debug\"\n"))?;
        hangup(&agent)?;
        let status = agent.wait_converged(2, TIMEOUT)?;
        assert_eq!(status["name"], "n2");
        wait_until("no debug lines", TIMEOUT, || agent.log().contains("DEBUG"));
        cluster.agents[0].wait_converged(2, TIMEOUT)?;
        Ok(())
    });
}

#[test]
fn journal_entries_have_priority_and_fields() {
    isolated(|lab| {
        let host = lab.host(1, "n1")?;
        let format = ["--init", "--log-format", "journal"];
        let mut blind = Agent::start(program(), &host, &format)?;
        wait_until("it starts", TIMEOUT, || {
            blind.log().contains("log_format: cannot reach systemd's journal")
        });
        blind.end(Signal::SIGTERM)?;
        fs::create_dir_all("/run/systemd/journal")?;
        let journal = UnixDatagram::bind("/run/systemd/journal/socket")?;
        journal.set_read_timeout(Some(TIMEOUT))?;
        let _agent = Agent::start(program(), &host, &format)?;
        let mut buffer = [0; 8192];
        loop {
            let length = journal.recv(&mut buffer)?;
            let entry = String::from_utf8_lossy(&buffer[..length]);
            if entry.contains("starting") {
                // Each field is its name, its length in eight bytes, and its value.
                assert!(entry.contains("PRIORITY\n\u{1}\0\0\0\0\0\0\x006\n"), "{entry:?}");
                assert!(entry.contains("F_NODE\n") && entry.contains("F_UNDERLAY\n"), "{entry}");
                return Ok(());
            }
        }
    });
}

#[test]
fn systemd_unit_is_valid_and_has_few_rights() {
    let security =
        Command::new("systemd-analyze").args(["security", "--offline=yes", UNIT]).output();
    let Ok(security) = security else {
        return skipped(
            "systemd_unit_is_valid_and_has_few_rights",
            "systemd-analyze is not installed",
        );
    };
    let said = String::from_utf8_lossy(&security.stdout);
    assert!(said.contains(": 3.") && said.contains(" OK "), "{said}");
    let verified = Command::new("systemd-analyze").args(["verify", UNIT]).output();
    let said = String::from_utf8_lossy(&verified.expect("it runs").stderr).into_owned();
    // The program is not installed on the test machine, and other units do not matter.
    let ours = said.lines().filter(|line| line.contains("gossamer.service"));
    let others = ours.filter(|line| !line.contains("/usr/bin/gossamer is not executable"));
    assert_eq!(others.collect::<Vec<_>>(), Vec::<&str>::new());
}
