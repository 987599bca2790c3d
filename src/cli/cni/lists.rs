//! The network configuration list that `cni install` writes, and other configurations beside it that a
//! runtime may use instead.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::PLUGIN_NAME;
use crate::files;

/// The configuration list, as the repository has it.
const CONFLIST: &str = include_str!("../../../config/10-gossamer.conflist");
const CONFLIST_NAME: &str = "10-gossamer.conflist";
/// The plugin's capabilities in the current list, and in the list of earlier versions. A list with the
/// latter is not a modification by the operator.
const CAPABILITIES: &str = r#"{ "ips": true, "mac": true, "dns": true }"#;
const EARLIER_CAPABILITIES: &str = r#"{ "ips": true }"#;
/// File name of the list.
/// The other plugin that the list uses; it publishes ports.
pub const PORTMAP: &str = "portmap";
/// Extensions of the files that runtimes read (libcni, `ConfFiles`).
const CONFIG_EXTENSIONS: [&str; 3] = ["conf", "conflist", "json"];

/// The configuration list at its path.
pub struct List {
    path: PathBuf,
    full: String,
    without_portmap: String,
    /// The two forms of the list in earlier versions.
    earlier_forms: [String; 2],
}

/// State of the file at the list's path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InstalledList {
    Absent,
    /// Written by this version or an earlier one, and not modified.
    Unmodified,
    /// Something else. The text continues a sentence that begins with the path.
    Modified(String),
}

impl List {
    pub fn new(directory: &Path) -> anyhow::Result<Self> {
        let earlier = CONFLIST.replace(CAPABILITIES, EARLIER_CAPABILITIES);
        Ok(Self {
            path: directory.join(CONFLIST_NAME),
            full: CONFLIST.to_owned(),
            without_portmap: without_portmap(CONFLIST)?,
            earlier_forms: [without_portmap(&earlier)?, earlier],
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the list to write, without `portmap` if that is not installed: a runtime refuses every pod
    /// if one plugin of the list is missing.
    pub fn text(&self, has_portmap: bool) -> &str {
        if has_portmap { &self.full } else { &self.without_portmap }
    }

    pub fn inspect(&self) -> InstalledList {
        let present = match files::read_text(&self.path, files::SMALL) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return InstalledList::Absent,
            Err(error) => return InstalledList::Modified(format!("cannot be read ({error})")),
            Ok(present) => present,
        };
        if [&self.full, &self.without_portmap]
            .into_iter()
            .chain(&self.earlier_forms)
            .any(|text| *text == present)
        {
            return InstalledList::Unmodified;
        }
        InstalledList::Modified(match serde_json::from_str::<Value>(&present) {
            Err(error) => format!("is not JSON, so no runtime can read it ({error}),"),
            Ok(list) if plugins(&list).any(|name| name == PLUGIN_NAME) => "was changed".to_owned(),
            Ok(_) => format!("was changed, does not use the plugin {PLUGIN_NAME},"),
        })
    }

    /// Returns the plugins that the file on disk uses and that `has` does not find.
    pub fn missing(&self, has: impl Fn(&str) -> bool) -> impl Iterator<Item = String> {
        let text = files::read_text(&self.path, files::SMALL).unwrap_or_default();
        let list: Value = serde_json::from_str(&text).unwrap_or_default();
        let missing: Vec<String> =
            plugins(&list).filter(|name| !has(name)).map(str::to_owned).collect();
        missing.into_iter()
    }
}

fn plugins(list: &Value) -> impl Iterator<Item = &str> {
    let plugins = list["plugins"].as_array().into_iter().flatten();
    plugins.filter_map(|plugin| plugin["type"].as_str())
}

fn without_portmap(list: &str) -> anyhow::Result<String> {
    let mut list: Value = serde_json::from_str(list)?;
    if let Some(plugins) = list["plugins"].as_array_mut() {
        plugins.retain(|plugin| plugin["type"] != PORTMAP);
    }
    Ok(format!("{list:#}\n"))
}

/// Returns a message for each configuration that keeps runtimes from using this one.
pub fn conflicting_configurations(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let is_read = |name: &String| {
        let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
        ending.is_some_and(|ending| CONFIG_EXTENSIONS.contains(&ending))
            && !directory.join(name).is_dir()
    };
    let mut names: Vec<String> = names.filter(is_read).collect();
    names.sort();
    let network = |name: &String| {
        let text = files::read_text(&directory.join(name), files::SMALL);
        let text = text.map_err(|error| error.to_string())?;
        let list: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        Ok::<_, String>(list["name"].as_str().unwrap_or_default().to_owned())
    };
    let mut found = Vec::new();
    if let Some(first) = names.first().filter(|name| *name != CONFLIST_NAME) {
        let what = match network(first) {
            Ok(name) => format!("network {name:?}"),
            Err(error) => format!("which cannot be read: {error}"),
        };
        found.push(format!(
            "gossamer does not connect pods yet: containerd and CRI-O use the first file of {} in order of \
             names, which is {first} ({what}): remove it, or rename it to sort after {CONFLIST_NAME}",
            directory.display()
        ));
    }
    let own = network(&CONFLIST_NAME.to_owned()).unwrap_or_default();
    let others = names.iter().filter(|name| *name != CONFLIST_NAME);
    let same = others.filter(|name| !own.is_empty() && network(name).is_ok_and(|name| name == own));
    found.extend(same.map(|name| {
        format!("two networks have the name {own:?}, in {name} and {CONFLIST_NAME}: remove or rename one")
    }));
    found
}
