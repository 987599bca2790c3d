//! Errors of the kernel that prevent the VXLAN device.

use std::io;

use ipnet::IpNet;

use super::ENOBUFS;

/// Why the device cannot be created. The remaining operations of the plan are not executed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Another VXLAN device has the VNI and port.
    #[error(
        "VNI {vni} on UDP port {port} is in use by device {holder}: stop what made it \
         (is flannel running here?), or choose another vni or vxlan_port for the cluster"
    )]
    VniTaken {
        /// The VNI.
        vni: u32,
        /// The UDP port.
        port: u16,
        /// Name of the other device.
        holder: String,
    },
    /// The VXLAN device cannot open the UDP port.
    #[error(
        "UDP port {port} is taken by {}, so the VXLAN device {name} cannot listen on it: {}, or choose \
         another vxlan_port for the cluster",
        holder(by.as_deref()),
        release(by.as_deref())
    )]
    PortTaken {
        /// Name of the device that cannot be created.
        name: String,
        /// The UDP port.
        port: u16,
        /// The other VXLAN device; `None` if another kind of socket has the port.
        by: Option<String>,
    },
    /// A device of another kind has the name.
    #[error(
        "the device name {name} is taken by a {kind} device: rename or remove that device, \
         or choose another vni for the cluster"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Kind of the other device.
        kind: String,
    },
    /// A network of the overlay overlaps with an underlay address or another overlay.
    #[error(
        "network {network} of the overlay and {what} of interface {interface} overlap, so packets would take \
         the wrong way: choose another network for the cluster"
    )]
    Overlap {
        /// The network of the overlay.
        network: IpNet,
        /// The address or network that overlaps with it.
        what: IpNet,
        /// Name of the interface with that address or network.
        interface: String,
    },
    /// IPv6 addresses cannot be added to the device.
    #[error(
        "no IPv6 address can be given to {name}: IPv6 is turned off in this kernel (ipv6.disable, or \
         net.ipv6.conf.all.disable_ipv6); turn it on, or use a cluster without IPv6"
    )]
    NoIpv6 {
        /// Name of the device.
        name: String,
    },
    /// The kernel has no VXLAN module.
    #[error("the kernel cannot make VXLAN devices: load or build the vxlan module")]
    NoVxlan,
    /// The process lacks `CAP_NET_ADMIN`.
    #[error("not permitted to change network settings: run as root or grant CAP_NET_ADMIN")]
    NotPermitted,
    /// Another error of netlink.
    #[error("netlink: {0}")]
    Netlink(#[from] io::Error),
}

/// Names the user of a taken port.
fn holder(device: Option<&str>) -> String {
    device.map_or("another socket".to_owned(), |device| {
        format!(
            "the VXLAN device {device} of another program, made with settings that cannot share it \
             (external, gbp, gpe, udp6zerocsumrx)"
        )
    })
}

/// Returns how to free a taken port.
fn release(device: Option<&str>) -> String {
    device.map_or("free the port".to_owned(), |device| {
        format!("stop the program that made it and remove it (ip link del {device})")
    })
}

impl KernelError {
    /// Whether the same operation may succeed soon, because the kernel was busy or short of memory.
    pub fn is_transient(&self) -> bool {
        let Self::Netlink(error) = self else { return false };
        matches!(
            error.kind(),
            io::ErrorKind::Interrupted
                | io::ErrorKind::TimedOut
                | io::ErrorKind::WouldBlock
                | io::ErrorKind::ResourceBusy
                | io::ErrorKind::OutOfMemory
        ) || error.raw_os_error() == Some(ENOBUFS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_errors_of_a_busy_kernel_are_transient() {
        let is_transient =
            |errno| KernelError::Netlink(io::Error::from_raw_os_error(errno)).is_transient();
        // EINTR, EAGAIN, ENOMEM, EBUSY, ENOBUFS, ETIMEDOUT
        assert!([4, 11, 12, 16, 105, 110].into_iter().all(is_transient));
        // EPERM, ENODEV, EINVAL, EOPNOTSUPP, EADDRINUSE
        assert!(![1, 19, 22, 95, 98].into_iter().any(is_transient));
        assert!(!KernelError::NoVxlan.is_transient());
    }
}
