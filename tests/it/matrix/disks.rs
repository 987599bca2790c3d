//! Disks that are full, read-only, or hang.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use gossamer::lab::{Agent, Host, Lab};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::{Scene, Tracer};
use crate::{
    cni::Runtime,
    common::{TIMEOUT, isolated, program, skipped, wait_until},
};

/// A runtime has its answer within half of this time; the rest is for a busy machine.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The disk of the state directory, which can be made to fail.
enum Disk {
    /// Filled by a file that takes all of its space.
    Full(PathBuf),
    /// Simulated by a tracer that makes writes fail, because a file that is open for writing keeps a
    /// mount writable.
    ReadOnly(PathBuf, Option<Tracer>),
    /// A file system whose process can be suspended.
    Hanging(Child),
}

impl Disk {
    fn full(state: &Path) -> anyhow::Result<Self> {
        mount(Some("tmpfs"), state, Some("tmpfs"), MsFlags::empty(), Some("size=4m"))?;
        Ok(Self::Full(state.join("filler")))
    }

    fn read_only(state: &Path) -> anyhow::Result<Self> {
        mount(Some("tmpfs"), state, Some("tmpfs"), MsFlags::empty(), Some("size=4m"))?;
        Ok(Self::ReadOnly(state.to_owned(), None))
    }

    fn hanging(host: &Host) -> anyhow::Result<Self> {
        let (state, real) = (host.dir.join("state"), host.dir.join("real"));
        fs::create_dir(&real)?;
        let mut command = Command::new("bindfs");
        command.arg("-f").arg(&real).arg(&state).stderr(Stdio::null());
        let child = command.spawn()?;
        wait_until("it is not mounted", TIMEOUT, || {
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            mounts.contains(&format!("{} fuse", state.display()))
        });
        Ok(Self::Hanging(child))
    }

    fn fail(&mut self, scene: &Scene) -> anyhow::Result<()> {
        match self {
            Self::Full(filler) => {
                let mut file = fs::File::create(filler)?;
                while file.write_all(&[0; 512]).is_ok() {}
            }
            Self::ReadOnly(_, tracer) => {
                let pid = scene.cluster.agents[0].pid().to_string();
                *tracer = Some(Tracer::start(&["-f", "-p", &pid], "pwrite64", "EROFS")?);
            }
            Self::Hanging(process) => {
                let pid = process.id();
                kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP)?;
                wait_until("the process is not stopped", TIMEOUT, || {
                    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                    stat.contains(") T ")
                });
            }
        }
        Ok(())
    }

    fn mend(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Full(filler) => fs::remove_file(filler)?,
            Self::ReadOnly(state, tracer) => {
                *tracer = None;
                remount(state, MsFlags::empty())?;
            }
            Self::Hanging(process) => {
                kill(Pid::from_raw(process.id().cast_signed()), Signal::SIGCONT)?;
            }
        }
        Ok(())
    }

    /// Returns the status text about this fault while the agent runs.
    const fn words(&self) -> &'static str {
        match self {
            Self::Full(_) | Self::ReadOnly(..) => "state directory",
            Self::Hanging(_) => "the disk has not answered",
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Self::Hanging(process) = self {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn remount(state: &Path, more: MsFlags) -> nix::Result<()> {
    mount(
        None::<&str>,
        state,
        None::<&str>,
        MsFlags::MS_REMOUNT | MsFlags::MS_BIND | more,
        None::<&str>,
    )
}

/// Creates the scene with the first host's state on this disk.
fn on_disk(
    lab: &mut Lab,
    make: impl FnOnce(&Host) -> anyhow::Result<Disk>,
) -> anyhow::Result<(Scene, Disk)> {
    let mut disk = None;
    let scene = Scene::new(lab, |host| {
        disk = Some(make(host)?);
        Ok(())
    })?;
    Ok((scene, disk.expect("made before the first agent")))
}

/// Adds and removes pods on the first host until `end` is called.
struct Changes {
    over: Arc<AtomicBool>,
    thread: thread::JoinHandle<()>,
}

impl Changes {
    fn begin(scene: &Scene) -> Self {
        let socket = scene.cluster.agents[0].socket().to_owned();
        let over = Arc::new(AtomicBool::new(false));
        let is_over = Arc::clone(&over);
        let thread = thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                for verb in ["ADD", "DEL"] {
                    Runtime::at(&socket).call(verb, "c", &json!({}));
                }
            }
        });
        Self { over, thread }
    }

    fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic");
    }
}

