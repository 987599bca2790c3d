//! Settings that are misspelt, invalid or without effect, as an operator meets them.

use std::process::{Command, Output};

use crate::common::program;

fn agent(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(program());
    command.arg("agent").args(arguments).envs(variables.iter().copied());
    command.output().expect("gossamer runs")
}

fn refused(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    said
}

#[test]
fn misspelt_settings_are_refused_with_the_one_that_is_meant() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("gossamer.toml");
    let file_name = file.display().to_string();
    for (text, expected) in [
        ("netwrok = \"10.0.0.0/8\"", "line 1: there is no setting netwrok: did you mean network?"),
        ("network = \"10.42.0.0\"", "write it as in network = \"10.42.0.0/16\""),
        ("init = true\nprefer_subnet = \"192.168.0.0\"", "192.168.0.0 is outside the network"),
        ("init = true\nprefer_subnet = \"10.42.1.5\"", "use 10.42.1.0"),
        ("log = \"verbose\"", "\"verbose\" is not a valid filter: use error, warn, info"),
        ("init = true\nidle_after = \"1m\"", "idle_after: it has no effect without program"),
    ] {
        std::fs::write(&file, text).expect("written");
        let said = refused(&agent(&["--config", &file_name], &[]), 1);
        assert!(said.contains(expected), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    let said = refused(&agent(&["--init"], &[("GOSSAMER_NETWROK", "10.0.0.0/8")]), 1);
    assert!(said.contains("did you mean GOSSAMER_NETWORK?"), "{said}");
    let said = refused(&agent(&["--network", "10.42.0.0"], &[]), 2);
    assert!(said.contains("Example: --network 10.42.0.0/16"), "{said}");
    let said = refused(&agent(&["--http", "9473"], &[]), 2);
    assert!(said.contains("Example: --http 127.0.0.1:9473"), "{said}");
}

#[test]
fn commands_refuse_a_misspelt_variable_and_ignore_an_empty_one() {
    let status = |variables: &[(&str, &str)]| {
        let mut command = Command::new(program());
        command.args(["status", "--socket", "/nowhere"]).envs(variables.iter().copied());
        command.output().expect("gossamer runs")
    };
    let said = refused(&status(&[("GOSSAMER_SOKET", "/x")]), 1);
    assert!(said.contains("did you mean GOSSAMER_SOCKET?"), "{said}");
    let empty = ["GOSSAMER_HTTP", "GOSSAMER_MTU", "GOSSAMER_INIT", "GOSSAMER_MODE"];
    let empty = empty.map(|name| (name, ""));
    let said = refused(&agent(&["--config", "/dev/null", "--vni", "0"], &empty), 1);
    assert!(said.contains("vni: 0 is out of range"), "{said}");
}

#[test]
fn help_groups_commands_and_manual_pages_have_examples() {
    let help = Command::new(program()).arg("--help").output().expect("gossamer runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    for words in ["Set up:\n  init", "Change the cluster:\n  token", "Usage: gossamer"] {
        assert!(help.contains(words), "{words:?} is not in\n{help}");
    }
    let help = Command::new(program()).args(["status", "--help"]).output().expect("runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(help.contains("Examples:") && !help.contains("[default: ]"), "{help}");
    let directory = tempfile::tempdir().expect("a directory");
    let made = Command::new(program()).arg("man").arg(directory.path()).output().expect("runs");
    assert!(made.status.success());
    for page in ["gossamer.1", "gossamer-status.1", "gossamer-cni-install.1"] {
        let text = std::fs::read_to_string(directory.path().join(page)).expect(page);
        for section in [".SH \"EXIT STATUS\"", ".SH FILES", ".SH \"SEE ALSO\""] {
            assert!(text.contains(section), "{page}: {section}");
        }
    }
    let text = std::fs::read_to_string(directory.path().join("gossamer-status.1")).expect("text");
    assert!(text.contains(".SH EXAMPLES"), "{text}");
}
