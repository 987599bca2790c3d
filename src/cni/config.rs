//! Parses the network configuration that the runtime writes to standard input.
//!
//! The keys that route a request (`name`, `type`, `socket`, `instance`) are read for every verb. The keys
//! that shape a pod are read for ADD only, because DEL must succeed even if the rest of the configuration has
//! become invalid. Unknown keys are ignored. Null counts as an absent key.

use std::{collections::BTreeMap, fmt::Display, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::error::{CniError, code};
use crate::{api::AttachmentName, json, model::Mac};

/// Maximum length of the configuration, in bytes.
pub const INPUT_MAX: u64 = 1 << 20;
/// Keys of `runtimeConfig` that gossamer refuses, because it does not implement them.
const UNSUPPORTED: [&str; 4] = ["bandwidth", "ipRanges", "infinibandGUID", "deviceID"];
/// Maximum length of a network name, in bytes. The name is stored with every pod.
const NAME_MAX: usize = 200;

/// A network configuration: a JSON object.
#[derive(Debug, Default)]
pub struct NetworkConfig(Value);

/// The properties that a configuration requests for one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodOptions {
    /// The addresses that the pod must get. If empty, the agent chooses.
    pub addresses: Vec<IpAddr>,
    /// The MAC that the pod must get. `None`: the agent chooses.
    pub mac: Option<Mac>,
    /// Whether the pod gets a default route through the gateway.
    pub default_route: bool,
    /// The `dns` object of the result, in the result's format. Only passed through.
    pub dns: Value,
}

#[derive(Debug, Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container: String,
    #[serde(rename = "ifname")]
    interface: String,
}

impl NetworkConfig {
    /// Parses the bytes of standard input.
    ///
    /// # Errors
    /// If the input is longer than [`INPUT_MAX`], is not JSON, or is not an object.
    pub fn parse(input: &[u8]) -> Result<Self, CniError> {
        let undecodable = |why: &dyn Display| {
            CniError::new(code::UNDECODABLE, format!("network configuration on stdin: {why}"))
        };
        if input.len() as u64 > INPUT_MAX {
            return Err(undecodable(&format_args!("longer than {INPUT_MAX} bytes")));
        }
        let value: Value = json::read(input).map_err(|error| undecodable(&error))?;
        match value {
            Value::Object(_) => Ok(Self(value)),
            _ => Err(undecodable(&"not a JSON object")),
        }
    }

    /// Returns `cniVersion`; empty if it is absent.
    ///
    /// # Errors
    /// If the value is not a string.
    pub fn version(&self) -> Result<String, CniError> {
        Ok(self.get(&["cniVersion"])?.unwrap_or_default())
    }

    /// Returns the name of the network; empty if it is absent.
    ///
    /// # Errors
    /// If the value is not a string, is longer than 200 bytes or has control characters.
    pub fn name(&self) -> Result<String, CniError> {
        let name: String = self.get(&["name"])?.unwrap_or_default();
        if name.len() > NAME_MAX || name.contains(char::is_control) {
            let why = format!("name: at most {NAME_MAX} bytes, no control characters");
            return Err(CniError::new(code::BAD_CONFIG, why));
        }
        Ok(name)
    }

    /// Returns `type`, the name of the plugin; empty if it is absent.
    ///
    /// # Errors
    /// If the value is not a string.
    pub fn kind(&self) -> Result<String, CniError> {
        Ok(self.get(&["type"])?.unwrap_or_default())
    }

    /// Returns the path of the agent's control socket. `None` means the default path.
    ///
    /// # Errors
    /// If the value is not a string or is a relative path: each runtime would resolve it against its own
    /// working directory.
    pub fn socket(&self) -> Result<Option<PathBuf>, CniError> {
        let socket: Option<PathBuf> = self.get(&["socket"])?;
        match socket.filter(|socket| !socket.as_os_str().is_empty()) {
            Some(socket) if socket.is_relative() => {
                let why = format!("socket: {}: use an absolute path", socket.display());
                Err(CniError::new(code::BAD_CONFIG, why))
            }
            socket => Ok(socket),
        }
    }

    /// Returns the name of the overlay, for hosts that have several; empty if it is absent.
    ///
    /// # Errors
    /// If the value is not a string.
    pub fn instance(&self) -> Result<String, CniError> {
        Ok(self.get(&["instance"])?.unwrap_or_default())
    }

