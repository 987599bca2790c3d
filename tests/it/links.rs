//! Links between the pages of the documentation lead to files and headings that exist.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Component, Path, PathBuf},
};

/// Folders with pages, below the project's root.
const FOLDERS: [&str; 4] = ["", "docs", "docs/decisions", "docs/recipes"];

/// Returns the pages, with their paths below the project's root.
fn pages() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = BTreeMap::new();
    for folder in FOLDERS {
        for entry in fs::read_dir(root.join(folder)).expect("a folder of pages") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let text = fs::read_to_string(&path).expect("a page");
                pages.insert(path.strip_prefix(root).expect("below the root").to_owned(), text);
            }
        }
    }
    pages
}

/// Returns the lines outside code blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    text.lines().enumerate().filter_map(move |(number, line)| {
        let fence = line.trim_start().starts_with("```");
        in_code ^= fence;
        (!in_code && !fence).then_some((number + 1, line))
    })
}

/// Returns the anchors of the headings of a page, as GitHub derives them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for (_, line) in prose(text).filter(|(_, line)| line.starts_with('#')) {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let mut number = 0;
        let mut unique = anchor.clone();
        while !anchors.insert(unique.clone()) {
            number += 1;
            unique = format!("{anchor}-{number}");
        }
    }
    anchors
}

/// Returns the targets of the links in a line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target)
}

/// Resolves `..` and `.` without the file system.
fn normalize(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => _ = result.pop(),
            Component::Normal(part) => result.push(part),
            _ => {}
        }
    }
    result
}

#[test]
fn links_lead_to_existing_files_and_headings() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = pages();
    let (mut broken, mut count) = (Vec::new(), 0);
    for (path, text) in &pages {
        // A link may be wrapped inside its text, but not inside its target.
        for (number, line) in prose(text) {
            for target in links(line).filter(|target| !target.contains("://")) {
                count += 1;
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                let folder = path.parent().expect("a folder");
                let file =
                    if file.is_empty() { path.clone() } else { normalize(&folder.join(file)) };
                let exists = if anchor.is_empty() {
                    root.join(&file).exists()
                } else {
                    pages.get(&file).is_some_and(|page| anchors(page).contains(anchor))
                };
                if !exists {
                    broken.push(format!("{}:{number}: {target}", path.display()));
                }
            }
        }
    }
    assert!(count > 200, "the links were not found");
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_page_of_the_documentation_is_linked_from_another() {
    let pages = pages();
    let mut linked = BTreeSet::new();
    for (path, text) in &pages {
        for target in prose(text).flat_map(|(_, line)| links(line)) {
            let file = target.split('#').next().unwrap_or_default();
            let file = normalize(&path.parent().expect("a folder").join(file));
            if file != *path {
                linked.insert(file);
            }
        }
    }
    let wanted = pages.keys().filter(|path| path.starts_with("docs"));
    let missing: Vec<_> = wanted.filter(|path| !linked.contains(*path)).collect();
    // The README links the folder of the decisions.
    let missing: Vec<_> =
        missing.into_iter().filter(|path| !path.starts_with("docs/decisions")).collect();
    assert!(missing.is_empty(), "{missing:#?}");
}
