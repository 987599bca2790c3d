//! Flags, environment and TOML file into one typed configuration.
//!
//! Every setting has one name: `--subnet-len`, `GOSSAMER_SUBNET_LEN` and `subnet_len = ...` are the same.
//! A flag outranks the environment, which outranks the file, which outranks a flannel `net-conf.json`.
//! What cannot work is refused here, with the field, its value and the fix; nothing is read later.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::{IpNet, Ipv6Net};
use regex_lite::Regex;
use serde::Deserialize;

use crate::{
    dataplane::{
        desired::Mode,
        firewall::{Policy, TABLE},
    },
    model::{ClusterSettings, NodeName, Pool, PoolSpec, Quorum, QuorumError, SettingsWish},
    wire::{Token, TokenError},
};

mod net_conf;
#[cfg(test)]
mod tests;

pub const DEFAULT_STATE_DIR: &str = "/var/lib/gossamer";
pub const DEFAULT_SOCKET: &str = "/run/gossamer/gossamer.sock";
pub const DEFAULT_SUBNET_FILE: &str = "/run/gossamer/subnet.env";
pub const DEFAULT_PORT: u16 = 8473;
const DEFAULT_NETWORK: &str = "10.42.0.0/16";
pub const DEFAULT_VXLAN_PORT: u16 = 8472;

/// Everything that can be set, as it was written. Nothing here is checked yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Create a new cluster, unless this host is in one already
    #[arg(long, env = "GOSSAMER_INIT", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    pub init: Option<bool>,
    /// A member to join by, HOST or HOST:PORT; repeatable. Names are resolved anew at each try
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
    /// Take tunnel packets from members alone, by a table of nftables [default: true]
    #[arg(long, env = "GOSSAMER_GUARD", num_args = 0..=1, default_missing_value = "true")]
    pub guard: Option<bool>,
    /// Let pods speak to the outside under this host's address, by the same table [default: false]
    #[arg(long, env = "GOSSAMER_IP_MASQ", num_args = 0..=1, default_missing_value = "true")]
    pub ip_masq: Option<bool>,
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
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// A complete configuration of one agent. All of it has been checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// The settings of the cluster to create where this host is in none.
    pub create: Option<ClusterSettings>,
    /// `HOST:PORT` of seeds.
    pub seeds: Vec<String>,
    pub token: Option<Token>,
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub subnet_file: PathBuf,
    /// None: port 8473 on all addresses of the underlay's family.
    pub listen: Option<SocketAddr>,
    pub advertise: Option<(IpAddr, Option<u16>)>,
    pub iface: IfaceChoice,
    pub wish: SettingsWish,
    pub prefer_subnet: Option<IpAddr>,
    pub replace_by_name: bool,
    pub quorum: Option<Quorum>,
    pub withdraw_after: Option<Duration>,
    pub mode: Mode,
    pub firewall: Policy,
    /// Sysctls that keep packets from passing are set, not only named.
    pub set_sysctls: bool,
    pub mtu: Option<u32>,
    pub name: NodeName,
}

/// How the underlay interface is chosen; flannel's ways.
#[derive(Clone, Debug)]
pub enum IfaceChoice {
    Default,
    Name(String),
    Address(IpAddr),
    Regex(Regex),
    CanReach(IpAddr),
}

