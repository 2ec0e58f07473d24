//! Who may call: the key, and which web pages.
//!
//! A web page of any origin can make a browser post to a local port, and needs no leave to do so; it only cannot read
//! the answer. Without a key, therefore, a request that says it comes from a foreign page is refused.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::jobs::Jobs;
use super::refusal::Refusal;
use super::settings::Settings;
use crate::error::ErrorClass;

/// The routes that need no key: there is nothing behind them to protect, and who asks for them cannot send one.
const OPEN: &[&str] = &["/", "/docs", "/openapi.json", "/ping"];

pub(super) async fn check(State(jobs): State<Arc<Jobs>>, request: Request, next: Next) -> Response {
    let settings = &jobs.settings;
    let allowed_origin = allowed_origin(settings, request.headers());
    let is_preflight =
        request.method() == Method::OPTIONS && request.headers().contains_key("access-control-request-method");
    let mut response = if is_preflight && allowed_origin.is_some() {
        StatusCode::NO_CONTENT.into_response()
    } else {
        match may_pass(settings, &request, allowed_origin.is_some()) {
            Ok(()) => next.run(request).await,
            Err(refusal) => refusal.into_response(),
        }
    };
    if let Some(origin) = allowed_origin {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        if is_preflight {
            let methods = HeaderValue::from_static("GET, POST");
            let names = HeaderValue::from_static("authorization, content-type");
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names);
        }
    }
    response
}

fn may_pass(settings: &Settings, request: &Request, origin_is_allowed: bool) -> Result<(), Refusal> {
    let path = request.uri().path();
    if OPEN.contains(&path) || path == settings.health_path {
        return Ok(());
    }
    let headers = request.headers();
    match &settings.api_key {
        Some(key) if !is_authorised(key.reveal(), headers) => {
            let message = "the Authorization header must carry this server's API key, bare or after `Bearer`";
            Err(Refusal::new(StatusCode::UNAUTHORIZED, ErrorClass::InvalidInput, "unauthorized", message))
        }
        None if !origin_is_allowed && !is_own_page(headers) => {
            let message = "web pages of other origins may not call this server";
            Err(Refusal::new(StatusCode::FORBIDDEN, ErrorClass::InvalidInput, "foreign_origin", message))
        }
        _ => Ok(()),
    }
}

fn is_authorised(key: &str, headers: &HeaderMap) -> bool {
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default().trim();
    let bare = match given.split_once(' ') {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("bearer") => rest.trim_start(),
        _ => given,
    };
    is_equal(key.as_bytes(), bare.as_bytes())
}

/// Takes as long for a key that is nearly right as for one that is not, so that time tells nothing but the length.
fn is_equal(own: &[u8], given: &[u8]) -> bool {
    let differing = own.iter().zip(given).fold(0, |differing, (a, b)| std::hint::black_box(differing | (a ^ b)));
    own.len() == given.len() && differing == 0
}

fn allowed_origin(settings: &Settings, headers: &HeaderMap) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    settings.allow_origins.iter().any(|allowed| allowed == "*" || allowed.as_bytes() == origin).then(|| origin.clone())
}

/// Whether the request comes from no page at all, or from one that this server sent.
fn is_own_page(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let of_origin = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    host.is_some() && host == of_origin
}
