//! What can be set, and how flags, environment and files are put together. Nothing is checked here.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use ipnet::{IpNet, Ipv6Net};
use serde::Deserialize;

use super::{ConfigError, bad, net_conf};
use crate::{
    dataplane::{demand::Program, desired::Mode},
    docker, files,
};

/// Everything that can be set, as it was written. Nothing here is checked yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Name of this overlay, where a host has several: files, ports, VNI and device follow from it
    #[arg(long, env = "GOSSAMER_INSTANCE", value_name = "NAME")]
    pub instance: Option<String>,
    /// Create a new cluster, unless this host is in one already
    #[arg(long, env = "GOSSAMER_INIT", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub init: Option<bool>,
    /// A member to join by, HOST or HOST:PORT; repeatable. Names are resolved again at each try
    #[arg(long, env = "GOSSAMER_JOIN", value_delimiter = ',', value_name = "HOST[:PORT]")]
    pub join: Vec<String>,
    /// The cluster's token, from `gossamer token`. Visible in `ps`: prefer the file or GOSSAMER_TOKEN
    #[arg(long, env = "GOSSAMER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// A file with the token, readable by its owner only
    #[arg(long, env = "GOSSAMER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where this node keeps its key and its database [default: /var/lib/gossamer]
    #[arg(long, env = "GOSSAMER_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The control socket [default: /run/gossamer/gossamer.sock]
    #[arg(long, env = "GOSSAMER_SOCKET", value_name = "FILE")]
    pub socket: Option<PathBuf>,
    /// Where flannel's subnet.env is written [default: /run/gossamer/subnet.env]
    #[arg(long, env = "GOSSAMER_SUBNET_FILE", value_name = "FILE")]
    pub subnet_file: Option<PathBuf>,
    /// UDP address for gossip, IP or IP:PORT [default: all addresses, port 8473]
    #[arg(long, env = "GOSSAMER_LISTEN", value_name = "IP[:PORT]")]
    pub listen: Option<String>,
    /// Address given to peers, IP or IP:PORT; behind NAT one that this host does not have
    /// [default: the underlay address]
    #[arg(long, env = "GOSSAMER_ADVERTISE", value_name = "IP[:PORT]")]
    pub advertise: Option<String>,
    /// Underlay interface, by name or address [default: that of the default route]
    #[arg(long, env = "GOSSAMER_IFACE", value_name = "NAME|IP")]
    pub iface: Option<String>,
    /// Underlay interface: the first whose address, or else whose name, matches
    #[arg(long, env = "GOSSAMER_IFACE_REGEX", value_name = "REGEX")]
    pub iface_regex: Option<String>,
    /// Underlay interface: the one by which this address is reached
    #[arg(long, env = "GOSSAMER_IFACE_CAN_REACH", value_name = "IP")]
    pub iface_can_reach: Option<IpAddr>,
    /// The cluster's addresses; IPv6, if it is to have no IPv4 [default: 10.42.0.0/16]
    #[arg(long, env = "GOSSAMER_NETWORK", value_name = "CIDR")]
    pub network: Option<IpNet>,
    /// Prefix length of each node's subnet [default: 24 (IPv6: 64), or network + 2 if that is narrower]
    #[arg(long, env = "GOSSAMER_SUBNET_LEN", value_name = "BITS")]
    pub subnet_len: Option<u8>,
    /// First subnet to lease [default: the second of the network]
    #[arg(long, env = "GOSSAMER_SUBNET_MIN", value_name = "IP")]
    pub subnet_min: Option<IpAddr>,
    /// Last subnet to lease [default: the last of the network]
    #[arg(long, env = "GOSSAMER_SUBNET_MAX", value_name = "IP")]
    pub subnet_max: Option<IpAddr>,
    /// IPv6 addresses beside those of IPv4 (dual stack)
    #[arg(long, env = "GOSSAMER_NETWORK6", value_name = "CIDR")]
    pub network6: Option<Ipv6Net>,
    /// Prefix length of each node's IPv6 subnet in a dual stack [default: 64]
    #[arg(long, env = "GOSSAMER_SUBNET_LEN6", value_name = "BITS")]
    pub subnet_len6: Option<u8>,
    /// The subnet this node would like, if it is free
    #[arg(long, env = "GOSSAMER_PREFER_SUBNET", value_name = "IP")]
    pub prefer_subnet: Option<IpAddr>,
    /// Who says which subnet this node has: the nodes among themselves, or Kubernetes [default: gossip]
    #[arg(long, env = "GOSSAMER_LEASE_SOURCE", value_enum, value_name = "WHO")]
    pub lease_source: Option<LeaseSource>,
    /// With podcidr: that subnet, if it is not to be read from the API; with one of each family CIDR,CIDR
    /// [default: spec.podCIDRs of the node]
    #[arg(long, env = "GOSSAMER_POD_CIDR", value_name = "CIDR[,CIDR]")]
    pub pod_cidr: Option<String>,
    /// With podcidr: a file with that subnet, or with one of each family
    #[arg(long, env = "GOSSAMER_POD_CIDR_FILE", value_name = "FILE")]
    pub pod_cidr_file: Option<PathBuf>,
    /// Node names are unique by construction: a down member of this node's name is its predecessor, is
    /// forgotten, and its subnet taken over
    #[arg(long, env = "GOSSAMER_REPLACE_BY_NAME", num_args = 0..=1, default_missing_value = "true")]
    pub replace_by_name: Option<bool>,
    /// Forget a member that most voters have missed for so long, as in "12h" [default: never]
    #[arg(long, env = "GOSSAMER_FORGET_AFTER", value_name = "SPAN")]
    pub forget_after: Option<String>,
    /// Names of the 3, 5 or 7 nodes that vote on that: the same on all of them
    #[arg(long, env = "GOSSAMER_VOTERS", value_delimiter = ',', value_name = "NAME,NAME")]
    pub voters: Vec<String>,
    /// A peer's subnet is unreachable by route when gossip holds it as down and its kernel has not answered
    /// for so long, or "never" [default: 10s]
    #[arg(long, env = "GOSSAMER_WITHDRAW_AFTER", value_name = "SPAN")]
    pub withdraw_after: Option<String>,
    /// How packets get to peers: through a tunnel, directly where the underlay allows it, or only so
    /// [default: vxlan]
    #[arg(long, env = "GOSSAMER_MODE", value_enum, value_name = "MODE")]
    pub mode: Option<Mode>,
    /// Program all peers, or each when the first packet goes to it [default: all]
    #[arg(long, env = "GOSSAMER_PROGRAM", value_enum, value_name = "WHICH")]
    pub program: Option<Program>,
    /// With on-demand: a peer loses its entries when it was not used for so long [default: 5m]
    #[arg(long, env = "GOSSAMER_IDLE_AFTER", value_name = "SPAN")]
    pub idle_after: Option<String>,
    /// Take tunnel packets from members alone, by a table of nftables [default: true]
    #[arg(long, env = "GOSSAMER_GUARD", num_args = 0..=1, default_missing_value = "true")]
    pub guard: Option<bool>,
    /// Let pods speak to the outside under this host's address, by the same table [default: false]
    #[arg(long, env = "GOSSAMER_IP_MASQ", num_args = 0..=1, default_missing_value = "true")]
    pub ip_masq: Option<bool>,
    /// Hold pods to the addresses and the MAC that they were given, by a table of nftables [default: true]
    #[arg(long, env = "GOSSAMER_ANTI_SPOOFING", num_args = 0..=1, default_missing_value = "true")]
    pub anti_spoofing: Option<bool>,
    /// Set the sysctls that packets need to pass, instead of only naming those that are wrong
    #[arg(long, env = "GOSSAMER_SET_SYSCTLS", num_args = 0..=1, default_missing_value = "true")]
    pub set_sysctls: Option<bool>,
    /// VXLAN network identifier [default: 1]
    #[arg(long, env = "GOSSAMER_VNI", value_name = "NUMBER")]
    pub vni: Option<u32>,
    /// UDP port of the VXLAN device [default: 8472]
    #[arg(long, env = "GOSSAMER_VXLAN_PORT", value_name = "PORT")]
    pub vxlan_port: Option<u16>,
    /// MTU of the overlay device [default: the underlay's, less 50 (IPv4) or 70 (IPv6)]
    #[arg(long, env = "GOSSAMER_MTU", value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Bridge that pods are plugged into [default: gsm0, or gsm and the VNI]
    #[arg(long, env = "GOSSAMER_BRIDGE", value_name = "NAME")]
    pub bridge: Option<String>,
    /// Serve metrics and health by HTTP at this address, IP:PORT, to whoever reaches it [default: not]
    #[arg(long, env = "GOSSAMER_HTTP", value_name = "IP:PORT")]
    pub http: Option<SocketAddr>,
    /// Serve Docker's network plugin on a socket in this directory [directory: /run/docker/plugins]
    #[arg(long, env = "GOSSAMER_DOCKER_PLUGIN", num_args = 0..=1,
          default_missing_value = docker::DIRECTORY, value_name = "DIR")]
    pub docker_plugin: Option<PathBuf>,
    /// Name of this node in tables [default: the host name]
    #[arg(long, env = "GOSSAMER_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// Cluster settings from a flannel net-conf.json
    #[arg(long, env = "GOSSAMER_NET_CONFIG", value_name = "FILE")]
    pub net_config: Option<PathBuf>,
    /// What to log: error, warn, info, debug, trace, or filters by module [default: info]
    #[arg(long, env = "GOSSAMER_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// How to log [default: text]
    #[arg(long, env = "GOSSAMER_LOG_FORMAT", value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
