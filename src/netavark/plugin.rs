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

/// Version of the plugin API.
const API_VERSION: &str = "1.0.0";
/// Name of the directories in which Podman looks for plugins.
const DIRECTORY: &str = "netavark";
/// Content of `/proc/self/uid_map` in the initial user namespace.
const ALL_USERS: [&str; 3] = ["0", "0", "4294967295"];

/// A call of the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// Prints the versions of the plugin and of its API.
    Info,
    /// Creates a network.
    Create,
    /// Connects a container. Has the path of its network namespace.
    Setup(PathBuf),
    /// Disconnects a container. Has the path of its network namespace.
    Teardown(PathBuf),
    /// A malformed call, with the reason. The answer has the plugin's format, not that of a command.
    Invalid(String),
}

impl Call {
    /// Parses the program's arguments. Returns `None` if this is not a call of the plugin. Except for `info`,
    /// a call with a terminal as standard input is not one, because it has no request.
    pub fn new(arguments: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let call = Self::parse(arguments)?;
        (call == Self::Info || !io::stdin().is_terminal()).then_some(call)
    }

    /// Returns a malformed call for an unknown subcommand if the program was called by a path in a directory
    /// of netavark plugins, as Podman and netavark do. Use it for arguments that are no command of gossamer
    /// either.
    pub fn unknown(arguments: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let mut arguments = arguments.into_iter();
        let program = PathBuf::from(arguments.next()?);
        let verb = arguments.next().unwrap_or_default();
        let why = format!("subcommand {verb:?}: use info, create, setup or teardown");
        let is_plugin = program.parent().and_then(Path::file_name) == Some(OsStr::new(DIRECTORY));
        is_plugin.then_some(Self::Invalid(why))
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
        Some(Self::Invalid(format!("{verb} takes {wanted}, and was given {}", rest.len())))
    }
}

/// Carries out a call. Prints the answer or the error to standard output.
pub fn run(call: &Call) -> ExitCode {
    let (answer, exit) = match carry_out(call) {
        Ok(answer) => (answer, ExitCode::SUCCESS),
        Err(error) => (Some(json!({ "error": error })), ExitCode::FAILURE),
    };
    cni::print_answer(answer.as_ref(), exit)
}

fn carry_out(call: &Call) -> Result<Option<Value>, String> {
    match call {
        Call::Info => Ok(Some(json!({
            "version": env!("CARGO_PKG_VERSION"),
            "api_version": API_VERSION,
        }))),
        Call::Create => create(&input()?).map(Some),
        Call::Setup(netns) => setup(netns, &json::connection(&input()?)?).map(Some),
        Call::Invalid(why) => Err(why.clone()),
        Call::Teardown(netns) => teardown(netns, &json::connection(&input()?)?).map(|()| None),
    }
}

fn input() -> Result<Vec<u8>, String> {
    let mut input = Vec::new();
    // One byte more than allowed, to detect a request that is too long.
    let read = io::stdin().take(INPUT_MAX + 1).read_to_end(&mut input);
    read.map_err(|error| format!("stdin: {error}"))?;
    Ok(input)
}

fn create(input: &[u8]) -> Result<Value, String> {
    let (mut whole, network) = json::network(input)?;
    let status = cni::await_answer(api::get(&network.socket()?, "/v1/status")).map_err(explain)?;
    let overlay = overlay(&status).ok_or(
        "this node is not in a cluster yet: create the network once `gossamer status --wait` succeeds",
    )?;
    create::check(&network, &overlay)?;
    create::fill(&mut whole, &overlay);
    Ok(Value::Object(whole))
}

/// Returns the overlay's networks from an agent's status. `None` if the node is in no cluster.
fn overlay(status: &Value) -> Option<Vec<IpNet>> {
    let pool = status["settings"]["pool"].as_object()?;
    let network = |key: &str| pool.get(key)?.as_str()?.parse::<IpNet>().ok();
    let first = network("network")?;
    Some([Some(first), network("network6")].into_iter().flatten().collect())
}

fn setup(netns: &Path, connection: &Connection) -> Result<Value, String> {
    let socket = connection.network.socket()?;
    let options = &connection.network_options;
    let attach_request = AttachRequest {
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
    // If the container ended without a teardown, its earlier attachment still exists.
    cni::detach_first(&socket, &attachment_name(connection), &opened).map_err(explain)?;
    let attached = cni::connect(&socket, &attach_request, &opened).map_err(explain)?;
    if !connection.port_mappings.is_empty() {
        // netavark passes it on to the user. It is no error, because netavark passes the ports to every
        // network of a container.
        eprintln!(
            "gossamer: network {} publishes no ports: to publish those of this container, also connect it \
             to a network of Podman's own (--network podman)",
            connection.network.name
        );
    }
    Ok(json::status_block(&options.interface_name, &attached))
}

fn teardown(netns: &Path, connection: &Connection) -> Result<(), String> {
    let socket = connection.network.socket()?;
    cni::disconnect(&socket, &attachment_name(connection), Some(netns)).map_err(explain)
}

fn attachment_name(connection: &Connection) -> AttachmentName {
    let interface = connection.network_options.interface_name.clone();
    AttachmentName { container: connection.container_id.clone(), interface }
}

/// Converts an error of the control socket into advice for a user of Podman.
fn explain(error: ClientError) -> String {
    match error {
        ClientError::NoAgent { .. } | ClientError::NotPermitted { .. } if is_rootless() => {
            "rootless Podman cannot use gossamer networks: its containers are in network namespaces of a \
             user, and the agent connects only namespaces of the host. Run Podman as root (`sudo podman`, \
             or a system unit of systemd)"
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

/// Returns whether this process lacks privileges on the host's network, as with rootless Podman.
fn is_rootless() -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    !geteuid().is_root() || !map.split_whitespace().eq(ALL_USERS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plugin_calls_are_distinguished_from_commands() {
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
            let is_named = matches!(&call, Some(Call::Invalid(why)) if why.contains(word));
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
            let is_named = matches!(&call, Some(Call::Invalid(why)) if why.contains(word));
            assert!(is_named, "{words}: {call:?}");
        }
        for other in ["/usr/bin/gossamer update a", "gossamer update", "netavark"] {
            assert_eq!(unknown(other), None, "{other}");
        }
    }

    #[test]
    fn overlay_networks_are_read_from_the_status() {
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
