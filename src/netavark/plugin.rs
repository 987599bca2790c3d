//! One call of the plugin, from its arguments to its exit code.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, IsTerminal as _, Read as _},
    path::{Path, PathBuf},
    process::ExitCode,
};

use ipnet::IpNet;
use nix::unistd::geteuid;
use serde_json::{Value, json};

use super::{
    create,
    json::{self, Connection, INPUT_MAX, INSTANCE, SOCKET},
    owner,
};
use crate::{
    api::{self, AttachRequest, AttachmentName, ClientError},
    cni,
};

/// Of the plugin API.
const API_VERSION: &str = "1.0.0";
/// Podman looks for plugins in directories of this name.
const DIRECTORY: &str = "netavark";
/// What the first user namespace of a host has in /proc/self/uid_map.
const ALL_USERS: [&str; 3] = ["0", "0", "4294967295"];

/// What Podman or netavark wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Info,
    Create,
    /// With the path of the container's network namespace, as the next.
    Setup(PathBuf),
    Teardown(PathBuf),
    /// What is none of these, with why. It is answered as the plugin answers, not as a command is.
    Misused(String),
}

impl Call {
    /// Reads the program's arguments; none, if this is not a call of the plugin. A person at a terminal does
    /// not make one: there is no request to read.
    pub fn new(arguments: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let call = Self::parse(arguments)?;
        (call == Self::Info || !io::stdin().is_terminal()).then_some(call)
    }

    /// What is no command of this program either, where Podman and netavark call it: by its whole path.
    pub fn unknown(arguments: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let mut arguments = arguments.into_iter();
        let program = PathBuf::from(arguments.next()?);
        let verb = arguments.next().unwrap_or_default();
        let why = format!("subcommand {verb:?}: it is info, create, setup or teardown");
        let is_plugin = program.parent().and_then(Path::file_name) == Some(OsStr::new(DIRECTORY));
        is_plugin.then_some(Self::Misused(why))
    }

    fn parse(arguments: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let mut arguments = arguments.into_iter().skip(1);
        let verb = arguments.next()?;
        let verb = verb.to_str()?;
        let mut rest: Vec<OsString> = arguments.collect();
        let wanted = match (verb, rest.len()) {
            ("info", 0) => return Some(Self::Info),
            ("create", 0) => return Some(Self::Create),
            ("setup", 1) => return rest.pop().map(|netns| Self::Setup(netns.into())),
            ("teardown", 1) => return rest.pop().map(|netns| Self::Teardown(netns.into())),
            ("info" | "create", _) => "no argument",
            ("setup" | "teardown", _) => "one argument, the path of a network namespace",
            _ => return None,
        };
        Some(Self::Misused(format!("{verb} takes {wanted}, and was given {}", rest.len())))
    }
}

/// Does what is wanted, with the answer or the error on standard output.
pub fn run(call: &Call) -> ExitCode {
    let (answer, exit) = match carry_out(call) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(error) => (Some(json!({ "error": error })), ExitCode::FAILURE),
    };
    cni::say(answer.as_ref(), exit)
}

fn carry_out(call: &Call) -> Result<Option<Value>, String> {
    match call {
        Call::Info => Ok(Some(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "api_version": API_VERSION,
        }))),
        Call::Create => create(&input()?).map(Some),
        Call::Setup(netns) => setup(netns, &json::connection(&input()?)?).map(Some),
        Call::Misused(why) => Err(why.clone()),
        Call::Teardown(netns) => teardown(netns, &json::connection(&input()?)?).map(|()| None),
    }
}

fn input() -> Result<Vec<u8>, String> {
    let mut input = Vec::new();
    // One byte more than is allowed, so that a request that is too long is seen to be.
    let read = io::stdin().take(INPUT_MAX + 1).read_to_end(&mut input);
    read.map_err(|error| format!("stdin: {error}"))?;
    Ok(input)
}

fn create(input: &[u8]) -> Result<Value, String> {
    let (mut whole, network) = json::network(input)?;
    let status = cni::ask(api::get(&network.socket()?, "/v1/status")).map_err(explain)?;
    let overlay = overlay(&status).ok_or(
        "this node is in no cluster yet: create the network when `gossamer status --wait` succeeds",
    )?;
    create::check(&network, &overlay)?;
    create::fill(&mut whole, &overlay);
    Ok(Value::Object(whole))
}

/// The overlay's networks in an agent's status.
fn overlay(status: &Value) -> Option<Vec<IpNet>> {
    let pool = status["settings"]["pool"].as_object()?;
    let network = |key: &str| pool.get(key)?.as_str()?.parse::<IpNet>().ok();
    let first = network("network")?;
    Some([Some(first), network("network6")].into_iter().flatten().collect())
}

