//! `gossamer cni install` and `uninstall`, and the same for Podman: what they write to the runtimes'
//! directories, what they remove, and what they print about other files.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::common::program;

/// The two directories of a runtime.
struct RuntimeDirectories {
    dir: tempfile::TempDir,
}

impl RuntimeDirectories {
    fn new() -> Self {
        let this = Self { dir: tempfile::tempdir().expect("a directory") };
        fs::create_dir(this.bin()).expect("made");
        fs::create_dir(this.conf()).expect("made");
        this
    }

    fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }

    fn conf(&self) -> PathBuf {
        self.dir.path().join("net.d")
    }

    /// Runs `gossamer cni`, which must succeed, and returns its output.
    fn cni(&self, verb: &str, more: &[&str]) -> String {
        let mut command = Command::new(program());
        command.args(["cni", verb, "--bin-dir"]).arg(self.bin()).arg("--conf-dir").arg(self.conf());
        let output = command.args(more).output().expect("gossamer runs");
        assert!(output.status.success(), "{verb}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.conf().join(name), text).expect("written");
    }

    /// Returns the names of all files in both directories.
    fn content(&self) -> Vec<String> {
        let mut names: Vec<String> = [self.bin(), self.conf()]
            .iter()
            .flat_map(|directory| fs::read_dir(directory).expect("readable").flatten())
            .map(|entry| entry.file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }
}

fn list(name: &str, plugin: &str) -> String {
    json!({ "cniVersion": "1.0.0", "name": name, "plugins": [{ "type": plugin }] }).to_string()
}

#[test]
fn cni_list_behind_another_one_is_reported_as_ineffective() {
    let directories = RuntimeDirectories::new();
    let first = "the first file of";
    assert!(!directories.cni("install", &[]).contains(first));
    // Runtimes do not read these files.
    for name in ["00-notes.txt", "05-flannel.conflist.bak"] {
        directories.put(name, &list("other", "bridge"));
    }
    // Runtimes read this list after gossamer's.
    directories.put("87-podman.conflist", &list("podman", "bridge"));
    let said = directories.cni("install", &[]);
    assert!(!said.contains(first) && !said.contains("two networks"), "{said}");
    for (name, text, words) in [
        ("09-a.conf", r#"{"name": "nine", "type": "bridge"}"#.to_owned(), "network \"nine\""),
        ("05-flannel.conflist", list("cbr0", "flannel"), "network \"cbr0\""),
        ("01-broken.conflist", "{".to_owned(), "which cannot be read: "),
        ("00-a.json", list("zero", "bridge"), "network \"zero\""),
    ] {
        directories.put(name, &text);
        let said = directories.cni("install", &[]);
        assert!(said.contains(&format!("{name} ({words}")), "{said}");
        assert_eq!(said.matches(first).count(), 1, "{said}");
        fs::remove_file(directories.conf().join(name)).expect("removed");
    }
    directories.put("20-same.conflist", &list("gossamer", "bridge"));
    let said = directories.cni("install", &[]);
    assert!(said.contains("20-same.conflist and 10-gossamer.conflist"), "{said}");
}

#[test]
fn kept_cni_list_that_cannot_work_is_reported_with_the_reason() {
    let directories = RuntimeDirectories::new();
    for (text, words) in [
        ("{".to_owned(), "is not JSON"),
        (String::new(), "is not JSON"),
        (list("gossamer", "bridge"), "does not use the plugin gossamer"),
        (list("gossamer", "bridge"), "uses the plugin bridge, which is not in"),
        (list("mine", "gossamer"), "was changed and was kept"),
    ] {
        directories.put("10-gossamer.conflist", &text);
        let said = directories.cni("install", &[]);
        assert!(said.contains(words) && said.contains("--force replaces it"), "{said}");
        let kept =
            fs::read_to_string(directories.conf().join("10-gossamer.conflist")).expect("read");
        assert_eq!(kept, text);
    }
    assert!(!directories.cni("install", &["--force"]).contains("was kept"));
}

#[test]
fn install_on_an_obstacle_fails_with_a_remedy() {
    let directories = RuntimeDirectories::new();
    let fails = |more: &[&str]| {
        let mut command = Command::new(program());
        command.args(["cni", "install", "--bin-dir"]).arg(directories.bin());
        let output = command.arg("--conf-dir").arg(directories.conf()).args(more).output();
        let output = output.expect("gossamer runs");
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    // A directory in place of the list.
    let list = directories.conf().join("10-gossamer.conflist");
    fs::create_dir(&list).expect("made");
    for force in [&[][..], &["--force"]] {
        let said = fails(force);
        assert!(said.contains("is a directory") && said.contains("remove it"), "{said}");
    }
    fs::remove_dir(&list).expect("removed");
    // A file in place of the directory.
    fs::remove_dir(directories.conf()).expect("removed");
    fs::write(directories.conf(), "").expect("written");
    let said = fails(&[]);
    assert!(said.contains("is not a directory") && said.contains("--conf-dir"), "{said}");
    fs::remove_file(directories.conf()).expect("removed");
    // A program of another package.
    let plugin = directories.bin().join("gossamer");
    fs::write(&plugin, "another's").expect("written");
    let said = fails(&[]);
    assert!(said.contains("another program") && said.contains("--force"), "{said}");
    assert_eq!(fs::read_to_string(&plugin).expect("read"), "another's");
    directories.cni("install", &["--force"]);
    assert!(plugin.is_symlink());
    // An earlier version of gossamer is replaced.
    fs::remove_file(&plugin).expect("removed");
    directories.cni("install", &["--copy"]);
    fs::File::options()
        .append(true)
        .open(&plugin)
        .and_then(|mut file| {
            use std::io::Write as _;
            file.write_all(b"more")
        })
        .expect("written");
    directories.cni("install", &[]);
    assert!(plugin.is_symlink());
}

#[test]
fn dangling_loopback_link_is_reported_and_replaced_only_with_force() {
    let directories = RuntimeDirectories::new();
    let loopback = directories.bin().join("loopback");
    symlink("/nonexistent/loopback", &loopback).expect("a link");
    let said = directories.cni("install", &[]);
    assert!(said.contains("dangling link") && said.contains("/nonexistent/loopback"), "{said}");
    assert_eq!(fs::read_link(&loopback).expect("a link"), Path::new("/nonexistent/loopback"));
    directories.cni("install", &["--force"]);
    assert_eq!(fs::read_link(&loopback).expect("a link"), Path::new("gossamer"));
}

#[test]
fn uninstall_removes_installed_files_only() {
    let directories = RuntimeDirectories::new();
    assert!(directories.cni("uninstall", &[]).contains("gossamer has no files in"));
    fs::write(directories.bin().join("portmap"), "another's").expect("written");
    directories.put("05-flannel.conflist", &list("cbr0", "flannel"));
    let before = directories.content();
    for copy in [&[][..], &["--copy"]] {
        directories.cni("install", copy);
        assert_ne!(directories.content(), before);
        let said = directories.cni("uninstall", &[]);
        assert_eq!(said.matches("removed ").count(), 3, "{said}");
        assert_eq!(directories.content(), before);
    }
    // Files that were changed since the installation, and files that existed before it.
    directories.cni("install", &[]);
    directories.put("10-gossamer.conflist", &list("mine", "gossamer"));
    for name in ["gossamer", "loopback"] {
        fs::remove_file(directories.bin().join(name)).expect("removed");
        fs::write(directories.bin().join(name), "another's").expect("written");
    }
    let changed = directories.content();
    let said = directories.cni("uninstall", &[]);
    assert_eq!(said.matches("was kept: --force").count(), 2, "{said}");
    assert_eq!(directories.content(), changed);
    directories.cni("uninstall", &["--force"]);
    assert_eq!(directories.content(), ["05-flannel.conflist", "loopback", "portmap"]);
}

#[test]
fn podman_driver_is_installed_and_uninstalled() {
    let dir = tempfile::tempdir().expect("a directory");
    let podman = |verb: &str, more: &[&str]| {
        let mut command = Command::new(program());
        let output = command.args(["podman", verb, "--dir"]).arg(dir.path()).args(more).output();
        let output = output.expect("gossamer runs");
        assert!(output.status.success(), "{verb}: {output:?}");
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let driver = dir.path().join("gossamer");
    podman("install", &[]);
    assert!(podman("uninstall", &[]).contains("removed"));
    assert!(driver.symlink_metadata().is_err());
    assert!(podman("uninstall", &[]).contains("gossamer has no files in"));
    fs::write(&driver, "another's").expect("written");
    assert!(podman("uninstall", &[]).contains("was kept"));
    podman("uninstall", &["--force"]);
    assert!(driver.symlink_metadata().is_err());
}
