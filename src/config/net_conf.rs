//! flannel's `net-conf.json`, as far as it speaks of the cluster.
//!
//! Keys and their meaning are flannel's (`pkg/subnet/config.go`); what gossamer cannot do is refused by
//! name rather than ignored.

use std::{fs, path::Path};

use serde_json::{Map, Value};

use super::{ConfigError, Settings, bad};
use crate::dataplane::desired::overhead;

/// Reads the file into the settings that it stands for.
pub(super) fn read(path: &Path) -> Result<Settings, ConfigError> {
    let field = format!("net_config {}", path.display());
    let text = fs::read_to_string(path).map_err(|e| bad(field.clone(), e))?;
    parse(&text).map_err(|problem| bad(field, problem))
}

fn parse(text: &str) -> Result<Settings, String> {
    let object: Map<String, Value> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let mut settings = Settings::default();
    for (key, value) in &object {
        match key.to_ascii_lowercase().as_str() {
            "network" => settings.network = Some(from_text(key, value)?),
            "subnetlen" => settings.subnet_len = Some(from_number(key, value)?),
            "subnetmin" => settings.subnet_min = Some(from_text(key, value)?),
            "subnetmax" => settings.subnet_max = Some(from_text(key, value)?),
            "backend" => backend(value, &mut settings)?,
            "enableipv4" if value == &Value::Bool(true) => {}
            "enableipv6" if value == &Value::Bool(false) => {}
            "enablenftables" => {}
            _ => return Err(format!("{key} = {value} is not supported: remove it")),
        }
    }
    Ok(settings)
}

fn backend(value: &Value, settings: &mut Settings) -> Result<(), String> {
    let object = value.as_object().ok_or("Backend must be an object")?;
    for (key, value) in object {
        match key.to_ascii_lowercase().as_str() {
            "type" if value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("vxlan")) => {}
            "type" => return Err(format!("Backend.Type is {value}: only \"vxlan\" is supported")),
            "vni" => settings.vni = Some(from_number(key, value)?),
            "port" => match from_number(key, value)? {
                0_u16 => {}
                port => settings.vxlan_port = Some(port),
            },
            "mtu" => {
                // flannel means the underlay's MTU; ours is that of the overlay device.
                let underlay: u32 = from_number(key, value)?;
                let ipv4 = std::net::Ipv4Addr::UNSPECIFIED.into();
                settings.mtu = Some(underlay.saturating_sub(overhead(ipv4)));
            }
            "learning" | "gbp" | "directrouting" if value == &Value::Bool(false) => {}
            _ => return Err(format!("Backend.{key} = {value} is not supported: remove it")),
        }
    }
    Ok(())
}

fn from_text<T: std::str::FromStr>(key: &str, value: &Value) -> Result<T, String> {
    value
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| format!("{key} is {value}: not an address of the kind expected"))
}

fn from_number<T: TryFrom<u64>>(key: &str, value: &Value) -> Result<T, String> {
    value
        .as_u64()
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("{key} is {value}: not a number in range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flannels_own_example_is_understood() {
        let settings = parse(
            r#"{ "Network": "10.244.0.0/16", "EnableNFTables": false,
                 "SubnetLen": 25, "SubnetMin": "10.244.8.0",
                 "Backend": { "Type": "vxlan", "VNI": 7, "Port": 4789, "MTU": 1400 } }"#,
        )
        .expect("understood");
        assert_eq!(settings.network, "10.244.0.0/16".parse().ok());
        assert_eq!((settings.subnet_len, settings.vni), (Some(25), Some(7)));
        assert_eq!((settings.vxlan_port, settings.mtu), (Some(4789), Some(1350)));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (text, word) in [
            (r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}"#, "wireguard"),
            (r#"{"EnableIPv6": true}"#, "EnableIPv6"),
            (r#"{"Backend": {"Type": "vxlan", "Learning": true}}"#, "Learning"),
            (r#"{"SubnetLen": 300}"#, "SubnetLen"),
            (r#"{"Network": "ten"}"#, "Network"),
            ("{", "EOF"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(word), "{error:?} should name {word}");
        }
    }
}
