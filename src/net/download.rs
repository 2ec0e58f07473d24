//! What a request names by address or carries inline (data URI, bare base64), as bytes under a cap. Every address goes
//! through the [`Guard`], also each one that a redirect leads to.

use std::time::Duration;

use anyhow::anyhow;
use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use reqwest::header::{CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Method, Response, StatusCode};
use tokio::time::{sleep, timeout};
use url::{Origin, Url};

use super::guard::refusal;
use super::{Guard, Secret, back_off, is_passing, variable};
use crate::error::{Error, ErrorClass, Result};

const HUB: &str = "https://huggingface.co";
const MAX_REDIRECTS: usize = 5;
const MAX_URL_LENGTH: usize = 8192;
/// RunPod's default of `RUNPOD_MAX_DOWNLOAD_BYTES`.
const DEFAULT_MAX_BYTES: u64 = 5 << 30;

#[derive(Debug, Clone)]
pub struct Settings {
    /// Cap of every download, whatever its caller allows.
    pub max_bytes: u64,
    /// How long a host may send nothing.
    pub idle_timeout: Duration,
    /// For everything: redirects, all tries and the waits between them.
    pub total_timeout: Duration,
    pub tries: u32,
    /// Sent to huggingface.co and to `hub_endpoint`.
    pub hub_token: Option<Secret>,
    /// Another Hub, such as a mirror.
    pub hub_endpoint: Option<String>,
    /// Sent to civitai.com.
    pub civitai_token: Option<Secret>,
}

impl Settings {
    /// From `RUNPOD_MAX_DOWNLOAD_BYTES`, `HF_TOKEN`, `HF_ENDPOINT` and `CIVITAI_TOKEN`. What is no positive number is the
    /// default, as in the SDK.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let max_bytes = variable(&get, "RUNPOD_MAX_DOWNLOAD_BYTES").and_then(|value| value.parse().ok());
        Settings {
            max_bytes: max_bytes.filter(|bytes| *bytes > 0).unwrap_or(DEFAULT_MAX_BYTES),
            hub_token: variable(&get, "HF_TOKEN").map(Secret),
            hub_endpoint: variable(&get, "HF_ENDPOINT"),
            civitai_token: variable(&get, "CIVITAI_TOKEN").map(Secret),
            ..Settings::default()
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            max_bytes: DEFAULT_MAX_BYTES,
            idle_timeout: Duration::from_secs(15),
            total_timeout: Duration::from_secs(120),
            tries: 3,
            hub_token: None,
            hub_endpoint: None,
            civitai_token: None,
        }
    }
}

/// What came, and what its sender says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    pub bytes: Vec<u8>,
    pub content_type: Option<String>,
}

/// Fetches what clients name. Clones share connections.
#[derive(Debug, Clone)]
pub struct Downloader {
    guard: Guard,
    /// An origin that the operator configured, and how it is reached though it may be private.
    trusted: Option<(Origin, Guard)>,
    pub(super) settings: Settings,
    /// Whose token is whose.
    tokens: Vec<(Origin, Secret)>,
}

impl Downloader {
    pub fn new(guard: Guard, settings: Settings) -> Self {
        let mut tokens = Vec::new();
        let mut belongs = |token: &Option<Secret>, endpoint: &str| {
            if let (Some(token), Ok(url)) = (token, Url::parse(endpoint)) {
                tokens.push((url.origin(), token.clone()));
            }
        };
        belongs(&settings.hub_token, HUB);
        belongs(&settings.hub_token, settings.hub_endpoint.as_deref().unwrap_or_default());
        belongs(&settings.civitai_token, "https://civitai.com");
        Downloader { guard, trusted: None, settings, tokens }
    }

    /// The Hub's address, and what reaches it also where the operator configured one in a private network. For addresses
    /// that are put together here, never for one that a client wrote.
    pub(super) fn for_hub(&self) -> (String, Downloader) {
        let endpoint = self.settings.hub_endpoint.as_deref().unwrap_or(HUB).trim_end_matches('/').to_owned();
        let origin = self.settings.hub_endpoint.as_deref().and_then(|endpoint| Url::parse(endpoint).ok());
        let trusted = origin.map(|url| (url.origin(), self.guard.opened()));
        (endpoint, Downloader { trusted, ..self.clone() })
    }

    /// The Hub's address, and what fetches the models that the operator named there: as large as they are, through the
    /// operator's proxies. `token` is for where `HF_TOKEN` is not set.
    pub(crate) fn for_models(&self, token: Option<String>) -> (String, Downloader) {
        let (endpoint, _) = self.for_hub();
        let settings = Settings {
            max_bytes: u64::MAX,
            idle_timeout: Duration::from_secs(30),
            tries: 5,
            hub_token: self.settings.hub_token.clone().or(token.map(Secret)),
            ..self.settings.clone()
        };
        (endpoint, Downloader::new(self.guard.opened(), settings))
    }