/// A setting that cannot work: where it is, what is wrong, how to put it right.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    pub field: String,
    pub problem: String,
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
        let text = fs::read_to_string(path).map_err(|e| bad(field(), e))?;
        toml::from_str(&text).map_err(|e| bad(field(), e.to_string().trim_end()))
    }

    fn or(self, other: Self) -> Self {
        let list = |ours: Vec<String>, theirs| if ours.is_empty() { theirs } else { ours };
        Self {
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
            guard: self.guard.or(other.guard),
            ip_masq: self.ip_masq.or(other.ip_masq),
            set_sysctls: self.set_sysctls.or(other.set_sysctls),
            vni: self.vni.or(other.vni),
            vxlan_port: self.vxlan_port.or(other.vxlan_port),
            mtu: self.mtu.or(other.mtu),
            node_name: self.node_name.or(other.node_name),
            net_config: self.net_config.or(other.net_config),
            log: self.log.or(other.log),
            log_format: self.log_format.or(other.log_format),
        }
    }

    /// Checks everything that can be checked without a network.
    pub fn check(self) -> Result<Config, ConfigError> {
        let token = self.read_token()?;
        let wish = SettingsWish {
            network: self.network,
            subnet_len: self.subnet_len,
            subnet_min: self.subnet_min,
            subnet_max: self.subnet_max,
            network6: self.network6,
            subnet_len6: self.subnet_len6,
            vni: self.vni,
            vxlan_port: self.vxlan_port,
        };
        let settings = cluster_settings(&wish)?;
        let init = self.init.unwrap_or(false);
        if init && !self.join.is_empty() {
            let problem = "--init creates a cluster and --join enters one: use one of the two";
            return Err(bad("init", problem));
        }
        let mut seeds = self.join.clone();
        if !init && seeds.is_empty() {
            seeds.extend(token.iter().flat_map(|token| token.seeds.clone()));
        }
        let seeds = seeds.iter().map(|seed| with_port("join", seed)).collect::<Result<_, _>>()?;
        if let Some(mtu) = self.mtu.filter(|mtu| !(576..=65_000).contains(mtu)) {
            return Err(bad("mtu", format!("{mtu} is out of range: use 576 to 65000")));
        }
        let ipv6 = settings.pool.networks().iter().any(|network| network.addr().is_ipv6());
        if let Some(mtu) = self.mtu.filter(|mtu| ipv6 && *mtu < 1280) {
            return Err(bad("mtu", format!("{mtu} is too small for IPv6: use at least 1280")));
        }
        let listen = match &self.listen {
            Some(text) => {
                let (ip, port) = address("listen", text)?;
                Some(SocketAddr::new(ip, port.unwrap_or(DEFAULT_PORT)))
            }
            None => None,
        };
        let advertise = self.advertise.as_deref().map(|text| address("advertise", text));
        let quorum = quorum(self.forget_after.as_deref(), &self.voters)?;
        let path = |given: Option<PathBuf>, default: &str| given.unwrap_or_else(|| default.into());
        Ok(Config {
            create: init.then_some(settings),
            seeds,
            token,
            listen,
            advertise: advertise.transpose()?,
            iface: self.iface_choice()?,
            name: node_name(self.node_name)?,
            state_dir: path(self.state_dir, DEFAULT_STATE_DIR),
            socket: path(self.socket, DEFAULT_SOCKET),
            subnet_file: path(self.subnet_file, DEFAULT_SUBNET_FILE),
            wish,
            prefer_subnet: self.prefer_subnet,
            replace_by_name: self.replace_by_name.unwrap_or(false),
            quorum,
            withdraw_after: span(
                "withdraw_after",
                self.withdraw_after.as_deref().unwrap_or("10s"),
            )?,
            mode: self.mode.unwrap_or_default(),
            firewall: Policy {
                table: TABLE.to_owned(),
                guard: self.guard.unwrap_or(true),
                masquerade: self.ip_masq.unwrap_or(false),
            },
            set_sysctls: self.set_sysctls.unwrap_or(false),
            mtu: self.mtu,
        })
    }

    fn read_token(&self) -> Result<Option<Token>, ConfigError> {
        let parse = |field: &str, text: &str| {
            text.parse().map(Some).map_err(|error: TokenError| bad(field, error))
        };
        match (&self.token, &self.token_file) {
            (Some(_), Some(_)) => Err(bad("token", "set token or token_file, not both")),
            (Some(text), None) => parse("token", text),
            (None, Some(path)) => {
                let field = format!("token_file {}", path.display());
                let meta = fs::metadata(path).map_err(|e| bad(field.clone(), e))?;
                if meta.permissions().mode() & 0o077 != 0 {
                    let problem = "others may read it: run chmod 600 on it";
                    return Err(bad(field, problem));
                }
                let text = fs::read_to_string(path).map_err(|e| bad(field.clone(), e))?;
                parse(&field, &text)
            }
            (None, None) => Ok(None),
        }
    }

    fn iface_choice(&self) -> Result<IfaceChoice, ConfigError> {
        match (&self.iface, &self.iface_regex, self.iface_can_reach) {
            (Some(text), None, None) => Ok(text
                .parse()
                .map_or_else(|_| IfaceChoice::Name(text.clone()), IfaceChoice::Address)),
            (None, Some(text), None) => {
                Regex::new(text).map(IfaceChoice::Regex).map_err(|e| bad("iface_regex", e))
            }
            (None, None, Some(ip)) => Ok(IfaceChoice::CanReach(ip)),
            (None, None, None) => Ok(IfaceChoice::Default),
            _ => {
                Err(bad("iface", "use one of iface, iface_regex and iface_can_reach, not several"))
            }
        }
    }
}

