//! The systemd unit of the agent: the package's, or one that `init` and `join` write.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};

use super::{Options, say};
use crate::{
    config::Instance,
    files::{PUBLIC, replace},
};

/// The unit of the package.
const PACKAGED_UNIT: &str = include_str!("../../../config/gossamer.service");
/// First line of a unit that this program wrote.
const MARK: &str = "# Written by gossamer; `gossamer uninstall` removes it.";
/// Directory of units that administrators write.
const OWN_DIRECTORY: &str = "/etc/systemd/system";
/// Directories of units, in systemd's order.
const UNIT_DIRECTORIES: [&str; 5] = [
    OWN_DIRECTORY,
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
];
/// Directories that the unit hides from its program (`ProtectHome`, `PrivateTmp`).
const HIDDEN_DIRECTORIES: [&str; 5] = ["/home", "/root", "/run/user", "/tmp", "/var/tmp"];

/// systemd on the host to set up, and the agent's unit.
pub(super) struct Systemd {
    unit: String,
    /// The root directory, if that is not this system's.
    root: Option<PathBuf>,
    /// The unit's file, if there is one.
    file: Option<PathBuf>,
    /// The instance whose agent the unit runs.
    directory: String,
}

impl Systemd {
    /// Returns `None` if the host is not run by systemd.
    ///
    /// # Errors
    /// Fails if a file cannot be read.
    pub(super) fn find(options: &Options, instance: &Instance) -> anyhow::Result<Option<Self>> {
        // sd_booted(3); an image is not running.
        let marks = match options.root {
            Some(_) => &["/usr/lib/systemd/system", "/lib/systemd/system"][..],
            None => &["/run/systemd/system"],
        };
        if !marks.iter().any(|mark| options.place(Path::new(mark)).is_dir()) {
            return Ok(None);
        }
        let unit = instance.unit();
        let files = UNIT_DIRECTORIES.iter().map(|dir| options.place(Path::new(dir)).join(&unit));
        let file = files.into_iter().find(|file| file.exists());
        let (root, directory) = (options.root.clone(), instance.directory());
        Ok(Some(Self { unit, root, file, directory }))
    }

    pub(super) fn unit(&self) -> &str {
        &self.unit
    }

    /// Returns the file of the unit, if this program wrote it.
    pub(super) fn own_file(&self) -> Option<&Path> {
        let file = self.file.as_deref()?;
        fs::read_to_string(file).ok()?.starts_with(MARK).then_some(file)
    }

    /// Returns whether there is a unit.
    pub(super) const fn has_unit(&self) -> bool {
        self.file.is_some()
    }

    /// Returns whether the unit's agent runs.
    pub(super) fn is_active(&self) -> bool {
        self.root.is_none() && self.systemctl(&["is-active", "--quiet", &self.unit]).is_ok()
    }

    /// Installs the unit if there is none, enables it and starts it. `changed`: the settings have changed.
    ///
    /// # Errors
    /// Fails if the unit cannot be written or started.
    pub(super) fn start(
        &self,
        options: &Options,
        settings: &Path,
        changed: bool,
    ) -> anyhow::Result<()> {
        let verb = |done, planned| if options.dry_run { planned } else { done };
        if self.file.is_none() || self.own_file().is_some() {
            let program = std::env::current_exe().context("the path of this program")?;
            let text = self.unit_text(&program, settings)?;
            let path = Path::new(OWN_DIRECTORY).join(&self.unit);
            let place = options.place(&path);
            if fs::read_to_string(&place).ok().as_deref() != Some(&text) {
                if !options.dry_run {
                    replace(&place, &text, PUBLIC & 0o644)
                        .with_context(|| place.display().to_string())?;
                    if self.root.is_none() {
                        self.systemctl(&["daemon-reload"])?;
                    }
                }
                say(verb("wrote", "would write"), &path.display());
            }
        }
        let was_active = !options.dry_run && self.is_active();
        let mut commands = vec![vec!["enable", "--now", &self.unit]];
        if self.root.is_some() {
            commands = vec![vec!["enable", &self.unit]];
        } else if was_active && changed {
            commands.push(vec!["restart", &self.unit]);
        }
        for arguments in commands {
            if !options.dry_run {
                self.systemctl(&arguments)?;
            }
            say(verb("ran", "would run"), &format_args!("systemctl {}", arguments.join(" ")));
        }
        Ok(())
    }

