//! A support archive with the doctor's findings, the agent's status and the host's tables, but no
//! secrets.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    process::Command,
};

use flate2::{Compression, write::GzEncoder};
use regex_lite::Regex;
use serde_json::Value;

use super::{Examination, Finding};
use crate::{files, model::visible_lines};

/// Files of the archive with the commands whose output they contain. Missing programs are skipped.
const COMMANDS: [(&str, &str); 12] = [
    ("links.txt", "ip -d -s link"),
    ("addresses.txt", "ip address"),
    ("routes.txt", "ip route show table all"),
    ("routes6.txt", "ip -6 route show table all"),
    ("neighbors.txt", "ip neigh"),
    ("fdb.txt", "bridge fdb"),
    ("rules.txt", "ip rule"),
    ("rules6.txt", "ip -6 rule"),
    ("sockets.txt", "ss -lunp"),
    ("nftables.txt", "nft list ruleset"),
    ("sysctls.txt", "sysctl net.ipv4.ip_forward net.ipv4.conf net.ipv6.conf.all"),
    ("kernel.txt", "uname -a"),
];
/// Maximum size of a file in the archive in bytes; the beginning of a longer text is cut off.
const MAX_FILE_BYTES: usize = 4 << 20;
/// Files of the host that are copied into the archive.
const HOST_FILES: [&str; 2] = ["/etc/os-release", "/proc/meminfo"];

/// Writes a `.tar.gz` archive that only its owner can read.
///
/// # Errors
/// Fails with one sentence if the archive exists or cannot be written.
pub fn write(
    path: &Path,
    examination: &Examination,
    findings: &[Finding],
    config: Option<&Path>,
) -> Result<(), String> {
    let fail = |error: io::Error| format!("bundle: {}: {error}", path.display());
    let file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(fail)?;
    pack(file, examination, findings, config).map_err(fail)
}

fn pack(
    file: File,
    examination: &Examination,
    findings: &[Finding],
    config: Option<&Path>,
) -> io::Result<()> {
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    // Everything that looks like a token: `wire/token.rs`.
    let token = Regex::new(r"gsm1\.[A-Za-z2-7]+").map_err(io::Error::other)?;
    let mut add = |name: &str, text: &str| {
        let text = visible_lines(text);
        let text = token.replace_all(&text, "gsm1.REDACTED");
        let from = text.len().saturating_sub(MAX_FILE_BYTES);
        let bytes = text.as_bytes().get(from..).unwrap_or_default();
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        archive.append_data(&mut header, format!("gossamer/{name}"), bytes)
    };
    let pretty = |value: &Value| format!("{value:#}\n");
    add("doctor.json", &pretty(&serde_json::to_value(findings)?))?;
    add("version.txt", concat!(env!("CARGO_PKG_VERSION"), "\n"))?;
    if let Some(agent) = &examination.agent {
        for (name, reply) in &agent.replies {
            add(name, &pretty(reply))?;
        }
    }
    let instance = examination.instance();
    let subnet_file = instance.subnet_file();
    for path in HOST_FILES.iter().map(Path::new).chain([subnet_file.as_path()]) {
        if let Ok(text) = files::read_text(path, files::SMALL) {
            let name = path.display().to_string();
            add(&name.trim_start_matches('/').replace('/', "-"), &text)?;
        }
    }
    if let Some(text) = config.and_then(|path| files::read_text(path, files::SMALL).ok()) {
        add("config.toml", &text)?;
    }
    let log = format!("journalctl -u {} -n 2000 --no-pager", instance.unit());
    for (name, command) in COMMANDS.into_iter().chain([("log.txt", log.as_str())]) {
        let mut words = command.split(' ');
        let Some(program) = words.next() else { continue };
        if let Ok(output) = Command::new(program).args(words).output() {
            let text = [output.stdout, output.stderr].concat();
            add(name, &String::from_utf8_lossy(&text))?;
        }
    }
    archive.into_inner()?.finish()?.sync_all()
}
