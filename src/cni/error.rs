//! What went wrong, by the numbers of the specification (section "Error").

use serde_json::{Value, json};

use crate::api::{self, ClientError, PodError, PodErrorKind};

/// A failure, as the runtime is told it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    pub code: u32,
    pub msg: String,
    pub details: String,
}

/// The specification's numbers; from 100 on they are a plugin's own.
pub mod code {
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// The message has the key and the value.
    pub const UNSUPPORTED_FIELD: u32 = 2;
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// The message has the names of the variables.
    pub const BAD_ENVIRONMENT: u32 = 4;
    pub const IO: u32 = 5;
    pub const UNDECODABLE: u32 = 6;
    pub const BAD_CONFIG: u32 = 7;
    pub const TRY_LATER: u32 = 11;
    pub const NOT_AVAILABLE: u32 = 50;
    /// And pods that are there may be cut off.
    pub const NOT_AVAILABLE_AND_CUT_OFF: u32 = 51;
    /// Ours: the node's subnet is used up.
    pub const EXHAUSTED: u32 = 100;
    /// Ours: the address that was asked for cannot be had.
    pub const ADDRESS: u32 = 101;
}

impl CniError {
    pub fn new(code: u32, msg: impl ToString) -> Self {
        Self { code, msg: msg.to_string(), details: String::new() }
    }

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
            // Runtimes wait no longer: whatever it does, it may answer the next time.
            ClientError::NoAnswer | ClientError::Broken { .. } => Self {
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
    fn an_agent_that_is_not_there_is_named_with_what_a_configuration_can_say() {
        let error = CniError::from(ClientError::NoAgent { path: "/run/x.sock".into() });
        assert!(error.details.contains("/run/x.sock") && error.details.contains("the key socket"));
        assert!(!error.details.contains("--socket"), "{}", error.details);
        let error = CniError::from(ClientError::NoAnswer);
        assert!(error.code == 11 && error.msg.contains("runs on this host"), "{}", error.msg);
    }
}