    /// The bytes behind a picture or file field: an `http` or `https` address, a data URI, or bare base64. `field` is its
    /// path in the request. Decoding base64 takes about a millisecond per megabyte.
    ///
    /// # Errors
    ///
    /// Those of [`Downloader::fetch`] and [`from_inline`].
    pub async fn load(&self, source: &str, field: &str, max_bytes: u64) -> Result<Download> {
        // Base64 has no colon.
        if source.contains(':') && !is_data_uri(source) {
            self.fetch(source, field, max_bytes).await
        } else {
            from_inline(source, field, max_bytes.min(self.settings.max_bytes))
        }
    }

    /// GETs an address.
    ///
    /// # Errors
    ///
    /// `invalid_url`, `url_refused`, `download_failed`, `download_too_large`, `download_timeout`, with this `field`.
    pub async fn fetch(&self, url: &str, field: &str, max_bytes: u64) -> Result<Download> {
        let result = match parse(url) {
            Ok(url) => self.fetch_small(&url, max_bytes).await.map_err(Failure::into_error),
            Err(error) => Err(error),
        };
        result.map_err(|error| error.field(field))
    }

    pub(crate) async fn fetch_small(&self, url: &Url, max_bytes: u64) -> Result<Download, Failure> {
        let max_bytes = max_bytes.min(self.settings.max_bytes);
        match timeout(self.settings.total_timeout, self.try_repeatedly(url, max_bytes)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::Passing(timed_out(url, "was not done in time", self.settings.total_timeout))),
        }
    }

    async fn try_repeatedly(&self, url: &Url, max_bytes: u64) -> Result<Download, Failure> {
        let mut failed = 0;
        loop {
            match self.try_once(url, max_bytes).await {
                Err(Failure::Passing(error)) => {
                    failed += 1;
                    if failed >= self.settings.tries {
                        return Err(Failure::Passing(error));
                    }
                    tracing::debug!(
                        host = host(url),
                        code = error.code,
                        failed,
                        "a download failed and is tried again"
                    );
                    sleep(back_off(failed)).await;
                }
                other => return other,
            }
        }
    }

    async fn try_once(&self, url: &Url, max_bytes: u64) -> Result<Download, Failure> {
        let mut response = self.follow(url, &HeaderMap::new()).await?;
        success(&response)?;
        let too_large = || {
            let message = format!("what {} sends is larger than {max_bytes} bytes", host(url));
            Failure::Final(
                Error::new(ErrorClass::TooLarge, "download_too_large", message).remedy("name a smaller file"),
            )
        };
        if response.content_length().is_some_and(|length| length > max_bytes) {
            return Err(too_large());
        }
        let content_type =
            response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let mut bytes = Vec::new();
        while let Some(chunk) = self.in_time(url, response.chunk()).await? {
            if (bytes.len() + chunk.len()) as u64 > max_bytes {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Download { bytes, content_type })
    }

    /// The first answer that is no redirect, whatever its status. A token goes along as long as the redirects stay where
    /// they began, `headers` all the way.
    pub(crate) async fn follow(&self, first: &Url, headers: &HeaderMap) -> Result<Response, Failure> {
        let origin = first.origin();
        let mut token = self.tokens.iter().find(|(owner, _)| *owner == origin).map(|(_, token)| token);
        let mut url = first.clone();
        for _ in 0..=MAX_REDIRECTS {
            if url.origin() != origin {
                token = None;
            }
            let trusted = self.trusted.as_ref().filter(|(trusted, _)| *trusted == url.origin());
            let guard = trusted.map_or(&self.guard, |(_, guard)| guard);
            let mut request = guard.request(Method::GET, &url).map_err(Failure::Final)?.headers(headers.clone());
            if let Some(token) = token.filter(|_| url.username().is_empty() && url.password().is_none()) {
                request = request.bearer_auth(token.reveal());
            }
            let response = self.in_time(&url, request.send()).await?;
            match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => url = target(&url, &response).map_err(Failure::Final)?,
                _ => return Ok(response),
            }
        }
        Err(Failure::Final(failed(format!("{} leads to more than {MAX_REDIRECTS} redirects", host(first)))))
    }

    /// An answer or a piece of it, if it comes before the host counts as silent.
    pub(crate) async fn in_time<T>(
        &self,
        url: &Url,
        part: impl Future<Output = reqwest::Result<T>>,
    ) -> Result<T, Failure> {
        match timeout(self.settings.idle_timeout, part).await {
            Ok(Ok(part)) => Ok(part),
            Ok(Err(error)) => Err(match refusal(&error) {
                Some(refusal) => Failure::Final(refusal),
                None if error.is_timeout() => Failure::Passing(timed_out(url, "took no connection", None)),
                None => {
                    let message = if error.is_connect() { "cannot be reached" } else { "broke the transfer off" };
                    Failure::Passing(failed(format!("{} {message}", host(url))).source(anyhow!(error.without_url())))
                }
            }),
            Err(_) => Err(Failure::Passing(timed_out(url, "sent nothing", self.settings.idle_timeout))),
        }
    }
}