/// The settings of a cluster in which whatever the operator left open has its default.
fn cluster_settings(wish: &SettingsWish) -> Result<ClusterSettings, ConfigError> {
    let default = || IpNet::V4(DEFAULT_NETWORK.parse().unwrap_or_default());
    let pool = Pool::new(&PoolSpec {
        network: wish.network.unwrap_or_else(default),
        subnet_len: wish.subnet_len,
        subnet_min: wish.subnet_min,
        subnet_max: wish.subnet_max,
        network6: wish.network6,
        subnet_len6: wish.subnet_len6,
    });
    let vni = wish.vni.unwrap_or(1);
    if !(1..1 << 24).contains(&vni) {
        return Err(bad("vni", format!("{vni} is out of range: use 1 to 16777215")));
    }
    let vxlan_port = wish.vxlan_port.unwrap_or(DEFAULT_VXLAN_PORT);
    if vxlan_port == 0 {
        return Err(bad("vxlan_port", "0 is no port: use 1 to 65535"));
    }
    let pool = pool.map_err(|error| bad("pool", error))?;
    Ok(ClusterSettings { pool, vni, vxlan_port })
}

/// A span of time; none for "never".
fn span(field: &str, text: &str) -> Result<Option<Duration>, ConfigError> {
    if text == "never" {
        return Ok(None);
    }
    humantime::parse_duration(text).map(Some).map_err(|error| {
        bad(field, format!("{text:?}: {error}; write a span as in \"12h\", or \"never\""))
    })
}

fn quorum(forget_after: Option<&str>, voters: &[String]) -> Result<Option<Quorum>, ConfigError> {
    let Some(span) = span("forget_after", forget_after.unwrap_or("never"))? else {
        let problem = "without forget_after they decide nothing: set it, or leave them out";
        return if voters.is_empty() { Ok(None) } else { Err(bad("voters", problem)) };
    };
    let parse = |name: &String| name.parse().map_err(|error| bad("voters", error));
    let voters: Vec<NodeName> = voters.iter().map(parse).collect::<Result<_, _>>()?;
    Quorum::new(span, &voters).map(Some).map_err(|error| {
        let field = match error {
            QuorumError::Voters(_) => "voters",
            QuorumError::TooShort(..) => "forget_after",
        };
        bad(field, error)
    })
}

fn node_name(given: Option<String>) -> Result<NodeName, ConfigError> {
    let host = || nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    let text = given.or_else(host).unwrap_or_default();
    text.parse().map_err(|error| bad("node_name", error))
}

/// `HOST`, `HOST:PORT`, `IPv6` or `[IPv6]:PORT` as `HOST:PORT`.
fn with_port(field: &str, text: &str) -> Result<String, ConfigError> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, DEFAULT_PORT).to_string());
    }
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let port_is_fine = port.is_empty() != text.contains(':')
        && (port.is_empty() || port.parse::<u16>().is_ok_and(|p| p > 0));
    if host.is_empty() || !port_is_fine || text.contains(char::is_whitespace) {
        return Err(bad(field, format!("{text:?} is not HOST or HOST:PORT")));
    }
    Ok(if port.is_empty() { format!("{text}:{DEFAULT_PORT}") } else { text.to_owned() })
}

fn address(field: &str, text: &str) -> Result<(IpAddr, Option<u16>), ConfigError> {
    text.parse::<SocketAddr>()
        .map(|address| (address.ip(), Some(address.port())))
        .or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, None)))
        .map_err(|_| bad(field, format!("{text:?} is not IP or IP:PORT")))
}

fn bad(field: impl Into<String>, problem: impl std::fmt::Display) -> ConfigError {
    ConfigError { field: field.into(), problem: problem.to_string() }
}
