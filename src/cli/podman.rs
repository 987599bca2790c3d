//! `gossamer podman install` and `uninstall`: put the network driver where Podman and netavark look for it,
//! and take it away again.

use std::{fmt::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::{
    fail,
    output::put,
    placed::{Taken, expect_directory, put_here, take_away},
};
use crate::netavark::DRIVER;

/// Where Podman looks unless its configuration says otherwise, in this order.
const SEARCHED: [&str; 4] = [
    "/usr/local/libexec/netavark",
    "/usr/libexec/netavark",
    "/usr/local/lib/netavark",
    "/usr/lib/netavark",
];

#[derive(Debug, Args)]
pub struct PodmanArgs {
    #[command(subcommand)]
    command: PodmanCommand,
}

#[derive(Debug, Subcommand)]
enum PodmanCommand {
    /// Link this program into the directory of netavark's plugins
    Install(InstallArgs),
    /// Remove what install has put there, and nothing else
    Uninstall(UninstallArgs),
}

#[derive(Debug, Args)]
struct InstallArgs {
    /// Where Podman looks for network drivers
    #[arg(long, default_value = SEARCHED[0], value_name = "DIR")]
    dir: PathBuf,
    /// Copy this program instead of linking to it: out of a container, for one
    #[arg(long)]
    copy: bool,
    /// Replace another program named gossamer, too
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct UninstallArgs {
    /// Where Podman looks for network drivers
    #[arg(long, default_value = SEARCHED[0], value_name = "DIR")]
    dir: PathBuf,
    /// Remove a file that is another program too
    #[arg(long)]
    force: bool,
}

pub fn run(args: &PodmanArgs) -> ExitCode {
    let done = match &args.command {
        PodmanCommand::Install(args) => install(args),
        PodmanCommand::Uninstall(args) => uninstall(args),
    };
    match done {
        Ok(text) => {
            put(&text);
            ExitCode::SUCCESS
        }
        Err(error) => fail(format_args!("{error:#}")),
    }
}

fn install(args: &InstallArgs) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("the path of this program")?;
    let dir = std::path::absolute(&args.dir).with_context(|| args.dir.display().to_string())?;
    let plugin = dir.join(DRIVER);
    let mut text = String::new();
    // Installed there it needs no link.
    if program != plugin {
        expect_directory(&dir, "--dir")?;
        put_here(&program, &plugin, args.copy, args.force)?;
        let arrow = if args.copy { "=" } else { "->" };
        writeln!(text, "{} {arrow} {}", plugin.display(), program.display())?;
    }
    if !SEARCHED.iter().any(|searched| dir == PathBuf::from(searched)) {
        writeln!(
            text,
            "Podman does not look there by itself: in /etc/containers/containers.conf, below [network], set \
             netavark_plugin_dirs = [{dir:?}]"
        )?;
    }
    writeln!(text, "next, as root: podman network create --driver {DRIVER} web")?;
    Ok(text)
}

fn uninstall(UninstallArgs { dir, force }: &UninstallArgs) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("the path of this program")?;
    let plugin = dir.join(DRIVER);
    let taken = take_away(&program, &plugin, *force);
    Ok(match taken.with_context(|| plugin.display().to_string())? {
        Taken::Removed => format!("removed {}\n", plugin.display()),
        Taken::Absent => format!("nothing of gossamer is in {}\n", dir.display()),
        Taken::Stays(why) => {
            format!("{} is {why} and stays: --force removes a file\n", plugin.display())
        }
    })
}
