//! Combines command-line flags, environment variables and a TOML file into one typed configuration.
//!
//! Every setting has one name: `--subnet-len`, `GOSSAMER_SUBNET_LEN` and `subnet_len = ...` are the same.
//! A flag takes precedence over the environment, the environment over the file, and the file over a
//! flannel `net-conf.json`.
//!
//! Invalid settings are rejected here with the field, its value and a remedy. The agent reads no setting
//! from elsewhere.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use regex_lite::Regex;

use crate::{
    dataplane::{demand::Program, desired::Mode, firewall::Policy},
    files,
    model::{
        ClusterSettings, NodeName, Pool, PoolSpec, Quorum, QuorumError, SettingsWish,
        check_interface_name,
    },
    pods::names::bridge_name,
    wire::{Token, TokenError},
};

mod choices;
mod instance;
mod log_filter;
mod net_conf;
mod planned;
mod preferred;
mod settings;
mod sources;
#[cfg(test)]
mod tests;
mod unknown;

pub use instance::{BadInstance, Instance, NAME};
pub use log_filter::log_filter;
pub use settings::{LeaseSource, LogFormat, Settings};
pub use sources::NO_FILE;
pub use unknown::{check_environment, example};

/// Pool of a cluster whose operator sets none.
const DEFAULT_NETWORK: &str = "10.42.0.0/16";
/// UDP port of the VXLAN device unless the operator sets another; flannel's default.
pub const DEFAULT_VXLAN_PORT: u16 = 8472;

/// A complete and checked configuration of one agent.
#[derive(Clone, Debug)]
pub struct Config {
    /// Settings of the cluster to create if this host has not joined one.
    pub create: Option<ClusterSettings>,
    /// Seeds as `HOST:PORT`.
    pub seeds: Vec<String>,
    /// Token of the cluster to join or create.
    pub token: Option<Token>,
    /// Directory of the node's key and database.
    pub state_dir: PathBuf,
    /// Path of the control socket.
    pub socket: PathBuf,
    /// Path of the file `subnet.env`.
    pub subnet_file: PathBuf,
    /// Address of the gossip socket. `None`: port [`Self::port`] on all addresses of the underlay's
    /// family.
    pub listen: Option<SocketAddr>,
    /// Address, and port if it differs, under which peers reach this node's agent.
    pub advertise: Option<(IpAddr, Option<u16>)>,
    /// How to choose the underlay interface.
    pub iface: IfaceChoice,
    /// Settings that the operator has set. They must match those of the cluster.
    pub wish: SettingsWish,
    /// An address of the subnet that this node requests if it is free.
    pub prefer_subnet: Option<IpAddr>,
    /// Source of this node's subnets if Kubernetes assigns them. `None`: the cluster assigns them by
    /// gossip.
    pub pod_cidr: Option<PodCidr>,
    /// Whether to forget a member that is down and has this node's name, and take over its subnet.
    pub replace_by_name: bool,
    /// Voters that forget members which have been missing for a time. `None`: only the operator forgets
    /// members.
    pub quorum: Option<Quorum>,
    /// Time for which a peer must be down and silent until its route is withdrawn. `None`: never.
    pub withdraw_after: Option<Duration>,
    /// VNI assumed until the cluster's settings are known.
    pub vni: u32,
    /// UDP port for gossip, unless `listen` has one.
    pub port: u16,
    /// Which peers have entries in the kernel: all, or those in use.
    pub program: Program,
    /// Time without traffic after which a peer's on-demand entries are removed.
    pub idle_after: Duration,
    /// How packets reach peers: by tunnel, directly, or either.
    pub mode: Mode,
    /// Policy of the nftables table.
    pub firewall: Policy,
    /// Whether pods may only use the addresses and the MAC assigned to them.
    pub anti_spoofing: bool,
    /// Whether the agent sets sysctls that block packets, instead of only reporting them.
    pub set_sysctls: bool,
    /// MTU of the overlay device, in bytes. `None`: derived from the underlay's.
    pub mtu: Option<u32>,
    /// Name of the pods' bridge. `None`: derived from the VNI.
    pub bridge: Option<String>,
    /// TCP address of the HTTP server for dashboard, metrics and health.
    pub http: Option<SocketAddr>,
    /// Path of the socket of Docker's network plugin. `None`: not served.
    pub docker_plugin: Option<PathBuf>,
    /// Name of this node.
    pub name: NodeName,
}

