//! The commands in the documentation are run, or at least parsed.
//!
//! A page that begins with `<!-- run: hosts=3 -->` has transcripts: blocks marked `console` with lines
//! such as `host1# COMMAND`. They are run from top to bottom on as many new hosts. A backslash at the
//! end of a line continues the command, and so does a here-document (`<<EOF`) up to its end. Other lines
//! are output, and are not compared. A command must succeed, or end with the code N of a trailing
//! `# exit N`. A command that ends with `&` runs in the background.
//!
//! Comments that begin with the line `<!-- run:` have commands that readers do not see: they create the
//! cluster that a page assumes, or wait where a reader looks twice. The hosts have no init: a script in
//! place of `systemctl` runs the program as the real unit does.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use clap::{CommandFactory as _, Parser as _};
use gossamer::{
    cli::Cli,
    lab::{Host, Lab},
};

use crate::common::{TIMEOUT, isolated, program, wait_until};

/// Pages with transcripts; a test below runs each of them.
const PAGES_WITH_TRANSCRIPTS: [&str; 5] =
    ["CLI.md", "GETTING-STARTED.md", "MIGRATION.md", "OPERATIONS.md", "TROUBLESHOOTING.md"];

/// Gives a host its own files, so that files of other hosts are invisible.
const HOST_SETUP: &str = "mount --make-rprivate /; mount -t tmpfs tmpfs /mnt; cp $PROGRAM /mnt/gossamer; \
                    printf '%s' \"$SCP\" > /mnt/scp; chmod 755 /mnt/scp; mkdir /mnt/up /mnt/work; \
                    mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work /etc; \
                    for d in /run /var/lib /opt /root; do mount -t tmpfs tmpfs $d; done; \
                    mkdir /run/lock /var/lib/misc; hostname $NAME; \
                    for n in 1 2 3 4; do echo 10.99.0.$((n + 9)) host$n >> /etc/hosts; done; \
                    echo ready > /mnt/ready; exec sleep infinity";
/// An `scp FILE hostN:PATH` for hosts that share a machine.
const SCP: &str = "#!/bin/sh\nset -e\nfor last; do :; done\nroot=/proc/$(cat \
                   /proc/1/root/run/lab/${last%%:*}.pid)/root\ncase ${last#*:} in /*) to=$root${last#*:} ;; \
                   *) to=$root/root/${last#*:} ;; esac\nwhile [ $# -gt 1 ]; do case $1 in -*) ;; \
                   *) cp -p $1 $to ;; esac; shift; done\n";
/// A `systemctl` for hosts without an init: it runs the program as the unit's file says. The process holds
/// a lock until it ends.
const SYSTEMCTL: &str = r#"#!/bin/sh
set -e
start() {
    exec 9> /mnt/lock
    flock -n 9 || return 0
    file=/etc/systemd/system/$unit; [ -e $file ] || file=/run/systemd/system/$unit
    set -- $(sed -n 's:^ExecStart=\(/usr/bin/\)\?::p' $file)
    "$@" > /mnt/journal 2>&1 < /dev/null & echo $! > /mnt/pid
    exec 9>&-
}
stop() { flock -n /mnt/lock true || kill $(cat /mnt/pid) || true; flock /mnt/lock true; }
verb=$1; shift; now=; unit=gossamer.service
for word; do case $word in --now) now=1 ;; --quiet | gossamer | $unit) ;; *) exit 5 ;; esac; done
case $verb in
daemon-reload) ;;
enable) [ ! "$now" ] || start ;;
disable) [ ! "$now" ] || stop ;;
is-active) ! flock -n /mnt/lock true ;;
start | stop) $verb ;;
restart) stop; start ;;
reload) kill -HUP $(cat /mnt/pid) ;;
*) exit 5 ;;
esac
"#;
/// Installs both on a host.
const INSTALL_UNIT: &str = "mkdir -p /run/systemd/system; printf '%s' \"$UNIT\" > \
                            /run/systemd/system/gossamer.service; printf '%s' \"$SYSTEMCTL\" > \
                            /mnt/systemctl; chmod 755 /mnt/systemctl";
/// The unit that the package installs.
const UNIT: &str = include_str!("../../config/gossamer.service");

/// Time limit of a command, in seconds. Commands on the pages take less.
const COMMAND_LIMIT_SECONDS: &str = "60";

struct Step {
    line: usize,
    host: usize,
    command: String,
    code: i32,
}

