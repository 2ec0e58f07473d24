//! What a client gets instead of an answer: one place that knows which error is which HTTP status.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::wire::{BodyProblem, ErrorReply};
use crate::error::{Error, ErrorClass};

#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    error: Error,
    /// In place of the error's words.
    detail: Option<Box<Value>>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, class: ErrorClass, code: &'static str, message: impl Into<String>) -> Self {
        Refusal { status, error: Error::new(class, code, message), detail: None }
    }

    pub(super) fn unknown_job(id: &str) -> Self {
        let id: String = id.chars().take(100).collect();
        let message = format!("there is no job {id:?}: it never was, or its time is over");
        Refusal::new(StatusCode::NOT_FOUND, ErrorClass::NotFound, "job_not_found", message)
    }

    pub(super) fn loading() -> Self {
        let message = "the model is being loaded";
        let status = StatusCode::SERVICE_UNAVAILABLE;
        let mut refusal = Refusal::new(status, ErrorClass::Overloaded, "loading", message);
        refusal.error.remedy = Some("ask again in a second".into());
        refusal
    }

    pub(super) fn body_too_large(limit: usize) -> Self {
        let message = format!("the body may have {limit} bytes");
        let mut refusal = Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, ErrorClass::TooLarge, "body_too_large", message);
        refusal.error.remedy = Some("send pictures as links, or smaller".into());
        refusal
    }

    pub(super) fn body_too_slow(limit: Duration) -> Self {
        let message = format!("the body did not arrive within {} s", limit.as_secs());
        Refusal::new(StatusCode::REQUEST_TIMEOUT, ErrorClass::InvalidInput, "body_timeout", message)
    }

    pub(super) fn body_broken() -> Self {
        Refusal::new(StatusCode::BAD_REQUEST, ErrorClass::InvalidInput, "body_incomplete", "the body broke off")
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match error.class {
            _ if error.code == "shutting_down" => StatusCode::SERVICE_UNAVAILABLE,
            ErrorClass::InvalidInput => StatusCode::BAD_REQUEST,
            ErrorClass::NotFound => StatusCode::NOT_FOUND,
            ErrorClass::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorClass::Overloaded => StatusCode::TOO_MANY_REQUESTS,
            ErrorClass::Cancelled => StatusCode::CONFLICT,
            ErrorClass::DeviceLost | ErrorClass::Setup => StatusCode::SERVICE_UNAVAILABLE,
            ErrorClass::OutOfMemory | ErrorClass::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal { status, error, detail: None }
    }
}

impl From<BodyProblem> for Refusal {
    fn from(problem: BodyProblem) -> Self {
        let BodyProblem { field, message, detail } = problem;
        let error = Error::invalid("invalid_body", field, message);
        let detail = Some(Box::new(json!([detail])));
        Refusal { status: StatusCode::UNPROCESSABLE_ENTITY, error, detail }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Refusal { status, error, detail } = self;
        let text = error.to_json().to_string();
        let detail = detail.map_or_else(|| error.message.into(), |detail| *detail);
        let mut response = (status, Json(ErrorReply { detail, error: text })).into_response();
        let mut set = |name, value| response.headers_mut().insert(name, HeaderValue::from_static(value));
        match status {
            StatusCode::UNAUTHORIZED => set(header::WWW_AUTHENTICATE, "Bearer"),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => set(header::RETRY_AFTER, "1"),
            _ => None,
        };
        response
    }
}
