//! Errors of the API.

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};

use crate::http::Dropped;

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[error("{message}")]
pub struct ApiError {
    /// What the client can do.
    pub code: ApiErrorCode,
    /// What is wrong, and what to do.
    pub message: String,
}

/// What a client can do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ApiErrorCode {
    /// Correct the request.
    BadRequest,
    /// There is no such member.
    NotFound,
    /// The node refuses what was requested; the message has the reason.
    Refused,
    /// Try again once the node is ready.
    NotReady,
    /// Try again later: too many requests are waiting.
    Busy,
    /// Try again: the agent dropped the request, as when it restarts its work.
    Unanswered,
    /// Try again once the agent has started again: it is stopping.
    Stopping,
    /// A code that only a later version of the agent knows.
    #[serde(other)]
    Other,
}

impl ApiError {
    /// Returns an error.
    pub fn new(code: ApiErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// Returns the error of a request that the agent dropped.
    pub fn unanswered() -> Self {
        Self::new(
            ApiErrorCode::Unanswered,
            "the agent did not answer: it is ending, restarts its work, or is overloaded; try again",
        )
    }

    /// Returns the error of a request to an agent that is ending.
    pub fn stopping() -> Self {
        Self::new(
            ApiErrorCode::Stopping,
            "the agent is ending: try again when another one has started",
        )
    }
}

impl ApiErrorCode {
    /// Returns the HTTP status.
    pub const fn status(self) -> StatusCode {
        match self {
            Self::BadRequest => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Refused | Self::Other => StatusCode::CONFLICT,
            Self::NotReady | Self::Busy | Self::Unanswered | Self::Stopping => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        }
    }

    /// Returns whether the same request may succeed in a moment.
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Unanswered | Self::Stopping)
    }
}

impl From<Dropped> for ApiError {
    fn from(dropped: Dropped) -> Self {
        match dropped {
            Dropped::Ended => Self::stopping(),
            Dropped::Unanswered => Self::unanswered(),
        }
    }
}

/// A reason for which a request is refused.
impl From<String> for ApiError {
    fn from(message: String) -> Self {
        Self::new(ApiErrorCode::Refused, message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.code.status(), Json(self)).into_response()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_code_of_a_later_version_is_understood() {
        let later = serde_json::json!({ "code": "on-holiday", "message": "not today", "more": 1 });
        let error: ApiError = serde_json::from_value(later).expect("an error");
        assert_eq!(error, ApiError::new(ApiErrorCode::Other, "not today"));
    }

    #[test]
    fn dropped_request_is_unavailable_and_not_gone() {
        for error in [ApiError::unanswered(), ApiError::stopping()] {
            assert_eq!(error.code.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(error.code.is_transient());
        }
    }
}
