//! `gossamer cni install` and `uninstall`: put the plugin where container runtimes look for it, with
//! `loopback` where there is none, and take both away again.

mod lists;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};

use super::{
    fail, output,
    placed::{PLUGIN_NAME, Taken, expect_directory, put, put_here, take_away},
};
use crate::{
    cni::LOOPBACK,
    store::{PUBLIC, replace},
};
use lists::{Found, List, PORTMAP};

#[derive(Debug, Args)]
pub struct CniArgs {
    #[command(subcommand)]
    command: CniCommand,
}

#[derive(Debug, Subcommand)]
enum CniCommand {
    /// Link this program into the plugins' directory, as loopback too where there is none, and write the
    /// network configuration
    Install(InstallArgs),
    /// Remove what install has put there, and nothing else
    Uninstall(UninstallArgs),
}

#[derive(Debug, Args)]
struct Places {
    /// Where the runtime looks for plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
    bin_dir: PathBuf,
    /// Where it looks for configurations
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIR")]
    conf_dir: PathBuf,
}

#[derive(Debug, Args)]
struct InstallArgs {
    #[command(flatten)]
    places: Places,
    /// Copy this program instead of linking to it: out of a container, for one
    #[arg(long)]
    copy: bool,
    /// Write over a configuration that was changed, another program named gossamer, and a loopback that leads
    /// nowhere
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
struct UninstallArgs {
    #[command(flatten)]
    places: Places,
    /// Remove a configuration that was changed too, and a plugin gossamer that is another program
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
            lines.iter().for_each(|line| _ = output::put(&format!("{line}\n")));
            ExitCode::SUCCESS
        }
        Err(error) => fail(format_args!("{error:#}")),
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
        "{} is a directory, where runtimes read a file: remove it",
        list.path().display()
    );
    let found = list.find();
    let mut done = Vec::new();
    // Installed there it needs no link.
    if program != plugin {
        put_here(&program, &plugin, args.copy, args.force)?;
        let arrow = if args.copy { "=" } else { "->" };
        done.push(format!("{} {arrow} {}", plugin.display(), program.display()));
    }
    done.extend(put_loopback(&bin_dir.join(LOOPBACK), args.force)?);
    let has = |plugin: &str| fs::symlink_metadata(bin_dir.join(plugin)).is_ok();
    if let Found::Changed(why) = &found
        && !args.force
    {
        done.push(format!("{} {why} and stays: --force replaces it", list.path().display()));
        done.extend(list.missing(has).map(|name| {
            format!(
                "no pod can be connected: {} names the plugin {name}, which is not in {}",
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
                "without published ports: there is no {PORTMAP} in {}; with the CNI plugins there (Debian: \
                 containernetworking-plugins), install once more",
                bin_dir.display()
            ));
        }
    }
    done.extend(lists::rivals(conf_dir));
    Ok(done)
}

/// A runtime starts no pod without it. In a container a link that is right outside leads nowhere, so it
/// stays; one to a file beside it is right everywhere.
fn put_loopback(loopback: &Path, force: bool) -> anyhow::Result<Option<String>> {
    let context = || loopback.display().to_string();
    if fs::metadata(loopback).is_ok() {
        return Ok(None);
    }
    match fs::read_link(loopback) {
        Ok(target) if !force => Ok(Some(format!(
            "{} leads nowhere here and stays: it is a link to {}, and runtimes start no pod without that \
             plugin; --force replaces it",
            loopback.display(),
            target.display()
        ))),
        _ => {
            put(Path::new(PLUGIN_NAME), loopback, false).with_context(context)?;
            Ok(Some(format!("{} -> {PLUGIN_NAME}", loopback.display())))
        }
    }
}

/// The configuration first: a runtime must not find it without its plugin.
fn uninstall(args: &UninstallArgs) -> anyhow::Result<Vec<String>> {
    let Places { bin_dir, conf_dir } = &args.places;
    let program = std::env::current_exe().context("the path of this program")?;
    let (plugin, loopback) = (bin_dir.join(PLUGIN_NAME), bin_dir.join(LOOPBACK));
    let mut done = Vec::new();
    let list = List::new(conf_dir)?;
    match list.find() {
        Found::Absent => {}
        Found::Changed(why) if !args.force => {
            done.push(format!("{} {why} and stays: --force removes it", list.path().display()));
        }
        Found::Ours | Found::Changed(_) => {
            let removed = fs::remove_file(list.path());
            removed.with_context(|| list.path().display().to_string())?;
            done.push(format!("removed {}", list.path().display()));
        }
    }
    // Another package's, or a link of the operator's, is not one to this name beside it.
    if fs::read_link(&loopback).is_ok_and(|target| target == Path::new(PLUGIN_NAME)) {
        fs::remove_file(&loopback).with_context(|| loopback.display().to_string())?;
        done.push(format!("removed {}", loopback.display()));
    }
    let taken = take_away(&program, &plugin, args.force);
    match taken.with_context(|| plugin.display().to_string())? {
        Taken::Removed => done.push(format!("removed {}", plugin.display())),
        Taken::Absent => {}
        Taken::Stays(why) => {
            done.push(format!("{} is {why} and stays: --force removes a file", plugin.display()));
        }
    }
    if done.is_empty() {
        let (bin, conf) = (bin_dir.display(), conf_dir.display());
        done.push(format!("nothing of gossamer is in {bin} and {conf}"));
    }
    Ok(done)
}
