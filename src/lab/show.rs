//! Formats the kernel's tables of a host like `ip` and `bridge`, read by netlink.

use std::{fmt::Write as _, io};

use super::Host;
use crate::dataplane::{
    desired::{ROUTE_PROTOCOL, RouteTarget},
    kernel::Kernel,
    plan::{Actual, Found},
};

/// Returns gossamer's entries as `ip -d link`, `ip route`, `ip neigh` and `bridge fdb` would print them.
///
/// # Errors
/// Fails if the kernel cannot be queried.
pub fn tables(host: &Host, device: &str) -> io::Result<String> {
    let actual = host.netns.run(|| {
        let mut kernel = Kernel::open()?;
        kernel.observe(device, None).map_err(io::Error::other)
    })?;
    Ok(render(device, &actual))
}

fn render(name: &str, actual: &Actual) -> String {
    let mut out = String::new();
    if let Some(Found { device, addresses, .. }) = &actual.device {
        let _ = writeln!(out, "{name}: mtu {} link/ether {}", device.mtu, device.mac);
        let _ = writeln!(
            out,
            "    vxlan id {} local {} dstport {} nolearning",
            device.vni, device.local, device.port
        );
        for (address, len) in addresses {
            let _ = writeln!(out, "    inet {address}/{len}");
        }
    }
    for (subnet, hop) in &actual.routes {
        let (protocol, metric) = (ROUTE_PROTOCOL, hop.metric);
        let mtu = hop.mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
        let _ = match hop.way {
            RouteTarget::Overlay(vtep) => writeln!(
                out,
                "{subnet} via {vtep} dev {name} proto {protocol} metric {metric} onlink{mtu}"
            ),
            RouteTarget::Direct { gateway, link } => writeln!(
                out,
                "{subnet} via {gateway} dev {link} proto {protocol} metric {metric} onlink{mtu}"
            ),
            RouteTarget::Device => {
                writeln!(out, "{subnet} dev {name} proto {protocol} metric {metric} scope link")
            }
            RouteTarget::Unreachable => {
                writeln!(out, "unreachable {subnet} proto {protocol} metric {metric}")
            }
        };
    }
    for (address, mac) in &actual.neighbors {
        let _ = writeln!(out, "{address} dev {name} lladdr {mac} PERMANENT");
    }
    for (mac, underlay) in &actual.fdb {
        let _ = writeln!(out, "{mac} dev {name} dst {underlay} self permanent");
    }
    out
}
