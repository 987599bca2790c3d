//! Rules about the imports between the modules of the library.

use std::collections::{BTreeMap, BTreeSet};

use super::tidy::{code, sources};

/// The modules that each module imports, with a file that does so.
type Imports = BTreeMap<String, BTreeMap<String, String>>;

/// Returns the first names of the paths that follow `crate::` in a file.
fn imported(text: &str) -> BTreeSet<String> {
    let program: String = code(text).flat_map(|(_, line)| [line, "\n"]).collect();
    let mut names = BTreeSet::new();
    for (at, _) in program.match_indices("crate::") {
        let path = &program[at + "crate::".len()..];
        match path.strip_prefix('{') {
            Some(group) => names.extend(first_names(group)),
            None => names.extend(first_name(path)),
        }
    }
    names
}

/// Returns the first names of the paths in a group, up to its closing brace.
fn first_names(group: &str) -> impl Iterator<Item = String> {
    let (mut depth, mut items) = (0, vec![String::new()]);
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => items.push(String::new()),
            _ if depth == 0 => items.last_mut().expect("an item").push(c),
            _ => {}
        }
    }
    items.into_iter().filter_map(|item| first_name(item.trim()))
}

/// Returns the name of a module at the beginning of a path.
fn first_name(path: &str) -> Option<String> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let name = path.split(|c| !is_name(c)).next().filter(|name| !name.is_empty());
    name.map(str::to_owned)
}

fn imports() -> Imports {
    let mut imports = Imports::new();
    for (file, text) in sources() {
        let Some(below) = file.strip_prefix("src/") else { continue };
        let module = below.split('/').next().unwrap_or_default().trim_end_matches(".rs");
        let is_root = ["lib", "main", "bin"].contains(&module);
        if is_root || below.contains("/tests/") || below.ends_with("/tests.rs") {
            continue;
        }
        let known = imports.entry(module.to_owned()).or_default();
        for name in imported(&text).into_iter().filter(|name| name != module) {
            known.entry(name).or_insert_with(|| file.clone());
        }
    }
    assert!(imports.len() > 20, "the modules were not found");
    imports
}

/// Returns the modules that import one.
fn importers(imports: &Imports, module: &str) -> Vec<String> {
    let all = imports.iter().filter(|(_, imported)| imported.contains_key(module));
    all.map(|(name, _)| name.clone()).collect()
}

#[test]
fn modules_import_each_other_without_cycles() {
    let mut left = imports();
    loop {
        let remaining: BTreeSet<String> = left.keys().cloned().collect();
        left.values_mut().for_each(|names| names.retain(|name, _| remaining.contains(name)));
        let before = left.len();
        left.retain(|_, names| !names.is_empty());
        if left.len() == before {
            break;
        }
    }
    assert!(left.is_empty(), "these modules import each other, or one that does: {left:#?}");
}

#[test]
fn only_commands_import_the_agent_and_the_lab() {
    let imports = imports();
    for module in ["agent", "lab"] {
        assert_eq!(importers(&imports, module), ["cli"], "{module}");
    }
}

#[test]
fn imported_reads_groups_and_single_paths() {
    let text = "use crate::{\n    a::{b, c::d},\n    e_f,\n};\nuse crate::g::h; // crate::i\n\
                #[cfg(test)]\nuse crate::j;\n";
    assert_eq!(imported(text).into_iter().collect::<Vec<_>>(), ["a", "e_f", "g"]);
}
