//! Errors with the codes of the CNI specification (section "Error").

use serde_json::{Value, json};

use crate::api::{self, ClientError, PodError, PodErrorKind};

/// An error as the runtime receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    /// One of the numbers in [`code`].
    pub code: u32,
    /// One line: what is wrong.
    pub msg: String,
    /// More about the cause; may be empty.
    pub details: String,
}

/// Error codes. Codes below 100 are the specification's; those from 100 on are gossamer's own.
pub mod code {
    /// The plugin does not support the configuration's version.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The configuration requests an unsupported feature. The message has the key and the value.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    /// The container is not known.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// An environment variable is missing or invalid. The message has its name.
    pub const BAD_ENVIRONMENT: u32 = 4;
    /// A system call or the agent failed.
    pub const IO: u32 = 5;
    /// The input is not JSON.
    pub const UNDECODABLE: u32 = 6;
    /// The configuration has an invalid value.
    pub const BAD_CONFIG: u32 = 7;
    /// The agent cannot do it now; a retry may succeed.
    pub const TRY_LATER: u32 = 11;
    /// STATUS: no pod can be connected now.
    pub const NOT_AVAILABLE: u32 = 50;
    /// STATUS: no pod can be connected now, and existing pods may have lost connectivity.
    pub const NOT_AVAILABLE_AND_CUT_OFF: u32 = 51;
    /// gossamer's own: the node's subnet has no free address.
    pub const EXHAUSTED: u32 = 100;
    /// gossamer's own: the requested address is not available.
    pub const ADDRESS: u32 = 101;
}

impl CniError {
    /// Creates an error without details.
    pub fn new(code: u32, msg: impl ToString) -> Self {
        Self { code, msg: msg.to_string(), details: String::new() }
    }

    /// Returns the error in the format of the specification.
    pub fn to_json(&self, version: &str) -> Value {
        json!({
            "cniVersion": version,
            "code": self.code,
            "msg": self.msg,
            "details": self.details,
        })
    }
}

impl From<ClientError> for CniError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NoAgent { path } => Self {
                code: code::TRY_LATER,
                msg: "the gossamer agent does not run on this host".to_owned(),
                details: format!(
                    "no agent listens at {}: start it (`systemctl start gossamer`); if it listens elsewhere, \
                     name its socket in the configuration of the network (the key socket, or instance)",
                    path.display()
                ),
            },
            // The agent may still be at work. A retry can succeed.
            ClientError::NoAnswer(_) | ClientError::Broken { .. } => Self {
                code: code::TRY_LATER,
                msg: "the gossamer agent runs on this host and does not answer".to_owned(),
                details: error.to_string(),
            },
            ClientError::OtherVersion { agent, why } => Self {
                code: code::TRY_LATER,
                msg: format!(
                    "the agent is version {agent}, the plugin {}; restart the agent",
                    api::own_version(&agent)
                ),
                details: why,
            },
            ClientError::Refused { ref answer, .. } => {
                match serde_json::from_value::<PodError>(answer.clone()) {
                    Ok(error) => error.into(),
                    Err(_) => Self::new(code::IO, error),
                }
            }
            ClientError::NotPermitted { .. } => Self::new(code::IO, error),
        }
    }
}

impl From<PodError> for CniError {
    fn from(PodError { kind, error, .. }: PodError) -> Self {
        let code = match kind {
            PodErrorKind::NotReady | PodErrorKind::Other => code::TRY_LATER,
            PodErrorKind::Invalid => code::BAD_ENVIRONMENT,
            PodErrorKind::Unknown => code::UNKNOWN_CONTAINER,
            PodErrorKind::Address => code::ADDRESS,
            PodErrorKind::Exhausted => code::EXHAUSTED,
            PodErrorKind::Failed => code::IO,
        };
        Self::new(code, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_that_does_not_run_is_reported_with_the_configuration_keys() {
        let error = CniError::from(ClientError::NoAgent { path: "/run/x.sock".into() });
        assert!(error.details.contains("/run/x.sock") && error.details.contains("the key socket"));
        assert!(!error.details.contains("--socket"), "{}", error.details);
        let error = CniError::from(ClientError::NoAnswer(api::ApiError::unanswered()));
        assert!(error.code == 11 && error.msg.contains("runs on this host"), "{}", error.msg);
    }
}
