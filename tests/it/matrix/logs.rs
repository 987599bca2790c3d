//! Logs whose reader does not read.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    os::unix::{fs::OpenOptionsExt as _, net::UnixDatagram},
    path::Path,
    time::Instant,
};

use gossamer::lab::{Agent, Lab};
use nix::{
    fcntl::OFlag,
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};

use super::{STOP_TIMEOUT, Scene};
use crate::common::{TIMEOUT, has_notice, isolated, program, wait_until};

const JOURNAL: &str = "/run/systemd/journal/socket";
const NOTICE: &str = "the log's reader does not read";

/// The other end of an agent's log.
enum Reader {
    /// Both ends of the pipe that is the agent's standard error.
    Pipe(File),
    /// The socket of systemd's journal.
    Journal(UnixDatagram),
}

impl Reader {
    /// Makes a host's log a pipe.
    fn pipe(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("log");
        mkfifo(&path, Mode::S_IRWXU)?;
        let flags = OFlag::O_NONBLOCK.bits();
        Ok(Self::Pipe(File::options().read(true).write(true).custom_flags(flags).open(path)?))
    }

    fn journal() -> anyhow::Result<Self> {
        fs::create_dir_all(Path::new(JOURNAL).parent().expect("a directory"))?;
        let socket = UnixDatagram::bind(JOURNAL)?;
        socket.set_nonblocking(true)?;
        Ok(Self::Journal(socket))
    }

    /// Fills the sink, so that further lines wait for the reader.
    fn fill(&mut self) -> anyhow::Result<()> {
        let filler = UnixDatagram::unbound()?;
        filler.set_nonblocking(true)?;
        loop {
            let written = match self {
                Self::Pipe(file) => file.write(b"\n"),
                Self::Journal(_) => filler.send_to(b"MESSAGE=\n", JOURNAL),
            };
            match written {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads what is there.
    fn read(&mut self) -> String {
        let (mut text, mut buffer) = (String::new(), [0; 65_536]);
        loop {
            let read = match self {
                Self::Pipe(file) => file.read(&mut buffer),
                Self::Journal(socket) => socket.recv(&mut buffer),
            };
            match read {
                Ok(length) => text.push_str(&String::from_utf8_lossy(&buffer[..length])),
                Err(_) => return text,
            }
        }
    }
}

/// Runs the phases with a reader. `arguments` select the format of the log.
fn delays_nothing(
    lab: &mut Lab,
    open: impl FnOnce(&Path) -> anyhow::Result<Reader>,
    arguments: &[&str],
) -> anyhow::Result<()> {
    let arguments = [&["--init"], arguments].concat();
    let mut scene = Scene::new(lab, |_| Ok(()))?;
    scene.ends()?;
    let dir = scene.cluster.hosts[0].dir.clone();
    fs::remove_file(dir.join("log"))?;
    let mut reader = open(&dir)?;
    let starts = |scene: &mut Scene| -> anyhow::Result<()> {
        let host = &scene.cluster.hosts[0];
        scene.cluster.agents[0] = Agent::start(program(), host, &arguments)?;
        Ok(())
    };
    let warned = |scene: &mut Scene| has_notice(&mut scene.cluster.agents[0], NOTICE);

    // It hangs when the agent starts, and once more while it runs.
    reader.fill()?;
    starts(&mut scene)?;
    for _ in 0..2 {
        scene.recovers()?;
        wait_until("not reported", TIMEOUT, || warned(&mut scene));
        let mut log = String::new();
        wait_until("lines were lost", TIMEOUT, || {
            log.push_str(&reader.read());
            log.contains("pod connected")
        });
        wait_until("still reported", TIMEOUT, || !warned(&mut scene));
        reader.fill()?;
    }

    // It hangs while the agent stops.
    scene.recovers()?;
    scene.ends()?;
    starts(&mut scene)?;
    scene.recovers()?;
    let (signaled, agent) = (Instant::now(), &mut scene.cluster.agents[0]);
    kill(Pid::from_raw(agent.pid().cast_signed()), Signal::SIGTERM)?;
    agent.end(Signal::SIGTERM)?;
    assert!(signaled.elapsed() < STOP_TIMEOUT, "ending took {:?}", signaled.elapsed());

    // It hangs when an agent reports why it does not start.
    let invalid = ["--init", "--log", "gossamer=loud"];
    let mut agent = Agent::start(program(), &scene.cluster.hosts[0], &invalid)?;
    let started = Instant::now();
    assert!(!agent.wait()?.success());
    assert!(started.elapsed() < STOP_TIMEOUT, "ending took {:?}", started.elapsed());
    Ok(())
}

#[test]
fn pipe_that_is_not_read_in_each_phase_delays_nothing() {
    isolated(|lab| delays_nothing(lab, Reader::pipe, &["--log-format", "json"]));
}

#[test]
fn journal_that_does_not_read_in_each_phase_delays_nothing() {
    isolated(|lab| delays_nothing(lab, |_| Reader::journal(), &["--log-format", "journal"]));
}
