//! What the runtime asks: environment and the JSON on standard input. The only parser of both.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use super::error::{CniError, code};
use crate::{config::Instance, model::Attachment};

/// Versions of the specification that are spoken, oldest first.
pub const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longest configuration that is read, in bytes.
pub const INPUT_MAX: u64 = 1 << 20;

/// Named by `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

/// A request, checked.
#[derive(Debug)]
pub struct CniRequest {
    pub verb: Verb,
    /// In which the answer is to be.
    pub version: &'static str,
    pub config: NetworkConfig,
    /// With ADD, DEL and CHECK.
    pub attachment: Option<Attachment>,
    /// With ADD and CHECK.
    pub netns: Option<PathBuf>,
    /// Those that the pod must have.
    pub addresses: Vec<IpAddr>,
}

/// The part of the configuration that is ours.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkConfig {
    #[serde(default)]
    pub cni_version: String,
    /// Of the network.
    #[serde(default)]
    pub name: String,
    /// The agent's control socket, where it is not at its usual place.
    pub socket: Option<PathBuf>,
    /// Name of the overlay, where this host has several.
    #[serde(default)]
    pub instance: String,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    /// What the runtime still knows, with GC.
    #[serde(rename = "cni.dev/valid-attachments", default)]
    pub valid_attachments: Option<Vec<ValidAttachment>>,
}

#[derive(Debug, Default, Deserialize)]
struct RuntimeConfig {
    #[serde(default)]
    ips: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub struct ValidAttachment {
    #[serde(rename = "containerID")]
    pub container: String,
    #[serde(rename = "ifname")]
    pub interface: String,
}

impl CniRequest {
    /// # Errors
    /// By the specification's numbers; it names what is wrong.
    pub fn parse(environment: &BTreeMap<String, String>, input: &[u8]) -> Result<Self, CniError> {
        let variable =
            |name: &str| environment.get(name).map(String::as_str).filter(|v| !v.is_empty());
        let missing = |name: &str| {
            CniError::new(code::BAD_ENVIRONMENT, format!("{name} is not set in the environment"))
        };
        let need = |name: &str| variable(name).ok_or_else(|| missing(name));
        let verb = match need("CNI_COMMAND")? {
            "ADD" => Verb::Add,
            "DEL" => Verb::Del,
            "CHECK" => Verb::Check,
            "GC" => Verb::Gc,
            "STATUS" => Verb::Status,
            "VERSION" => Verb::Version,
            other => {
                let why =
                    format!("CNI_COMMAND {other:?}: it is ADD, DEL, CHECK, GC, STATUS or VERSION");
                return Err(CniError::new(code::BAD_ENVIRONMENT, why));
            }
        };
        let config: NetworkConfig = serde_json::from_slice(input).map_err(|error| {
            CniError::new(code::UNDECODABLE, format!("network configuration on stdin: {error}"))
        })?;
        let version = match VERSIONS.into_iter().find(|version| *version == config.cni_version) {
            Some(version) => version,
            // Whoever asks for the versions need not know them.
            None if verb == Verb::Version => VERSIONS[VERSIONS.len() - 1],
            None => return Err(unknown_version(&config.cni_version)),
        };
        let attachment = match verb {
            Verb::Add | Verb::Del | Verb::Check => {
                let attachment = Attachment::new(need("CNI_CONTAINERID")?, need("CNI_IFNAME")?);
                Some(attachment.map_err(|error| CniError::new(code::BAD_ENVIRONMENT, error))?)
            }
            Verb::Gc | Verb::Status | Verb::Version => None,
        };
        let netns = match verb {
            Verb::Add | Verb::Check => Some(Path::new(need("CNI_NETNS")?).to_owned()),
            _ => None,
        };
        let addresses = wishes(&config, variable("CNI_ARGS"))?;
        Ok(Self { verb, version, config, attachment, netns, addresses })
    }

    /// On whose behalf the agent keeps what this network asks for.
    pub fn owner(&self) -> String {
        format!("cni/{}", self.config.name)
    }