/// Source of the subnets that Kubernetes has assigned to this node: one, or one of each family.
#[derive(Clone, Debug)]
pub enum PodCidr {
    /// The subnets themselves.
    Values(Vec<IpNet>),
    /// A file that holds the subnets.
    File(PathBuf),
    /// The node object of the Kubernetes API.
    Api,
}

/// How the underlay interface is chosen. The choices are flannel's.
#[derive(Clone, Debug)]
pub enum IfaceChoice {
    /// The interface of the default route.
    Default,
    /// The interface with this name.
    Name(String),
    /// The interface with this address.
    Address(IpAddr),
    /// The first interface whose address matches, or else the first whose name matches.
    Regex(Regex),
    /// The interface of the route to this address.
    CanReach(IpAddr),
}

/// An invalid setting.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// The setting, and its file if it comes from one.
    pub field: String,
    /// What is wrong, and the remedy.
    pub problem: String,
    /// Whether this user may not read the file.
    pub is_refused: bool,
}

impl Config {
    /// Returns the address of this host to which gossip is bound, if `listen` names one.
    pub fn bound_address(&self) -> Option<IpAddr> {
        let listen = self.listen.map(|listen| listen.ip());
        listen.filter(|ip| !ip.is_unspecified() && !ip.is_loopback())
    }

    /// Returns the address of this host to which gossip is bound, if peers use this host's own address.
    pub fn bound_peer_address(&self) -> Option<IpAddr> {
        self.bound_address().filter(|_| self.advertise.is_none())
    }

    /// Returns the name of the pods' bridge in an overlay with this VNI.
    pub fn bridge_name(&self, vni: u32) -> String {
        self.bridge.clone().unwrap_or_else(|| bridge_name(vni))
    }
}

/// Reads a token from a file that only its owner can read.
///
/// # Errors
/// Fails if the file cannot be read, is accessible to other users, or holds no valid token.
pub fn read_token_file(path: &Path) -> Result<Token, ConfigError> {
    let field = format!("token_file {}", path.display());
    let meta = fs::metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => bad(
            &field,
            "there is no such file: on a member, run gossamer token --out FILE, and copy it here",
        ),
        _ => unreadable(&field, &error),
    })?;
    if !meta.is_file() {
        return Err(bad(field, "not a regular file"));
    }
    if meta.permissions().mode() & 0o077 != 0 {
        return Err(bad(field, "other users have access to it: run chmod 600 on it"));
    }
    let text = files::read_text(path, files::SMALL).map_err(|error| unreadable(&field, &error))?;
    parse_token(&field, &text)
}

/// Parses a token, or the command with it that `gossamer token` prints.
///
/// # Errors
/// Fails if the text is not a complete token; the error is of the setting `field`.
pub fn parse_token(field: &str, text: &str) -> Result<Token, ConfigError> {
    let text = text.trim();
    text.strip_prefix("gossamer join ").unwrap_or(text).parse().map_err(|error: TokenError| {
        let why = error.to_string();
        bad(field, why.strip_prefix("token: ").unwrap_or(&why))
    })
}

