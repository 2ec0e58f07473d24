//! The web page at `/`: one file, whose own style and script a browser runs, and nothing else.

use std::sync::LazyLock;

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};

const PAGE: &str = include_str!("page.html");

/// The page's own style and script by their checksums; requests to this server alone.
static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let (style, script) = (checksum(between("<style>", "</style>")), checksum(between("<script>", "</script>")));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; img-src \
         'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    policy.try_into().expect("a checksum is visible ASCII")
});

static TAG: LazyLock<HeaderValue> =
    LazyLock::new(|| format!("\"{}\"", checksum(PAGE)).try_into().expect("a checksum is visible ASCII"));

/// Whether a browser asks; other clients get JSON.
pub(super) fn is_wanted(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|kind| kind.trim().starts_with("text/html"))
}

pub(super) fn answer(headers: &HeaderMap) -> Response {
    let is_known = headers.get(header::IF_NONE_MATCH).is_some_and(|known| known == *TAG);
    let mut response = if is_known { StatusCode::NOT_MODIFIED.into_response() } else { Html(PAGE).into_response() };
    let fixed: [(HeaderName, &'static str); 4] = [
        (header::CACHE_CONTROL, "no-cache"),
        (header::VARY, "Accept"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    let headers = response.headers_mut();
    headers.insert(header::ETAG, TAG.clone());
    headers.insert(header::CONTENT_SECURITY_POLICY, POLICY.clone());
    headers.extend(fixed.map(|(name, value)| (name, HeaderValue::from_static(value))));
    response
}

/// The first piece of the page between two tags.
fn between(start: &str, end: &str) -> &'static str {
    let rest = PAGE.split_once(start).map_or("", |(_, rest)| rest);
    rest.split_once(end).map_or("", |(piece, _)| piece)
}

fn checksum(text: &str) -> String {
    BASE64_STANDARD.encode(Sha256::digest(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_one_file_that_asks_for_nothing() {
        for (tag, count) in [("<style", 1), ("<script", 1), ("</script>", 1), ("@import", 0), (" src=\"http", 0)] {
            assert_eq!(PAGE.matches(tag).count(), count, "{tag}");
        }
        // the policy would not let them act
        for attribute in [" style=\"", " onclick=\"", " onload=\"", "javascript:"] {
            assert!(!PAGE.contains(attribute), "{attribute}");
        }
        assert!(between("<style>", "</style>").len() > 100 && between("<script>", "</script>").len() > 100);
    }

    #[test]
    fn browsers_want_the_page_and_others_do_not() {
        let accepts =
            |value: &'static str| is_wanted(&HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(value))]));
        assert!(accepts("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"));
        assert!(!accepts("*/*") && !accepts("application/json") && !is_wanted(&HeaderMap::new()));
    }
}