/// Returns the names and the texts of the pages: those below docs/, and the README.
pub fn pages() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = root.join("docs");
    let mut paths = BTreeSet::new();
    for folder in [docs.clone(), docs.join("recipes")] {
        let entries = fs::read_dir(folder).expect("a folder of pages");
        let files = entries.map(|entry| entry.expect("an entry").path());
        paths.extend(files.filter(|path| path.extension().is_some_and(|end| end == "md")));
    }
    paths
        .into_iter()
        .chain([root.join("README.md")])
        .map(|path| {
            let name = path.strip_prefix(&docs).unwrap_or(Path::new("README.md")).display();
            (name.to_string(), fs::read_to_string(&path).expect("a page"))
        })
        .collect()
}

/// Returns the blocks of a page with a mark: the number of the line before each block, and its lines.
/// Hidden commands are blocks with the mark `console`.
fn blocks<'a>(text: &'a str, mark: &str) -> Vec<(usize, Vec<&'a str>)> {
    let mut blocks: Vec<(usize, Vec<&str>)> = Vec::new();
    let mut open: Option<(&str, bool)> = None;
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        match open {
            Some((end, _)) if trimmed.starts_with(end) => open = None,
            Some((_, true)) => blocks.last_mut().into_iter().for_each(|block| block.1.push(line)),
            Some((_, false)) => {}
            None => {
                let (end, info) = match trimmed.strip_prefix("```") {
                    Some(info) => ("```", info.trim()),
                    None if trimmed == "<!-- run:" => ("-->", "console"),
                    None => continue,
                };
                open = Some((end, info == mark));
                if info == mark {
                    blocks.push((number + 1, Vec::new()));
                }
            }
        }
    }
    blocks
}

/// Returns the commands in the transcripts of a page.
fn steps(text: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for (first, lines) in blocks(text, "console") {
        let mut lines = lines.into_iter().enumerate();
        while let Some((number, line)) = lines.next() {
            let Some((host, command)) = prompt(line) else { continue };
            let mut command = command.to_owned();
            while command.ends_with('\\') {
                command.pop();
                command.push_str(lines.next().map_or("", |(_, line)| line.trim_start()));
            }
            if let Some((_, end)) = command.split_once("<<") {
                let end = end.trim().trim_matches('\'').to_owned();
                for (_, line) in lines.by_ref() {
                    command.push('\n');
                    command.push_str(line);
                    if line == end {
                        break;
                    }
                }
            }
            let (command, code) = match command.rsplit_once("# exit ") {
                Some((command, code)) => (command.to_owned(), code.trim().parse().expect("a code")),
                None => (command, 0),
            };
            steps.push(Step { line: first + number + 1, host, command, code });
        }
    }
    steps
}

/// Parses a line such as `host2# COMMAND`.
fn prompt(line: &str) -> Option<(usize, &str)> {
    let (host, command) = line.trim_start().strip_prefix("host")?.split_once("# ")?;
    Some((host.parse().ok()?, command))
}

/// Creates the mount namespace of a host, with its own files. Commands enter it.
pub fn create_host_files(host: &Host) -> anyhow::Result<Child> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--uts", "sh", "-ec", HOST_SETUP]);
    command.env("PROGRAM", program()).env("SCP", SCP).env("NAME", &host.name);
    let child = host.netns.spawn(command.stdin(Stdio::null()))?;
    fs::write(format!("/run/lab/{}.pid", host.name), child.id().to_string())?;
    let ready = PathBuf::from(format!("/proc/{}/root/mnt/ready", child.id()));
    wait_until("the files of the host are not ready", TIMEOUT, || ready.exists());
    Ok(child)
}

/// Gives a host a stand-in for systemd, with the unit of the package.
pub fn install_systemctl(host: &Host, keeper: &Child) -> anyhow::Result<()> {
    let mut install = enter(keeper, INSTALL_UNIT);
    install.env("UNIT", UNIT).env("SYSTEMCTL", SYSTEMCTL);
    anyhow::ensure!(host.netns.spawn(&mut install)?.wait()?.success(), "no systemctl");
    Ok(())
}

