//! `gossamer demo exec`: runs a command in the namespaces of a running demo.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use clap::Args;
use nix::sched::{CloneFlags, setns};

use super::fail;

/// Environment variable that names the demo's host to the commands run on it.
const HOST_VARIABLE: &str = "IN_GOSSAMER_DEMO";

/// Returns why a command that changes files of a host cannot run: the hosts of the demo share the files of
/// this machine, so it would change those.
///
/// # Errors
/// The reason, on a host of the demo.
pub fn refuse_changes_of_files() -> Result<(), String> {
    match std::env::var(HOST_VARIABLE) {
        Ok(host) => Err(format!(
            "{host} is a host of the demo, which shares the files of this machine: this command would change \
             /etc, /var/lib and the plugins of the machine itself"
        )),
        Err(_) => Ok(()),
    }
}

#[derive(Debug, Args)]
pub struct ExecArgs {
    /// Host (n1) or pod (n1-pod)
    #[arg(id = "host", value_name = "HOST")]
    node: String,
    /// Command and its arguments; `gossamer` stands for this program
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command and returns its exit code.
pub fn run(args: &ExecArgs) -> ExitCode {
    let program = std::env::current_exe();
    let result = running_demo().and_then(|demo| enter(&demo, &args.node)).and_then(|()| {
        let (name, arguments) = args.command.split_first().ok_or("no command")?;
        let program = match (name.as_str(), program) {
            ("gossamer", Ok(path)) => path,
            _ => PathBuf::from(name),
        };
        // A pod's name is its host's with a suffix.
        let host = args.node.strip_suffix("-pod").unwrap_or(&args.node);
        let socket = Path::new("/run/lab").join(host).join("gossamer.sock");
        let mut command = Command::new(&program);
        command.args(arguments).env("GOSSAMER_SOCKET", socket).env(HOST_VARIABLE, host);
        let status = command.status();
        status.map_err(|error| format!("{name}: {error}"))
    });
    match result {
        Ok(status) => ExitCode::from(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1)),
        Err(why) => fail(format_args!("demo exec: {why:#}")),
    }
}

/// Returns the /proc directory of the demo's first process.
fn running_demo() -> Result<PathBuf, String> {
    let mut demos = fs::read_dir("/proc")
        .map_err(|error| format!("/proc: {error}"))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|process| is_inside_a_demo(process));
    match (demos.next(), demos.next()) {
        (Some(demo), None) => Ok(demo),
        (None, _) => Err("no demo is running: start one with `gossamer demo --keep`".to_owned()),
        (Some(_), Some(_)) => Err("several demos are running: end all but one".to_owned()),
    }
}

fn is_inside_a_demo(process: &Path) -> bool {
    let Ok(command) = fs::read(process.join("cmdline")) else { return false };
    let mut words = command.split(|byte| *byte == 0).skip(1);
    words.next() == Some(b"demo") && words.next() == Some(b"inside")
}

/// Enters the demo's namespaces, then that of one node. The process must have one thread.
fn enter(demo: &Path, node: &str) -> Result<(), String> {
    let join = |kind: &str, flag: CloneFlags| -> io::Result<()> {
        let theirs = demo.join("ns").join(kind);
        // Entering the current user namespace again is an error.
        if fs::read_link(&theirs)? == fs::read_link(Path::new("/proc/self/ns").join(kind))? {
            return Ok(());
        }
        Ok(setns(File::open(theirs)?, flag)?)
    };
    let namespaces = [
        ("user", CloneFlags::CLONE_NEWUSER),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    for (kind, flag) in namespaces {
        join(kind, flag).map_err(|error| format!("cannot enter the demo ({kind}): {error}"))?;
    }
    let path = Path::new("/run/netns").join(node);
    let netns = File::open(&path).map_err(|_| match names() {
        names if names.is_empty() => format!("{node}: the demo has not created its hosts yet"),
        names => format!("{node}: no such host or pod; the demo has {names}"),
    })?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(|error| format!("{node}: {error}"))
}

fn names() -> String {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let mut names: Vec<_> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names.join(", ")
}
