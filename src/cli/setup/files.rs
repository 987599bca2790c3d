//! The settings file that `init` and `join` extend.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use toml::{Table, Value};

use crate::{
    config::{Config, Settings},
    files,
    wire::Token,
};

/// First line of a new settings file.
const HEADER: &str = "# Settings of gossamer. `gossamer agent --help` lists them all.\n";

/// The settings file: what it contains, and what is to be added.
pub(super) struct SettingsFile {
    path: PathBuf,
    text: String,
    settings: Settings,
    added: Table,
}

impl SettingsFile {
    /// Reads the file; one that does not exist has no settings.
    ///
    /// # Errors
    /// Fails if the file cannot be read or has an invalid setting.
    pub(super) fn read(path: &Path) -> anyhow::Result<Self> {
        let text = match files::read_text(path, files::SMALL) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => HEADER.to_owned(),
            text => text.with_context(|| path.display().to_string())?,
        };
        let settings = Settings::parse(path, &text)?;
        Ok(Self { path: path.to_owned(), text, settings, added: Table::new() })
    }

    /// Returns the value of `set_sysctls`.
    pub(super) const fn set_sysctls(&self) -> Option<bool> {
        self.settings.set_sysctls
    }

    /// Returns whether the file created a cluster before settings were added.
    pub(super) fn created(&self) -> bool {
        self.settings.init == Some(true)
    }

    /// Fails if the file creates a cluster and the host is to join one, or the other way around.
    pub(super) fn require_same_purpose(&self, wanted: &Settings) -> anyhow::Result<()> {
        let (file, path) = (&self.settings, self.path.display());
        let joins = file.token.is_some() || file.token_file.is_some() || !file.join.is_empty();
        let creates = file.init == Some(true);
        let hint = "run `gossamer uninstall` first, or edit that file";
        if wanted.init == Some(true) {
            ensure!(creates || !joins, "{path} lets this host join a cluster: {hint}");
        } else {
            ensure!(!creates, "{path} lets this host create a cluster (init = true): {hint}");
        }
        Ok(())
    }

    /// Adds the settings that the file lacks. Addresses to join through replace those in the file, because
    /// they may have been wrong.
    ///
    /// # Errors
    /// Fails if the file has another value of a setting.
    pub(super) fn add(&mut self, wanted: &Settings) -> anyhow::Result<()> {
        let present = Table::try_from(&self.settings)?;
        for (key, value) in Table::try_from(wanted)? {
            match present.get(&key) {
                None => _ = self.added.insert(key, value),
                Some(present) if *present == value => {}
                Some(_) if key == "join" => {
                    self.text = without_setting(&self.text, &key);
                    self.added.insert(key, value);
                }
                Some(present) => bail!(
                    "{} has {key} = {present}, not {value}: {}",
                    self.path.display(),
                    match key.as_str() {
                        // `join TOKEN` sets it without an option.
                        "token_file" => "put the token into that file, or remove the setting there",
                        _ => "edit that file, or leave the option out",
                    }
                ),
            }
        }
        if !self.added.is_empty() {
            // An operator may have removed the last end of line.
            let end = if self.text.is_empty() || self.text.ends_with('\n') { "" } else { "\n" };
            self.text = format!("{}{end}{}", self.text, self.lines());
        }
        Ok(())
    }

    /// Checks all settings of the file as the agent does.
    ///
    /// # Errors
    /// Fails with the first setting that is invalid or contradicts another one.
    pub(super) fn check(&self, token: Option<&Token>) -> anyhow::Result<Config> {
        let mut settings: Settings = toml::from_str(&self.text)?;
        // The token file may not exist yet.
        if let Some(token) = token {
            (settings.token, settings.token_file) = (Some(token.to_string()), None);
        }
        Ok(settings.complete(None)?.check()?)
    }

    /// Returns the new content of the file.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Returns the added lines; `None` if there are none.
    pub(super) fn added(&self) -> Option<String> {
        (!self.added.is_empty()).then(|| self.lines())
    }

    fn lines(&self) -> String {
        let line = |(key, value): (&String, &Value)| format!("{key} = {value}\n");
        self.added.iter().map(line).collect()
    }
}

