//! Enters new namespaces: user (unless root), mount, process and network.
//!
//! All processes in them die with the first one, so nothing remains, however that one ends.

use std::{
    fs, io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Command, ExitCode},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{Gid, Uid, getgid, getuid},
};

/// Environment variable that is set for all processes inside.
pub const INSIDE: &str = "GOSSAMER_LAB";

/// Why namespaces could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// The user may not create namespaces.
    #[error(
        "ordinary users may not create namespaces here ({error}). Run as root, or allow it: sysctl -w \
         user.max_user_namespaces=10000 (and, where they exist, kernel.unprivileged_userns_clone=1, \
         kernel.apparmor_restrict_unprivileged_userns=0)"
    )]
    Forbidden {
        /// The kernel's error.
        error: io::Error,
    },
    /// Root lacks the capabilities to create namespaces.
    #[error(
        "cannot make namespaces as root ({error}): a container needs CAP_SYS_ADMIN (--privileged)"
    )]
    NotPrivileged {
        /// The kernel's error.
        error: io::Error,
    },
    /// The namespaces exist, but preparing them or starting the command failed.
    #[error("inside the namespaces: {0}")]
    Inside(#[from] io::Error),
}

/// Runs a command in new namespaces and returns its exit code. The process must have one thread.
///
/// # Errors
/// Fails if the namespaces cannot be created, or if the command cannot be started in them.
pub fn enter(command: &mut Command) -> Result<ExitCode, EnterError> {
    let (uid, gid) = (getuid(), getgid());
    let own = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWPID;
    if !uid.is_root() || unshare(own).is_err() {
        unshare(own | CloneFlags::CLONE_NEWUSER).map_err(|error| match uid.is_root() {
            true => EnterError::NotPrivileged { error: error.into() },
            false => EnterError::Forbidden { error: error.into() },
        })?;
        map_to_root(uid, gid).map_err(|error| EnterError::Forbidden { error })?;
    }
    private_run().map_err(|error| match uid.is_root() {
        true => EnterError::Inside(error),
        false => EnterError::Forbidden { error },
    })?;
    let status = command.env(INSIDE, "1").process_group(0).spawn().map_err(|error| {
        let program = command.get_program().to_string_lossy();
        io::Error::new(error.kind(), format!("{program}: {error}"))
    });
    let code = wait(status?)?;
    Ok(ExitCode::from(code))
}

/// Runs this program again in new namespaces, with these arguments. Returns `None` if it already is
/// inside, and success with a line `SKIPPED` if namespaces are not possible.
pub fn rerun_inside(arguments: &[String]) -> Option<ExitCode> {
    if std::env::var_os(INSIDE).is_some() {
        return None;
    }
    let entered = std::env::current_exe()
        .map_err(EnterError::Inside)
        .and_then(|this| enter(Command::new(this).args(arguments)));
    Some(entered.unwrap_or_else(|error| {
        println!("SKIPPED: {error}");
        ExitCode::SUCCESS
    }))
}

/// Waits for the command, and returns its exit code. A signal to this process kills the command, and with it,
/// as the first process of its namespaces, everything inside. The code is then that of the signal.
fn wait(mut child: std::process::Child) -> io::Result<u8> {
    use nix::sys::signal::{SigSet, Signal, kill};
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let mut received = None;
    loop {
        if let Some(status) = child.try_wait()? {
            let signal = received.map(|signal| signal as i32).or(status.signal());
            let code = status.code().or(signal.map(|signal| 128 + signal)).unwrap_or(1);
            return Ok(u8::try_from(code).unwrap_or(1));
        }
        match signals.wait()? {
            Signal::SIGCHLD => {}
            signal => {
                received = Some(signal);
                kill(pid, Signal::SIGKILL)?;
            }
        }
    }
}

/// Maps the caller to root inside.
fn map_to_root(uid: Uid, gid: Gid) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

/// Mounts a private `/run`, for sockets, state directories and the names of network namespaces.
fn private_run() -> io::Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))?;
    fs::create_dir_all("/run/netns")
}
