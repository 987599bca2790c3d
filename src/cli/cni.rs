//! `gossamer cni install` and `uninstall`: install the CNI plugin, and `loopback` where it is missing, in
//! the directories of container runtimes, and remove both.

mod lists;

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use nix::unistd::{AccessFlags, access};

use super::{
    fail, output,
    placed::{
        PLUGIN_NAME, Removal, expect_directory, is_removable, place, place_program, remove_program,
        with_remedy,
    },
};
use crate::{
    cni::LOOPBACK,
    files::{PUBLIC, replace},
};
use lists::{InstalledList, List, PORTMAP};

/// Default plugin directory of runtimes.
const BIN_DIR: &str = "/opt/cni/bin";
/// Default configuration directory of runtimes.
const CONF_DIR: &str = "/etc/cni/net.d";

#[derive(Debug, Args)]
pub struct CniArgs {
    #[command(subcommand)]
    command: CniCommand,
}

#[derive(Debug, Subcommand)]
enum CniCommand {
    /// Link this program into the plugin directory and write the network configuration; if the plugin
    /// loopback is missing, also create a link of that name
    Install(InstallArgs),
    /// Remove what install created, and nothing else
    Uninstall(UninstallArgs),
}

#[derive(Debug, Args)]
struct Places {
    /// Plugin directory of the runtime
    #[arg(long, default_value = BIN_DIR, value_name = "DIR")]
    bin_dir: PathBuf,
    /// Configuration directory of the runtime
    #[arg(long, default_value = CONF_DIR, value_name = "DIR")]
    conf_dir: PathBuf,
}