pub fn enter(keeper: &Child, command: &str) -> Command {
    let mut shell = Command::new("nsenter");
    shell.args([
        "--mount",
        "--uts",
        "-t",
        &keeper.id().to_string(),
        "timeout",
        COMMAND_LIMIT_SECONDS,
        "sh",
        "-c",
    ]);
    shell.arg(format!("cd /root; {command}"));
    shell.env("PATH", "/mnt:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    shell.env("HOME", "/root").env_remove("GOSSAMER_SOCKET").stdin(Stdio::null());
    // The host has its own files.
    shell.env_remove("GOSSAMER_CONFIG");
    shell
}

fn run(lab: &mut Lab, name: &str) -> anyhow::Result<()> {
    let (_, text) = pages().into_iter().find(|(page, _)| page == name).expect("the page");
    let count = text.lines().find_map(|line| line.strip_prefix("<!-- run: hosts="));
    let count = count.and_then(|rest| rest.split(' ').next()?.parse::<u16>().ok());
    let mut hosts = Vec::new();
    for number in 1..=count.expect("a number of hosts") {
        let host = lab.host(number, &format!("host{number}"))?;
        let keeper = create_host_files(&host)?;
        install_systemctl(&host, &keeper)?;
        hosts.push((host, keeper));
    }
    let steps = steps(&text);
    anyhow::ensure!(!steps.is_empty(), "{name} has no commands");
    for Step { line, host, command, code } in steps {
        let (host, keeper) = &hosts[host - 1];
        let mut shell = enter(keeper, &command);
        if command.trim_end().ends_with('&') {
            shell.stdout(Stdio::null()).stderr(Stdio::null());
            host.netns.spawn(&mut shell)?.wait()?;
            continue;
        }
        shell.stdout(Stdio::piped()).stderr(Stdio::piped());
        let Output { status, stdout, stderr } = host.netns.spawn(&mut shell)?.wait_with_output()?;
        let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        anyhow::ensure!(
            status.code() == Some(code),
            "{name}:{line}: {}# {command}: {status}\n{}\n{}",
            host.name,
            said[0],
            said[1]
        );
    }
    for (_, keeper) in &mut hosts {
        keeper.kill()?;
        keeper.wait()?;
    }
    Ok(())
}

#[test]
fn getting_started_commands_succeed() {
    isolated(|lab| run(lab, "GETTING-STARTED.md"));
}

#[test]
fn operations_commands_succeed() {
    isolated(|lab| run(lab, "OPERATIONS.md"));
}

#[test]
fn troubleshooting_commands_succeed() {
    isolated(|lab| run(lab, "TROUBLESHOOTING.md"));
}

#[test]
fn migration_commands_succeed() {
    isolated(|lab| run(lab, "MIGRATION.md"));
}

#[test]
fn cli_reference_commands_succeed() {
    isolated(|lab| run(lab, "CLI.md"));
}

#[test]
fn pages_with_transcripts_are_run_and_shown_commands_parse() {
    let mut with_transcripts = BTreeSet::new();
    let mut understood = 0;
    for (name, text) in pages() {
        if text.lines().take(5).any(|line| line.starts_with("<!-- run:")) {
            with_transcripts.insert(name.clone());
        } else {
            assert!(blocks(&text, "console").is_empty(), "{name} has transcripts and is not run");
        }
        for (first, lines) in blocks(&text, "sh") {
            for (number, line) in lines.iter().enumerate() {
                let line = prompt(line).map_or(line.trim(), |(_, command)| command);
                let line = line.strip_prefix("sudo ").unwrap_or(line);
                let Some(rest) = line.strip_prefix("gossamer ") else { continue };
                let end = rest.find(['|', '>', '&', ';', '#', '`', '<']).unwrap_or(rest.len());
                let words = rest[..end].split_whitespace().filter(|word| !word.starts_with('['));
                let words = words.map(|word| word.trim_matches(['\'', '"', ']']));
                let parsed = Cli::try_parse_from(["gossamer"].into_iter().chain(words));
                let error = parsed.err().filter(clap::Error::use_stderr);
                assert!(error.is_none(), "{name}:{}: {line}: {error:?}", first + number + 1);
                understood += 1;
            }
        }
    }
    assert_eq!(with_transcripts, PAGES_WITH_TRANSCRIPTS.map(str::to_owned).into());
    assert!(understood > 20, "{understood}");
}

#[test]
fn reference_lists_exactly_the_existing_settings_and_commands() {
    let cli = Cli::command();
    let agent = cli.find_subcommand("agent").expect("the agent");
    let settings: BTreeSet<[String; 3]> = agent
        .get_arguments()
        .filter(|argument| !["help", "config"].contains(&argument.get_id().as_str()))
        .map(|argument| {
            let variable = argument.get_env().expect("a variable").display().to_string();
            let flag = format!("--{}", argument.get_long().expect("a flag"));
            [argument.get_id().to_string(), flag, variable]
        })
        .collect();
    let page =
        |wanted: &str| pages().into_iter().find(|(name, _)| name == wanted).expect("a page").1;
    let configuration = page("CONFIGURATION.md");
    let rows = configuration.lines().filter(|line| line.starts_with("| `"));
    let cells = |row: &str| -> Vec<String> {
        row.split('|').skip(1).map(|cell| cell.trim().trim_matches('`').to_owned()).collect()
    };
    let listed: BTreeSet<[String; 3]> = rows
        .map(cells)
        .filter(|cells| cells.len() > 3 && cells[1].starts_with("--"))
        .filter_map(|cells| cells[..3].to_vec().try_into().ok())
        .collect();
    assert_eq!(listed, settings);
    let commands = page("CLI.md");
    for command in cli.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("gossamer {}", command.get_name());
        assert!(commands.contains(&name), "{name}");
    }
}