    /// Where the agent listens.
    ///
    /// # Errors
    /// For an instance that cannot be one.
    pub fn socket(&self) -> Result<PathBuf, CniError> {
        if let Some(socket) = &self.config.socket {
            return Ok(socket.clone());
        }
        let instance: Result<Instance, _> = self.config.instance.parse();
        let instance = instance
            .map_err(|error| CniError::new(code::BAD_CONFIG, format!("instance: {error}")))?;
        Ok(instance.socket())
    }
}

fn unknown_version(version: &str) -> CniError {
    let why = match version {
        "" => "cniVersion is missing".to_owned(),
        version => format!("cniVersion {version}: this plugin does not speak it"),
    };
    let details = format!("it speaks {}", VERSIONS.join(", "));
    CniError { details, ..CniError::new(code::INCOMPATIBLE_VERSION, why) }
}

/// Addresses from the capability `ips`, or from `CNI_ARGS` ("IP=10.42.7.9,fd42::9" as others have it).
fn wishes(config: &NetworkConfig, arguments: Option<&str>) -> Result<Vec<IpAddr>, CniError> {
    let capability = config.runtime_config.ips.iter().map(|ip| ("runtimeConfig.ips", ip.as_str()));
    let pairs = arguments.into_iter().flat_map(|arguments| arguments.split(';'));
    let named = pairs.filter_map(|pair| pair.split_once('='));
    let named = named.filter(|(key, _)| *key == "IP").map(|(_, value)| ("CNI_ARGS IP", value));
    let mut found = Vec::new();
    for (place, text) in
        capability.chain(named.flat_map(|(p, v)| v.split(',').map(move |v| (p, v))))
    {
        // With or without the length of the subnet.
        let ip = text.split('/').next().unwrap_or_default();
        let ip = ip.parse().map_err(|_| {
            CniError::new(code::BAD_CONFIG, format!("{place}: {text:?} is no address"))
        })?;
        found.push(ip);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(environment: &[(&str, &str)], input: &str) -> Result<CniRequest, CniError> {
        let pairs =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        CniRequest::parse(&pairs.collect(), input.as_bytes())
    }

    const ADD: [(&str, &str); 4] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/c1"),
        ("CNI_IFNAME", "eth0"),
    ];
    const CONFIG: &str = r#"{"cniVersion": "1.1.0", "name": "net", "type": "gossamer"}"#;

    #[test]
    fn a_whole_request_is_read() {
        let mut environment = ADD.to_vec();
        environment.push(("CNI_ARGS", "IgnoreUnknown=1;IP=10.42.7.9"));
        let request = parse(&environment, CONFIG).expect("a request");
        assert_eq!((request.verb, request.version), (Verb::Add, "1.1.0"));
        assert_eq!(request.addresses, ["10.42.7.9".parse::<IpAddr>().expect("an address")]);
        assert_eq!(request.socket(), Ok(PathBuf::from("/run/gossamer/gossamer.sock")));
        let wish = r#"{"cniVersion": "0.4.0", "instance": "blue", "runtimeConfig": {"ips": ["fd42::9/64"]}}"#;
        let request = parse(&ADD, wish).expect("a request");
        assert_eq!(request.addresses, ["fd42::9".parse::<IpAddr>().expect("an address")]);
        assert_eq!(request.socket(), Ok(PathBuf::from("/run/gossamer-blue/gossamer.sock")));
    }

    #[test]
    fn what_is_missing_or_wrong_is_named_by_the_specifications_number() {
        for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
            let without: Vec<_> = ADD.into_iter().filter(|(other, _)| *other != name).collect();
            let error = parse(&without, CONFIG).expect_err(name);
            assert!(error.code == code::BAD_ENVIRONMENT && error.msg.contains(name), "{error:?}");
        }
        let with = |name: &'static str, value: &'static str| {
            ADD.into_iter()
                .map(|pair| if pair.0 == name { (name, value) } else { pair })
                .collect::<Vec<_>>()
        };
        for (environment, config, wanted, word) in [
            (with("CNI_COMMAND", "PLUG"), CONFIG, code::BAD_ENVIRONMENT, "PLUG"),
            (with("CNI_CONTAINERID", "../etc"), CONFIG, code::BAD_ENVIRONMENT, "../etc"),
            (with("CNI_IFNAME", "a/b"), CONFIG, code::BAD_ENVIRONMENT, "a/b"),
            (ADD.to_vec(), "{", code::UNDECODABLE, "stdin"),
            (ADD.to_vec(), "[]", code::UNDECODABLE, "stdin"),
            (ADD.to_vec(), "{}", code::INCOMPATIBLE_VERSION, "missing"),
            (ADD.to_vec(), r#"{"cniVersion": "2.0.0"}"#, code::INCOMPATIBLE_VERSION, "2.0.0"),
            (
                ADD.to_vec(),
                r#"{"cniVersion": "1.0.0", "runtimeConfig": {"ips": ["x"]}}"#,
                code::BAD_CONFIG,
                "runtimeConfig.ips",
            ),
        ] {
            let error = parse(&environment, config).expect_err(word);
            assert!(error.code == wanted && error.msg.contains(word), "{error:?}");
        }
        let shouting = r#"{"cniVersion": "1.0.0", "instance": "Blue"}"#;
        let error = parse(&ADD, shouting).expect("a request").socket().expect_err("no name");
        assert!(error.code == code::BAD_CONFIG && error.msg.contains("instance"), "{error:?}");
    }

    #[test]
    fn deletion_needs_no_namespace_and_the_versions_nothing() {
        let del = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")];
        assert_eq!(parse(&del, CONFIG).expect("a request").netns, None);
        let version = parse(&[("CNI_COMMAND", "VERSION")], r#"{"cniVersion": "9.9"}"#);
        assert_eq!(version.expect("a request").verb, Verb::Version);
    }
}
