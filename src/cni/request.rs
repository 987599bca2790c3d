//! A request of the runtime: its environment variables and the configuration on standard input.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use super::{
    config::{NetworkConfig, PodOptions},
    error::{CniError, code},
};
use crate::{api::AttachmentName, config::Instance, model::Attachment};

/// Supported versions of the specification, oldest first.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Name of the plugin that sets up a pod's `lo`. It is this program under another name.
pub const LOOPBACK: &str = "loopback";

/// Environment variables by name.
pub type Environment = BTreeMap<String, OsString>;

/// The operation that `CNI_COMMAND` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Connects a pod.
    Add,
    /// Disconnects a pod.
    Del,
    /// Checks a connected pod.
    Check,
    /// Removes the attachments that the runtime no longer knows.
    Gc,
    /// Reports whether pods can be connected.
    Status,
    /// Reports the supported versions.
    Version,
}

impl Verb {
    const ALL: [Self; 6] =
        [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    /// Returns the value of `CNI_COMMAND`.
    const fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        }
    }
}

/// A validated operation with its parameters.
#[derive(Debug)]
pub enum Operation {
    /// Connects a pod.
    Add {
        /// Container and interface.
        attachment: Attachment,
        /// Path of the pod's network namespace.
        netns: PathBuf,
        /// The properties requested for the pod.
        pod_options: PodOptions,
    },
    /// Disconnects a pod. The name is not validated: a name that ADD refuses belongs to no pod.
    Del {
        /// Container and interface.
        name: AttachmentName,
        /// Path of the pod's network namespace, if the runtime still has one.
        netns: Option<PathBuf>,
    },
    /// Checks a connected pod.
    Check {
        /// Container and interface.
        attachment: Attachment,
        /// Path of the pod's network namespace.
        netns: PathBuf,
    },
    /// Removes the network's attachments that are not listed.
    Gc {
        /// The attachments to keep.
        valid: Vec<AttachmentName>,
    },
    /// Reports whether pods can be connected.
    Status,
    /// Reports the supported versions.
    Version,
}

/// A parsed call of the plugin.
#[derive(Debug)]
pub struct CniRequest {
    /// The operation and its parameters.
    pub operation: Operation,
    /// The version of the specification whose format the answer has.
    pub version: &'static str,
    /// Whether the request is for the plugin `loopback` and not for the overlay.
    pub loopback: bool,
    /// Name of the network.
    pub network: String,
    /// The whole configuration.
    pub config: NetworkConfig,
}

impl CniRequest {
    /// Parses a call of the plugin. `program` is the file name by which the program was called.
    ///
    /// # Errors
    /// If a variable or the configuration is missing or invalid. The error comes with the version whose
    /// format it must have.
    pub fn parse(
        program: &str,
        environment: &Environment,
        input: &[u8],
    ) -> Result<Self, (CniError, &'static str)> {
        const NEWEST: &str = VERSIONS[VERSIONS.len() - 1];
        let verb = verb(environment).map_err(|error| (error, NEWEST))?;
        let config = match input.trim_ascii() {
            // The oldest runtimes send no configuration with VERSION.
            [] if verb == Verb::Version => Ok(NetworkConfig::default()),
            input => NetworkConfig::parse(input),
        };
        let config = config.map_err(|error| (error, NEWEST))?;
        let named = config.version().map_err(|error| (error, NEWEST))?;
        let version = match VERSIONS.into_iter().find(|version| *version == named) {
            Some(version) => version,
            // VERSION must work for any version.
            None if verb == Verb::Version => NEWEST,
            // Configurations of the first version have no `cniVersion`.
            None if named.is_empty() => VERSIONS[0],
            None => return Err((unknown_version(&named), NEWEST)),
        };
        Self::read(program, environment, verb, version, config).map_err(|error| (error, version))
    }

    fn read(
        program: &str,
        environment: &Environment,
        verb: Verb,
        version: &'static str,
        config: NetworkConfig,
    ) -> Result<Self, CniError> {
        let need = |name: &str| text(environment, name)?.ok_or_else(|| missing(name));
        let attachment = || {
            let attachment = Attachment::new(need("CNI_CONTAINERID")?, need("CNI_IFNAME")?);
            attachment.map_err(|error| {
                let why = format!("CNI_CONTAINERID or CNI_IFNAME: {error}");
                CniError::new(code::BAD_ENVIRONMENT, why)
            })
        };
        let netns = || need("CNI_NETNS").map(|path| Path::new(path).to_owned());
        expect_verb(verb, version)?;
        let operation = match verb {
            Verb::Add => {
                let (attachment, netns) = (attachment()?, netns()?);
                let arguments = arguments(text(environment, "CNI_ARGS")?.unwrap_or_default())?;
                Operation::Add { attachment, netns, pod_options: config.pod_options(&arguments)? }
            }
            Verb::Del => {
                let [container, interface] =
                    [need("CNI_CONTAINERID")?, need("CNI_IFNAME")?].map(str::to_owned);
                let netns = variable(environment, "CNI_NETNS").map(PathBuf::from);
                Operation::Del { name: AttachmentName { container, interface }, netns }
            }
            Verb::Check => Operation::Check { attachment: attachment()?, netns: netns()? },
            Verb::Gc => Operation::Gc { valid: config.valid_attachments()? },
            Verb::Status => Operation::Status,
            Verb::Version => Operation::Version,
        };
        let loopback = program == LOOPBACK || config.kind()? == LOOPBACK;
        Ok(Self { operation, version, loopback, network: config.name()?, config })
    }

