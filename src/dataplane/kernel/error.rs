//! Why the kernel cannot be used as it is.

use std::io;

use ipnet::IpNet;

use super::ENOBUFS;

/// Why the device cannot be made. The rest of the plan was not tried.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error(
        "VNI {vni} on UDP port {port} is in use by device {holder}: stop what made it \
         (is flannel running here?), or choose another vni or vxlan_port for the cluster"
    )]
    VniTaken { vni: u32, port: u16, holder: String },
    #[error(
        "UDP port {port} is taken by {}, so the VXLAN device {name} cannot listen on it: {}, or choose \
         another vxlan_port for the cluster",
        holder(by.as_deref()),
        release(by.as_deref())
    )]
    PortTaken {
        name: String,
        port: u16,
        /// The other VXLAN device, if it is one.
        by: Option<String>,
    },
    #[error(
        "the device name {name} is taken by a {kind} device: rename or remove that device, \
         or choose another vni for the cluster"
    )]
    NameTaken { name: String, kind: String },
    #[error(
        "network {network} of the overlay and {what} of interface {interface} overlap, so packets would take \
         the wrong way: choose another network for the cluster"
    )]
    Overlap { network: IpNet, what: IpNet, interface: String },
    #[error(
        "no IPv6 address can be given to {name}: IPv6 is turned off in this kernel (ipv6.disable, or \
         net.ipv6.conf.all.disable_ipv6); turn it on, or use a cluster without IPv6"
    )]
    NoIpv6 { name: String },
    #[error("the kernel cannot make VXLAN devices: load or build the vxlan module")]
    NoVxlan,
    #[error("not permitted to change network settings: run as root or grant CAP_NET_ADMIN")]
    NotPermitted,
    #[error("netlink: {0}")]
    Netlink(#[from] io::Error),
}

fn holder(device: Option<&str>) -> String {
    device.map_or("another socket".to_owned(), |device| {
        format!(
            "the VXLAN device {device} of another program, made with settings that cannot share it \
             (external, gbp, gpe, udp6zerocsumrx)"
        )
    })
}

fn release(device: Option<&str>) -> String {
    device.map_or("free the port".to_owned(), |device| {
        format!("stop the program that made it and remove it (ip link del {device})")
    })
}

impl KernelError {
    /// Whether the kernel may take the same in a moment: it was busy, or short of memory.
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
    fn errors_of_a_busy_kernel_are_transient_and_no_others() {
        let is_transient =
            |errno| KernelError::Netlink(io::Error::from_raw_os_error(errno)).is_transient();
        // EINTR, EAGAIN, ENOMEM, EBUSY, ENOBUFS, ETIMEDOUT
        assert!([4, 11, 12, 16, 105, 110].into_iter().all(is_transient));
        // EPERM, ENODEV, EINVAL, EOPNOTSUPP, EADDRINUSE
        assert!(![1, 19, 22, 95, 98].into_iter().any(is_transient));
        assert!(!KernelError::NoVxlan.is_transient());
    }
}