    /// Returns `prevResult`, the result of the plugins before this one.
    pub fn previous(&self) -> Option<&Value> {
        self.0.get("prevResult").filter(|previous| previous.is_object())
    }

    /// Returns the addresses that `prevResult` lists for the given interface of the pod. Skips malformed
    /// entries.
    pub fn previous_addresses(&self, interface: &str) -> Vec<IpAddr> {
        let Some(previous) = self.previous() else { return Vec::new() };
        let is_of_interface = |ip: &&Value| {
            let index = ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
            let link = index.map_or(&Value::Null, |index| &previous["interfaces"][index]);
            link["name"] == interface
                && link["sandbox"].as_str().is_some_and(|path| !path.is_empty())
        };
        let all = previous["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
        let addresses = all.iter().filter(is_of_interface).filter_map(|ip| ip["address"].as_str());
        addresses.filter_map(parse_address).collect()
    }

    /// Returns the attachments that the runtime still knows (GC). Reads the key of the specification and the
    /// key that libcni 1.2.0 used. Null counts as an empty list.
    ///
    /// # Errors
    /// If both keys are absent, because GC would then remove every pod, or if an entry lacks a name.
    pub fn valid_attachments(&self) -> Result<Vec<AttachmentName>, CniError> {
        let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        if keys.iter().all(|key| self.0.get(key).is_none()) {
            let why = format!("{} is missing, so no attachment is removed", keys[0]);
            return Err(CniError::new(code::BAD_CONFIG, why));
        }
        let mut all = Vec::new();
        for key in keys {
            let names =
                self.list(&[key])?.into_iter().map(|ValidAttachment { container, interface }| {
                    AttachmentName { container, interface }
                });
            all.extend(names);
        }
        Ok(all)
    }

    /// Returns the properties requested for a pod, from the configuration and from `CNI_ARGS`.
    ///
    /// # Errors
    /// If a value is malformed, contradicts another one or requests an unsupported feature. The message names
    /// the key and the value.
    pub fn pod_options(
        &self,
        arguments: &BTreeMap<String, String>,
    ) -> Result<PodOptions, CniError> {
        self.refuse_unsupported()?;
        Ok(PodOptions {
            addresses: self.addresses(arguments)?,
            mac: self.mac(arguments)?,
            default_route: self.get(&["isDefaultGateway"])?.unwrap_or(true),
            dns: self.dns()?,
        })
    }

    fn refuse_unsupported(&self) -> Result<(), CniError> {
        for key in UNSUPPORTED {
            match self.0["runtimeConfig"].get(key).filter(|value| !requests_nothing(value)) {
                None => {}
                Some(value) => {
                    let why = format!(
                        "runtimeConfig.{key}: {value}: not supported by gossamer; declare the capability \
                         at a plugin that supports it"
                    );
                    return Err(CniError::new(code::UNSUPPORTED_FIELD, why));
                }
            }
        }
        Ok(())
    }

    /// Collects the addresses of the capability `ips`, of `args.cni.ips` and of `CNI_ARGS`
    /// ("`IP=10.42.7.9,fd42::9`"). Each may carry a prefix length.
    fn addresses(&self, arguments: &BTreeMap<String, String>) -> Result<Vec<IpAddr>, CniError> {
        let mut addresses = Vec::new();
        let mut add = |place: &str, text: &str, code| {
            let ip = parse_address(text).ok_or_else(|| {
                CniError::new(code, format!("{place}: {text:?} is not an address"))
            })?;
            if !addresses.contains(&ip) {
                addresses.push(ip);
            }
            Ok::<(), CniError>(())
        };
        for path in [&["runtimeConfig", "ips"][..], &["args", "cni", "ips"]] {
            let list: Vec<String> = self.list(path)?;
            list.iter().try_for_each(|text| add(&path.join("."), text, code::BAD_CONFIG))?;
        }
        let argument = arguments.get("IP").map(String::as_str).unwrap_or_default();
        let mut texts = argument.split(',').map(str::trim).filter(|text| !text.is_empty());
        texts.try_for_each(|text| add("CNI_ARGS IP", text, code::BAD_ENVIRONMENT))?;
        Ok(addresses)
    }

    /// Returns the MAC of the capability `mac`, of `args.cni.mac` or of `CNI_ARGS`. These must not contradict
    /// each other. The network's own `mac` applies only if none of them is set.
    fn mac(&self, arguments: &BTreeMap<String, String>) -> Result<Option<Mac>, CniError> {
        let mut chosen: Option<(String, Mac)> = None;
        let places = [&["runtimeConfig", "mac"][..], &["args", "cni", "mac"]];
        let mut texts: Vec<(String, String, u32)> = Vec::new();
        for path in places {
            let text: Option<String> = self.get(path)?;
            texts.extend(text.map(|text| (path.join("."), text, code::BAD_CONFIG)));
        }
        let argument = arguments.get("MAC").cloned();
        texts.extend(argument.map(|text| ("CNI_ARGS MAC".into(), text, code::BAD_ENVIRONMENT)));
        if texts.iter().all(|(_, text, _)| text.is_empty()) {
            let text: Option<String> = self.get(&["mac"])?;
            texts.extend(text.map(|text| ("mac".to_owned(), text, code::BAD_CONFIG)));
        }
        for (place, text, code) in texts.into_iter().filter(|(_, text, _)| !text.is_empty()) {
            let bad = |why: String| CniError::new(code, format!("{place}: {why}"));
            let mac: Mac = text.replace('-', ":").parse().map_err(bad)?;
            if !mac.is_assignable() {
                return Err(bad(format!("{mac} must be unicast and not zero")));
            }
            match &chosen {
                Some((other, before)) if *before != mac => {
                    return Err(bad(format!("{mac} contradicts {other}, which is {before}")));
                }
                _ => chosen = Some((place, mac)),
            }
        }
        Ok(chosen.map(|(_, mac)| mac))
    }

    /// Returns the DNS settings. Those of the runtime override those of the network, key by key.
    fn dns(&self) -> Result<Value, CniError> {
        let mut dns = Map::new();
        for (place, names) in [
            ("dns", [("nameservers", "nameservers"), ("search", "search"), ("options", "options")]),
            (
                "runtimeConfig",
                [("servers", "nameservers"), ("searches", "search"), ("options", "options")],
            ),
        ] {
            let path = |key| match place {
                "dns" => vec!["dns", key],
                _ => vec!["runtimeConfig", "dns", key],
            };
            for (key, name) in names {
                let list: Vec<String> = self.list(&path(key))?;
                if !list.is_empty() {
                    dns.insert(name.to_owned(), json!(list));
                }
            }
            let domain: Option<String> = self.get(&path("domain"))?;
            if let Some(domain) = domain.filter(|domain| !domain.is_empty()) {
                dns.insert("domain".to_owned(), domain.into());
            }
        }
        Ok(Value::Object(dns))
    }

    /// Returns the list at a path, without its null elements.
    fn list<T: DeserializeOwned>(&self, path: &[&str]) -> Result<Vec<T>, CniError> {
        let all: Option<Vec<Option<T>>> = self.get(path)?;
        Ok(all.unwrap_or_default().into_iter().flatten().collect())
    }

    /// Returns the value at a path; `None` where it is absent or null.
    ///
    /// # Errors
    /// If the value, or one on the way to it, has another type.
    fn get<T: DeserializeOwned>(&self, path: &[&str]) -> Result<Option<T>, CniError> {
        let bad = |depth: usize, why: &dyn Display| {
            CniError::new(code::BAD_CONFIG, format!("{}: {why}", path[..depth].join(".")))
        };
        let mut value = &self.0;
        for (depth, key) in path.iter().enumerate() {
            value = match value {
                Value::Object(map) => map.get(*key).unwrap_or(&Value::Null),
                Value::Null => &Value::Null,
                _ => return Err(bad(depth, &"not a JSON object")),
            };
        }
        json::read_value(value).map_err(|error| {
            // The error starts with an index if it is about an element below this path.
            let (colon, place) = (if error.starts_with('[') { "" } else { ": " }, path.join("."));
            CniError::new(code::BAD_CONFIG, format!("{place}{colon}{error}"))
        })
    }
}

/// Parses an address with or without a prefix length.
fn parse_address(text: &str) -> Option<IpAddr> {
    text.parse::<IpNet>().map(|net| net.addr()).or_else(|_| text.parse()).ok()
}

/// Returns whether a value requests nothing. A limit of 0 means "no limit".
fn requests_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is_wanted) => !is_wanted,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.iter().all(requests_nothing),
        Value::Object(map) => map.values().all(requests_nothing),
    }
}
