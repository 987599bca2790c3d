//! The network configuration on standard input. The only parser of it.
//!
//! What decides where a request goes is read for every verb. What a pod is to be like is read for ADD alone:
//! DEL must succeed whatever has become of the rest. Unknown keys are left alone, and null is as good as no
//! key.

use std::{collections::BTreeMap, fmt::Display, net::IpAddr, path::PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{
    error::{CniError, code},
    request::INPUT_MAX,
};
use crate::{api::AttachmentName, json, model::Mac};

/// What a runtime can ask for in the pod's part of the configuration, and gossamer does not do.
const UNSUPPORTED: [&str; 4] = ["bandwidth", "ipRanges", "infinibandGUID", "deviceID"];
/// Longest name of a network, in bytes: it is kept with every pod.
const NAME_MAX: usize = 200;

/// A network configuration.
#[derive(Debug, Default)]
pub struct NetworkConfig(Value);

/// What a pod is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// Those that it must have; any, if empty.
    pub addresses: Vec<IpAddr>,
    pub mac: Option<Mac>,
    pub default_route: bool,
    /// For the result alone, in the format of it.
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
    /// # Errors
    /// For what is no JSON object.
    pub fn parse(input: &[u8]) -> Result<Self, CniError> {
        let undecodable = |why: &dyn Display| {
            CniError::new(code::UNDECODABLE, format!("network configuration on stdin: {why}"))
        };
        if input.len() as u64 > INPUT_MAX {
            return Err(undecodable(&format_args!("it is longer than {INPUT_MAX} bytes")));
        }
        let value: Value = json::read(input).map_err(|error| undecodable(&error))?;
        match value {
            Value::Object(_) => Ok(Self(value)),
            _ => Err(undecodable(&"it is no JSON object")),
        }
    }

    /// Of the specification; empty if it is not named.
    ///
    /// # Errors
    /// For what is no text, as with all others.
    pub fn version(&self) -> Result<String, CniError> {
        Ok(self.get(&["cniVersion"])?.unwrap_or_default())
    }

    /// Name of the network.
    ///
    /// # Errors
    /// For a name that cannot be kept.
    pub fn name(&self) -> Result<String, CniError> {
        let name: String = self.get(&["name"])?.unwrap_or_default();
        if name.len() > NAME_MAX || name.contains(char::is_control) {
            let why = format!("name: it has at most {NAME_MAX} bytes and no control characters");
            return Err(CniError::new(code::BAD_CONFIG, why));
        }
        Ok(name)
    }

    /// Name of the plugin.
    pub fn kind(&self) -> Result<String, CniError> {
        Ok(self.get(&["type"])?.unwrap_or_default())
    }

    /// The agent's control socket, where it is not at its usual place.
    ///
    /// # Errors
    /// For a relative path: each runtime would look in a directory of its own.
    pub fn socket(&self) -> Result<Option<PathBuf>, CniError> {
        let socket: Option<PathBuf> = self.get(&["socket"])?;
        match socket.filter(|socket| !socket.as_os_str().is_empty()) {
            Some(socket) if socket.is_relative() => {
                let why = format!("socket: {}: give its absolute path", socket.display());
                Err(CniError::new(code::BAD_CONFIG, why))
            }
            socket => Ok(socket),
        }
    }

    /// Name of the overlay, where this host has several.
    pub fn instance(&self) -> Result<String, CniError> {
        Ok(self.get(&["instance"])?.unwrap_or_default())
    }

    /// The result of the plugins before this one.
    pub fn previous(&self) -> Option<&Value> {
        self.0.get("prevResult").filter(|previous| previous.is_object())
    }

    /// The addresses of an interface of the pod in the result of the plugins before this one. What is no
    /// result has none.
    pub fn previous_addresses(&self, interface: &str) -> Vec<IpAddr> {
        let Some(previous) = self.previous() else { return Vec::new() };
        let is_its = |ip: &&Value| {
            let index = ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
            let link = index.map_or(&Value::Null, |index| &previous["interfaces"][index]);
            link["name"] == interface
                && link["sandbox"].as_str().is_some_and(|path| !path.is_empty())
        };
        let all = previous["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
        let addresses = all.iter().filter(is_its).filter_map(|ip| ip["address"].as_str());
        addresses.filter_map(parse_address).collect()
    }

    /// What the runtime still knows, with GC: under the key of the specification, and under the one that
    /// libcni 1.2.0 used. Null is an empty list.
    ///
    /// # Errors
    /// If neither is there: nothing must be removed then.
    pub fn valid_attachments(&self) -> Result<Vec<AttachmentName>, CniError> {
        let keys = ["cni.dev/valid-attachments", "cni.dev/attachments"];
        if keys.iter().all(|key| self.0.get(key).is_none()) {
            let why = format!("{} is missing: nothing is removed", keys[0]);
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

    /// What a pod is to be like, with what `CNI_ARGS` says.
    ///
    /// # Errors
    /// For what cannot be honoured; it names the key and its value.
    pub fn wishes(&self, arguments: &BTreeMap<String, String>) -> Result<Wishes, CniError> {
        self.refuse_unsupported()?;
        Ok(Wishes {
            addresses: self.addresses(arguments)?,
            mac: self.mac(arguments)?,
            default_route: self.get(&["isDefaultGateway"])?.unwrap_or(true),
            dns: self.dns()?,
        })
    }

    fn refuse_unsupported(&self) -> Result<(), CniError> {
        for key in UNSUPPORTED {
            match self.0["runtimeConfig"].get(key).filter(|value| !asks_for_nothing(value)) {
                None => {}
                Some(value) => {
                    let why = format!(
                        "runtimeConfig.{key}: {value}: gossamer does not do that: declare the capability \
                         at a plugin that does"
                    );
                    return Err(CniError::new(code::UNSUPPORTED_FIELD, why));
                }
            }
        }
        Ok(())
    }

    /// From the capability `ips`, from `args.cni.ips` and from `CNI_ARGS` ("IP=10.42.7.9,fd42::9"). With or
    /// without the length of the subnet.
    fn addresses(&self, arguments: &BTreeMap<String, String>) -> Result<Vec<IpAddr>, CniError> {
        let mut found = Vec::new();
        let mut add = |place: &str, text: &str, code| {
            let ip = parse_address(text)
                .ok_or_else(|| CniError::new(code, format!("{place}: {text:?} is no address")))?;
            if !found.contains(&ip) {
                found.push(ip);
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
        Ok(found)
    }

    /// From the capability `mac`, from `args.cni.mac` and from `CNI_ARGS`, which must not contradict each
    /// other; the network's own `mac` is for pods for which nothing else is said.
    fn mac(&self, arguments: &BTreeMap<String, String>) -> Result<Option<Mac>, CniError> {
        let mut said: Option<(String, Mac)> = None;
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
                return Err(bad(format!("{mac} is not the MAC of one interface")));
            }
            match &said {
                Some((other, before)) if *before != mac => {
                    return Err(bad(format!("{mac}, but {other} says {before}")));
                }
                _ => said = Some((place, mac)),
            }
        }
        Ok(said.map(|(_, mac)| mac))
    }

    /// What the runtime says of DNS goes before what the network says.
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

    /// The list at a path, without what is null in it.
    fn list<T: DeserializeOwned>(&self, path: &[&str]) -> Result<Vec<T>, CniError> {
        let all: Option<Vec<Option<T>>> = self.get(path)?;
        Ok(all.unwrap_or_default().into_iter().flatten().collect())
    }

    /// What is at a path; none where nothing or null is.
    ///
    /// # Errors
    /// For a value of another type, there or on the way.
    fn get<T: DeserializeOwned>(&self, path: &[&str]) -> Result<Option<T>, CniError> {
        let bad = |depth: usize, why: &dyn Display| {
            CniError::new(code::BAD_CONFIG, format!("{}: {why}", path[..depth].join(".")))
        };
        let mut value = &self.0;
        for (depth, key) in path.iter().enumerate() {
            value = match value {
                Value::Object(map) => map.get(*key).unwrap_or(&Value::Null),
                Value::Null => &Value::Null,
                _ => return Err(bad(depth, &"it is no JSON object")),
            };
        }
        json::read_value(value).map_err(|error| {
            // Behind the path comes what is wrong, or the rest of the path.
            let (colon, place) = (if error.starts_with('[') { "" } else { ": " }, path.join("."));
            CniError::new(code::BAD_CONFIG, format!("{place}{colon}{error}"))
        })
    }
}

/// With or without a length.
fn parse_address(text: &str) -> Option<IpAddr> {
    text.parse::<IpNet>().map(|net| net.addr()).or_else(|_| text.parse()).ok()
}

/// A limit of 0 is none.
fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is_wanted) => !is_wanted,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.iter().all(asks_for_nothing),
        Value::Object(map) => map.values().all(asks_for_nothing),
    }
}
