//! Requests that were not done.

use serde::{Deserialize, Serialize};

/// Why a request was not done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// Kind of error.
    pub code: ErrorCode,
    /// What was tried, what is wrong, what to do.
    pub error: String,
}

/// Kind of error; decides the HTTP status and the command's exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request makes no sense as it is.
    Invalid,
    /// No such workload, peer or process.
    NotFound,
    /// It exists, but its state (or the peer) does not allow this.
    Refused,
    /// The peer did not answer.
    Unreachable,
    /// It was tried and failed.
    Failed,
}

impl ErrorCode {
    /// HTTP status.
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Refused => 409,
            Self::Unreachable => 504,
            Self::Failed => 500,
        }
    }

    /// Exit code of the command that asked.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Invalid => 2,
            Self::NotFound => 3,
            Self::Refused => 4,
            Self::Unreachable => 5,
        }
    }
}

/// A request that was not done, inside the agent.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Kind.
    pub code: ErrorCode,
    /// For people.
    pub message: String,
}

impl ApiError {
    /// An error of a kind.
    pub fn new(code: ErrorCode, message: impl std::fmt::Display) -> Self {
        Self { code, message: message.to_string() }
    }

    /// Tried and failed.
    pub fn failed(message: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::Failed, message)
    }

    /// Not in this state.
    pub fn refused(message: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::Refused, message)
    }

    /// Not here.
    pub fn not_found(message: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::NotFound, message)
    }

    /// Makes no sense.
    pub fn invalid(message: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::Invalid, message)
    }

    /// No answer.
    pub fn unreachable(message: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::Unreachable, message)
    }
}