fn setup(netns: &Path, connection: &Connection) -> Result<Value, String> {
    let socket = connection.network.socket()?;
    let options = &connection.network_options;
    let asked = AttachRequest {
        container: connection.container_id.clone(),
        interface: options.interface_name.clone(),
        owner: owner(&connection.network.name),
        netns: netns.to_owned(),
        addresses: options.static_ips.clone(),
        mac: options.mac()?,
        default_route: true,
        others_first: true,
    };
    let opened = cni::open_netns("network namespace", netns).map_err(|error| error.msg)?;
    // A container that ended without a word, and is started again, is still known from before.
    cni::detach_first(&socket, &name_of(connection), &opened).map_err(explain)?;
    let attached = cni::connect(&socket, &asked, &opened).map_err(explain)?;
    if !connection.port_mappings.is_empty() {
        // netavark hands it on to the user. It is no error: every network of a container is told its ports.
        eprintln!(
            "gossamer: network {} publishes no ports: those of this container are published if it is also \
             in a network of Podman's own (--network podman)",
            connection.network.name
        );
    }
    Ok(json::status_block(&options.interface_name, &attached))
}

fn teardown(netns: &Path, connection: &Connection) -> Result<(), String> {
    let socket = connection.network.socket()?;
    cni::disconnect(&socket, &name_of(connection), Some(netns)).map_err(explain)
}

fn name_of(connection: &Connection) -> AttachmentName {
    let interface = connection.network_options.interface_name.clone();
    AttachmentName { container: connection.container_id.clone(), interface }
}

/// What helps a user of Podman.
fn explain(error: ClientError) -> String {
    match error {
        ClientError::NoAgent { .. } | ClientError::NotPermitted { .. } if is_rootless() => {
            "rootless Podman cannot use networks of gossamer: its containers are in network namespaces that \
             belong to a user, and the agent connects those of the host. Run Podman as root (`sudo podman`, \
             or a unit of the system's systemd)"
                .to_owned()
        }
        ClientError::NoAgent { path } => format!(
            "no gossamer agent listens at {}: start it (`systemctl start gossamer`); if it listens \
             elsewhere, create the network with `-o {INSTANCE}=NAME` or `-o {SOCKET}=FILE`",
            path.display()
        ),
        error => error.to_string(),
    }
}

/// Whether this process has no rights on the host's network, as with rootless Podman.
fn is_rootless() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !geteuid().is_root() || !map.split_whitespace().eq(ALL_USERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_of_the_plugin_are_told_from_commands() {
        let parse = |words: &str| Call::parse(words.split(' ').map(OsString::from));
        assert_eq!(parse("gossamer info"), Some(Call::Info));
        assert_eq!(parse("/usr/libexec/netavark/gossamer create"), Some(Call::Create));
        assert_eq!(parse("gossamer setup /run/netns/a"), Some(Call::Setup("/run/netns/a".into())));
        assert_eq!(
            parse("gossamer teardown /run/netns/a"),
            Some(Call::Teardown("/run/netns/a".into()))
        );
        for (wrong, word) in [
            ("gossamer info --help", "no argument"),
            ("gossamer create a", "no argument"),
            ("gossamer setup", "one argument"),
            ("gossamer setup a b", "one argument"),
            ("gossamer teardown", "was given 0"),
        ] {
            let call = parse(wrong);
            let is_named = matches!(&call, Some(Call::Misused(why)) if why.contains(word));
            assert!(is_named, "{wrong}: {call:?}");
        }
        for other in ["gossamer", "gossamer status", "/usr/libexec/netavark/gossamer update a"] {
            assert_eq!(parse(other), None, "{other}");
        }
        let unknown = |words: &str| Call::unknown(words.split(' ').map(OsString::from));
        for (words, word) in [
            ("/usr/libexec/netavark/gossamer update a", "\"update\""),
            ("/run/netavark/gossamer", "\"\""),
        ] {
            let call = unknown(words);
            let is_named = matches!(&call, Some(Call::Misused(why)) if why.contains(word));
            assert!(is_named, "{words}: {call:?}");
        }
        for other in ["/usr/bin/gossamer update a", "gossamer update", "netavark"] {
            assert_eq!(unknown(other), None, "{other}");
        }
    }

    #[test]
    fn the_overlay_is_read_from_a_status() {
        let pool = json!({ "network": "10.42.0.0/16", "subnet_len": 24, "network6": "fd42::/48" });
        let found = overlay(&json!({ "settings": { "pool": pool } })).expect("an overlay");
        assert_eq!(
            found.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.42.0.0/16", "fd42::/48"]
        );
        assert_eq!(overlay(&json!({ "settings": null })), None);
        let pool = json!({ "network": "10.42.0.0/16", "network6": null });
        assert_eq!(
            overlay(&json!({ "settings": { "pool": pool } })).map(|found| found.len()),
            Some(1)
        );
    }
}
