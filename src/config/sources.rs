//! Merges the settings of flags, environment and files. Nothing is checked here.

use std::path::{Path, PathBuf};

use super::{ConfigError, Instance, Settings, net_conf, unknown, unreadable};
use crate::files;

/// Path that stands for no settings file.
pub const NO_FILE: &str = "/dev/null";

impl Settings {
    /// Returns the settings file to read: the given one, or else the instance's if it exists.
    pub fn file(&self, given: Option<&Path>) -> Option<PathBuf> {
        if let Some(path) = given {
            return (path != Path::new(NO_FILE)).then(|| path.to_owned());
        }
        let instance: Instance = self.instance.as_deref().unwrap_or_default().parse().ok()?;
        Some(instance.settings_file()).filter(|path| path.exists())
    }

    /// Adds the settings of the TOML file and then those of `net_config`, where flags and environment set
    /// none.
    ///
    /// # Errors
    /// Fails if one of the files cannot be read or parsed.
    pub fn complete(self, file: Option<&Path>) -> Result<Self, ConfigError> {
        let from_file = match file {
            Some(path) => Self::from_toml(path)?,
            None => Self::default(),
        };
        let merged = self.or(from_file);
        match merged.net_config.clone() {
            Some(path) => {
                let fallback = net_conf::read(&path)?;
                Ok(merged.or(fallback))
            }
            None => Ok(merged),
        }
    }

    /// Reads the TOML file alone, without environment and `net_config`.
    fn from_toml(path: &Path) -> Result<Self, ConfigError> {
        let text = files::read_text(path, files::SMALL);
        Self::parse(path, &text.map_err(|e| unreadable(&format!("config {}", path.display()), &e))?)
    }

    /// Parses the text of a TOML file.
    ///
    /// # Errors
    /// Fails if a setting is unknown or its value is invalid.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let field = || format!("config {}", path.display());
        toml::from_str(text).map_err(|error| unknown::explain(&field(), text, &error))
    }
}
