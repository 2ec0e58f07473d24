//! The six calls to the host, with their headers and what their answers mean. No other file knows a path or a header.
//! Nothing is retried here.

use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result};
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use reqwest::{Request, StatusCode};
use serde_json::Value;

use super::job::{self, Delivered};
use super::pool::Pool;
use super::settings::Settings;
use super::urls::{Urls, encode_segment, with_parameter};

pub struct Client {
    urls: Urls,
    /// Raw, without `Bearer`.
    authorization: HeaderValue,
    runpod_version: String,
    take_timeout: Duration,
    post_timeout: Duration,
    http: Mutex<Pool>,
}

/// What a take came to.
#[derive(Debug)]
pub enum Taken {
    Jobs(Vec<Delivered>),
    /// 204: the host has none.
    Nothing,
    /// 400: what a worker hears that was paused.
    Paused,
    /// 200 with something that is no job.
    NoJob,
    Refused(Refusal),
    /// No answer within the take's own time.
    TimedOut,
}

/// What a stop poll came to.
#[derive(Debug)]
pub enum Stops {
    Ids(Vec<String>),
    Nothing,
    Refused(Refusal),
    TimedOut,
}

/// What a post came to.
#[derive(Debug)]
pub enum Posted {
    Accepted,
    /// The host will never take this body.
    Rejected(StatusCode),
    /// The host does not know the job any more.
    Gone(StatusCode),
    Refused(Refusal),
}

/// Why to try again later.
#[derive(Debug)]
pub struct Refusal {
    /// `None` for a connection that failed.
    pub status: Option<StatusCode>,
    pub retry_after: Option<Duration>,
    /// For the log; names no URL.
    pub reason: String,
}

struct Answer {
    status: StatusCode,
    retry_after: Option<Duration>,
    is_json: bool,
    body: Vec<u8>,
}

enum Failure {
    TimedOut,
    Broken(String),
}

/// The largest take's answer that is read: a batch of the largest payloads.
const MAX_TAKE_BYTES: usize = 256 << 20;
/// Of an answer whose content nobody looks at; it is read only so that the connection can be used again.
const MAX_IGNORED_BYTES: usize = 64 << 10;

impl Client {
    /// # Errors
    /// When the system's certificates cannot be read or the key is no header value.
    pub fn new(settings: &Settings) -> Result<Client> {
        let mut authorization =
            HeaderValue::from_str(settings.api_key.reveal()).context("RUNPOD_AI_API_KEY is no header value")?;
        authorization.set_sensitive(true);
        Ok(Client {
            urls: settings.urls.clone(),
            authorization,
            runpod_version: settings.runpod_version.clone(),
            take_timeout: settings.take_timeout,
            post_timeout: settings.post_timeout,
            http: Mutex::new(Pool::new(&settings.user_agent)?),
        })
    }

    pub fn has_stop_channel(&self) -> bool {
        self.urls.stop().is_some()
    }

    pub fn has_stream(&self) -> bool {
        self.urls.stream("").is_some()
    }

    pub fn has_batch(&self) -> bool {
        self.urls.take_batch(2, false).is_some()
    }

    /// Asks for one job, or for up to `size` on the other route, and waits as long as the host does.
    pub async fn take(&self, size: usize, job_in_progress: bool) -> Taken {
        let batch = (size > 1).then(|| self.urls.take_batch(size, job_in_progress)).flatten();
        let url = batch.unwrap_or_else(|| self.urls.take(job_in_progress));
        let answer = match self.poll(&url, MAX_TAKE_BYTES).await {
            Ok(answer) => answer,
            Err(Failure::TimedOut) => return Taken::TimedOut,
            Err(Failure::Broken(reason)) => return Taken::Refused(Refusal::broken(reason)),
        };
        match answer.status.as_u16() {
            200 if answer.is_json => {
                // Megabytes of JSON are read where that holds up no other call.
                let parsed = tokio::task::spawn_blocking(move || job::parse(&answer.body)).await;
                parsed.ok().flatten().map_or(Taken::NoJob, Taken::Jobs)
            }
            204 => Taken::Nothing,
            200..300 => Taken::NoJob,
            400 => {
                self.drop_connections();
                Taken::Paused
            }
            _ => Taken::Refused(answer.refusal()),
        }
    }

    pub async fn stop(&self) -> Stops {
        let url = self.urls.stop().unwrap_or_default();
        let answer = match self.poll(&url, MAX_IGNORED_BYTES).await {
            Ok(answer) => answer,
            Err(Failure::TimedOut) => return Stops::TimedOut,
            Err(Failure::Broken(reason)) => return Stops::Refused(Refusal::broken(reason)),
        };
        if !answer.status.is_success() {
            return Stops::Refused(answer.refusal());
        }
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let ids = body.get("jobsToStop").and_then(Value::as_array).into_iter().flatten();
        let ids: Vec<String> = ids
            .filter_map(|id| match id {
                Value::String(id) => Some(id.clone()),
                Value::Number(id) => Some(id.to_string()),
                _ => None,
            })
            .collect();
        if ids.is_empty() { Stops::Nothing } else { Stops::Ids(ids) }
    }

    /// Posts a final result or a progress update.
    pub async fn done(&self, job_id: &str, body: Vec<u8>, is_stream: bool) -> Posted {
        match self.urls.done(job_id, is_stream) {
            Some(url) => self.post(&url, job_id, body).await,
            None => Posted::Refused(Refusal::broken("RUNPOD_WEBHOOK_POST_OUTPUT is not set".into())),
        }
    }