/// A second signal ends the agent without further delay.
fn ends_at_the_second_signal(scene: &mut Scene, disk: &mut Disk) -> anyhow::Result<()> {
    disk.fail(scene)?;
    let changes = Changes::begin(scene);
    scene.wait_reported(disk.words());
    let agent = &mut scene.cluster.agents[0];
    let pid = Pid::from_raw(agent.pid().cast_signed());
    let stat = format!("/proc/{pid}/stat");
    let signaled = Instant::now();
    wait_until("the second signal does not end it", TIMEOUT, || {
        let is_sent = kill(pid, Signal::SIGTERM).is_ok();
        is_sent && fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z "))
    });
    assert!(signaled.elapsed() < Duration::from_secs(4), "{:?}", signaled.elapsed());
    agent.wait()?;
    assert!(agent.log().contains("second signal received"), "{}", agent.log());
    changes.end();
    disk.mend()?;
    scene.starts()?;
    scene.recovers()
}

fn check_each_phase(mut scene: Scene, disk: &mut Disk, at_start: &str) -> anyhow::Result<()> {
    // While it runs.
    disk.fail(&scene)?;
    let changes = Changes::begin(&scene);
    scene.wait_reported(disk.words());
    scene.assert_pods_connected("while the agent runs")?;
    disk.mend()?;
    changes.end();
    scene.recovers()?;
    // While it stops.
    disk.fail(&scene)?;
    let changes = Changes::begin(&scene);
    scene.wait_reported(disk.words());
    scene.ends()?;
    changes.end();
    if let Disk::ReadOnly(state, tracer) = disk {
        *tracer = None;
        remount(state, MsFlags::MS_RDONLY)?;
    }
    // When it starts: it ends when told to, or continues once the fault is over.
    scene.starts()?;
    scene.wait_reported(at_start);
    scene.ends()?;
    scene.starts()?;
    scene.wait_reported(at_start);
    scene.assert_pods_connected("while the agent starts")?;
    disk.mend()?;
    scene.recovers()
}

#[test]
fn full_disk_in_each_phase_delays_only_changes() {
    isolated(|lab| {
        let (mut scene, mut disk) = on_disk(lab, |host| Disk::full(&host.dir.join("state")))?;
        // It is reported before a write fails.
        disk.fail(&scene)?;
        scene.wait_reported(
            "is full: changes may not be written, and the agent cannot be restarted",
        );
        disk.mend()?;
        check_each_phase(scene, &mut disk, "state directory")
    });
}

#[test]
fn read_only_disk_in_each_phase_delays_only_changes() {
    if !Tracer::is_there() {
        return skipped(
            "matrix::disks::read_only_disk_in_each_phase_delays_only_changes",
            "no strace",
        );
    }
    isolated(|lab| {
        let (scene, mut disk) = on_disk(lab, |host| Disk::read_only(&host.dir.join("state")))?;
        check_each_phase(scene, &mut disk, "waiting for the state directory")
    });
}

#[test]
fn hanging_disk_in_each_phase_delays_only_changes() {
    if Command::new("bindfs").arg("--version").output().is_err() {
        return skipped(
            "matrix::disks::hanging_disk_in_each_phase_delays_only_changes",
            "no bindfs",
        );
    }
    isolated(|lab| {
        let (mut scene, mut disk) = on_disk(lab, Disk::hanging)?;
        ends_at_the_second_signal(&mut scene, &mut disk)?;
        check_each_phase(scene, &mut disk, "waiting for the state directory")
    });
}

#[test]
fn runtimes_are_answered_while_the_disk_hangs_and_a_del_is_not_lost() {
    if Command::new("bindfs").arg("--version").output().is_err() {
        return skipped(
            "matrix::disks::runtimes_are_answered_while_the_disk_hangs_and_a_del_is_not_lost",
            "no bindfs",
        );
    }
    isolated(|lab| {
        let (mut scene, mut disk) = on_disk(lab, Disk::hanging)?;
        let socket = scene.cluster.agents[0].socket().to_owned();
        let notes = format!("{}.pending", socket.display());
        let count = || fs::read_dir(&notes).map_or(0, Iterator::count);
        Runtime::at(&socket).add("c");
        disk.fail(&scene)?;
        // Each call arrives before the agent knows that the disk hangs.
        let timed = |verb: &'static str, container: &'static str| {
            let socket = socket.clone();
            thread::spawn(move || {
                let begun = Instant::now();
                let said = Runtime::at(&socket).call(verb, container, &json!({}));
                (said, begun.elapsed())
            })
        };
        let (ending, beginning) = (timed("DEL", "c"), timed("ADD", "d"));
        let ((ended, said), took) = ending.join().expect("no panic");
        assert!(ended && took < ANSWER_TIMEOUT, "DEL: {said} after {took:?}");
        assert_eq!(count(), 1, "the end of the pod is noted");
        let ((begun, said), took) = beginning.join().expect("no panic");
        assert!(
            !begun && said["code"] == 11 && took < ANSWER_TIMEOUT,
            "ADD: {said} after {took:?}"
        );
        assert!(said["msg"].to_string().contains("disk has not answered"), "{said}");
        disk.mend()?;
        wait_until("the note is carried out", TIMEOUT, || count() == 0);
        let agent = &mut scene.cluster.agents[0];
        wait_until("one pod is left", TIMEOUT, || crate::cni::pods(agent) == 1);
        scene.recovers()
    });
}

