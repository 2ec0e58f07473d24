//! One job from its acceptance to the host's answer. Every way out of here has answered the job, or the host has said
//! that it wants no answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::Value;
use tracing::Instrument;

use super::Worker;
use super::body::{self, Body};
use super::deliver::{self, Delivery, Encoded};
use super::job::TakenJob;
use super::jobs::Held;
use super::slots::Slot;
use super::updates::{Updates, send_bytes};
use crate::error::{Error, ErrorClass};
use crate::job::{Job, Reply};

type Outcome = Result<Box<dyn Reply>, Arc<Error>>;

/// What one line of the log says about a job.
#[derive(Default)]
struct Phases {
    queue: Duration,
    run: Duration,
    encode: Duration,
    upload: Duration,
    post: Duration,
    bytes: usize,
    /// Of the error, if there was one.
    code: Option<&'static str>,
    timings: Value,
}

/// Runs the job, or fails one that cannot be run, and posts what came of it.
pub async fn execute(worker: Arc<Worker>, job: Result<TakenJob, Error>, held: Arc<Held>, slot: Slot) {
    let span = tracing::info_span!("job", request_id = %held.id);
    async {
        let mut phases = Phases::default();
        let ended = tokio::select! {
            biased;
            () = held.stopped() => None,
            ended = answer(&worker, job, &held, slot, &mut phases) => Some(ended),
        };
        // First out of the heartbeat, then out of the slot: the next take must not count this job.
        worker.jobs.release(&held);
        let (delivery, slot) = ended.unzip();
        drop(slot);
        if delivery == Some(Delivery::Lost) {
            worker.lost.fetch_add(1, Ordering::Relaxed);
        }
        phases.log(delivery);
    }
    .instrument(span)
    .await;
}

async fn answer(
    worker: &Arc<Worker>,
    job: Result<TakenJob, Error>,
    held: &Arc<Held>,
    slot: Slot,
    phases: &mut Phases,
) -> (Delivery, Option<Slot>) {
    let is_stream = job.as_ref().is_ok_and(TakenJob::wants_stream);
    let (body, slot) = match job {
        Err(error) => (failed(worker, &error, phases), Some(slot)),
        Ok(job) => {
            let (outcome, updates, slot) = tokio::select! {
                biased;
                why = worker.phases.stopping() => {
                    held.cancel();
                    (Err(why), None, None)
                }
                run = run(worker, &job, held, slot, phases) => run,
            };
            if matches!(&outcome, Err(error) if error.class == ErrorClass::DeviceLost) {
                worker.phases.drain();
            }
            (finish(worker, &job, outcome, updates, phases).await, slot)
        }
    };
    if is_stream && worker.client.has_stream() {
        announce(worker, held, &body).await;
    }
    let posting = Instant::now();
    if body.stop_pod {
        worker.asks_for_new_one.store(true, Ordering::Relaxed);
        worker.phases.drain();
    }
    phases.bytes = body.bytes.len();
    let delivery = deliver::post_final(worker, &held.id, body, is_stream).await;
    phases.post = posting.elapsed();
    (delivery, slot)
}

/// Waits for the model and the slot, and runs the job in a task of its own. That task keeps the slot, so that a job whom
/// nobody waits for any more still counts until the device is free.
async fn run(
    worker: &Arc<Worker>,
    job: &TakenJob,
    held: &Arc<Held>,
    mut slot: Slot,
    phases: &mut Phases,
) -> (Outcome, Option<Updates>, Option<Slot>) {
    let waiting = Instant::now();
    slot.start().await;
    let runner = match worker.runner().await {
        Ok(runner) => runner,
        Err(error) => return (Err(error), None, Some(slot)),
    };
    phases.queue = waiting.elapsed();

    let (updates, context) = Updates::start(worker, &held.id, job.wants_stream());
    held.runs_with(context.clone());
    let job = Job { id: job.id.clone(), input: job.input.clone() };
    let running = Instant::now();
    let work = async move { runner.run(job, context).await }.in_current_span();
    let task = async move { (tokio::spawn(work).await, slot) };
    let (outcome, slot) = tokio::spawn(task).await.expect("a task that only waits for another does not panic");
    let outcome = outcome.unwrap_or_else(|_| {
        let error = Error::new(ErrorClass::Internal, "internal", "the job failed for a reason of ours");
        Err(error.remedy("report it, with the request"))
    });
    phases.run = running.elapsed();
    (outcome.map_err(Arc::new), Some(updates), Some(slot))
}

/// Ends the updates and makes the final body.
async fn finish(
    worker: &Arc<Worker>,
    job: &TakenJob,
    outcome: Outcome,
    updates: Option<Updates>,
    phases: &mut Phases,
) -> Body {
    let (arrived, chunks) = match updates {
        Some(updates) => updates.finish().await,
        None => (true, Vec::new()),
    };
    let encoding = Instant::now();
    let wants_chunks = job.wants_stream() && (!arrived || worker.settings.aggregate_stream);
    let encoded = match outcome {
        Ok(reply) => deliver::encode(worker, job, reply, wants_chunks.then_some(chunks)).await.map_err(Arc::new),
        Err(error) => Err(error),
    };
    match encoded {
        Ok(Encoded { body, timings, upload }) => {
            (phases.timings, phases.upload) = (timings, upload);
            phases.encode = encoding.elapsed().saturating_sub(upload);
            body
        }
        Err(error) => failed(worker, &error, phases),
    }
}

fn failed(worker: &Worker, error: &Error, phases: &mut Phases) -> Body {
    phases.code = Some(error.code);
    Body::new(&body::failure(error, &worker.settings))
}

/// The last chunk of a stream: the result where it fits, or the error, which a reader of the stream alone would not see.
async fn announce(worker: &Worker, held: &Held, body: &Body) {
    let bytes = match body.is_error {
        true => [b"{\"output\":", body.bytes.as_slice(), b"}"].concat(),
        false => body.bytes.clone(),
    };
    if bytes.len() <= worker.settings.max_chunk_bytes && worker.phases.is_stopping().is_none() {
        send_bytes(worker, &held.id, bytes).await;
    }
}

impl Phases {
    fn log(&self, delivery: Option<Delivery>) {
        let outcome = match (delivery, self.code) {
            (None, _) => "stopped",
            (Some(Delivery::Lost), _) => "lost",
            (Some(Delivery::Gone), _) => "gone",
            (Some(Delivery::Replaced), _) => "rejected",
            (Some(Delivery::Accepted), Some(_)) => "failed",
            (Some(Delivery::Accepted), None) => "completed",
        };
        let ms = |duration: Duration| duration.as_millis() as u64;
        let steps = match &self.timings {
            Value::Object(_) => self.timings.to_string(),
            _ => "{}".into(),
        };
        tracing::info!(
            outcome,
            code = self.code,
            queue_ms = ms(self.queue),
            run_ms = ms(self.run),
            timings_ms = steps,
            encode_ms = ms(self.encode),
            upload_ms = ms(self.upload),
            post_ms = ms(self.post),
            bytes = self.bytes,
            "job ended"
        );
    }
}
