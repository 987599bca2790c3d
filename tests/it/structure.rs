//! Rules about the imports between the modules of the library.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

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
    let graph = imports().into_iter().map(|(name, files)| (name, files.into_keys().collect()));
    let left = circular(graph.collect());
    assert!(left.is_empty(), "these modules import each other, or one that does: {left:#?}");
}

/// What a path within the library begins with.
const ROOTS: [&str; 3] = ["crate::", "self::", "super::"];
/// Most modules that pass a name on in turn.
const MAX_EXPORTS: usize = 4;

/// Expands one path or group of a `use` declaration into its paths, and returns what follows it.
fn expand<'a>(prefix: &str, text: &'a str, paths: &mut Vec<String>) -> &'a str {
    let end = text.find(|c: char| !(c.is_alphanumeric() || "_:*".contains(c)));
    let (word, mut rest) = text.split_at(end.unwrap_or(text.len()));
    let path = format!("{prefix}{word}");
    if !rest.starts_with('{') {
        paths.push(path.trim_end_matches("::").to_owned());
        let alias = rest.trim_start().strip_prefix("as ").map(str::trim_start);
        return alias.map_or(rest, |alias| alias.trim_start_matches(|c: char| c.is_alphanumeric()));
    }
    loop {
        rest = rest[1..].trim_start();
        if rest.is_empty() || rest.starts_with('}') {
            return rest.get(1..).unwrap_or_default();
        }
        rest = expand(&path, rest, paths).trim_start();
        if let Some(rest) = rest.strip_prefix('}') {
            return rest;
        }
        if !rest.starts_with(',') {
            return rest;
        }
    }
}

/// Returns the module of a file, as a path below the library's root.
fn module_of(below: &str) -> Vec<String> {
    let path = below.trim_end_matches(".rs").trim_end_matches("/mod");
    path.split('/').map(str::to_owned).collect()
}

/// Resolves a path that begins with `crate`, `self` or `super` in a module.
fn resolve(module: &[String], path: &str) -> Vec<String> {
    let mut resolved = module.to_vec();
    for part in path.split("::") {
        match part {
            "crate" => resolved.clear(),
            "self" => {}
            "super" => _ = resolved.pop(),
            name => resolved.push(name.to_owned()),
        }
    }
    resolved
}

/// Returns the names that a module's `use` declarations give to items of other modules, with what they name.
/// Private ones count, because submodules reach them by `super::`.
fn named_again(module: &[String], program: &str) -> Vec<(Vec<String>, Vec<String>)> {
    let mut names = Vec::new();
    for keyword in ["\nuse ", "\npub use ", "\npub(crate) use ", "\npub(super) use "] {
        for (at, _) in program.match_indices(keyword) {
            let mut items = Vec::new();
            expand("", &program[at + keyword.len()..], &mut items);
            for item in items {
                let definition = resolve(module, &item);
                let name = definition.last().cloned();
                let named: Vec<String> = module.iter().cloned().chain(name).collect();
                if named != definition {
                    names.push((named, definition));
                }
            }
        }
    }
    names
}

/// The paths of the library that each module uses, outside of its tests. A path to a name that a module has
/// from another is followed to its definition.
fn used_paths() -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let (mut used, mut exported) = (BTreeMap::new(), BTreeMap::new());
    for (file, text) in sources() {
        let Some(below) = file.strip_prefix("src/") else { continue };
        if below.starts_with("bin/") || below.contains("/tests/") || below.ends_with("tests.rs") {
            continue;
        }
        let module = module_of(below);
        let program: String = code(&text).flat_map(|(_, line)| [line, "\n"]).collect();
        let mut paths = Vec::new();
        for (at, _) in ROOTS.iter().flat_map(|root| program.match_indices(root)) {
            let before = program[..at].chars().next_back();
            if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                expand("", &program[at..], &mut paths);
            }
        }
        exported.extend(named_again(&module, &program));
        let paths: Vec<_> = paths.iter().map(|path| resolve(&module, path)).collect();
        used.insert(module, paths);
    }
    let follow = |mut path: Vec<String>| {
        for _ in 0..MAX_EXPORTS {
            let at = (1..=path.len()).rev().find(|end| exported.contains_key(&path[..*end]));
            let Some(at) = at else { break };
            path = exported[&path[..at]].iter().chain(&path[at..]).cloned().collect();
        }
        path
    };
    let followed = |paths: Vec<_>| paths.into_iter().map(follow).collect();
    used.into_iter().map(|(module, paths)| (module, followed(paths))).collect()
}