#[test]
fn agent_start_waits_for_a_process_that_holds_the_state_directory() {
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        scene.ends()?;
        let lock = fs::File::open(scene.cluster.hosts[0].dir.join("state/lock"))?;
        let lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
        scene.starts()?;
        scene.wait_reported(&format!("is in use by process {}", std::process::id()));
        drop(lock);
        scene.recovers()
    });
}

#[test]
fn hanging_disk_delays_a_secret_step_but_not_the_agent() {
    if Command::new("bindfs").arg("--version").output().is_err() {
        return skipped(
            "matrix::disks::hanging_disk_delays_a_secret_step_but_not_the_agent",
            "no bindfs",
        );
    }
    isolated(|lab| {
        let (mut scene, mut disk) = on_disk(lab, Disk::hanging)?;
        let socket = scene.cluster.agents[0].socket().display().to_string();
        let secret = move |step: &str| {
            let arguments = ["secret", step, "-o", "json", "--socket", &socket];
            Command::new(program()).args(arguments).output().expect("gossamer runs")
        };
        let accepted = |output: &Output| {
            let listed: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            listed["secrets"].as_array().map(Vec::len)
        };
        disk.fail(&scene)?;
        let add = secret.clone();
        let adding = thread::spawn(move || add("add"));
        // A blocking write in the event loop would delay these requests for three seconds.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            scene.cluster.agents[0].ask("/v1/status", Duration::from_secs(1))?;
        }
        assert_eq!(accepted(&secret("list")), Some(1), "it is used before it is on disk");
        assert!(!adding.is_finished());
        scene.assert_pods_connected("while the disk hangs")?;
        disk.mend()?;
        let added = adding.join().expect("no panic");
        assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
        assert_eq!(accepted(&added), Some(2));
        scene.recovers()
    });
}

/// Sets the soft limit of the size of files that an agent writes (`ulimit -f`).
fn limit_file_size(pid: u32, size: &str) {
    let mut command = Command::new("prlimit");
    command.args(["--pid", &pid.to_string(), &format!("--fsize={size}:")]);
    assert!(command.status().expect("prlimit runs").success());
}

#[test]
fn file_size_limit_in_each_phase_delays_only_changes() {
    isolated(|lab| {
        let mut scene = Scene::new(lab, |_| Ok(()))?;
        // While it runs, and while it stops.
        limit_file_size(scene.cluster.agents[0].pid(), "4096");
        let changes = Changes::begin(&scene);
        scene.wait_reported("state directory");
        scene.assert_pods_connected("while the agent runs")?;
        changes.end();
        limit_file_size(scene.cluster.agents[0].pid(), "unlimited");
        scene.recovers()?;
        limit_file_size(scene.cluster.agents[0].pid(), "4096");
        let changes = Changes::begin(&scene);
        scene.wait_reported("state directory");
        scene.ends()?;
        changes.end();
        // When it starts.
        let limited = scene.cluster.hosts[0].dir.join("limited");
        let run = format!("#!/bin/sh\nexec prlimit --fsize=4096: {} \"$@\"\n", program().display());
        fs::write(&limited, run)?;
        fs::set_permissions(&limited, fs::Permissions::from_mode(0o755))?;
        scene.cluster.agents[0] = Agent::start(&limited, &scene.cluster.hosts[0], &["--init"])?;
        scene.wait_reported("state directory");
        scene.assert_pods_connected("while the agent starts")?;
        limit_file_size(scene.cluster.agents[0].pid(), "unlimited");
        scene.recovers()
    });
}
