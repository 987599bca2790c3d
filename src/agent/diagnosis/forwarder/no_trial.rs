//! Why a trial is not made.

use std::io;

use super::pod::Forbidden;

/// Why a trial was not made.
pub enum NoTrial {
    /// There is nothing to test.
    Idle(String),
    /// It failed.
    Failed(io::Error),
}

impl NoTrial {
    /// Whether the kernel forbids this process to send.
    pub fn is_forbidden(&self) -> bool {
        let Self::Failed(error) = self else { return false };
        error.get_ref().is_some_and(|error| error.is::<Forbidden>())
    }
}

impl From<io::Error> for NoTrial {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

/// Returns why there is no trial without a bridge for pods.
pub fn no_bridge(foreign: Option<&str>) -> NoTrial {
    match foreign {
        Some(bridge) => NoTrial::Failed(io::Error::other(format!(
            "the bridge \"{bridge}\" of the pods belongs to another program, so the agent has no pod on it; \
             check connections between pods of two hosts"
        ))),
        None => NoTrial::Idle("there are no pods on a bridge of gossamer's".to_owned()),
    }
}

/// Returns why a trial failed, with a remedy if one is known.
pub fn no_trial_reason(error: &io::Error) -> String {
    let why = match error.kind() {
        io::ErrorKind::PermissionDenied => "it needs CAP_SYS_ADMIN and CAP_NET_RAW".to_owned(),
        // user_namespaces(7)
        io::ErrorKind::StorageFull => "no more network namespaces can be created: raise \
                                       user.max_net_namespaces (sysctl), or end the program that \
                                       makes so many"
            .to_owned(),
        _ => error.to_string(),
    };
    format!("no test is possible: {why}")
}
