//! flannel's `net-conf.json`.
//!
//! Keys and their meaning follow flannel (`pkg/subnet/config.go`). Unsupported keys are rejected instead
//! of ignored.

use std::path::Path;

use serde_json::{Map, Value};

use super::{ConfigError, Settings, bad, unreadable};
use crate::{
    dataplane::desired::{Mode, overhead},
    files,
};

/// Reads the file and converts it to settings.
pub(super) fn read(path: &Path) -> Result<Settings, ConfigError> {
    let field = format!("net_config {}", path.display());
    let text = files::read_text(path, files::SMALL).map_err(|e| unreadable(&field, &e))?;
    parse(&text).map_err(|problem| bad(field, problem))
}

fn parse(text: &str) -> Result<Settings, String> {
    let object: Map<String, Value> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    let mut settings = Settings::default();
    let (mut ipv4, mut ipv6) = (true, false);
    for (key, value) in &object {
        match key.to_ascii_lowercase().as_str() {
            "network" => settings.network = Some(from_text(key, value)?),
            "subnetlen" => settings.subnet_len = Some(from_number(key, value)?),
            "subnetmin" => settings.subnet_min = Some(from_text(key, value)?),
            "subnetmax" => settings.subnet_max = Some(from_text(key, value)?),
            "ipv6network" => settings.network6 = Some(from_text(key, value)?),
            "ipv6subnetlen" => settings.subnet_len6 = Some(from_number(key, value)?),
            "backend" => backend(value, &mut settings)?,
            "enableipv4" => ipv4 = from_bool(key, value)?,
            "enableipv6" => ipv6 = from_bool(key, value)?,
            "enablenftables" => {}
            _ => return Err(format!("{key} = {value} is not supported: remove it")),
        }
    }
    choose_families(&mut settings, ipv4, ipv6)?;
    Ok(settings)
}

/// Applies `EnableIPv4` and `EnableIPv6`: the file may have networks of families that are disabled.
fn choose_families(settings: &mut Settings, ipv4: bool, ipv6: bool) -> Result<(), String> {
    if !ipv6 {
        (settings.network6, settings.subnet_len6) = (None, None);
    } else if settings.network6.is_none() {
        return Err("EnableIPv6 is true: set IPv6Network as well".to_owned());
    }
    if ipv4 {
        return Ok(());
    }
    let network6 = settings.network6.take().ok_or("EnableIPv4 is false: set EnableIPv6")?;
    settings.network = Some(network6.into());
    settings.subnet_len = settings.subnet_len6.take();
    (settings.subnet_min, settings.subnet_max) = (None, None);
    Ok(())
}

fn backend(value: &Value, settings: &mut Settings) -> Result<(), String> {
    let object = value.as_object().ok_or("Backend must be an object")?;
    for (key, value) in object {
        match key.to_ascii_lowercase().as_str() {
            "type" => match value.as_str().map(str::to_ascii_lowercase).as_deref() {
                Some("vxlan") => {}
                Some("host-gw") => settings.mode = Some(Mode::HostGw),
                _ => return Err(format!("Backend.Type is {value}: use \"vxlan\" or \"host-gw\"")),
            },
            "vni" => settings.vni = Some(from_number(key, value)?),
            "port" => match from_number(key, value)? {
                0_u16 => {}
                port => settings.vxlan_port = Some(port),
            },
            "mtu" => {
                // flannel's MTU is that of the underlay, gossamer's that of the overlay device.
                let underlay: u32 = from_number(key, value)?;
                let ipv4 = std::net::Ipv4Addr::UNSPECIFIED.into();
                settings.mtu = Some(underlay.saturating_sub(overhead(ipv4)));
            }
            "directrouting" if from_bool(key, value)? => settings.mode = Some(Mode::Direct),
            "directrouting" => {}
            "learning" | "gbp" if value == &Value::Bool(false) => {}
            _ => return Err(format!("Backend.{key} = {value} is not supported: remove it")),
        }
    }
    Ok(())
}

fn from_bool(key: &str, value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| format!("{key} is {value}: use true or false"))
}

fn from_text<T: std::str::FromStr>(key: &str, value: &Value) -> Result<T, String> {
    value
        .as_str()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| format!("{key} is {value}: use an address or network of its family"))
}

fn from_number<T: TryFrom<u64>>(key: &str, value: &Value) -> Result<T, String> {
    value
        .as_u64()
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("{key} is {value}: use a number in range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_example_of_flannel_gives_settings() {
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
    fn parse_dual_stack_and_modes_without_tunnel_gives_settings() {
        let dual = r#""Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd42::/48""#;
        let settings = parse(&format!("{{{dual}, \"Backend\": {{\"Type\": \"host-gw\"}}}}"));
        let settings = settings.expect("understood");
        assert_eq!(settings.network6, "fd42::/48".parse().ok());
        assert_eq!(settings.mode, Some(Mode::HostGw));
        let alone = parse(&format!("{{{dual}, \"EnableIPv4\": false}}")).expect("understood");
        assert_eq!((alone.network, alone.network6), ("fd42::/48".parse().ok(), None));
        let direct = r#"{"Backend": {"Type": "vxlan", "DirectRouting": true}}"#;
        assert_eq!(parse(direct).expect("understood").mode, Some(Mode::Direct));
    }

    #[test]
    fn parse_unsupported_key_error_names_it() {
        for (text, word) in [
            (r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}"#, "wireguard"),
            (r#"{"EnableIPv6": true}"#, "IPv6Network"),
            (r#"{"EnableIPv4": false}"#, "EnableIPv6"),
            (r#"{"EnableIPv4": "no"}"#, "true or false"),
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
