//! `gossamer cni install` and `uninstall`, and those of Podman: what they put into the directories of
//! runtimes, what they take away, and what they say of the rest.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::common::program;

/// The two directories of a runtime.
struct Places {
    dir: tempfile::TempDir,
}

impl Places {
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

    /// What it says; it must not fail.
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

    /// Names of everything in both directories.
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
fn list_that_another_one_precedes_is_said_to_be_without_effect() {
    let places = Places::new();
    let first = "the first file of";
    assert!(!places.cni("install", &[]).contains(first));
    // Runtimes do not read these.
    for name in ["00-notes.txt", "05-flannel.conflist.bak"] {
        places.put(name, &list("other", "bridge"));
    }
    // And take this one after ours.
    places.put("87-podman.conflist", &list("podman", "bridge"));
    let said = places.cni("install", &[]);
    assert!(!said.contains(first) && !said.contains("two networks"), "{said}");
    for (name, text, words) in [
        ("09-a.conf", r#"{"name": "nine", "type": "bridge"}"#.to_owned(), "network \"nine\""),
        ("05-flannel.conflist", list("cbr0", "flannel"), "network \"cbr0\""),
        ("01-broken.conflist", "{".to_owned(), "which cannot be read: "),
        ("00-a.json", list("zero", "bridge"), "network \"zero\""),
    ] {
        places.put(name, &text);
        let said = places.cni("install", &[]);
        assert!(said.contains(&format!("{name} ({words}")), "{said}");
        assert_eq!(said.matches(first).count(), 1, "{said}");
        fs::remove_file(places.conf().join(name)).expect("removed");
    }
    places.put("20-same.conflist", &list("gossamer", "bridge"));
    let said = places.cni("install", &[]);
    assert!(said.contains("20-same.conflist and 10-gossamer.conflist"), "{said}");
}

#[test]
fn list_that_stays_and_cannot_work_is_named_with_the_reason() {
    let places = Places::new();
    for (text, words) in [
        ("{".to_owned(), "is not JSON"),
        (String::new(), "is not JSON"),
        (list("gossamer", "bridge"), "does not use the plugin gossamer"),
        (list("gossamer", "bridge"), "uses the plugin bridge, which is not in"),
        (list("mine", "gossamer"), "was changed and was kept"),
    ] {
        places.put("10-gossamer.conflist", &text);
        let said = places.cni("install", &[]);
        assert!(said.contains(words) && said.contains("--force replaces it"), "{said}");
        let kept = fs::read_to_string(places.conf().join("10-gossamer.conflist")).expect("read");
        assert_eq!(kept, text);
    }
    assert!(!places.cni("install", &["--force"]).contains("was kept"));
}

#[test]
fn what_cannot_be_installed_fails_and_says_what_helps() {
    let places = Places::new();
    let fails = |more: &[&str]| {
        let mut command = Command::new(program());
        command.args(["cni", "install", "--bin-dir"]).arg(places.bin());
        let output = command.arg("--conf-dir").arg(places.conf()).args(more).output();
        let output = output.expect("gossamer runs");
        assert!(!output.status.success(), "{output:?}");
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    // A directory in the place of the list.
    let list = places.conf().join("10-gossamer.conflist");
    fs::create_dir(&list).expect("made");
    for force in [&[][..], &["--force"]] {
        let said = fails(force);
        assert!(said.contains("is a directory") && said.contains("remove it"), "{said}");
    }
    fs::remove_dir(&list).expect("removed");
    // A file in the place of the directory.
    fs::remove_dir(places.conf()).expect("removed");
    fs::write(places.conf(), "").expect("written");
    let said = fails(&[]);
    assert!(said.contains("is not a directory") && said.contains("--conf-dir"), "{said}");
    fs::remove_file(places.conf()).expect("removed");
    // Another's program.
    let plugin = places.bin().join("gossamer");
    fs::write(&plugin, "another's").expect("written");
    let said = fails(&[]);
    assert!(said.contains("another program") && said.contains("--force"), "{said}");
    assert_eq!(fs::read_to_string(&plugin).expect("read"), "another's");
    places.cni("install", &["--force"]);
    assert!(plugin.is_symlink());
    // An earlier version of this one is replaced.
    fs::remove_file(&plugin).expect("removed");
    places.cni("install", &["--copy"]);
    fs::File::options()
        .append(true)
        .open(&plugin)
        .and_then(|mut file| {
            use std::io::Write as _;
            file.write_all(b"more")
        })
        .expect("written");
    places.cni("install", &[]);
    assert!(plugin.is_symlink());
}

#[test]
fn loopback_that_leads_nowhere_is_named_and_replaced_by_force_alone() {
    let places = Places::new();
    let loopback = places.bin().join("loopback");
    symlink("/nonexistent/loopback", &loopback).expect("a link");
    let said = places.cni("install", &[]);
    assert!(said.contains("dangling link") && said.contains("/nonexistent/loopback"), "{said}");
    assert_eq!(fs::read_link(&loopback).expect("a link"), Path::new("/nonexistent/loopback"));
    places.cni("install", &["--force"]);
    assert_eq!(fs::read_link(&loopback).expect("a link"), Path::new("gossamer"));
}

#[test]
fn uninstall_removes_what_install_has_put_there_and_nothing_else() {
    let places = Places::new();
    assert!(places.cni("uninstall", &[]).contains("gossamer has no files in"));
    fs::write(places.bin().join("portmap"), "another's").expect("written");
    places.put("05-flannel.conflist", &list("cbr0", "flannel"));
    let before = places.content();
    for copy in [&[][..], &["--copy"]] {
        places.cni("install", copy);
        assert_ne!(places.content(), before);
        let said = places.cni("uninstall", &[]);
        assert_eq!(said.matches("removed ").count(), 3, "{said}");
        assert_eq!(places.content(), before);
    }
    // What was changed since, and what was there before it.
    places.cni("install", &[]);
    places.put("10-gossamer.conflist", &list("mine", "gossamer"));
    for name in ["gossamer", "loopback"] {
        fs::remove_file(places.bin().join(name)).expect("removed");
        fs::write(places.bin().join(name), "another's").expect("written");
    }
    let changed = places.content();
    let said = places.cni("uninstall", &[]);
    assert_eq!(said.matches("was kept: --force").count(), 2, "{said}");
    assert_eq!(places.content(), changed);
    places.cni("uninstall", &["--force"]);
    assert_eq!(places.content(), ["05-flannel.conflist", "loopback", "portmap"]);
}

#[test]
fn podmans_driver_is_installed_and_uninstalled() {
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