    /// Posts one chunk of a streamed result.
    pub async fn stream(&self, job_id: &str, body: Vec<u8>) -> Posted {
        match self.urls.stream(job_id) {
            Some(url) => self.post(&url, job_id, body).await,
            None => Posted::Refused(Refusal::broken("RUNPOD_WEBHOOK_POST_STREAM is not set".into())),
        }
    }

    /// Says that the worker lives and which jobs it holds.
    pub async fn ping(&self, job_ids: &[String], timeout: Duration) -> Result<(), String> {
        let parameters = match job_ids {
            [] => Vec::new(),
            ids => vec![format!("job_id={}", encode_segment(&ids.join(",")))],
        };
        self.send_ping(&parameters, timeout).await
    }

    /// Says that the worker cannot work, and why: once, whatever comes of it.
    pub async fn unhealthy(&self, check: &str, reason: &str, timeout: Duration) {
        let reason: String = reason.chars().take(256).collect();
        let parameters = [
            "status=unhealthy".into(),
            format!("check={}", encode_segment(check)),
            format!("reason={}", encode_segment(&reason)),
        ];
        self.send_ping(&parameters, timeout).await.ok();
    }

    async fn send_ping(&self, parameters: &[String], timeout: Duration) -> Result<(), String> {
        let Some(ping) = &self.urls.ping else { return Ok(()) };
        let version = format!("runpod_version={}", encode_segment(&self.runpod_version));
        let url = parameters.iter().fold(ping.clone(), |url, parameter| with_parameter(&url, parameter));
        let request = self.http().get(with_parameter(&url, &version)).header(AUTHORIZATION, &self.authorization);
        match self.send(request.timeout(timeout).build(), MAX_IGNORED_BYTES).await {
            Ok(answer) if answer.status.is_success() => Ok(()),
            Ok(answer) => Err(answer.status.to_string()),
            Err(Failure::TimedOut) => Err("no answer in time".into()),
            Err(Failure::Broken(reason)) => Err(reason),
        }
    }

    async fn poll(&self, url: &str, max_bytes: usize) -> Result<Answer, Failure> {
        let request = self
            .http()
            .get(url)
            .header(AUTHORIZATION, &self.authorization)
            .header(CONTENT_TYPE, "application/json")
            .timeout(self.take_timeout);
        self.send(request.build(), max_bytes).await
    }

    async fn post(&self, url: &str, job_id: &str, body: Vec<u8>) -> Posted {
        // JSON that says it is a form, and a header for what is no header: what the SDK sends and the host expects.
        let request = self
            .http()
            .post(url)
            .header(AUTHORIZATION, &self.authorization)
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header("charset", "utf-8")
            .header("X-Request-ID", HeaderValue::from_str(job_id).unwrap_or(HeaderValue::from_static("-")))
            .body(body)
            .timeout(self.post_timeout);
        let answer = match self.send(request.build(), MAX_IGNORED_BYTES).await {
            Ok(answer) => answer,
            Err(Failure::TimedOut) => return Posted::Refused(Refusal::broken("no answer in time".into())),
            Err(Failure::Broken(reason)) => return Posted::Refused(Refusal::broken(reason)),
        };
        match answer.status.as_u16() {
            200..300 => Posted::Accepted,
            404 | 409 | 410 => Posted::Gone(answer.status),
            // A key may be about to be exchanged: nothing that was computed is thrown away for that.
            401 | 403 | 408 | 425 | 429 | 300..=399 | 500.. => Posted::Refused(answer.refusal()),
            _ => Posted::Rejected(answer.status),
        }
    }

    async fn send(&self, request: reqwest::Result<Request>, max_bytes: usize) -> Result<Answer, Failure> {
        let failure = |error: reqwest::Error| {
            if error.is_timeout() {
                return Failure::TimedOut;
            }
            self.drop_connections();
            Failure::Broken(reason_without_url(error))
        };
        let mut response = self.http().execute(request.map_err(failure)?).await.map_err(failure)?;
        let header = |name| response.headers().get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let mut answer = Answer {
            status: response.status(),
            retry_after: retry_after(response.headers()),
            is_json: header(CONTENT_TYPE).is_some_and(|kind| kind.to_ascii_lowercase().contains("json")),
            body: Vec::new(),
        };
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) if answer.body.len() + chunk.len() <= max_bytes => answer.body.extend(chunk),
                // The status is the answer to a post; the rest of its body is nobody's.
                Ok(None) => return Ok(answer),
                Ok(Some(_)) if max_bytes == MAX_IGNORED_BYTES => return Ok(answer),
                Ok(Some(_)) => return Err(Failure::Broken("the answer is too large".into())),
                Err(_) if max_bytes == MAX_IGNORED_BYTES => return Ok(answer),
                Err(error) => return Err(failure(error)),
            }
        }
    }

    fn http(&self) -> reqwest::Client {
        self.http.lock().expect("nothing panics while it holds the pool").client()
    }

    /// Connections that lie idle may be as dead as the one that just failed.
    fn drop_connections(&self) {
        self.http.lock().expect("nothing panics while it holds the pool").renew();
    }
}

impl Answer {
    fn refusal(&self) -> Refusal {
        Refusal { status: Some(self.status), retry_after: self.retry_after, reason: self.status.to_string() }
    }
}

impl Refusal {
    fn broken(reason: String) -> Self {
        Refusal { status: None, retry_after: None, reason }
    }
}

/// The form in seconds; a date is rare, and no date is no wait.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// The chain of causes; a URL can carry a secret.
fn reason_without_url(error: reqwest::Error) -> String {
    let error = anyhow::Error::new(error.without_url());
    error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