#[derive(Debug, Args)]
struct InstallArgs {
    #[command(flatten)]
    places: Places,
    /// Copy this program instead of linking to it, for example out of a container
    #[arg(long)]
    copy: bool,
    /// Replace a modified configuration, another program named gossamer, and a dangling loopback link
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct UninstallArgs {
    #[command(flatten)]
    places: Places,
    /// Also remove a modified configuration, and another program named gossamer
    #[arg(long)]
    force: bool,
}

pub fn run(args: &CniArgs) -> ExitCode {
    let done = match &args.command {
        CniCommand::Install(args) => install(args),
        CniCommand::Uninstall(args) => uninstall(args),
    };
    match done {
        Ok(lines) => {
            lines.iter().for_each(|line| _ = output::write_stdout(&format!("{line}\n")));
            ExitCode::SUCCESS
        }
        Err(error) => fail(with_remedy(&error)),
    }
}

fn install(args: &InstallArgs) -> anyhow::Result<Vec<String>> {
    let Places { bin_dir, conf_dir } = &args.places;
    let program = std::env::current_exe().context("the path of this program")?;
    let plugin = bin_dir.join(PLUGIN_NAME);
    expect_directory(bin_dir, "--bin-dir")?;
    expect_directory(conf_dir, "--conf-dir")?;
    let list = List::new(conf_dir)?;
    ensure!(
        !list.path().is_dir(),
        "{} is a directory, but runtimes expect a file: remove it",
        list.path().display()
    );
    // Before anything is installed.
    let writable = fs::create_dir_all(conf_dir)
        .and_then(|()| access(conf_dir, AccessFlags::W_OK).map_err(io::Error::from));
    writable.with_context(|| conf_dir.display().to_string())?;
    let found = list.inspect();
    let mut done = Vec::new();
    // A program that already is in the plugin directory needs no link.
    if program != plugin {
        place_program(&program, &plugin, args.copy, args.force)?;
        let arrow = if args.copy { "=" } else { "->" };
        done.push(format!("{} {arrow} {}", plugin.display(), program.display()));
    }
    done.extend(link_loopback(&bin_dir.join(LOOPBACK), args.force)?);
    let has = |plugin: &str| fs::symlink_metadata(bin_dir.join(plugin)).is_ok();
    if let InstalledList::Modified(why) = &found
        && !args.force
    {
        done.push(format!("{} {why} and was kept: --force replaces it", list.path().display()));
        done.extend(list.missing(has).map(|name| {
            format!(
                "no pod can be connected: {} uses the plugin {name}, which is not in {}",
                list.path().display(),
                bin_dir.display()
            )
        }));
    } else {
        let text = list.text(has(PORTMAP));
        replace(list.path(), text, PUBLIC).with_context(|| list.path().display().to_string())?;
        done.push(list.path().display().to_string());
        if !has(PORTMAP) {
            done.push(format!(
                "published ports will not work: {PORTMAP} is not in {}; install the CNI plugins there \
                 (Debian: containernetworking-plugins), then run this command again",
                bin_dir.display()
            ));
        }
    }
    done.extend(lists::conflicting_configurations(conf_dir));
    Ok(done)
}

/// Links `loopback` to the plugin if it is missing. Runtimes start no pod without it.
///
/// The link is relative, so it also works where the directory is mounted elsewhere. A dangling link stays
/// unless `force`: seen from inside a container, a valid link of the host may dangle.
fn link_loopback(loopback: &Path, force: bool) -> anyhow::Result<Option<String>> {
    let context = || loopback.display().to_string();
    if fs::metadata(loopback).is_ok() {
        return Ok(None);
    }
    match fs::read_link(loopback) {
        Ok(target) if !force => Ok(Some(format!(
            "{} is a dangling link to {} and was kept, but runtimes start no pod without that plugin; \
             --force replaces it",
            loopback.display(),
            target.display()
        ))),
        _ => {
            place(Path::new(PLUGIN_NAME), loopback, false).with_context(context)?;
            Ok(Some(format!("{} -> {PLUGIN_NAME}", loopback.display())))
        }
    }
}

/// Removes the configuration first, so that no runtime finds a configuration without its plugin.
fn uninstall(args: &UninstallArgs) -> anyhow::Result<Vec<String>> {
    let Places { bin_dir, conf_dir } = &args.places;
    let program = std::env::current_exe().context("the path of this program")?;
    let (plugin, loopback) = (bin_dir.join(PLUGIN_NAME), bin_dir.join(LOOPBACK));
    let mut done = Vec::new();
    let list = List::new(conf_dir)?;
    match list.inspect() {
        InstalledList::Absent => {}
        InstalledList::Modified(why) if !args.force => {
            done.push(format!("{} {why} and was kept: --force removes it", list.path().display()));
        }
        InstalledList::Unmodified | InstalledList::Modified(_) => {
            let removed = fs::remove_file(list.path());
            removed.with_context(|| list.path().display().to_string())?;
            done.push(format!("removed {}", list.path().display()));
        }
    }
    // Any other link or file is another package's or the operator's.
    if fs::read_link(&loopback).is_ok_and(|target| target == Path::new(PLUGIN_NAME)) {
        fs::remove_file(&loopback).with_context(|| loopback.display().to_string())?;
        done.push(format!("removed {}", loopback.display()));
    }
    let removal = remove_program(&program, &plugin, args.force);
    match removal.with_context(|| plugin.display().to_string())? {
        Removal::Removed => done.push(format!("removed {}", plugin.display())),
        Removal::Absent => {}
        Removal::Kept(why) => {
            done.push(format!(
                "{} is {why} and was kept: --force removes a file",
                plugin.display()
            ));
        }
    }
    if done.is_empty() {
        let (bin, conf) = (bin_dir.display(), conf_dir.display());
        done.push(format!("gossamer has no files in {bin} and {conf}"));
    }
    Ok(done)
}

/// Returns the files in the default directories that [`uninstall`] would remove. `place` maps paths of the
/// system.
///
/// # Errors
/// Fails if the shipped configuration cannot be parsed.
pub(super) fn installed_files(place: impl Fn(&Path) -> PathBuf) -> anyhow::Result<Vec<PathBuf>> {
    let Places { bin_dir, conf_dir } = default_places(place);
    let list = List::new(&conf_dir)?;
    let (plugin, loopback) = (bin_dir.join(PLUGIN_NAME), bin_dir.join(LOOPBACK));
    let is_ours = fs::read_link(&loopback).is_ok_and(|target| target == Path::new(PLUGIN_NAME));
    let list_is_ours = list.inspect() == InstalledList::Unmodified;
    let files = [
        list_is_ours.then(|| list.path().to_owned()),
        is_ours.then_some(loopback),
        is_removable(&plugin).then_some(plugin),
    ];
    Ok(files.into_iter().flatten().collect())
}

/// Removes those files. Returns what was removed.
///
/// # Errors
/// Fails if a file cannot be removed.
pub(super) fn remove_installed(place: impl Fn(&Path) -> PathBuf) -> anyhow::Result<Vec<String>> {
    if installed_files(&place)?.is_empty() {
        return Ok(Vec::new());
    }
    uninstall(&UninstallArgs { places: default_places(place), force: false })
}

fn default_places(place: impl Fn(&Path) -> PathBuf) -> Places {
    Places { bin_dir: place(Path::new(BIN_DIR)), conf_dir: place(Path::new(CONF_DIR)) }
}

/// Says which files in the default directories stay, for commands that remove everything else.
pub(super) fn note_of_installed() -> String {
    let files = installed_files(Path::to_owned).unwrap_or_default();
    let names: Vec<String> = files.iter().map(|path| path.display().to_string()).collect();
    match names.is_empty() {
        true => String::new(),
        false => format!(
            "kept {}, so runtimes still call this plugin: `gossamer cni uninstall` removes it\n",
            names.join(", ")
        ),
    }
}
