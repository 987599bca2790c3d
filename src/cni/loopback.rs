//! The plugin `loopback`: sets the interface `lo` of a pod up.
//!
//! Runtimes call it in a separate list, before any other network. DEL has nothing to do, because `lo`
//! disappears with the pod's namespace.

use std::{fs::File, path::Path};

use ipnet::IpNet;
use rtnetlink::LinkUnspec;
use serde_json::Value;

use super::{
    error::{CniError, code},
    netns,
    request::{CniRequest, Operation},
    result::{AddResult, Interface},
};
use crate::netlink::Netlink;

const NAME: &str = "lo";

/// Carries out a request of the plugin `loopback`. Returns the result to print, if the verb has one.
///
/// # Errors
/// If the namespace cannot be entered, or `lo` is missing, down (CHECK) or cannot be changed.
pub fn carry_out(request: &CniRequest) -> Result<Option<Value>, CniError> {
    match &request.operation {
        Operation::Add { netns, .. } => add(request, netns).map(Some),
        Operation::Check { netns, .. } => match lo_state(&mut enter(netns)?)? {
            (_, true) => Ok(None),
            (_, false) => {
                let why = format!("interface {NAME} in {} is down", netns.display());
                Err(CniError::new(code::IO, why))
            }
        },
        Operation::Del { .. } | Operation::Gc { .. } | Operation::Status | Operation::Version => {
            Ok(None)
        }
    }
}

fn add(request: &CniRequest, netns: &Path) -> Result<Value, CniError> {
    let mut inside = enter(netns)?;
    let (index, _) = lo_state(&mut inside)?;
    inside.set_link(LinkUnspec::new_with_index(index).up()).map_err(failed)?;
    if let Some(previous) = request.config.previous() {
        return Ok(previous.clone());
    }
    let addresses = inside.addresses().map_err(failed)?;
    let addresses = addresses.iter().filter(|address| address.link == index);
    // Only 127.0.0.1 and ::1; another program may have added more addresses.
    let own = addresses.filter(|address| address.ip.is_loopback());
    let result = AddResult {
        interfaces: vec![Interface {
            name: NAME.to_owned(),
            mac: Some("00:00:00:00:00:00".to_owned()),
            mtu: None,
            sandbox: Some(netns.display().to_string()),
        }],
        addresses: own
            .map(|address| (IpNet::new_assert(address.ip, address.prefix_len), None))
            .collect(),
        dns: Value::Object(serde_json::Map::new()),
        ..AddResult::default()
    };
    Ok(result.to_json(request.version))
}

fn enter(path: &Path) -> Result<Netlink, CniError> {
    let netns: File = netns::open("CNI_NETNS", path)?;
    let host_netns = File::open(netns::OWN_NETNS).map_err(failed)?;
    Netlink::open_in(&netns, &host_netns)
        .map_err(|error| netns::namespace_error("CNI_NETNS", path, &error))
}

/// Returns the index of `lo`, and whether it is up.
fn lo_state(inside: &mut Netlink) -> Result<(u32, bool), CniError> {
    let link = inside.link(NAME).map_err(failed)?;
    let link =
        link.ok_or_else(|| CniError::new(code::IO, format!("there is no interface {NAME}")))?;
    Ok((link.index, link.up))
}

fn failed(error: std::io::Error) -> CniError {
    CniError::new(code::IO, format!("interface {NAME}: {error}"))
}