/// Whether trying again may help.
#[derive(Debug)]
pub(crate) enum Failure {
    /// There was no answer, or one that says "later".
    Passing(Error),
    /// The host says no.
    Refused(StatusCode, Error),
    Final(Error),
}

impl Failure {
    pub(crate) fn into_error(self) -> Error {
        match self {
            Failure::Passing(error) | Failure::Refused(_, error) | Failure::Final(error) => error,
        }
    }
}

pub(super) fn parse(url: &str) -> Result<Url> {
    let invalid = |message: &str| {
        Error::new(ErrorClass::InvalidInput, "invalid_url", message).remedy("send an http or https address")
    };
    if url.len() > MAX_URL_LENGTH {
        return Err(invalid(&format!("the address is longer than {MAX_URL_LENGTH} characters")));
    }
    Url::parse(url).map_err(|error| invalid(&format!("not an address: {error}")))
}

/// All that messages and logs say of an address: paths and queries hold keys.
pub(super) fn host(url: &Url) -> &str {
    url.host_str().unwrap_or("the host")
}

/// # Errors
/// `download_failed`, unless the answer says that it has what was asked for.
pub(crate) fn success(response: &Response) -> Result<(), Failure> {
    let url = response.url();
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let error = failed(format!("{} answered {status}", host(url)));
    let error = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => error.remedy("name an address that anybody may read"),
        _ => error,
    };
    Err(if is_passing(status) { Failure::Passing(error) } else { Failure::Refused(status, error) })
}

fn target(from: &Url, response: &Response) -> Result<Url> {
    let location = response.headers().get(LOCATION).map(|value| String::from_utf8_lossy(value.as_bytes()));
    location
        .and_then(|location| from.join(&location).ok())
        .ok_or_else(|| failed(format!("{} redirects to no address", host(from))))
}

pub(super) fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorClass::InvalidInput, "download_failed", message)
        .remedy("check that the address leads to the file, or send the data inline")
}

pub(super) fn timed_out(url: &Url, what: &str, limit: impl Into<Option<Duration>>) -> Error {
    let limit = limit.into().map(|limit| format!(" ({} s)", limit.as_secs_f64())).unwrap_or_default();
    Error::new(ErrorClass::InvalidInput, "download_timeout", format!("{} {what}{limit}", host(url)))
        .remedy("name a faster host, or send the data inline")
}

fn is_data_uri(source: &str) -> bool {
    source.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"))
}

/// The bytes of a data URI or of bare base64, of either alphabet, with or without padding and line breaks.
///
/// # Errors
///
/// `invalid_data_uri`, `invalid_base64`, `data_too_large`, with this `field`.
pub fn from_inline(source: &str, field: &str, max_bytes: u64) -> Result<Download> {
    let (content_type, text) = match is_data_uri(source) {
        false => (None, source),
        true => {
            let (head, text) = source[5..].split_once(',').unwrap_or_default();
            let Some((content_type, "base64")) = head.rsplit_once(';').map(|(left, right)| (left, right.trim())) else {
                let message = "not a data URI of the form `data:image/png;base64,...`";
                return Err(Error::invalid("invalid_data_uri", field, message).remedy(INLINE));
            };
            (Some(content_type.to_owned()).filter(|text| !text.is_empty()), text)
        }
    };
    let too_large = || {
        let message = format!("the data is larger than {max_bytes} bytes");
        Error::new(ErrorClass::TooLarge, "data_too_large", message).field(field).remedy("send less data")
    };
    // A quarter of slack is for line breaks.
    if text.len() as u64 / 5 * 3 > max_bytes {
        return Err(too_large());
    }
    let is_plain = |byte: u8| !byte.is_ascii_whitespace() && !matches!(byte, b'-' | b'_');
    let decoded = if text.bytes().all(is_plain) {
        BASE64.decode(text)
    } else {
        let standard = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).map(|byte| match byte {
            b'-' => b'+',
            b'_' => b'/',
            byte => byte,
        });
        BASE64.decode(standard.collect::<Vec<u8>>())
    };
    let bytes = decoded
        .map_err(|error| Error::invalid("invalid_base64", field, format!("not base64: {error}")).remedy(INLINE))?;
    if bytes.is_empty() {
        return Err(Error::invalid("invalid_base64", field, "there is no data").remedy(INLINE));
    }
    if bytes.len() as u64 > max_bytes {
        return Err(too_large());
    }
    Ok(Download { bytes, content_type })
}

/// How to send data itself.
const INLINE: &str = "send a URL, a data URI (data:image/png;base64,...) or base64";

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

#[cfg(test)]
#[path = "download_tests.rs"]
mod tests;
