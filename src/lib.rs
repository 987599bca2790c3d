pub mod core;
pub mod dataplane;
pub mod model;
#[cfg(feature = "agent")]
pub mod netlink;
#[cfg(feature = "agent")]
pub mod transport;
pub mod wire;