    /// Returns the owner under which the agent stores this network's pods.
    pub fn owner(&self) -> String {
        format!("cni/{}", self.network)
    }

    /// Returns the path of the agent's control socket.
    ///
    /// # Errors
    /// If `socket` or `instance` in the configuration is invalid.
    pub fn socket(&self) -> Result<PathBuf, CniError> {
        if let Some(socket) = self.config.socket()? {
            return Ok(socket);
        }
        let instance: Result<Instance, _> = self.config.instance()?.parse();
        let instance = instance
            .map_err(|error| CniError::new(code::BAD_CONFIG, format!("instance: {error}")))?;
        Ok(instance.socket())
    }
}

fn variable<'a>(environment: &'a Environment, name: &str) -> Option<&'a OsStr> {
    environment.get(name).map(OsString::as_os_str).filter(|value| !value.is_empty())
}

fn text<'a>(environment: &'a Environment, name: &str) -> Result<Option<&'a str>, CniError> {
    let Some(value) = variable(environment, name) else { return Ok(None) };
    let unreadable = || {
        let why = format!("{name} {}: not UTF-8", value.display());
        CniError::new(code::BAD_ENVIRONMENT, why)
    };
    value.to_str().map(Some).ok_or_else(unreadable)
}

fn missing(name: &str) -> CniError {
    CniError::new(code::BAD_ENVIRONMENT, format!("{name} is not set in the environment"))
}

fn verb(environment: &Environment) -> Result<Verb, CniError> {
    let said = text(environment, "CNI_COMMAND")?.ok_or_else(|| missing("CNI_COMMAND"))?;
    Verb::ALL.into_iter().find(|verb| verb.name() == said).ok_or_else(|| {
        let why = format!("CNI_COMMAND {said:?}: use ADD, DEL, CHECK, GC, STATUS or VERSION");
        CniError::new(code::BAD_ENVIRONMENT, why)
    })
}

/// Checks that the version of the configuration has the verb.
fn expect_verb(verb: Verb, version: &'static str) -> Result<(), CniError> {
    let since = match verb {
        Verb::Add | Verb::Del | Verb::Version => VERSIONS[0],
        Verb::Check => "0.4.0",
        Verb::Gc | Verb::Status => "1.1.0",
    };
    let place = |version| VERSIONS.iter().position(|other| *other == version);
    if place(version) >= place(since) {
        return Ok(());
    }
    let verb = verb.name();
    let why = format!("CNI_COMMAND {verb}: not in cniVersion {version}; it exists since {since}");
    Err(CniError::new(code::INCOMPATIBLE_VERSION, why))
}

fn unknown_version(version: &str) -> CniError {
    let why = format!("cniVersion {version}: not supported by this plugin");
    let details = format!("supported: {}", VERSIONS.join(", "));
    CniError { details, ..CniError::new(code::INCOMPATIBLE_VERSION, why) }
}

/// Parses the pairs in `CNI_ARGS`. Refuses unknown keys unless `IgnoreUnknown` is set.
fn arguments(text: &str) -> Result<BTreeMap<String, String>, CniError> {
    const IGNORE: &str = "IgnoreUnknown";
    const KNOWN: [&str; 3] = ["IP", "MAC", IGNORE];
    let bad = |why: String| CniError::new(code::BAD_ENVIRONMENT, format!("CNI_ARGS: {why}"));
    let mut pairs = BTreeMap::new();
    for pair in text.split(';').filter(|pair| !pair.trim().is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| bad(format!("{pair:?} is not KEY=VALUE")))?;
        let (key, value) = (key.trim(), value.trim());
        match pairs.insert(key.to_owned(), value.to_owned()) {
            Some(other) if other != value && KNOWN.contains(&key) => {
                return Err(bad(format!("{key} is set twice: {other} and {value}")));
            }
            _ => {}
        }
    }
    let ignore = pairs.get(IGNORE).map(|value| value.to_ascii_lowercase());
    let ignore = match ignore.as_deref() {
        None | Some("0" | "false") => false,
        Some("1" | "true") => true,
        Some(other) => return Err(bad(format!("{IGNORE}={other}: use 1, true, 0 or false"))),
    };
    let is_unknown = |key: &&String| !KNOWN.contains(&key.as_str());
    match pairs.keys().find(is_unknown).filter(|_| !ignore) {
        Some(key) => Err(bad(format!("{key} is unknown: set {IGNORE}=1 to ignore unknown keys"))),
        None => Ok(pairs),
    }
}

#[cfg(test)]
mod tests;
