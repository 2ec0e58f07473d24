//! From a job's outcome to the host's answer. A finished picture is never thrown away where any form of it can be
//! delivered.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::Worker;
use super::backoff::Backoff;
use super::body::{self, Body};
use super::client::{Posted, Refusal};
use super::job::TakenJob;
use crate::error::{Error, ErrorClass};
use crate::job::Reply;

/// How a job ended for the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    Accepted,
    /// The host would not have the result and took an error in its place.
    Replaced,
    /// The host did not know the job any more.
    Gone,
    /// Nobody knows.
    Lost,
}

/// A reply as a body, and what is worth a line in the log.
pub struct Encoded {
    pub body: Body,
    /// The reply's own timings, such as `denoise`.
    pub timings: Value,
    pub upload: Duration,
}

/// Finds a form of the reply that the host takes: as it is, with links in place of the pictures, or smaller.
///
/// `chunks` are repeated in the result: those of a stream whose reader may have missed some.
pub async fn encode(
    worker: &Worker,
    job: &TakenJob,
    reply: Box<dyn Reply>,
    chunks: Option<Vec<Value>>,
) -> Result<Encoded, Error> {
    let limit = worker.settings.result_limit(&job.id);
    // whoever has a bucket of their own or asked for links gets them however small the pictures are
    let wants_links = job.s3_config.is_some() || reply.wants_links();
    let mut form = Form { worker, job, chunks, reply: Arc::from(reply), notes: Vec::new(), upload: Duration::ZERO };
    if wants_links && let Some(linked) = form.linked().await? {
        return Ok(linked);
    }
    let mut encoded = form.inline().await?;
    if encoded.body.bytes.len() > limit
        && !wants_links
        && let Some(linked) = form.linked().await?
    {
        return Ok(linked);
    }
    while encoded.body.bytes.len() > limit {
        if !form.shrink().await? {
            let size = encoded.body.bytes.len();
            let text = format!("the result has {size} bytes in its smallest form; a job of this kind may have {limit}");
            let remedy = "configure a bucket (BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY, or \
                          s3Config in the request), or ask for fewer or smaller images, or output_format webp or jpeg";
            return Err(Error::new(ErrorClass::TooLarge, "result_too_large", text).remedy(remedy));
        }
        encoded = form.inline().await?;
    }
    Ok(encoded)
}

/// The form that a reply has taken so far.
struct Form<'a> {
    worker: &'a Worker,
    job: &'a TakenJob,
    chunks: Option<Vec<Value>>,
    reply: Arc<dyn Reply>,
    /// What the client is told among the reply's warnings.
    notes: Vec<String>,
    upload: Duration,
}

impl Form<'_> {
    async fn inline(&self) -> Result<Encoded, Error> {
        self.encoded(|reply| reply.to_json()).await
    }

    /// `None` where there is no bucket, or it does not take the pictures.
    async fn linked(&mut self) -> Result<Option<Encoded>, Error> {
        let Some(upload) = &self.worker.upload else { return Ok(None) };
        let reply = self.reply.clone();
        let pictures = blocking(move || reply.pictures()).await?;
        if pictures.is_empty() {
            return Ok(None);
        }
        let started = Instant::now();
        // in a task of its own, so that a panic in it costs the links and not the pictures
        let uploading = tokio::spawn(upload(self.job.id.clone(), self.job.s3_config.clone(), pictures));
        let links = uploading.await.unwrap_or_else(|panic| Err(panicked("the upload", &panic)));
        self.upload = started.elapsed();
        match links {
            Ok(Some(links)) => self.encoded(move |reply| reply.with_links(&links)).await.map(Some),
            Ok(None) => Ok(None),
            Err(error) => {
                tracing::warn!(code = error.code, "the pictures could not be uploaded");
                self.notes.push(format!("the pictures could not be uploaded: {}", error.message));
                Ok(None)
            }
        }
    }

    async fn shrink(&mut self) -> Result<bool, Error> {
        let reply = self.reply.clone();
        let smaller = blocking(move || reply.smaller()).await?;
        let found = smaller.is_some();
        if let Some(smaller) = smaller {
            self.reply = Arc::from(smaller);
        }
        Ok(found)
    }

    async fn encoded(&self, show: impl FnOnce(&dyn Reply) -> Value + Send + 'static) -> Result<Encoded, Error> {
        let (reply, chunks, notes) = (self.reply.clone(), self.chunks.clone(), self.notes.clone());
        let work = move || {
            let mut value = show(&*reply);
            let timings = value.get("timings").cloned().unwrap_or_default();
            if let Some(warnings) = value.get_mut("warnings").and_then(Value::as_array_mut) {
                warnings.extend(notes.into_iter().map(Value::from));
            }
            if let (Some(chunks), Some(fields)) = (chunks, value.as_object_mut()) {
                fields.insert("stream".into(), chunks.into());
            }
            (Body::new(&body::result(value)), timings)
        };
        let (body, timings) = blocking(work).await?;
        Ok(Encoded { body, timings, upload: self.upload })
    }
}

