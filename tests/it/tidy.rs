//! Rules about the source code that the compiler does not check.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A longer file should be split.
const MAX_LINES: usize = 500;
const MAX_WIDTH: usize = 110;

/// The pure modules, below src/.
const PURE: [&str; 7] = [
    "model/",
    "wire/",
    "core/",
    "pods/mod.rs",
    "dataplane/compare.rs",
    "dataplane/desired.rs",
    "dataplane/plan.rs",
];

/// Imports that would make them impure: IO, clocks, randomness, threads, and modules outside the pure
/// ones.
const IMPURE: [&str; 24] = [
    "tokio",
    "quinn",
    "rustls",
    "sled",
    "rtnetlink",
    "netlink::",
    "nix::",
    "socket2",
    "getrandom",
    "std::fs",
    "std::io",
    "std::env",
    "std::process",
    "std::thread",
    "std::sync",
    "UdpSocket",
    "TcpStream",
    "UnixStream",
    "Instant",
    "SystemTime",
    "HashMap",
    "HashSet",
    "rand::rng(",
    "crate::agent",
];

/// Calls that panic, instead of returning an error, if the system cannot create a thread.
const PANICKING: [&str; 4] =
    ["thread::spawn(", "scope.spawn(", "spawn_blocking", "tokio::net::lookup_host"];
/// Parts that no agent runs.
const NO_AGENT: [&str; 4] = ["src/bin/", "src/cli/", "src/lab/", "src/sim/"];

/// Returns all Rust files of the project, with their paths below the project's root.
fn sources() -> Vec<(String, String)> {
    fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).expect("readable").flatten() {
            let path = entry.path();
            if path.is_dir() {
                collect(&path, files);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    ["src", "tests", "benches"].iter().for_each(|part| collect(&root.join(part), &mut files));
    files.sort();
    assert!(files.len() > 40, "the sources were not found");
    files
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(root).expect("below the root").display().to_string();
            (name, fs::read_to_string(path).expect("UTF-8"))
        })
        .collect()
}

/// Returns the program part of a file, without comments and tests.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .take_while(|(_, line)| !line.starts_with("#[cfg(test)]"))
        .map(|(number, line)| (number + 1, line.split("//").next().unwrap_or_default()))
}

#[test]
fn pure_modules_import_no_io_no_clock_and_no_randomness() {
    let mut found = Vec::new();
    let mut looked_at = 0;
    for (name, text) in sources() {
        let Some(below) = name.strip_prefix("src/") else { continue };
        if !PURE.iter().any(|pure| below.starts_with(pure)) || below.ends_with("tests.rs") {
            continue;
        }
        looked_at += 1;
        for (number, line) in code(&text) {
            let impure = IMPURE.iter().filter(|word| line.contains(**word));
            found.extend(impure.map(|word| format!("{name}:{number}: {word}")));
        }
    }
    assert!(looked_at > 20, "the pure modules were not found");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn agent_creates_threads_only_by_calls_that_do_not_panic() {
    let mut found = Vec::new();
    let of_agent = |name: &String| {
        name.starts_with("src/")
            && !name.ends_with("tests.rs")
            && !NO_AGENT.iter().any(|part| name.starts_with(part))
    };
    for (name, text) in sources().into_iter().filter(|(name, _)| of_agent(name)) {
        for (number, line) in code(&text) {
            let panicking = PANICKING.iter().filter(|word| line.contains(**word));
            found.extend(panicking.map(|word| format!("{name}:{number}: {word}")));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn source_files_have_a_description_and_a_limited_size() {
    let mut found = Vec::new();
    for (name, text) in sources() {
        if !text.starts_with("//!") && !name.ends_with("tests.rs") {
            found.push(format!("{name}: does not open with what it is"));
        }
        let lines = text.lines().count();
        if lines > MAX_LINES && !name.ends_with("tests.rs") {
            found.push(format!("{name}: {lines} lines"));
        }
        let wide = text.lines().enumerate().filter(|(_, line)| line.chars().count() > MAX_WIDTH);
        found.extend(wide.map(|(number, _)| format!("{name}:{}: too wide", number + 1)));
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn bincode_is_used_in_one_module_only() {
    let named: Vec<String> = sources()
        .into_iter()
        .filter(|(name, text)| {
            name.starts_with("src/") && code(text).any(|(_, line)| line.contains("bincode"))
        })
        .map(|(name, _)| name)
        .collect();
    assert_eq!(named, ["src/wire/codec.rs"]);
}
