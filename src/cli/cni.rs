//! `gossamer cni install`: puts the plugin where container runtimes look for it, and `loopback` where there
//! is none.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::Value;

use super::fail;
use crate::{
    cni::LOOPBACK,
    files,
    store::{PUBLIC, replace},
};

/// What a runtime reads.
const CONFLIST: &str = include_str!("../../config/10-gossamer.conflist");
const CONFLIST_NAME: &str = "10-gossamer.conflist";
/// Of this plugin, and what they were in the list of earlier versions: that is no change of an operator's.
const CAPABILITIES: &str = r#"{ "ips": true, "mac": true, "dns": true }"#;
const EARLIER_CAPABILITIES: &str = r#"{ "ips": true }"#;
/// Another plugin that the configuration names.
const PORTMAP: &str = "portmap";
/// As a network configuration names the plugin.
const PLUGIN_NAME: &str = "gossamer";

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
}

#[derive(Debug, Args)]
struct InstallArgs {
    /// Where the runtime looks for plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
    bin_dir: PathBuf,
    /// Where it looks for configurations
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIR")]
    conf_dir: PathBuf,
    /// Copy this program instead of linking to it: out of a container, for one
    #[arg(long)]
    copy: bool,
    /// Write over a configuration that was changed
    #[arg(long)]
    force: bool,
}

pub fn run(args: &CniArgs) -> ExitCode {
    let CniCommand::Install(args) = &args.command;
    match install(args) {
        Ok(lines) => {
            lines.iter().for_each(|line| println!("{line}"));
            ExitCode::SUCCESS
        }
        Err(error) => fail(format_args!("{error:#}")),
    }
}

fn install(args: &InstallArgs) -> anyhow::Result<Vec<String>> {
    let program = std::env::current_exe().context("the path of this program")?;
    let plugin = args.bin_dir.join(PLUGIN_NAME);
    let conflist = args.conf_dir.join(CONFLIST_NAME);
    let present = files::read_text(&conflist, files::SMALL);
    let (whole, without_portmap) = (CONFLIST.to_owned(), without_portmap(CONFLIST)?);
    let earlier = CONFLIST.replace(CAPABILITIES, EARLIER_CAPABILITIES);
    let ours = [&whole, &without_portmap, &earlier, &self::without_portmap(&earlier)?];
    let was_changed = match present {
        Ok(present) => !ours.contains(&&present),
        // What cannot be read is not what was written here.
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    let mut done = Vec::new();
    // Installed there it needs no link.
    if program != plugin {
        put(&program, &plugin, args.copy).with_context(|| plugin.display().to_string())?;
        let arrow = if args.copy { "=" } else { "->" };
        done.push(format!("{} {arrow} {}", plugin.display(), program.display()));
    }
    let loopback = args.bin_dir.join(LOOPBACK);
    // A runtime starts no pod without it. In a container a link that is right outside leads nowhere, but one
    // to a file beside it is right everywhere.
    if fs::symlink_metadata(&loopback).is_err() {
        symlink(PLUGIN_NAME, &loopback).with_context(|| loopback.display().to_string())?;
        done.push(format!("{} -> {PLUGIN_NAME}", loopback.display()));
    }
    if was_changed && !args.force {
        done.push(format!("{} was changed and stays: --force replaces it", conflist.display()));
        return Ok(done);
    }
    let has_portmap = fs::symlink_metadata(args.bin_dir.join(PORTMAP)).is_ok();
    let text = if has_portmap { whole } else { without_portmap };
    replace(&conflist, &text, PUBLIC).with_context(|| conflist.display().to_string())?;
    done.push(conflist.display().to_string());
    if !has_portmap {
        done.push(format!(
            "without published ports: there is no {PORTMAP} in {}; with the CNI plugins there (Debian: \
             containernetworking-plugins), install once more",
            args.bin_dir.display()
        ));
    }
    Ok(done)
}

/// A runtime refuses every pod where one plugin of the list is missing.
fn without_portmap(list: &str) -> anyhow::Result<String> {
    let mut list: Value = serde_json::from_str(list)?;
    if let Some(plugins) = list["plugins"].as_array_mut() {
        plugins.retain(|plugin| plugin["type"] != PORTMAP);
    }
    Ok(format!("{list:#}\n"))
}

/// Readers see the old or the new program, never none.
pub(super) fn put(program: &Path, plugin: &Path, copy: bool) -> io::Result<()> {
    if let Some(directory) = plugin.parent() {
        fs::create_dir_all(directory)?;
    }
    let temporary = plugin.with_extension("new");
    let _ = fs::remove_file(&temporary);
    if copy {
        fs::copy(program, &temporary)?;
    } else {
        symlink(program, &temporary)?;
    }
    fs::rename(&temporary, plugin)
}
