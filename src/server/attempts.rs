//! The life of a job: from the queue to a slot, to its final state, to whoever wants to be told.

use std::future::Future;
use std::sync::Arc;

use serde_json::value::{RawValue, to_raw_value};
use tokio::time::{Instant, timeout};

use super::jobs::{Jobs, error_text};
use super::settings::Finished;
use super::table::{Entry, Request, RunnerSlot, Table};
use super::webhook::Webhook;
use super::wire::{Chunk, Json, Status};
use crate::context::{JobContext, Progress};
use crate::error::{Error, ErrorClass, Result};
use crate::job::{Job, Runner};

/// Bytes of unread chunks that one job may leave behind; the oldest go first.
const MAX_CHUNK_BYTES: usize = 16 << 20;

/// A job that was given a slot.
pub(super) struct Attempt {
    id: String,
    attempt: u64,
    request: Request,
    context: JobContext,
    runner: Arc<dyn Runner>,
}

/// How a job ended.
pub(super) struct End {
    status: Status,
    output: Option<Json>,
    error: Option<String>,
}

impl End {
    pub(super) fn with_error(status: Status, error: &Error) -> Self {
        End { status, output: None, error: Some(error_text(error)) }
    }

    pub(super) fn cancelled() -> Self {
        End { status: Status::Cancelled, output: None, error: None }
    }
}

impl Jobs {
    /// Starts jobs while there are free slots.
    pub(super) fn dispatch(self: &Arc<Self>) {
        while let Some(attempt) = self.take_next() {
            tokio::spawn(Arc::clone(self).run(attempt));
        }
    }

    fn take_next(self: &Arc<Self>) -> Option<Attempt> {
        let mut table = self.table();
        if table.free_slots(self.settings.concurrency) == 0 {
            return None;
        }
        let RunnerSlot::Ready(runner) = &table.runner else { return None };
        let runner = runner.clone();
        let id = table.queue.pop_front()?;
        table.running += 1;
        let entry = table.entries.get_mut(&id).expect("a job that waits is in the table");
        let attempt = entry.attempt;
        // weak, since the table holds the context
        let (jobs, job_id) = (Arc::downgrade(self), id.clone());
        let context = JobContext::new(move |progress| {
            if let Some(jobs) = jobs.upgrade() {
                jobs.progress(&job_id, attempt, &progress);
            }
        });
        entry.context = Some(context.clone());
        let now = Instant::now();
        entry.started = Some(now);
        entry.status.send_replace(Status::InProgress);
        self.metrics.phase("queue", now - entry.submitted);
        Some(Attempt { id, attempt, request: entry.request.clone(), context, runner })
    }

    /// Runs a job to its end and gives its slot to the next.
    async fn run(self: Arc<Self>, attempt: Attempt) {
        let (id, number, context) = (attempt.id.clone(), attempt.attempt, attempt.context.clone());
        let limit = attempt.request.execution_timeout;
        // a task of its own: a panic ends that one and not this one
        let mut work = tokio::spawn(Arc::clone(&self).work(attempt));
        let result = match timeout(limit, &mut work).await {
            Ok(result) => result,
            Err(_) => {
                let message = format!("the job did not end within its {} ms", limit.as_millis());
                let error = Error::new(ErrorClass::Cancelled, "timed_out", message)
                    .remedy("ask for less, or for more time with policy.executionTimeout");
                self.end(&mut self.table(), &id, Some(number), End::with_error(Status::TimedOut, &error));
                self.changed();
                // the client has its answer; the slot stays taken until the runner lets go
                context.cancel();
                work.await
            }
        };
        let result = result.unwrap_or_else(|failure| Err(panicked(&failure)));
        let lost = matches!(&result, Err(error) if error.class == ErrorClass::DeviceLost);
        let end = match &result {
            Ok(output) => End { status: Status::Completed, output: Some(output.clone()), error: None },
            Err(error) if error.class == ErrorClass::Cancelled => End::cancelled(),
            Err(error) => End::with_error(Status::Failed, error),
        };
        {
            let mut table = self.table();
            self.end(&mut table, &id, Some(number), end);
            table.running -= 1;
        }
        match result {
            Err(error) if lost => self.fail(error),
            _ => self.dispatch(),
        }
        self.changed();
    }

    async fn work(self: Arc<Self>, attempt: Attempt) -> Result<Json> {
        let Attempt { id, request, context, runner, .. } = attempt;
        let Request { input, s3_config, .. } = request;
        let (input, s3_config) = off_thread(move || {
            let read = |json: &RawValue| serde_json::from_str(json.get()).map_err(unreadable);
            Ok((read(&input)?, s3_config.as_deref().map(read).transpose()?))
        })
        .await?;
        context.check_cancelled()?;
        let reply = runner.run(Job { id: id.clone(), input }, context).await?;
        let output = match &self.hooks.encode {
            Some(encode) => encode(Finished { id, s3_config, reply }).await?,
            None => off_thread(move || Ok(reply.to_json())).await?,
        };
        off_thread(move || {
            self.metrics.timings(&output);
            let text = to_raw_value(&output).map_err(|e| {
                Error::new(ErrorClass::Internal, "internal", "the reply cannot be written as JSON").source(e)
            })?;
            Ok(Json::from(text))
        })
        .await
    }

