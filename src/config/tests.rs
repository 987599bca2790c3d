//! Tests of merging and checking settings.

use std::path::Path;

use super::*;

fn with_toml(flags: Settings, text: &str) -> Result<Settings, ConfigError> {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("gossamer.toml");
    fs::write(&path, text).expect("write");
    flags.complete(Some(&path))
}

fn problem(settings: Settings) -> String {
    settings.check().expect_err("must be refused").to_string()
}

#[test]
fn complete_flag_takes_precedence_over_file_and_file_over_default() {
    let flags = Settings { vni: Some(7), ..Settings::default() };
    let merged = with_toml(flags, "vni = 9\nmtu = 1400\njoin = ['a']").expect("valid");
    let config = merged.check().expect("valid");
    assert_eq!(config.wish.vni, Some(7));
    assert_eq!(config.mtu, Some(1400));
    assert_eq!(config.seeds, ["a:8473"]);
    assert_eq!(config.listen, None);
}

#[test]
fn shipped_example_is_valid_and_has_every_setting() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/gossamer.toml");
    Settings::default().complete(Some(&path)).expect("valid").check().expect("usable");
    let text = fs::read_to_string(path).expect("read");
    // Each commented-out setting must be known and have a value of its type.
    for line in text.lines().filter_map(|line| line.strip_prefix("# ")) {
        if line.split_once(" = ").is_some_and(|(key, _)| !key.contains(' ')) {
            toml::from_str::<Settings>(line).expect(line);
        }
    }
    let command = <Settings as clap::Args>::augment_args(clap::Command::new("test"));
    for argument in command.get_arguments() {
        let name = argument.get_id().as_str();
        assert!(text.contains(&format!("{name} = ")), "{name} is missing from the example");
    }
}

#[test]
fn from_toml_unknown_key_error_has_key_and_line() {
    let error = with_toml(Settings::default(), "vni = 1\nvnii = 2").expect_err("unknown key");
    let error = error.to_string();
    assert!(error.contains("vnii") && error.contains("line 2"), "{error}");
}

#[test]
fn check_invalid_setting_error_names_it() {
    let base = Settings::default;
    let voting = |after: &str, voters: &[&str]| Settings {
        forget_after: Some(after.to_owned()),
        voters: voters.iter().map(ToString::to_string).collect(),
        ..base()
    };
    let preferring = |text: &str, init| Settings {
        prefer_subnet: text.parse().ok(),
        init: Some(init),
        ..base()
    };
    let seed = |text: &str| Settings { join: vec![text.to_owned()], ..base() };
    for (settings, words) in [
        (Settings { init: Some(true), ..seed("a") }, "use only one of the two"),
        (Settings { network: "10.42.0.0/29".parse().ok(), ..base() }, "too small"),
        (Settings { subnet_len: Some(8), ..base() }, "subnet_len 8"),
        (Settings { vni: Some(1 << 24), ..base() }, "vni: 16777216"),
        (Settings { vxlan_port: Some(0), ..base() }, "vxlan_port"),
        (Settings { mtu: Some(100), ..base() }, "mtu: 100"),
        (voting("soon", &["a", "b", "c"]), "forget_after: \"soon\""),
        (voting("10s", &["a", "b", "c"]), "forget_after: 10s is too short"),
        (voting("12h", &["a", "b"]), "voters: 2 voters cannot decide"),
        (voting("12h", &["a", "b", "c d"]), "voters"),
        (voting("never", &["a", "b", "c"]), "voters: they have no effect without forget_after"),
        (Settings { listen: Some("here".to_owned()), ..base() }, "listen: \"here\""),
        (Settings { node_name: Some("two words".to_owned()), ..base() }, "two words"),
        (Settings { iface_regex: Some("(".to_owned()), ..base() }, "iface_regex"),
        (
            Settings {
                iface: Some("eth0".to_owned()),
                iface_can_reach: Some([1, 1, 1, 1].into()),
                ..base()
            },
            "set only one of",
        ),
        (
            Settings { log: Some("verbose".to_owned()), ..base() },
            "log: \"verbose\" is not a valid filter: use error, warn, info, debug or trace",
        ),
        (preferring("10.42.1.5", true), "not the first address of a subnet: use 10.42.1.0"),
        (preferring("10.42.0.0", true), "use 10.42.1.0 to 10.42.255.0"),
        (preferring("10.43.1.0", true), "10.43.1.0 is outside the network 10.42.0.0/16"),
        (preferring("10.42.1.5", false), "10.42.1.5 is the first address of no subnet"),
        (Settings { token: Some("hunter2".to_owned()), ..base() }, "gossamer token"),
        (seed("a:b:c"), "a:b:c"),
        (seed(":1"), "HOST:PORT"),
        (seed("a:0"), "a:0"),
        (seed("a:99999"), "a:99999"),
    ] {
        let error = problem(settings);
        assert!(error.contains(words), "{error:?} should say {words:?}");
    }
}

#[test]
fn with_port_seed_without_port_gets_default() {
    for (given, wanted) in [
        ("host", "host:8473"),
        ("host:1", "host:1"),
        ("192.0.2.1", "192.0.2.1:8473"),
        ("192.0.2.1:9", "192.0.2.1:9"),
        ("2001:db8::1", "[2001:db8::1]:8473"),
        ("[2001:db8::1]:9", "[2001:db8::1]:9"),
    ] {
        assert_eq!(with_port("join", given, 8473).expect(given), wanted);
    }
}

#[test]
fn read_token_file_accessible_to_others_is_rejected() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("token");
    fs::write(&path, "gsm1.x").expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
    let error = problem(Settings { token_file: Some(path), ..Settings::default() });
    assert!(error.contains("chmod 600"), "{error}");
    // chmod 600 would make a directory unusable.
    let path = dir.path().to_owned();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
    let error = problem(Settings { token_file: Some(path), ..Settings::default() });
    assert!(error.ends_with(": not a regular file"), "{error}");
}
