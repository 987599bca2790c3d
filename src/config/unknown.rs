//! Misspelt settings: in files, in values and in the environment. Errors name the setting, its value, and
//! what is meant.

use std::ffi::OsString;

use clap::Args as _;
use toml::{Table, Value};

use super::{ConfigError, Settings, bad};

/// The annotated example, which has a value for every setting.
const EXAMPLE: &str = include_str!("../../config/gossamer.toml");
/// Prefix of all environment variables.
const PREFIX: &str = "GOSSAMER_";
/// Variables of this program that are not settings of the agent.
const OTHER_VARIABLES: [&str; 2] = ["GOSSAMER_CONFIG", "GOSSAMER_LAB"];

/// Returns the names of all settings.
fn names() -> Vec<String> {
    let command = Settings::augment_args(clap::Command::new(""));
    command.get_arguments().map(|argument| argument.get_id().to_string()).collect()
}

/// Returns an example of a setting, as a line of the file.
pub fn example(name: &str) -> Option<&'static str> {
    let lines = EXAMPLE.lines().filter_map(|line| line.strip_prefix("# "));
    lines
        .into_iter()
        .find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(" = ")))
}

/// Returns the setting of which `name` may be a misspelling.
fn similar(name: &str) -> Option<String> {
    let limit = (name.len() / 3).max(1);
    let known = names().into_iter().map(|known| (distance(name, &known), known));
    known.min().filter(|(distance, _)| *distance <= limit).map(|(_, known)| known)
}

