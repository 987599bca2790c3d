//! The plugin `loopback`: the interface `lo` of a pod is up.
//!
//! Runtimes want it in a list of its own before any other network. A pod's `lo` goes with its namespace, so
//! that there is nothing to be undone.

use std::{fs::File, path::Path};

use ipnet::IpNet;
use rtnetlink::LinkUnspec;
use serde_json::Value;

use super::{
    error::{CniError, code},
    netns,
    request::{Asked, CniRequest},
    result::{Interface, Made},
};
use crate::netlink::Netlink;

const NAME: &str = "lo";

/// Carries a request out.
pub fn carry_out(request: &CniRequest) -> Result<Option<Value>, CniError> {
    match &request.asked {
        Asked::Add { netns, .. } => add(request, netns).map(Some),
        Asked::Check { netns, .. } => match lo(&mut enter(netns)?)? {
            (_, true) => Ok(None),
            (_, false) => {
                let why = format!("interface {NAME} in {} is down", netns.display());
                Err(CniError::new(code::IO, why))
            }
        },
        Asked::Del { .. } | Asked::Gc { .. } | Asked::Status | Asked::Version => Ok(None),
    }
}

fn add(request: &CniRequest, netns: &Path) -> Result<Value, CniError> {
    let mut inside = enter(netns)?;
    let (index, _) = lo(&mut inside)?;
    inside.set_link(LinkUnspec::new_with_index(index).up()).map_err(failed)?;
    if let Some(previous) = request.config.previous() {
        return Ok(previous.clone());
    }
    let has = inside.addresses().map_err(failed)?;
    let has = has.iter().filter(|address| address.link == index);
    // The address of each family, and none that others have put there.
    let own = has.filter(|address| address.ip.is_loopback());
    let made = Made {
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
        ..Made::default()
    };
    Ok(made.to_json(request.version))
}

fn enter(path: &Path) -> Result<Netlink, CniError> {
    let netns: File = netns::open("CNI_NETNS", path)?;
    let home = File::open(netns::OWN).map_err(failed)?;
    Netlink::open_in(&netns, &home).map_err(|error| netns::unusable("CNI_NETNS", path, &error))
}

/// Its index, and whether it is up.
fn lo(inside: &mut Netlink) -> Result<(u32, bool), CniError> {
    let link = inside.link(NAME).map_err(failed)?;
    let link =
        link.ok_or_else(|| CniError::new(code::IO, format!("there is no interface {NAME}")))?;
    Ok((link.index, link.up))
}

fn failed(error: std::io::Error) -> CniError {
    CniError::new(code::IO, format!("interface {NAME}: {error}"))
}