impl Settings {
    /// Checks all settings, as far as that is possible without a network.
    ///
    /// # Errors
    /// Fails with the first setting that is invalid or contradicts another one.
    #[expect(clippy::too_many_lines, reason = "one check for each setting")]
    pub fn check(self) -> Result<Config, ConfigError> {
        let instance: Instance = self
            .instance
            .as_deref()
            .unwrap_or_default()
            .parse()
            .map_err(|error| bad("instance", error))?;
        log_filter(self.log.as_deref())?;
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
        let pod_cidr = self.pod_cidr_source()?;
        let mut wish = wish;
        if pod_cidr.is_some() {
            // Kubernetes assigns subnets from the first of the network on.
            let network = wish.network.unwrap_or_else(default_network);
            wish.subnet_min = wish.subnet_min.or(Some(network.network()));
        }
        let settings = cluster_settings(&wish, &instance)?;
        let init = self.init.unwrap_or(false);
        if init && pod_cidr.is_some() {
            let problem =
                "with lease_source = \"podcidr\" no node creates the cluster: remove init";
            return Err(bad("init", problem));
        }
        if init && !self.join.is_empty() {
            let problem = "init creates a cluster and join enters one: use only one of the two";
            return Err(bad("init", problem));
        }
        let mut seeds = self.join.clone();
        if !init && seeds.is_empty() {
            seeds.extend(token.iter().flat_map(|token| token.seeds.clone()));
        }
        let seeds = seeds
            .iter()
            .map(|seed| with_port("join", seed, instance.port()))
            .collect::<Result<_, _>>()?;
        if let Some(name) = &self.bridge {
            check_interface_name(name).map_err(|error| bad("bridge", error))?;
        }
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
                Some(SocketAddr::new(ip, port.unwrap_or(instance.port())))
            }
            None => None,
        };
        let advertise = self.advertise.as_deref().map(|text| address("advertise", text));
        let quorum = quorum(self.forget_after.as_deref(), &self.voters)?;
        if let Some(address) = self.prefer_subnet {
            // A host that joins learns the pool from the cluster, unless it is given.
            let is_known = init || self.network.is_some();
            preferred::check(address, is_known.then_some(&settings.pool))?;
        }
        let (mode, program) = (self.mode.unwrap_or_default(), self.program.unwrap_or_default());
        if program == Program::OnDemand && mode != Mode::Vxlan {
            let problem = "on-demand requires tunnels: remove it, or use mode = \"vxlan\"";
            return Err(bad("program", problem));
        }
        if self.idle_after.is_some() && program != Program::OnDemand {
            let problem =
                "it has no effect without program = \"on-demand\": set that too, or remove it";
            return Err(bad("idle_after", problem));
        }
        let idle_after = span("idle_after", self.idle_after.as_deref().unwrap_or("5m"))?
            .unwrap_or(Duration::MAX);
        Ok(Config {
            vni: wish.vni.unwrap_or(instance.vni()),
            port: instance.port(),
            create: (init || pod_cidr.is_some()).then_some(settings),
            seeds,
            token,
            listen,
            advertise: advertise.transpose()?,
            iface: self.iface_choice()?,
            name: node_name(self.node_name)?,
            state_dir: self.state_dir.unwrap_or_else(|| instance.state_dir()),
            socket: self.socket.unwrap_or_else(|| instance.socket()),
            subnet_file: self.subnet_file.unwrap_or_else(|| instance.subnet_file()),
            wish,
            prefer_subnet: self.prefer_subnet,
            pod_cidr,
            replace_by_name: self.replace_by_name.unwrap_or(false),
            quorum,
            withdraw_after: span(
                "withdraw_after",
                self.withdraw_after.as_deref().unwrap_or("10s"),
            )?,
            program,
            idle_after,
            mode,
            firewall: Policy {
                guard: self.guard.unwrap_or(true),
                masquerade: self.ip_masq.unwrap_or(false),
                on_demand: program == Program::OnDemand,
            },
            anti_spoofing: self.anti_spoofing.unwrap_or(true),
            set_sysctls: self.set_sysctls.unwrap_or(false),
            mtu: self.mtu,
            bridge: self.bridge,
            http: self.http,
            docker_plugin: self.docker_plugin.map(|dir| instance.docker_socket(&dir)),
        })
    }

    fn pod_cidr_source(&self) -> Result<Option<PodCidr>, ConfigError> {
        let source = match (&self.pod_cidr, &self.pod_cidr_file) {
            (Some(_), Some(_)) => {
                return Err(bad("pod_cidr", "set pod_cidr or pod_cidr_file, not both"));
            }
            (Some(text), None) => {
                let parse = |text: &str| text.parse().map_err(|_| not_a_subnet(text));
                let subnets = text.split(',').map(|text| parse(text.trim()));
                PodCidr::Values(subnets.collect::<Result<_, _>>()?)
            }
            (None, Some(path)) => PodCidr::File(path.clone()),
            (None, None) => PodCidr::Api,
        };
        match self.lease_source.unwrap_or_default() {
            LeaseSource::PodCidr => Ok(Some(source)),
            LeaseSource::Gossip if matches!(source, PodCidr::Api) => Ok(None),
            LeaseSource::Gossip => Err(bad(
                "pod_cidr",
                "it has no effect without lease_source = \"podcidr\": set that too",
            )),
        }
    }

    fn read_token(&self) -> Result<Option<Token>, ConfigError> {
        match (&self.token, &self.token_file) {
            (Some(_), Some(_)) => Err(bad("token", "set token or token_file, not both")),
            (Some(text), None) => parse_token("token", text).map(Some),
            (None, Some(path)) => read_token_file(path).map(Some),
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
            _ => Err(bad("iface", "set only one of iface, iface_regex and iface_can_reach")),
        }
    }
}

fn not_a_subnet(text: &str) -> ConfigError {
    bad(
        "pod_cidr",
        format!("{text:?} is not a subnet: use CIDR, or CIDR,CIDR with one of each family"),
    )
}

/// Returns the pool of a cluster whose operator sets none.
pub fn default_network() -> IpNet {
    IpNet::V4(DEFAULT_NETWORK.parse().unwrap_or_default())
}