/// Runs what takes milliseconds of computing where it holds up nobody. A panic is an error.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work)).await.map_err(|panic| panicked("the result", &panic))
}

fn panicked(what: &str, _panic: &tokio::task::JoinError) -> Error {
    let error = Error::new(ErrorClass::Internal, "internal", format!("{what} failed for a reason of ours"));
    error.remedy("report it, with the request")
}

/// Posts a final result until the host has answered it, the budget is spent, or everything ends.
pub async fn post_final(worker: &Worker, job_id: &str, body: Body, is_stream: bool) -> Delivery {
    let size = body.bytes.len();
    match post_until_answered(worker, job_id, body.bytes, is_stream).await {
        Posted::Accepted => Delivery::Accepted,
        Posted::Gone(status) => {
            tracing::warn!(%status, "the host does not know the job any more");
            Delivery::Gone
        }
        Posted::Rejected(status) if !body.is_error => {
            tracing::error!(%status, bytes = size, "the host rejects the result; it gets an error in its place");
            let text = format!("the host rejected the result of {size} bytes with status {}", status.as_u16());
            let error = Error::new(ErrorClass::TooLarge, "result_rejected", text)
                .remedy("ask for fewer or smaller images, or configure a bucket");
            let mut replacement = body::failure(&error, &worker.settings);
            if body.stop_pod {
                replacement["stopPod"] = true.into();
            }
            let replacement = replacement.to_string().into_bytes();
            match post_until_answered(worker, job_id, replacement, is_stream).await {
                Posted::Accepted => Delivery::Replaced,
                Posted::Gone(_) => Delivery::Gone,
                _ => Delivery::Lost,
            }
        }
        Posted::Rejected(status) => {
            tracing::error!(%status, "the host rejects the job's error report");
            Delivery::Lost
        }
        Posted::Refused(refusal) => {
            tracing::error!(reason = refusal.reason, bytes = size, "the result cannot be delivered");
            Delivery::Lost
        }
    }
}

/// Never returns a refusal before all tries are used up.
async fn post_until_answered(worker: &Worker, job_id: &str, bytes: Vec<u8>, is_stream: bool) -> Posted {
    let settings = &worker.settings;
    let deadline = Instant::now() + settings.result_retry_budget;
    let mut backoff = Backoff::new(settings.backoff, settings.backoff_cap);
    loop {
        let is_last = worker.phases.is_stopping().is_some();
        let hurry = async {
            worker.phases.stopping().await;
            sleep(settings.last_try).await;
        };
        let refusal = tokio::select! {
            posted = worker.client.done(job_id, bytes.clone(), is_stream) => match posted {
                Posted::Refused(refusal) => refusal,
                answered => return answered,
            },
            () = hurry => Refusal { status: None, retry_after: None, reason: "no time is left".into() },
        };
        let wait = backoff.next(refusal.retry_after);
        if is_last || Instant::now() + wait > deadline {
            return Posted::Refused(refusal);
        }
        tracing::warn!(reason = refusal.reason, wait_ms = wait.as_millis() as u64, "the result is posted again later");
        tokio::select! {
            () = sleep(wait) => {}
            _ = worker.phases.stopping() => {}
        }
    }
}