/// Returns the text of a settings file without one setting, which may span several lines.
fn without_setting(text: &str, key: &str) -> String {
    let begins = |line: &str| {
        let rest = line.trim_start().strip_prefix(key);
        rest.is_some_and(|rest| rest.trim_start().starts_with('='))
    };
    let mut kept = String::new();
    let mut removed = String::new();
    for line in text.split_inclusive('\n') {
        if removed.is_empty() && !begins(line) {
            kept.push_str(line);
            continue;
        }
        removed.push_str(line);
        // An unfinished list continues in the next line.
        if toml::from_str::<Table>(&removed).is_ok() {
            removed.clear();
        }
    }
    kept
}

/// Makes all paths in the settings absolute: an agent has another working directory.
///
/// # Errors
/// Fails if this process has no working directory.
pub(super) fn make_paths_absolute(settings: &mut Settings) -> anyhow::Result<()> {
    let paths = [
        &mut settings.state_dir,
        &mut settings.socket,
        &mut settings.subnet_file,
        &mut settings.pod_cidr_file,
        &mut settings.docker_plugin,
        &mut settings.net_config,
    ];
    for path in paths.into_iter().flatten() {
        *path = std::path::absolute(&path).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> SettingsFile {
        let settings = toml::from_str(text).expect("valid");
        let (path, added) = ("/etc/gossamer/gossamer.toml".into(), Table::new());
        SettingsFile { path, text: text.to_owned(), settings, added }
    }

    #[test]
    fn add_keeps_comments_and_appends_only_what_is_missing() {
        let mut file = file("# mtu = 1\nvni = 7");
        let wanted = Settings {
            init: Some(true),
            vni: Some(7),
            network: "10.9.0.0/16".parse().ok(),
            join: vec!["a".to_owned()],
            ..Settings::default()
        };
        file.add(&wanted).expect("no conflict");
        let added = "init = true\njoin = [\"a\"]\nnetwork = \"10.9.0.0/16\"\n";
        assert_eq!(file.added().as_deref(), Some(added));
        assert_eq!(file.text(), format!("# mtu = 1\nvni = 7\n{added}"));
    }

    #[test]
    fn add_addresses_to_join_through_replaces_those_in_the_file() {
        let text = "# to join\nmtu = 1400\njoin = [\n  \"10.0.0.1\", # old\n  \"edge:9000\",\n]\nvni = 7\n";
        let mut file = file(text);
        let join = vec!["10.0.0.2".to_owned()];
        file.add(&Settings { join, ..Settings::default() }).expect("no conflict");
        assert_eq!(file.text(), "# to join\nmtu = 1400\nvni = 7\njoin = [\"10.0.0.2\"]\n");
        assert_eq!(file.added().as_deref(), Some("join = [\"10.0.0.2\"]\n"));
    }

    #[test]
    fn add_setting_with_another_value_is_refused_with_both() {
        let error = file("mtu = 1400")
            .add(&Settings { mtu: Some(1450), ..Settings::default() })
            .expect_err("differs")
            .to_string();
        assert!(error.contains("gossamer.toml has mtu = 1400, not 1450"), "{error}");
    }

    #[test]
    fn every_setting_of_the_shipped_example_survives_writing_and_reading() {
        for sample in crate::config::samples() {
            let text = String::from_utf8(sample).expect("UTF-8");
            let wanted: Settings = toml::from_str(&text).expect("valid");
            let mut file = file("");
            file.add(&wanted).expect("no conflict");
            assert_eq!(toml::from_str::<Settings>(file.text()).expect("valid"), wanted);
        }
    }
}