/// Returns the settings of a new cluster: the operator's, and defaults for the others.
fn cluster_settings(
    wish: &SettingsWish,
    instance: &Instance,
) -> Result<ClusterSettings, ConfigError> {
    let pool = Pool::new(&PoolSpec {
        network: wish.network.unwrap_or_else(default_network),
        subnet_len: wish.subnet_len,
        subnet_min: wish.subnet_min,
        subnet_max: wish.subnet_max,
        network6: wish.network6,
        subnet_len6: wish.subnet_len6,
    });
    let vni = wish.vni.unwrap_or(instance.vni());
    if !(1..1 << 24).contains(&vni) {
        return Err(bad("vni", format!("{vni} is out of range: use 1 to 16777215")));
    }
    let vxlan_port = wish.vxlan_port.unwrap_or(DEFAULT_VXLAN_PORT);
    if vxlan_port == 0 {
        return Err(bad("vxlan_port", "0 is not a valid port: use 1 to 65535"));
    }
    let pool = pool.map_err(|error| bad("pool", error))?;
    Ok(ClusterSettings { pool, vni, vxlan_port })
}

/// Parses a duration. Returns `None` for "never".
fn span(field: &str, text: &str) -> Result<Option<Duration>, ConfigError> {
    if text == "never" {
        return Ok(None);
    }
    humantime::parse_duration(text).map(Some).map_err(|error| {
        bad(field, format!("{text:?}: {error}; use a duration such as \"12h\", or \"never\""))
    })
}

fn quorum(forget_after: Option<&str>, voters: &[String]) -> Result<Option<Quorum>, ConfigError> {
    let Some(span) = span("forget_after", forget_after.unwrap_or("never"))? else {
        let problem = "they have no effect without forget_after: set it, or remove them";
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

/// Returns the node's name. A configured name must be valid; the host's name is adapted.
fn node_name(given: Option<String>) -> Result<NodeName, ConfigError> {
    if let Some(text) = given {
        return text.parse().map_err(|error| bad("node_name", error));
    }
    let host = nix::unistd::gethostname().map_err(|error| bad("node_name", error))?;
    NodeName::of_host(&host.to_string_lossy())
        .ok_or_else(|| bad("node_name", "this host has no usable name: set one"))
}

/// Converts `HOST`, `HOST:PORT`, `IPv6` or `[IPv6]:PORT` to `HOST:PORT`.
fn with_port(field: &str, text: &str, default: u16) -> Result<String, ConfigError> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(SocketAddr::new(ip, default).to_string());
    }
    let (host, port) = text.rsplit_once(':').unwrap_or((text, ""));
    let port_is_fine = port.is_empty() != text.contains(':')
        && (port.is_empty() || port.parse::<u16>().is_ok_and(|p| p > 0));
    if host.is_empty() || !port_is_fine || text.contains(char::is_whitespace) {
        return Err(bad(field, format!("{text:?} is not HOST or HOST:PORT")));
    }
    Ok(if port.is_empty() { format!("{text}:{default}") } else { text.to_owned() })
}

fn address(field: &str, text: &str) -> Result<(IpAddr, Option<u16>), ConfigError> {
    text.parse::<SocketAddr>()
        .map(|address| (address.ip(), Some(address.port())))
        .or_else(|_| text.parse::<IpAddr>().map(|ip| (ip, None)))
        .map_err(|_| bad(field, format!("{text:?} is not IP or IP:PORT")))
}

fn bad(field: impl Into<String>, problem: impl std::fmt::Display) -> ConfigError {
    ConfigError { field: field.into(), problem: problem.to_string(), is_refused: false }
}

/// Returns the error of a file that cannot be read.
fn unreadable(field: &str, error: &io::Error) -> ConfigError {
    ConfigError { is_refused: error.kind() == io::ErrorKind::PermissionDenied, ..bad(field, error) }
}

/// Returns all settings of the shipped example as one file, as a sample for the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn samples() -> Vec<Vec<u8>> {
    let shipped = include_str!("../config/gossamer.toml").lines();
    let settings = shipped.filter_map(|line| line.strip_prefix("# ").or(line.strip_prefix('#')));
    let settings: Vec<&str> = settings.filter(|line| fuzz(line.as_bytes())).collect();
    vec![settings.join("\n").into_bytes()]
}

/// Parses settings from arbitrary bytes; entry point of the fuzzer.
#[cfg(any(test, feature = "sim"))]
pub(crate) fn fuzz(text: &[u8]) -> bool {
    std::str::from_utf8(text).is_ok_and(|text| toml::from_str::<Settings>(text).is_ok())
}
