//! Rules about the source code that the compiler does not check.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A longer file should be split.
const MAX_LINES: usize = 500;
const MAX_WIDTH: usize = 110;

/// The modules of the pure ring, as lib.rs and ARCHITECTURE.md name it.
const PURE: [&str; 8] = ["checksum", "core", "dataplane", "frames", "model", "pods", "rpc", "wire"];

/// Adapters and pure modules that know nothing of the consensus core.
const WITHOUT_CORE: [&str; 7] =
    ["dataplane", "model", "netlink", "pods", "rpc", "store", "transport"];

/// Imports that would make the pure ring impure: IO, clocks, randomness, threads, and the shell.
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

/// The parts of the agent that run in its event loop.
const EVENT_LOOP: [&str; 3] = ["src/agent/handlers", "src/agent/operator", "src/agent/pods"];
/// What may block: it belongs to the threads in `src/agent/workers`.
const BLOCKING: [&str; 16] = [
    "netlink::",
    "Netlink::",
    "Kernel::open",
    "FirewallTable",
    "PodTables",
    "UserRules",
    "Wiring::",
    "sysctl::",
    "files::",
    "fs::read",
    "fs::write",
    "fs::remove",
    "fs::create",
    "fs::metadata",
    "File::open",
    "File::create",
];

/// Returns all Rust files of the project, with their paths below the project's root.
pub(crate) fn sources() -> Vec<(String, String)> {
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

/// Returns the program part of a file: without comments, and without items that only tests have.
pub(crate) fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut of_test = TestItem::default();
    text.lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line.split("//").next().unwrap_or_default()))
        .filter(move |(_, line)| !of_test.includes(line))
}

/// Finds the lines of items with the attribute `#[cfg(test)]` in column 0.
#[derive(Default)]
enum TestItem {
    #[default]
    No,
    Attributes,
    Body,
}

impl TestItem {
    fn includes(&mut self, line: &str) -> bool {
        let line = line.trim_end();
        let (is_included, next) = match self {
            Self::No if line == "#[cfg(test)]" => (true, Self::Attributes),
            Self::No => (false, Self::No),
            Self::Attributes if line.is_empty() || line.starts_with("#[") => {
                (true, Self::Attributes)
            }
            Self::Attributes if line.ends_with([';', '}']) => (true, Self::No),
            Self::Body if ["}", "};", "];"].contains(&line) => (true, Self::No),
            Self::Attributes | Self::Body => (true, Self::Body),
        };
        *self = next;
        is_included
    }
}

/// Returns the files of a module, below src/, and of the submodules that the build without features contains.
fn built_without_features(module: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let file = [format!("{module}.rs"), format!("{module}/mod.rs")]
        .into_iter()
        .find(|file| root.join(file).exists())
        .unwrap_or_else(|| panic!("{module}: no such module"));
    let text = fs::read_to_string(root.join(&file)).expect("UTF-8");
    let submodules = ungated_modules(&text);
    let below = submodules.iter().flat_map(|name| {
        let name = if module == "lib" { name.clone() } else { format!("{module}/{name}") };
        built_without_features(&name)
    });
    [file].into_iter().chain(below).collect()
}

/// Returns the submodules that a file declares without `cfg`.
fn ungated_modules(text: &str) -> Vec<String> {
    let mut modules = Vec::new();
    let mut is_gated = false;
    for line in text.lines() {
        let declared = line.strip_prefix("pub ").unwrap_or(line).strip_prefix("mod ");
        match declared.and_then(|rest| rest.strip_suffix(';')) {
            Some(name) if !is_gated => modules.push(name.to_owned()),
            _ if line.starts_with("#[cfg(") => is_gated = true,
            _ if line.starts_with("#[") => {}
            _ => is_gated = false,
        }
        is_gated &= declared.is_none();
    }
    modules
}

#[test]
fn build_without_features_contains_the_pure_ring_and_nothing_else() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs"));
    assert_eq!(ungated_modules(&lib.expect("UTF-8")), PURE);
    let files = built_without_features("lib");
    let has = |file: &str| files.iter().any(|found| found == file);
    assert!(has("dataplane/paths/path.rs") && has("core/slots/merge.rs") && has("pods/mod.rs"));
    let adapters = ["dataplane/kernel/mod.rs", "dataplane/foreign/mod.rs", "pods/wiring.rs"];
    assert!(!adapters.iter().any(|file| has(file)), "{files:#?}");
}

#[test]
fn adapters_do_not_import_the_consensus_core() {
    let mut found = Vec::new();
    for (name, text) in sources() {
        let Some(below) = name.strip_prefix("src/") else { continue };
        if WITHOUT_CORE.iter().any(|module| below.split(['/', '.']).next() == Some(module)) {
            let uses = |line: &str| {
                line.contains("crate::core") || line.trim_start().starts_with("core::")
            };
            found.extend(code(&text).filter(|(_, line)| uses(line)).map(|at| (name.clone(), at.0)));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn pure_modules_import_no_io_no_clock_and_no_randomness() {
    let mut found = Vec::new();
    let mut looked_at = 0;
    let pure = built_without_features("lib");
    for (name, text) in sources() {
        let Some(below) = name.strip_prefix("src/") else { continue };
        if !pure.iter().any(|pure| pure == below) {
            continue;
        }
        looked_at += 1;
        for (number, line) in code(&text) {
            // The text of an error number is no IO.
            let line = line.replace("std::io::Error::from_raw_os_error(", "");
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
fn event_loop_leaves_netlink_sysctls_and_files_to_threads() {
    let mut found = Vec::new();
    let mut looked_at = 0;
    let of_loop = |name: &String| EVENT_LOOP.iter().any(|part| name.starts_with(part));
    for (name, text) in sources().into_iter().filter(|(name, _)| of_loop(name)) {
        looked_at += 1;
        for (number, line) in code(&text) {
            let blocking = BLOCKING.iter().filter(|word| line.contains(**word));
            found.extend(blocking.map(|word| format!("{name}:{number}: {word}")));
        }
    }
    assert!(looked_at > 20, "the event loop was not found");
    assert!(found.is_empty(), "{found:#?}");
}

/// Files of container runtimes, which are no answers of the API.
const FOREIGN_JSON: [&str; 1] = ["src/cli/cni/lists.rs"];

#[test]
fn commands_read_answers_of_the_api_as_types() {
    let mut found = Vec::new();
    for (name, text) in sources() {
        if !name.starts_with("src/cli/") || FOREIGN_JSON.contains(&name.as_str()) {
            continue;
        }
        for (number, line) in code(&text) {
            let indexes = line.match_indices("[\"").any(|(at, _)| {
                let before = line[..at].chars().next_back();
                before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ')' | ']' | '?'))
            });
            let gets = ["get", "get_mut", "pointer"]
                .iter()
                .any(|call| line.contains(&format!(".{call}(\"")));
            if indexes || gets {
                found.push(format!("{name}:{number}: use the types of src/api"));
            }
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

#[test]
fn code_continues_after_a_test_module_declared_in_another_file() {
    let text = "a\n#[cfg(test)]\nmod tests;\nb // c\n#[cfg(test)]\n#[path = \"d\"]\nmod d {\n    e;\n}\nf\n\
                #[cfg(test)]\nuse g::{\n    h,\n};\ni\n";
    let lines: Vec<_> = code(text).collect();
    assert_eq!(lines, [(1, "a"), (4, "b "), (10, "f"), (15, "i")]);
}