    /// Stops and disables the unit, and removes it if this program wrote it.
    ///
    /// # Errors
    /// Fails if systemd refuses, or if the file cannot be removed.
    pub(super) fn stop(&self) -> anyhow::Result<()> {
        if self.root.is_none() {
            self.systemctl(&["disable", "--now", &self.unit])?;
        } else {
            self.systemctl(&["disable", &self.unit])?;
        }
        if let Some(file) = self.own_file() {
            fs::remove_file(file).with_context(|| file.display().to_string())?;
            if self.root.is_none() {
                self.systemctl(&["daemon-reload"])?;
            }
        }
        Ok(())
    }

    /// Returns the unit for a program and a settings file.
    ///
    /// # Errors
    /// Fails if the unit could not see the program.
    fn unit_text(&self, program: &Path, settings: &Path) -> anyhow::Result<String> {
        let shown = program.display();
        let hidden = HIDDEN_DIRECTORIES.iter().find(|hidden| program.starts_with(hidden));
        if let Some(hidden) = hidden {
            anyhow::bail!(
                "a service cannot run a program in {hidden}: run `install -m 755 {shown} \
                 /usr/local/bin/gossamer`, and then this command with /usr/local/bin/gossamer"
            );
        }
        ensure!(!shown.to_string().contains(char::is_whitespace), "{shown}: a path with spaces");
        let command = format!("ExecStart={shown} agent --config {}", settings.display());
        let line = |line: &str| {
            let directory = format!("Directory={}", self.directory);
            match line {
                _ if line.starts_with("ExecStart=") => command.clone(),
                "StateDirectory=gossamer" => format!("State{directory}"),
                "RuntimeDirectory=gossamer" => format!("Runtime{directory}"),
                other => other.to_owned(),
            }
        };
        let lines: Vec<String> = PACKAGED_UNIT.lines().map(line).collect();
        Ok(format!("{MARK}\n{}\n", lines.join("\n")))
    }

    fn systemctl(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new("systemctl");
        if let Some(root) = &self.root {
            command.arg(format!("--root={}", root.display()));
        }
        let output = match command.args(arguments).output() {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.root.is_some() => {
                anyhow::bail!(
                    "systemctl is not installed here: in that system, run systemctl enable {}",
                    self.unit
                )
            }
            output => output.context("systemctl")?,
        };
        ensure!(
            output.status.success(),
            "systemctl {}: {} (`journalctl -u {}` may say more)",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim(),
            self.unit
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn systemd(directory: &str) -> Systemd {
        let unit = format!("{directory}.service");
        Systemd { unit, root: None, file: None, directory: directory.to_owned() }
    }

    #[test]
    fn unit_text_names_program_settings_and_directories_of_the_instance() {
        let text = systemd("gossamer-blue")
            .unit_text(Path::new("/usr/local/bin/gossamer"), Path::new("/etc/gossamer/blue.toml"))
            .expect("visible");
        for line in [
            "ExecStart=/usr/local/bin/gossamer agent --config /etc/gossamer/blue.toml",
            "StateDirectory=gossamer-blue",
            "RuntimeDirectory=gossamer-blue",
            "WantedBy=multi-user.target",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        assert!(text.starts_with(MARK), "{text}");
    }

    #[test]
    fn unit_text_program_in_a_hidden_directory_is_refused_with_the_remedy() {
        let error = systemd("gossamer")
            .unit_text(Path::new("/root/gossamer"), Path::new("/etc/gossamer/gossamer.toml"))
            .expect_err("hidden")
            .to_string();
        assert!(error.contains("install -m 755 /root/gossamer /usr/local/bin"), "{error}");
    }
}
