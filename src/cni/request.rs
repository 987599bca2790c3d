//! What the runtime asks: its environment, and the configuration that comes with it.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use super::{
    config::{NetworkConfig, Wishes},
    error::{CniError, code},
};
use crate::{api::AttachmentName, config::Instance, model::Attachment};

/// Versions of the specification that are spoken, oldest first.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Longest configuration that is read, in bytes.
pub const INPUT_MAX: u64 = 1 << 20;
/// The plugin that sets up a pod's `lo`, which is this program under another name.
pub const LOOPBACK: &str = "loopback";

/// Variables by their names.
pub type Environment = BTreeMap<String, OsString>;

/// Named by `CNI_COMMAND`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    const ALL: [Self; 6] =
        [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    /// As the specification writes it.
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

/// A request, checked: what is to be done, with what that takes.
#[derive(Debug)]
pub enum Asked {
    Add {
        attachment: Attachment,
        netns: PathBuf,
        wishes: Wishes,
    },
    /// Of a name that ADD refuses there is nothing.
    Del {
        name: AttachmentName,
        netns: Option<PathBuf>,
    },
    Check {
        attachment: Attachment,
        netns: PathBuf,
    },
    /// Removes all but these.
    Gc {
        valid: Vec<AttachmentName>,
    },
    Status,
    Version,
}

#[derive(Debug)]
pub struct CniRequest {
    pub asked: Asked,
    /// In which the answer is to be.
    pub version: &'static str,
    /// Whether the pod's `lo` is meant, and not its place in the overlay.
    pub loopback: bool,
    /// Name of the network.
    pub network: String,
    pub config: NetworkConfig,
}

impl CniRequest {
    /// `program` is the name by which this one was called.
    ///
    /// # Errors
    /// By the specification's numbers, with the version in which they are to be told; it names what is
    /// wrong.
    pub fn parse(
        program: &str,
        environment: &Environment,
        input: &[u8],
    ) -> Result<Self, (CniError, &'static str)> {
        const NEWEST: &str = VERSIONS[VERSIONS.len() - 1];
        let verb = verb(environment).map_err(|error| (error, NEWEST))?;
        let config = match input.trim_ascii() {
            // The oldest runtimes send nothing along with it.
            [] if verb == Verb::Version => Ok(NetworkConfig::default()),
            input => NetworkConfig::parse(input),
        };
        let config = config.map_err(|error| (error, NEWEST))?;
        let named = config.version().map_err(|error| (error, NEWEST))?;
        let version = match VERSIONS.into_iter().find(|version| *version == named) {
            Some(version) => version,
            // What asks for the versions need not know them.
            None if verb == Verb::Version => NEWEST,
            // Configurations named none before there was a second.
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
        let asked = match verb {
            Verb::Add => {
                let (attachment, netns) = (attachment()?, netns()?);
                let arguments = arguments(text(environment, "CNI_ARGS")?.unwrap_or_default())?;
                Asked::Add { attachment, netns, wishes: config.wishes(&arguments)? }
            }
            Verb::Del => {
                let [container, interface] =
                    [need("CNI_CONTAINERID")?, need("CNI_IFNAME")?].map(str::to_owned);
                let netns = variable(environment, "CNI_NETNS").map(PathBuf::from);
                Asked::Del { name: AttachmentName { container, interface }, netns }
            }
            Verb::Check => Asked::Check { attachment: attachment()?, netns: netns()? },
            Verb::Gc => Asked::Gc { valid: config.valid_attachments()? },
            Verb::Status => Asked::Status,
            Verb::Version => Asked::Version,
        };
        let loopback = program == LOOPBACK || config.kind()? == LOOPBACK;
        Ok(Self { asked, version, loopback, network: config.name()?, config })
    }

    /// On whose behalf the agent keeps what this network asks for.
    pub fn owner(&self) -> String {
        format!("cni/{}", self.network)
    }

    /// Where the agent listens.
    ///
    /// # Errors
    /// For an instance that cannot be one.
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
        let why = format!("{name} {}: it is not UTF-8", value.display());
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
        let why = format!("CNI_COMMAND {said:?}: it is ADD, DEL, CHECK, GC, STATUS or VERSION");
        CniError::new(code::BAD_ENVIRONMENT, why)
    })
}

/// Verbs that came later than others are not in earlier versions.
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
    let why = format!("CNI_COMMAND {verb}: cniVersion {version} has none: it came with {since}");
    Err(CniError::new(code::INCOMPATIBLE_VERSION, why))
}

fn unknown_version(version: &str) -> CniError {
    let why = format!("cniVersion {version}: this plugin does not speak it");
    let details = format!("it speaks {}", VERSIONS.join(", "));
    CniError { details, ..CniError::new(code::INCOMPATIBLE_VERSION, why) }
}

/// The pairs in `CNI_ARGS`. One that is not known is refused, unless the runtime says that it need not be.
fn arguments(text: &str) -> Result<BTreeMap<String, String>, CniError> {
    const IGNORE: &str = "IgnoreUnknown";
    const KNOWN: [&str; 3] = ["IP", "MAC", IGNORE];
    let bad = |why: String| CniError::new(code::BAD_ENVIRONMENT, format!("CNI_ARGS: {why}"));
    let mut pairs = BTreeMap::new();
    for pair in text.split(';').filter(|pair| !pair.trim().is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| bad(format!("{pair:?} is no KEY=VALUE")))?;
        let (key, value) = (key.trim(), value.trim());
        match pairs.insert(key.to_owned(), value.to_owned()) {
            Some(other) if other != value && KNOWN.contains(&key) => {
                return Err(bad(format!("{key} is said twice: {other} and {value}")));
            }
            _ => {}
        }
    }
    let ignore = pairs.get(IGNORE).map(|value| value.to_ascii_lowercase());
    let ignore = match ignore.as_deref() {
        None | Some("0" | "false") => false,
        Some("1" | "true") => true,
        Some(other) => return Err(bad(format!("{IGNORE}={other}: it is 1, true, 0 or false"))),
    };
    let is_unknown = |key: &&String| !KNOWN.contains(&key.as_str());
    match pairs.keys().find(is_unknown).filter(|_| !ignore) {
        Some(key) => {
            Err(bad(format!("{key} is not known here: set {IGNORE}=1 to have it ignored")))
        }
        None => Ok(pairs),
    }
}

#[cfg(test)]
mod tests;