#[clap(rename_all = "lowercase")]
pub enum LeaseSource {
    #[default]
    Gossip,
    PodCidr,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    #[default]
    Text,
    Json,
    /// systemd's journal, with the fields as its own (`F_NODE=...`)
    Journal,
}

impl Settings {
    /// Fills in from the files what flags and environment left open.
    pub fn complete(self, file: Option<&Path>) -> Result<Self, ConfigError> {
        let from_file = match file {
            Some(path) => Self::from_toml(path)?,
            None => Self::default(),
        };
        let merged = self.or(from_file);
        match merged.net_config.clone() {
            Some(path) => {
                let fallback = net_conf::read(&path)?;
                Ok(merged.or(fallback))
            }
            None => Ok(merged),
        }
    }

    fn from_toml(path: &Path) -> Result<Self, ConfigError> {
        let field = || format!("config {}", path.display());
        let text = files::read_text(path, files::SMALL).map_err(|e| bad(field(), e))?;
        toml::from_str(&text).map_err(|e| bad(field(), e.to_string().trim_end()))
    }

    fn or(self, other: Self) -> Self {
        let list = |ours: Vec<String>, theirs| if ours.is_empty() { theirs } else { ours };
        Self {
            instance: self.instance.or(other.instance),
            init: self.init.or(other.init),
            join: list(self.join, other.join),
            token: self.token.or(other.token),
            token_file: self.token_file.or(other.token_file),
            state_dir: self.state_dir.or(other.state_dir),
            socket: self.socket.or(other.socket),
            subnet_file: self.subnet_file.or(other.subnet_file),
            listen: self.listen.or(other.listen),
            advertise: self.advertise.or(other.advertise),
            iface: self.iface.or(other.iface),
            iface_regex: self.iface_regex.or(other.iface_regex),
            iface_can_reach: self.iface_can_reach.or(other.iface_can_reach),
            network: self.network.or(other.network),
            subnet_len: self.subnet_len.or(other.subnet_len),
            subnet_min: self.subnet_min.or(other.subnet_min),
            subnet_max: self.subnet_max.or(other.subnet_max),
            network6: self.network6.or(other.network6),
            subnet_len6: self.subnet_len6.or(other.subnet_len6),
            prefer_subnet: self.prefer_subnet.or(other.prefer_subnet),
            replace_by_name: self.replace_by_name.or(other.replace_by_name),
            forget_after: self.forget_after.or(other.forget_after),
            voters: list(self.voters, other.voters),
            withdraw_after: self.withdraw_after.or(other.withdraw_after),
            mode: self.mode.or(other.mode),
            program: self.program.or(other.program),
            idle_after: self.idle_after.or(other.idle_after),
            guard: self.guard.or(other.guard),
            ip_masq: self.ip_masq.or(other.ip_masq),
            anti_spoofing: self.anti_spoofing.or(other.anti_spoofing),
            set_sysctls: self.set_sysctls.or(other.set_sysctls),
            vni: self.vni.or(other.vni),
            vxlan_port: self.vxlan_port.or(other.vxlan_port),
            mtu: self.mtu.or(other.mtu),
            lease_source: self.lease_source.or(other.lease_source),
            pod_cidr: self.pod_cidr.or(other.pod_cidr),
            pod_cidr_file: self.pod_cidr_file.or(other.pod_cidr_file),
            bridge: self.bridge.or(other.bridge),
            http: self.http.or(other.http),
            docker_plugin: self.docker_plugin.or(other.docker_plugin),
            node_name: self.node_name.or(other.node_name),
            net_config: self.net_config.or(other.net_config),
            log: self.log.or(other.log),
            log_format: self.log_format.or(other.log_format),
        }
    }
}