/// Returns the modules of a graph that are in a cycle, or import one that is.
fn circular(mut left: BTreeMap<String, BTreeSet<String>>) -> BTreeMap<String, BTreeSet<String>> {
    loop {
        let remaining: BTreeSet<String> = left.keys().cloned().collect();
        left.values_mut().for_each(|names| names.retain(|name| remaining.contains(name)));
        let before = left.len();
        left.retain(|_, names| !names.is_empty());
        if left.len() == before {
            return left;
        }
    }
}

/// The file of the parent, which holds what its submodules share, is not compared.
#[test]
fn submodules_of_a_module_import_each_other_without_cycles() {
    let used = used_paths();
    let parents: BTreeSet<&[String]> =
        used.keys().map(|module| &module[..module.len() - 1]).collect();
    assert!(parents.len() > 30, "the modules were not found");
    let mut found = Vec::new();
    for parent in parents.into_iter().filter(|parent| !parent.is_empty()) {
        let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let part = |path: &[String]| path.strip_prefix(parent)?.first().cloned();
        for (module, paths) in &used {
            let Some(name) = part(module) else { continue };
            let others = paths.iter().filter_map(|path| part(path)).filter(|other| *other != name);
            graph.entry(name.clone()).or_default().extend(others);
        }
        let circular = circular(graph);
        found.extend((!circular.is_empty()).then(|| format!("{}: {circular:?}", parent.join("/"))));
    }
    assert!(found.is_empty(), "these files import each other, or one that does: {found:#?}");
}

#[test]
fn expand_reads_nested_groups_and_aliases() {
    let mut paths = Vec::new();
    expand("", "super::{a::{self, B}, c as d, e::{F}};", &mut paths);
    assert_eq!(paths, ["super::a::self", "super::a::B", "super::c", "super::e::F"]);
    assert_eq!(resolve(&["x".into(), "y".into()], "super::a::self"), ["x", "a"]);
}

#[test]
fn named_again_includes_private_declarations() {
    let module = ["a".to_owned()];
    let program = "\nmod b;\nuse b::C;\npub use super::d::E;\n    use f::G;\n";
    let names: Vec<_> = named_again(&module, program)
        .into_iter()
        .map(|(name, definition)| (name.join("::"), definition.join("::")))
        .collect();
    let expected = [("a::C", "a::b::C"), ("a::E", "d::E")];
    assert_eq!(names, expected.map(|(name, definition)| (name.to_owned(), definition.to_owned())));
}

#[test]
fn only_commands_import_the_agent_and_the_lab() {
    let imports = imports();
    for module in ["agent", "lab"] {
        assert_eq!(importers(&imports, module), ["cli"], "{module}");
    }
}

/// Returns the modules that a cell of the table in ARCHITECTURE.md names, such as `core/{boot,join}`.
fn modules_of(cell: &str) -> Vec<String> {
    let named = cell.split('`').skip(1).step_by(2);
    let expand = |name: &str| match name.split_once('{') {
        None => vec![name.to_owned()],
        Some((before, group)) => {
            let ends = group.trim_end_matches('}').split(',');
            ends.map(|end| format!("{before}{}", end.trim())).collect()
        }
    };
    named.flat_map(expand).collect()
}

#[test]
fn architecture_has_a_row_for_each_module_and_no_other() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/ARCHITECTURE.md")).expect("UTF-8");
    let rows = page.lines().skip_while(|line| !line.starts_with("| module |")).skip(2);
    let cells = rows.map_while(|line| line.strip_prefix("| ")?.split(" |").next());
    let named: Vec<String> = cells.flat_map(modules_of).collect();
    let exists = |name: &str| {
        let path = root.join("src").join(name);
        path.is_dir() || path.with_extension("rs").is_file()
    };
    let unknown: Vec<_> = named.iter().filter(|name| !exists(name)).collect();
    assert!(unknown.is_empty(), "ARCHITECTURE.md names modules that do not exist: {unknown:?}");
    let is_named = |module: &str| named.iter().any(|name| name.split('/').next() == Some(module));
    let modules = fs::read_dir(root.join("src")).expect("a folder").map(|entry| {
        let name = entry.expect("an entry").file_name();
        name.to_string_lossy().trim_end_matches(".rs").to_owned()
    });
    let missing: Vec<_> = modules.filter(|module| module != "lib" && !is_named(module)).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md has no row for these modules: {missing:?}");
}

#[test]
fn imported_reads_groups_and_single_paths() {
    let text = "use crate::{\n    a::{b, c::d},\n    e_f,\n};\nuse crate::g::h; // crate::i\n\
                #[cfg(test)]\nuse crate::j;\n";
    assert_eq!(imported(text).into_iter().collect::<Vec<_>>(), ["a", "e_f", "g"]);
}