    fn progress(&self, id: &str, attempt: u64, progress: &Progress) {
        let Ok(output) = to_raw_value(&progress.to_json()) else { return };
        let output = Json::from(output);
        self.table().change(id, |entry| {
            if entry.attempt != attempt || entry.status() != Status::InProgress {
                return;
            }
            entry.output = Some(output.clone());
            if entry.request.streams {
                entry.chunks.push_back(Chunk { output });
                let mut bytes: usize = entry.chunks.iter().map(|chunk| chunk.output.get().len()).sum();
                while bytes > MAX_CHUNK_BYTES {
                    bytes -= entry.chunks.pop_front().map_or(bytes, |chunk| chunk.output.get().len());
                }
            }
        });
    }

    /// Gives a job its final state, unless it has one, or another attempt is meant. Stops it if it runs.
    pub(super) fn end(self: &Arc<Self>, table: &mut Table, id: &str, attempt: Option<u64>, end: End) {
        let now = Instant::now();
        let is_open = |entry: &&Entry| attempt.is_none_or(|a| a == entry.attempt) && !entry.status().is_final();
        let Some(entry) = table.entries.get(id).filter(is_open) else { return };
        let (waited, expires) =
            (entry.started.is_none(), (entry.submitted + entry.request.ttl).min(now + entry.request.keep));
        let status = end.status;
        let closing = *self.closing.borrow();
        table.change(id, |entry| {
            (entry.output, entry.error, entry.ended) = (end.output, end.error, Some(now));
            entry.ended_while_closing = closing;
            if let Some(context) = entry.context.take().filter(|_| status != Status::Completed) {
                context.cancel();
            }
            entry.status.send_replace(status);
        });
        table.set_deadline(id, expires);
        if waited {
            table.queue.retain(|waiting| waiting != id);
        }
        match status {
            Status::Completed => table.completed += 1,
            Status::Failed | Status::TimedOut => table.failed += 1,
            _ => {}
        }
        table.open -= 1;
        self.metrics.job_ended(status);
        table.drop_outdated();
        let most = self.settings.max_finished + table.open;
        while table.held_bytes > self.settings.max_held_bytes || table.entries.len() > most {
            if !table.forget_one() {
                break;
            }
        }
        if let Some(entry) = table.entries.get(id) {
            let state = entry.state(id, &self.settings.worker_id);
            tracing::info!(
                job = %id,
                status = status.name(),
                delay_ms = state.delay_time,
                execution_ms = state.execution_time,
                "job ended"
            );
            table.finished.push_back((entry.attempt, id.to_owned()));
            let hook = entry.request.webhook.clone().zip(self.hooks.post_webhook.clone());
            if let Some((url, post)) = hook {
                table.pending_webhooks += 1;
                let (input, attempt) = (entry.request.input.clone(), entry.attempt);
                let (pause, closing) = (self.settings.webhook_pause, self.closing.subscribe());
                self.spawn_webhook(id.to_owned(), attempt, async move {
                    Webhook { url: &url, state: &state, input: &input }.deliver(&post, pause, closing).await
                });
            }
        }
    }

    fn spawn_webhook(
        self: &Arc<Self>,
        id: String,
        attempt: u64,
        delivery: impl Future<Output = bool> + Send + 'static,
    ) {
        let jobs = Arc::clone(self);
        tokio::spawn(async move {
            // a task of its own: the count must go down also after a panic in the hook
            let delivered = tokio::spawn(delivery).await.unwrap_or(false);
            let mut table = jobs.table();
            table.pending_webhooks -= 1;
            if let Some(entry) = table.entries.get_mut(&id).filter(|entry| entry.attempt == attempt) {
                entry.delivered |= delivered;
            }
            drop(table);
            jobs.changed();
        });
    }
}

/// Runs what may take milliseconds where it holds up nobody.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|failure| Err(panicked(&failure)))
}

/// The panic's own words may hold a part of the input, so they are not passed on; the panic hook has printed them.
fn panicked(_: &tokio::task::JoinError) -> Error {
    Error::new(ErrorClass::Internal, "internal", "the job failed for a reason of ours")
        .remedy("report it, with the request")
}

fn unreadable(error: serde_json::Error) -> Error {
    Error::invalid("invalid_json", "input", "the input is not JSON that can be read").source(error)
}