/// Returns the number of insertions, deletions and replacements of characters between two texts.
fn distance(one: &str, other: &str) -> usize {
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in other.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

/// Explains why the text of a settings file cannot be read. `file` names the file.
pub(super) fn explain(file: &str, text: &str, error: &toml::de::Error) -> ConfigError {
    let Ok(table) = text.parse::<Table>() else {
        // Not TOML. The parser shows the place in several lines; the message alone is one sentence.
        let before = error.span().and_then(|span| text.get(..span.start));
        let line = before.map_or(1, |before| before.matches('\n').count() + 1);
        let why = error.message().replace('\n', ", ");
        let what = text.lines().nth(line - 1).and_then(|text| explain_line(text, &why));
        return bad(file, format!("line {line}: {}", what.unwrap_or(why)));
    };
    let names = names();
    for (key, value) in &table {
        let line = text.lines().position(|line| is_setting_of(line, key)).map_or(1, |n| n + 1);
        let place = format!("{file}: line {line}");
        if !names.contains(key) {
            let hint = similar(key).map_or_else(
                || "see config/gossamer.toml or `gossamer agent --help`".to_owned(),
                |similar| format!("did you mean {similar}?"),
            );
            return bad(place, format!("there is no setting {key}: {hint}"));
        }
        let alone = Table::from_iter([(key.clone(), value.clone())]);
        if let Err(error) = Value::Table(alone).try_into::<Settings>() {
            let why = error.message().replace('\n', ", ");
            let as_in =
                example(key).map_or_else(String::new, |line| format!(": write it as in {line}"));
            return bad(place, format!("{key} = {value} is not valid ({why}){as_in}"));
        }
    }
    bad(file, error.message())
}

/// Explains why the parser refuses the line of a setting. `why` is what it says.
fn explain_line(line: &str, why: &str) -> Option<String> {
    let key = line.split('=').next()?.trim();
    let example = example(key)?;
    if why.starts_with("duplicate key") {
        return Some(format!("{key} is set twice: remove one of the two lines"));
    }
    // A token is a secret.
    let line = if key == "token" { "token = ..." } else { line.trim() };
    let remedy = match example.contains('"') {
        true => "write texts in quotes, as in",
        false => "write it as in",
    };
    Some(format!("{line} is not valid TOML: {remedy} {example}"))
}

fn is_setting_of(line: &str, key: &str) -> bool {
    let rest = line.trim_start().trim_start_matches('"').strip_prefix(key);
    rest.is_some_and(|rest| rest.trim_start_matches('"').trim_start().starts_with('='))
}

/// Returns the variables that look like settings and are none. Those of Kubernetes for a service named
/// `gossamer` do not count.
fn unknown_variables(variables: impl Iterator<Item = OsString>) -> Vec<String> {
    let names = names();
    let variables = variables.filter_map(|name| name.into_string().ok());
    let ours: Vec<String> = variables.filter(|name| name.starts_with(PREFIX)).collect();
    let of_services: Vec<String> = ours
        .iter()
        .filter_map(|name| name.strip_suffix("_SERVICE_HOST").map(str::to_owned))
        .collect();
    let is_of_service = |name: &str| {
        of_services.iter().any(|service| {
            name.strip_prefix(service.as_str())
                .is_some_and(|rest| rest.starts_with("_SERVICE_") || rest.starts_with("_PORT"))
        })
    };
    let is_known = |name: &str| {
        OTHER_VARIABLES.contains(&name)
            || name.strip_prefix(PREFIX).is_some_and(|rest| {
                rest == rest.to_ascii_uppercase() && names.contains(&rest.to_ascii_lowercase())
            })
    };
    ours.into_iter().filter(|name| !is_known(name) && !is_of_service(name)).collect()
}

/// Fails if an environment variable seems to be a misspelt setting. Returns the other unknown ones.
///
/// # Errors
/// The variable, and the one that is probably meant.
pub fn check_environment() -> Result<Vec<String>, ConfigError> {
    check_variables(std::env::vars_os().map(|(name, _)| name))
}

fn check_variables(variables: impl Iterator<Item = OsString>) -> Result<Vec<String>, ConfigError> {
    let unknown = unknown_variables(variables);
    for name in &unknown {
        let rest = name.strip_prefix(PREFIX).unwrap_or_default().to_ascii_lowercase();
        if let Some(similar) = similar(&rest) {
            let meant = format!("{PREFIX}{}", similar.to_ascii_uppercase());
            let problem = format!(
                "this environment variable is no setting: did you mean {meant}? Rename or unset it"
            );
            return Err(bad(name.clone(), problem));
        }
    }
    Ok(unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(text: &str) -> String {
        let error = toml::from_str::<Settings>(text).expect_err("invalid");
        explain("config gossamer.toml", text, &error).to_string()
    }

    #[test]
    fn explain_names_the_setting_its_value_and_the_remedy_in_one_line() {
        for (text, expected) in [
            (
                "mtu = 1400\nnetwrok = \"1\"",
                "line 2: there is no setting netwrok: did you mean network?",
            ),
            ("prefer-subnet = 1", "did you mean prefer_subnet?"),
            ("unheard_of_key = 1", "`gossamer agent --help`"),
            ("network = \"10.42.0.0\"", "write it as in network = \"10.42.0.0/16\""),
            ("http = \"9473\"", "http = \"9473\" is not valid (invalid socket address syntax)"),
            ("http = \"9473\"", "write it as in http = \"127.0.0.1:9473\""),
            ("mtu = \"big\"", "write it as in mtu = 1450"),
            ("init = 1", "write it as in init = true"),
            ("join = 1", "write it as in join = [\"10.0.0.1\""),
            ("vni = 1\nmtu 3", "config gossamer.toml: line 2: "),
            (
                "network = 10.42.0.0/16",
                "line 1: network = 10.42.0.0/16 is not valid TOML: write texts in quotes, as in network = \
                 \"10.42.0.0/16\"",
            ),
            (
                "set_sysctls = yes",
                "set_sysctls = yes is not valid TOML: write it as in set_sysctls = ",
            ),
            ("init = true\ninit = true", "line 2: init is set twice: remove one of the two lines"),
            ("token = gossamer1abc", "token = ... is not valid TOML"),
            ("mode = \"fast\"", "mode = \"fast\" is not valid"),
        ] {
            let error = explained(text);
            assert!(error.contains(expected), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn list_settings_accept_one_text() {
        let settings: Settings =
            toml::from_str("join = \"a, b:1\"\nvoters = \"x\"").expect("valid");
        assert_eq!(
            (settings.join, settings.voters),
            (vec!["a".to_owned(), "b:1".to_owned()], vec!["x".to_owned()])
        );
    }

    #[test]
    fn check_environment_rejects_misspelt_variables_only() {
        let check = |names: &[&str]| check_variables(names.iter().map(OsString::from));
        for (name, meant) in [
            ("GOSSAMER_NETWROK", "GOSSAMER_NETWORK"),
            ("GOSSAMER_TOKENFILE", "GOSSAMER_TOKEN_FILE"),
            ("GOSSAMER_VXLAN_PRT", "GOSSAMER_VXLAN_PORT"),
            ("GOSSAMER_network", "GOSSAMER_NETWORK"),
        ] {
            let error = check(&["PATH", name]).expect_err(name).to_string();
            assert!(error.starts_with(name) && error.contains(meant), "{error}");
        }
        let fine = ["GOSSAMER_NETWORK", "GOSSAMER_CONFIG", "GOSSAMER_LAB", "HOME", "GOSSAMER"];
        assert_eq!(check(&fine).expect("known"), Vec::<String>::new());
        assert_eq!(check(&["GOSSAMER_SOMETHING_ELSE"]).expect("other").len(), 1);
        // Kubernetes sets these for a service.
        let service = [
            "GOSSAMER_SERVICE_HOST",
            "GOSSAMER_SERVICE_PORT",
            "GOSSAMER_PORT",
            "GOSSAMER_PORT_9473_TCP_ADDR",
            "GOSSAMER_METRICS_SERVICE_HOST",
            "GOSSAMER_METRICS_PORT",
        ];
        assert_eq!(check(&service).expect("of Kubernetes"), Vec::<String>::new());
    }

    #[test]
    fn every_setting_has_an_example() {
        for name in names() {
            assert!(example(&name).is_some(), "{name}");
        }
    }
}
