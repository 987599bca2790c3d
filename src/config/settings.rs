//! Defines all settings, as flags, variables and keys of the file. Nothing is checked here.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::{IpNet, Ipv6Net};
use serde::{Deserialize, Deserializer, Serialize};

use super::{choices, instance::DOCKER_PLUGINS};
use crate::dataplane::{demand::Program, desired::Mode};

/// All settings as the operator wrote them, unchecked.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Name of this overlay, if the host has several; files, ports, VNI and device are derived from it
    #[arg(long, env = "GOSSAMER_INSTANCE", value_name = "NAME")]
    pub instance: Option<String>,
    /// Create a new cluster, unless this host already belongs to one
    #[arg(long, env = "GOSSAMER_INIT", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub init: Option<bool>,
    /// Member through which to join, HOST or HOST:PORT; repeatable. Names are resolved for each attempt
    #[arg(long, env = "GOSSAMER_JOIN", value_delimiter = ',', value_name = "HOST[:PORT]")]
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "text_or_list")]
    pub join: Vec<String>,
    /// Token of the cluster, from `gossamer token`. Visible in `ps`: prefer --token-file or
    /// `GOSSAMER_TOKEN`
    #[arg(long, env = "GOSSAMER_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// File with the token; only its owner may read it
    #[arg(long, env = "GOSSAMER_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Directory for this node's key and database [default: /var/lib/gossamer]
    #[arg(long, env = "GOSSAMER_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// The control socket [default: /run/gossamer/gossamer.sock]
    #[arg(long, env = "GOSSAMER_SOCKET", value_name = "FILE")]
    pub socket: Option<PathBuf>,
    /// Path of the flannel-style subnet.env [default: /run/gossamer/subnet.env]
    #[arg(long, env = "GOSSAMER_SUBNET_FILE", value_name = "FILE")]
    pub subnet_file: Option<PathBuf>,
    /// UDP address for gossip, IP or IP:PORT [default: all addresses, port 8473]
    #[arg(long, env = "GOSSAMER_LISTEN", value_name = "IP[:PORT]")]
    pub listen: Option<String>,
    /// Address at which peers reach this agent, IP or IP:PORT; behind NAT it need not be this host's
    /// [default: the underlay address]
    #[arg(long, env = "GOSSAMER_ADVERTISE", value_name = "IP[:PORT]")]
    pub advertise: Option<String>,
    /// Underlay interface, by name or address [default: the interface of the default route]
    #[arg(long, env = "GOSSAMER_IFACE", value_name = "NAME|IP")]
    pub iface: Option<String>,
    /// Underlay interface: the first whose address matches, or else the first whose name matches
    #[arg(long, env = "GOSSAMER_IFACE_REGEX", value_name = "REGEX")]
    pub iface_regex: Option<String>,
    /// Underlay interface: the interface of the route to this address
    #[arg(long, env = "GOSSAMER_IFACE_CAN_REACH", value_name = "IP")]
    pub iface_can_reach: Option<IpAddr>,
    /// Address pool of the cluster; an IPv6 network for a cluster without IPv4 [default: 10.42.0.0/16]
    #[arg(long, env = "GOSSAMER_NETWORK", value_name = "CIDR")]
    pub network: Option<IpNet>,
    /// Prefix length of each node's subnet [default: 24 (IPv6: 64), or the network's + 2 if that is
    /// longer]
    #[arg(long, env = "GOSSAMER_SUBNET_LEN", value_name = "BITS")]
    pub subnet_len: Option<u8>,
    /// First subnet to lease [default: the second of the network]
    #[arg(long, env = "GOSSAMER_SUBNET_MIN", value_name = "IP")]
    pub subnet_min: Option<IpAddr>,
    /// Last subnet to lease [default: the last of the network]
    #[arg(long, env = "GOSSAMER_SUBNET_MAX", value_name = "IP")]
    pub subnet_max: Option<IpAddr>,
    /// IPv6 address pool beside the IPv4 one (dual stack)
    #[arg(long, env = "GOSSAMER_NETWORK6", value_name = "CIDR")]
    pub network6: Option<Ipv6Net>,
    /// Prefix length of each node's IPv6 subnet in dual stack [default: 64]
    #[arg(long, env = "GOSSAMER_SUBNET_LEN6", value_name = "BITS")]
    pub subnet_len6: Option<u8>,
    /// Address of the subnet that this node requests, if it is free
    #[arg(long, env = "GOSSAMER_PREFER_SUBNET", value_name = "IP")]
    pub prefer_subnet: Option<IpAddr>,
    /// How nodes get their subnets: from each other, or from Kubernetes [default: gossip]
    #[arg(long, env = "GOSSAMER_LEASE_SOURCE", value_enum, value_name = "SOURCE")]
    pub lease_source: Option<LeaseSource>,
    /// With podcidr: this node's subnet, or CIDR,CIDR with one of each family [default: spec.podCIDRs of
    /// the node, read from the API]
    #[arg(long, env = "GOSSAMER_POD_CIDR", value_name = "CIDR[,CIDR]")]
    pub pod_cidr: Option<String>,
    /// With podcidr: file that holds this node's subnet, or one of each family
    #[arg(long, env = "GOSSAMER_POD_CIDR_FILE", value_name = "FILE")]
    pub pod_cidr_file: Option<PathBuf>,
    /// Forget a member that is down and has this node's name, and take over its subnet. Requires that
    /// node names are unique [default: false]
    #[arg(long, env = "GOSSAMER_REPLACE_BY_NAME", num_args = 0..=1, default_missing_value = "true")]
    pub replace_by_name: Option<bool>,
    /// Forget a member that most voters have missed for this time, for example 12h [default: never]
    #[arg(long, env = "GOSSAMER_FORGET_AFTER", value_name = "SPAN")]
    pub forget_after: Option<String>,
    /// Names of the 3, 5 or 7 nodes that vote on forgetting; the same on all of them
    #[arg(long, env = "GOSSAMER_VOTERS", value_delimiter = ',', value_name = "NAME,NAME")]
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "text_or_list")]
    pub voters: Vec<String>,
    /// Replace the route to a peer's subnet by an unreachable route when gossip considers the peer down and
    /// its kernel has not answered for this time; "never" keeps the route [default: 10s]
    #[arg(long, env = "GOSSAMER_WITHDRAW_AFTER", value_name = "SPAN")]
    pub withdraw_after: Option<String>,
    /// How packets reach peers: always by tunnel, directly where the underlay allows it, or always
    /// directly [default: vxlan]
    #[arg(long, env = "GOSSAMER_MODE", value_parser = choices::mode(), value_name = "MODE")]
    pub mode: Option<Mode>,
    /// Which peers have kernel entries: all, or each from its first packet on [default: all]
    #[arg(long, env = "GOSSAMER_PROGRAM", value_parser = choices::program(), value_name = "WHICH")]
    pub program: Option<Program>,
    /// With on-demand: remove the entries of a peer that was not used for this time [default: 5m]
    #[arg(long, env = "GOSSAMER_IDLE_AFTER", value_name = "SPAN")]
    pub idle_after: Option<String>,
    /// Accept tunnel packets from members only, with an nftables table [default: true]
    #[arg(long, env = "GOSSAMER_GUARD", num_args = 0..=1, default_missing_value = "true")]
    pub guard: Option<bool>,
    /// Masquerade packets from pods to addresses outside the overlay, with the same table [default: false]
    #[arg(long, env = "GOSSAMER_IP_MASQ", num_args = 0..=1, default_missing_value = "true")]
    pub ip_masq: Option<bool>,
    /// Restrict pods to their assigned addresses and MAC, with an nftables table [default: true]
    #[arg(long, env = "GOSSAMER_ANTI_SPOOFING", num_args = 0..=1, default_missing_value = "true")]
    pub anti_spoofing: Option<bool>,
    /// Correct sysctls whose values block packets, instead of only reporting them [default: false]
    #[arg(long, env = "GOSSAMER_SET_SYSCTLS", num_args = 0..=1, default_missing_value = "true")]
    pub set_sysctls: Option<bool>,
    /// VXLAN network identifier [default: 1]
    #[arg(long, env = "GOSSAMER_VNI", value_name = "NUMBER")]
    pub vni: Option<u32>,
    /// UDP port of the VXLAN device [default: 8472]
    #[arg(long, env = "GOSSAMER_VXLAN_PORT", value_name = "PORT")]
    pub vxlan_port: Option<u16>,
    /// MTU of the overlay device [default: the underlay's minus 50 (IPv4) or 70 (IPv6)]
    #[arg(long, env = "GOSSAMER_MTU", value_name = "BYTES")]
    pub mtu: Option<u32>,
    /// Name of the pods' bridge [default: gsm0, or gsm and the VNI]
    #[arg(long, env = "GOSSAMER_BRIDGE", value_name = "NAME")]
    pub bridge: Option<String>,
    /// Serve dashboard, metrics and health by HTTP at this address, without authentication [default: off]
    #[arg(long, env = "GOSSAMER_HTTP", value_name = "IP:PORT")]
    pub http: Option<SocketAddr>,
    /// Serve Docker's network plugin on a socket in this directory [default without a value:
    /// /run/docker/plugins]
    #[arg(long, env = "GOSSAMER_DOCKER_PLUGIN", num_args = 0..=1,
          default_missing_value = DOCKER_PLUGINS, value_name = "DIR")]
    pub docker_plugin: Option<PathBuf>,
    /// Name of this node [default: the host name]
    #[arg(long, env = "GOSSAMER_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,
    /// File with cluster settings, a flannel net-conf.json
    #[arg(long, env = "GOSSAMER_NET_CONFIG", value_name = "FILE")]
    pub net_config: Option<PathBuf>,
    /// Log level (error, warn, info, debug, trace), or filters by module [default: info]
    #[arg(long, env = "GOSSAMER_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// Log format [default: text]
    #[arg(long, env = "GOSSAMER_LOG_FORMAT", value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Deserializes a list of texts, or one text with commas as in the environment.
fn text_or_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a list of texts")]
    enum TextOrList {
        Text(String),
        List(Vec<String>),
    }
    Ok(match TextOrList::deserialize(deserializer)? {
        TextOrList::Text(text) => text.split(',').map(|part| part.trim().to_owned()).collect(),
        TextOrList::List(list) => list,
    })
}

/// How a node gets its subnet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
#[clap(rename_all = "lowercase")]
pub enum LeaseSource {
    /// Nodes lease subnets from each other.
    #[default]
    Gossip,
    /// Kubernetes assigns subnets (`spec.podCIDRs`).
    PodCidr,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Lines of text on standard error.
    #[default]
    Text,
    /// JSON objects on standard error.
    Json,
    /// systemd's journal, with the fields of an event as journal fields (`F_NODE=...`)
    Journal,
}

impl Settings {
    /// Adds the settings of `other` where this has none.
    pub(super) fn or(self, other: Self) -> Self {
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
