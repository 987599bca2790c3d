//! `gossamer podman install` and `uninstall`: install the network driver in netavark's plugin directory,
//! and remove it.

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Output},
};

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::{
    fail,
    output::write_stdout,
    placed::{Removal, expect_directory, is_removable, place_program, remove_program, with_remedy},
};
use crate::netavark::DRIVER;

/// First version of Podman that uses network plugins.
const FIRST_VERSION: u32 = 5;

/// Default plugin directories of Podman, in order of precedence.
const DEFAULT_PLUGIN_DIRS: [&str; 4] = [
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
    /// Link this program into netavark's plugin directory
    Install(InstallArgs),
    /// Remove what install created, and nothing else
    Uninstall(UninstallArgs),
}

#[derive(Debug, Args)]
struct InstallArgs {
    /// Plugin directory of netavark
    #[arg(long, default_value = DEFAULT_PLUGIN_DIRS[0], value_name = "DIR")]
    dir: PathBuf,
    /// Copy this program instead of linking to it, for example out of a container
    #[arg(long)]
    copy: bool,
    /// Replace another program named gossamer
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct UninstallArgs {
    /// Plugin directory of netavark
    #[arg(long, default_value = DEFAULT_PLUGIN_DIRS[0], value_name = "DIR")]
    dir: PathBuf,
    /// Remove the file even if it is another program
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
            write_stdout(&text);
            ExitCode::SUCCESS
        }
        Err(error) => fail(with_remedy(&error)),
    }
}

fn install(args: &InstallArgs) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("the path of this program")?;
    let dir = std::path::absolute(&args.dir).with_context(|| args.dir.display().to_string())?;
    let plugin = dir.join(DRIVER);
    let mut text = String::new();
    // A program that already is in the plugin directory needs no link.
    if program != plugin {
        expect_directory(&dir, "--dir")?;
        place_program(&program, &plugin, args.copy, args.force)?;
        let arrow = if args.copy { "=" } else { "->" };
        writeln!(text, "{} {arrow} {}", plugin.display(), program.display())?;
    }
    if !DEFAULT_PLUGIN_DIRS.iter().any(|default| dir == PathBuf::from(default)) {
        writeln!(
            text,
            "Podman does not search this directory by default: in /etc/containers/containers.conf, below \
             [network], set netavark_plugin_dirs = [{dir:?}]"
        )?;
    }
    let shown = Command::new("podman").arg("--version").output().ok();
    match shown.as_ref().and_then(too_old) {
        Some(version) => writeln!(
            text,
            "next: update Podman: this host has {version}, and only Podman {FIRST_VERSION} or later knows \
             the driver {DRIVER}"
        )?,
        None => writeln!(text, "next, as root: podman network create --driver {DRIVER} web")?,
    }
    Ok(text)
}

/// Returns Podman's version if it has no network plugins. `shown`: the output of `podman --version`.
fn too_old(shown: &Output) -> Option<String> {
    let text = String::from_utf8_lossy(&shown.stdout);
    let version = text.split_whitespace().last().filter(|_| shown.status.success())?;
    let major: u32 = version.split('.').next()?.parse().ok()?;
    (major < FIRST_VERSION).then(|| version.to_owned())
}

fn uninstall(UninstallArgs { dir, force }: &UninstallArgs) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("the path of this program")?;
    let plugin = dir.join(DRIVER);
    let removal = remove_program(&program, &plugin, *force);
    Ok(match removal.with_context(|| plugin.display().to_string())? {
        Removal::Removed => format!("removed {}\n", plugin.display()),
        Removal::Absent => format!("gossamer has no files in {}\n", dir.display()),
        Removal::Kept(why) => {
            format!("{} is {why} and was kept: --force removes a file\n", plugin.display())
        }
    })
}

/// Returns the file that [`install`] places by default, if it is there. `place` maps paths of the system.
pub(super) fn installed_file(place: impl Fn(&Path) -> PathBuf) -> Option<PathBuf> {
    let plugin = place(Path::new(DEFAULT_PLUGIN_DIRS[0])).join(DRIVER);
    is_removable(&plugin).then_some(plugin)
}

/// Removes that file. Returns what was removed.
///
/// # Errors
/// Fails if the file cannot be removed.
pub(super) fn remove_installed(place: impl Fn(&Path) -> PathBuf) -> anyhow::Result<Vec<String>> {
    let Some(plugin) = installed_file(&place) else { return Ok(Vec::new()) };
    let dir = plugin.parent().map(Path::to_owned).unwrap_or_default();
    let text = uninstall(&UninstallArgs { dir, force: false })?;
    Ok(text.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt as _, process::ExitStatus};

    use super::*;

    #[test]
    fn too_old_is_podman_4_and_no_later_or_unknown_version() {
        let of = |text: &str| {
            let stdout = text.as_bytes().to_vec();
            too_old(&Output { status: ExitStatus::from_raw(0), stdout, stderr: Vec::new() })
        };
        assert_eq!(of("podman version 4.9.3\n").as_deref(), Some("4.9.3"));
        for usable in ["podman version 5.4.2\n", "podman version 10.0.0-dev\n", "unknown\n", ""] {
            assert_eq!(of(usable), None, "{usable}");
        }
    }
}
