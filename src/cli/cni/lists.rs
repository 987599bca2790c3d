//! The list of plugins that is installed, and the other configurations beside it, of which a runtime may take
//! one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::PLUGIN_NAME;
use crate::files;

/// What a runtime reads.
const CONFLIST: &str = include_str!("../../../config/10-gossamer.conflist");
const CONFLIST_NAME: &str = "10-gossamer.conflist";
/// Of this plugin, and what they were in the list of earlier versions: that is no change of an operator's.
const CAPABILITIES: &str = r#"{ "ips": true, "mac": true, "dns": true }"#;
const EARLIER_CAPABILITIES: &str = r#"{ "ips": true }"#;
/// Another plugin that the list names.
pub const PORTMAP: &str = "portmap";
/// How the names of files end that runtimes read (libcni, `ConfFiles`).
const ENDINGS: [&str; 3] = ["conf", "conflist", "json"];

/// The list, at its place.
pub struct List {
    path: PathBuf,
    whole: String,
    without_portmap: String,
    /// Of earlier versions.
    earlier: [String; 2],
}

/// What is at the place of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Absent,
    /// As this version or an earlier one writes it.
    Ours,
    /// Something else; what, as the rest of a sentence.
    Changed(String),
}

impl List {
    pub fn new(directory: &Path) -> anyhow::Result<Self> {
        let earlier = CONFLIST.replace(CAPABILITIES, EARLIER_CAPABILITIES);
        Ok(Self {
            path: directory.join(CONFLIST_NAME),
            whole: CONFLIST.to_owned(),
            without_portmap: without_portmap(CONFLIST)?,
            earlier: [without_portmap(&earlier)?, earlier],
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A runtime refuses every pod where one plugin of the list is missing.
    pub fn text(&self, has_portmap: bool) -> &str {
        if has_portmap { &self.whole } else { &self.without_portmap }
    }

    pub fn find(&self) -> Found {
        let present = match files::read_text(&self.path, files::SMALL) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Found::Absent,
            Err(error) => return Found::Changed(format!("cannot be read ({error})")),
            Ok(present) => present,
        };
        if [&self.whole, &self.without_portmap]
            .into_iter()
            .chain(&self.earlier)
            .any(|text| *text == present)
        {
            return Found::Ours;
        }
        Found::Changed(match serde_json::from_str::<Value>(&present) {
            Err(error) => format!("is no JSON, so that no runtime can read it ({error}),"),
            Ok(list) if plugins(&list).any(|name| name == PLUGIN_NAME) => "was changed".to_owned(),
            Ok(_) => format!("was changed, does not name the plugin {PLUGIN_NAME},"),
        })
    }

    /// Plugins that the list at the place names and that are not there.
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

/// Other configurations that keep runtimes from this one, as sentences.
pub fn rivals(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let is_read = |name: &String| {
        let ending = Path::new(name).extension().and_then(|ending| ending.to_str());
        ending.is_some_and(|ending| ENDINGS.contains(&ending)) && !directory.join(name).is_dir()
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
            "pods are not connected by gossamer yet: containerd and CRI-O take the first file of {} by its \
             name, which is {first} ({what}): remove it, or give it a name behind {CONFLIST_NAME}",
            directory.display()
        ));
    }
    let own = network(&CONFLIST_NAME.to_owned()).unwrap_or_default();
    let others = names.iter().filter(|name| *name != CONFLIST_NAME);
    let same = others.filter(|name| !own.is_empty() && network(name).is_ok_and(|name| name == own));
    found.extend(same.map(|name| {
        format!("two networks are called {own:?}: {name} and {CONFLIST_NAME}: remove or rename one")
    }));
    found
}
