//! The job table and the queue: every job from its submission until nobody can ask for it any more.
//!
//! One lock guards the whole table. It is a std mutex, since nothing is awaited while it is held and no section does more
//! than move a few words. A job's state changes here and nowhere else, and a final state is left only by a retry.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::metrics::{Levels, Metrics};
use super::settings::{Finished, Hooks, RunnerState, Settings};
use super::webhook::Webhook;
use super::wire::{
    Chunk, HealthReply, JobCounts, JobState, JobStatus, Json, Policy, RunRequest, Status, StreamReply, WorkerCounts,
    asks_for_stream,
};
use crate::context::{JobContext, Progress};
use crate::error::{Error, ErrorClass, Result};
use crate::job::{Job, Runner};

/// Bytes of unread chunks that one job may leave behind; the oldest go first.
const MAX_CHUNK_BYTES: usize = 16 << 20;
/// How long jobs have to stop after they were cancelled, before the server ends without them.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// How long the webhooks of the last jobs may take.
const WEBHOOK_GRACE: Duration = Duration::from_secs(10);

pub(super) struct Jobs {
    pub(super) settings: Settings,
    pub(super) hooks: Hooks,
    metrics: Metrics,
    table: Mutex<Table>,
    /// Told after every change of the table but progress: a nearer deadline, a free slot, an answer that was fetched.
    changes: watch::Sender<()>,
    /// No job is accepted any more.
    closing: watch::Sender<bool>,
}

struct Table {
    entries: HashMap<String, Entry>,
    /// Ids of the jobs that wait.
    queue: VecDeque<String>,
    /// When to look at a job again: its TTL, or the end of its result's time.
    deadlines: BTreeSet<(Instant, String)>,
    /// Ids of the jobs that are over, the first first, with the attempt that was; an entry may be out of date.
    finished: VecDeque<(u64, String)>,
    /// Slots that are taken, also by jobs that were cancelled and have not stopped yet.
    running: usize,
    held_bytes: usize,
    runner: RunnerSlot,
    /// Why the server has to end.
    fatal: Option<Error>,
    pending_webhooks: usize,
    /// Numbers every attempt at a job.
    attempts: u64,
    completed: u64,
    failed: u64,
    retried: u64,
}

enum RunnerSlot {
    Loading,
    Ready(Arc<dyn Runner>),
    Failed,
}

/// What a client submitted.
#[derive(Clone)]
struct Request {
    input: Json,
    webhook: Option<String>,
    s3_config: Option<Json>,
    streams: bool,
    execution_timeout: Duration,
    ttl: Duration,
    keep: Duration,
}

struct Entry {
    request: Request,
    status: watch::Sender<Status>,
    attempt: u64,
    submitted: Instant,
    started: Option<Instant>,
    ended: Option<Instant>,
    deadline: Instant,
    /// The reply, or the last progress.
    output: Option<Json>,
    error: Option<Arc<str>>,
    chunks: VecDeque<Chunk>,
    /// Of the job that runs.
    context: Option<JobContext>,
    /// Somebody has seen the final state.
    delivered: bool,
    ended_while_closing: bool,
}

/// A job that was given a slot.
struct Attempt {
    id: String,
    attempt: u64,
    request: Request,
    context: JobContext,
    runner: Arc<dyn Runner>,
}

/// How a job is submitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Run,
    Sync,
    Realtime,
}

/// Knows where a submitted job is, also after the table forgot it.
pub(super) struct Ticket {
    pub(super) id: String,
    status: watch::Receiver<Status>,
}

impl Ticket {
    pub(super) fn status(&self) -> JobStatus {
        JobStatus { id: self.id.clone(), status: *self.status.borrow() }
    }

    /// Waits until the job is over, at most so long.
    pub(super) async fn wait(&mut self, at_most: Duration) {
        timeout(at_most, self.status.wait_for(|status| status.is_final())).await.ok();
    }
}

/// How a job ended.
struct End {
    status: Status,
    output: Option<Json>,
    error: Option<Arc<str>>,
}

impl End {
    fn with_error(status: Status, error: &Error) -> Self {
        End { status, output: None, error: Some(error_text(error)) }
    }

    fn cancelled() -> Self {
        End { status: Status::Cancelled, output: None, error: None }
    }
}

/// An error as the string that a failed job carries.
pub(super) fn error_text(error: &Error) -> Arc<str> {
    error.to_json().to_string().into()
}

impl Entry {
    fn status(&self) -> Status {
        *self.status.borrow()
    }

    fn bytes(&self) -> usize {
        let chunks: usize = self.chunks.iter().map(|chunk| chunk.output.get().len()).sum();
        self.request.input.get().len() + self.output.as_ref().map_or(0, |output| output.get().len()) + chunks
    }

    fn state(&self, id: &str, worker_id: &str) -> JobState {
        let milliseconds = |from: Option<Instant>, to: Option<Instant>| Some((to? - from?).as_millis() as u64);
        JobState {
            delay_time: milliseconds(Some(self.submitted), self.started),
            error: self.error.clone(),
            execution_time: milliseconds(self.started, self.ended),
            id: id.to_owned(),
            output: self.output.clone(),
            status: self.status(),
            worker_id: self.started.map(|_| worker_id.to_owned()),
        }
    }
}

impl Table {
    /// Changes an entry and keeps count of its bytes.
    fn change<T>(&mut self, id: &str, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let entry = self.entries.get_mut(id)?;
        let before = entry.bytes();
        let result = change(entry);
        self.held_bytes = self.held_bytes - before + entry.bytes();
        Some(result)
    }

    fn set_deadline(&mut self, id: &str, deadline: Instant) {
        if let Some(entry) = self.entries.get_mut(id) {
            self.deadlines.remove(&(entry.deadline, id.to_owned()));
            entry.deadline = deadline;
            self.deadlines.insert((deadline, id.to_owned()));
        }
    }

    fn remove(&mut self, id: &str) {
        if let Some(entry) = self.entries.remove(id) {
            self.held_bytes -= entry.bytes();
            self.deadlines.remove(&(entry.deadline, id.to_owned()));
        }
    }

    /// Forgets one result: the oldest that somebody has seen, else the oldest.
    fn forget_one(&mut self) -> bool {
        let entries = &self.entries;
        let is_current = |(attempt, id): &(u64, String)| {
            entries.get(id).is_some_and(|entry| entry.attempt == *attempt && entry.status().is_final())
        };
        self.finished.retain(is_current);
        let seen = self.finished.iter().position(|(_, id)| entries.get(id).is_some_and(|entry| entry.delivered));
        let Some((_, id)) = self.finished.remove(seen.unwrap_or(0)) else { return false };
        if seen.is_none() {
            tracing::warn!(job = %id, "a result was dropped before anybody fetched it: too many results are held");
        }
        self.remove(&id);
        true
    }

    fn free_slots(&self, concurrency: usize) -> usize {
        match self.runner {
            RunnerSlot::Ready(_) => concurrency.saturating_sub(self.running),
            _ => 0,
        }
    }
}

impl Jobs {
    pub(super) fn new(settings: Settings, hooks: Hooks) -> Arc<Self> {
        let table = Table {
            entries: HashMap::new(),
            queue: VecDeque::new(),
            deadlines: BTreeSet::new(),
            finished: VecDeque::new(),
            running: 0,
            held_bytes: 0,
            runner: RunnerSlot::Loading,
            fatal: None,
            pending_webhooks: 0,
            attempts: 0,
            completed: 0,
            failed: 0,
            retried: 0,
        };
        let (changes, closing) = (watch::Sender::new(()), watch::Sender::new(false));
        Arc::new(Jobs { settings, hooks, metrics: Metrics::new(), table: Mutex::new(table), changes, closing })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_replace(());
    }

    // --- What clients ask for ---

    /// Takes a job in. A realtime job brings its own id.
    ///
    /// # Errors
    /// `queue_full`, `memory_full`, `shutting_down`, `duplicate_id`.
    pub(super) fn submit(self: &Arc<Self>, request: RunRequest, mode: Mode, id: Option<String>) -> Result<Ticket> {
        let uuid = uuid::Uuid::new_v4();
        let id = id.unwrap_or_else(|| if mode == Mode::Sync { format!("sync-{uuid}-u1") } else { format!("{uuid}-u1") });
        let request = self.request(request, mode);
        let mut table = self.table();
        self.check_open()?;
        if table.entries.contains_key(&id) {
            let message = format!("a job with the id {id:?} is here already");
            return Err(Error::new(ErrorClass::InvalidInput, "duplicate_id", message).field("id"));
        }
        self.check_queue(&table)?;
        let bytes = request.input.get().len();
        while table.held_bytes + bytes > self.settings.max_held_bytes {
            if !table.forget_one() {
                let message = "the jobs that wait and run fill the memory set aside for them";
                return Err(Error::new(ErrorClass::Overloaded, "memory_full", message).remedy("try again later"));
            }
        }
        let (now, attempt) = (Instant::now(), next(&mut table.attempts));
        let (sender, status) = watch::channel(Status::InQueue);
        let deadline = now + request.ttl;
        let entry = Entry {
            request,
            status: sender,
            attempt,
            submitted: now,
            started: None,
            ended: None,
            deadline,
            output: None,
            error: None,
            chunks: VecDeque::new(),
            context: None,
            delivered: false,
            ended_while_closing: false,
        };
        table.held_bytes += entry.bytes();
        table.entries.insert(id.clone(), entry);
        table.deadlines.insert((deadline, id.clone()));
        table.queue.push_back(id.clone());
        drop(table);
        self.dispatch();
        self.changed();
        Ok(Ticket { id, status })
    }

    fn request(&self, request: RunRequest, mode: Mode) -> Request {
        let RunRequest { input, webhook, policy: Policy { execution_timeout, ttl }, s3_config } = request;
        let settings = &self.settings;
        Request {
            streams: asks_for_stream(&input),
            input,
            webhook,
            s3_config,
            execution_timeout: clamp(execution_timeout, settings.execution_timeout, &settings.execution_timeout_range),
            ttl: clamp(ttl, settings.ttl, &settings.ttl_range),
            keep: if mode == Mode::Run { settings.keep } else { settings.keep_sync },
        }
    }

    fn check_open(&self) -> Result<()> {
        match *self.closing.borrow() {
            true => Err(shutting_down()),
            false => Ok(()),
        }
    }

    fn check_queue(&self, table: &Table) -> Result<()> {
        if table.queue.len() < self.settings.max_queue + table.free_slots(self.settings.concurrency) {
            return Ok(());
        }
        let message = format!("{} jobs wait already, and no more may", table.queue.len());
        Err(Error::new(ErrorClass::Overloaded, "queue_full", message).remedy("try again later"))
    }

    pub(super) fn ticket(&self, id: &str) -> Option<Ticket> {
        self.table().entries.get(id).map(|entry| Ticket { id: id.to_owned(), status: entry.status.subscribe() })
    }

    /// A job's state; a final one counts as fetched.
    pub(super) fn state(&self, id: &str) -> Option<JobState> {
        let mut table = self.table();
        let entry = table.entries.get_mut(id)?;
        let state = entry.state(id, &self.settings.worker_id);
        entry.delivered |= state.status.is_final();
        drop(table);
        if state.status.is_final() {
            self.changed();
        }
        Some(state)
    }

    /// The chunks that nobody has read yet.
    pub(super) fn stream(&self, id: &str) -> Option<StreamReply> {
        self.table().change(id, |entry| StreamReply {
            error: entry.error.clone(),
            id: id.to_owned(),
            status: entry.status(),
            stream: entry.chunks.drain(..).collect(),
        })
    }

    /// Ends a job that waits or runs; what is over stays as it is.
    pub(super) fn cancel(&self, id: &str) -> Option<JobStatus> {
        let mut table = self.table();
        self.end(&mut table, id, None, End::cancelled());
        let status = table.entries.get(id)?.status();
        drop(table);
        self.changed();
        Some(JobStatus { id: id.to_owned(), status })
    }

    /// Removes a job altogether.
    pub(super) fn forget(&self, id: &str) {
        let mut table = self.table();
        self.end(&mut table, id, None, End::cancelled());
        table.remove(id);
        drop(table);
        self.changed();
    }

    /// Queues a job again that failed.
    ///
    /// # Errors
    /// `not_retryable`, and those of [`submit`](Self::submit).
    pub(super) fn retry(self: &Arc<Self>, id: &str) -> Option<Result<JobStatus>> {
        let mut table = self.table();
        let status = table.entries.get(id)?.status();
        if !matches!(status, Status::Failed | Status::TimedOut) {
            let message = format!("only a job that failed or timed out can be tried again; this one is {}", status.name());
            return Some(Err(Error::new(ErrorClass::InvalidInput, "not_retryable", message)));
        }
        if let Err(error) = self.check_open().and_then(|()| self.check_queue(&table)) {
            return Some(Err(error));
        }
        let (now, attempt) = (Instant::now(), next(&mut table.attempts));
        let ttl = table.change(id, |entry| {
            (entry.attempt, entry.submitted, entry.started, entry.ended) = (attempt, now, None, None);
            (entry.output, entry.error, entry.delivered) = (None, None, false);
            entry.chunks.clear();
            entry.status.send_replace(Status::InQueue);
            entry.request.ttl
        })?;
        table.set_deadline(id, now + ttl);
        table.queue.push_back(id.to_owned());
        table.retried += 1;
        drop(table);
        self.dispatch();
        self.changed();
        Some(Ok(JobStatus { id: id.to_owned(), status: Status::InQueue }))
    }

    /// Cancels all jobs that wait, and says how many.
    pub(super) fn purge(&self) -> usize {
        let mut table = self.table();
        let waiting: Vec<String> = table.queue.iter().cloned().collect();
        for id in &waiting {
            self.end(&mut table, id, None, End::cancelled());
        }
        drop(table);
        self.changed();
        waiting.len()
    }

    pub(super) fn health(&self) -> HealthReply {
        let table = self.table();
        let running = table.entries.values().filter(|entry| entry.status() == Status::InProgress).count();
        let workers = match table.runner {
            RunnerSlot::Loading => WorkerCounts { initializing: 1, ..Default::default() },
            RunnerSlot::Failed => WorkerCounts { unhealthy: 1, ..Default::default() },
            RunnerSlot::Ready(_) if table.running > 0 => WorkerCounts { running: 1, ..Default::default() },
            RunnerSlot::Ready(_) => WorkerCounts { idle: 1, ready: 1, ..Default::default() },
        };
        let (in_progress, in_queue) = (running, table.queue.len());
        let Table { completed, failed, retried, .. } = *table;
        HealthReply { jobs: JobCounts { completed, failed, in_progress, in_queue, retried }, workers }
    }

    /// All jobs without what they hold, the newest first.
    pub(super) fn requests(&self) -> Vec<JobState> {
        let table = self.table();
        let mut entries: Vec<_> = table.entries.iter().collect();
        entries.sort_unstable_by_key(|(_, entry)| std::cmp::Reverse(entry.attempt));
        let worker_id = &self.settings.worker_id;
        entries.into_iter().map(|(id, e)| JobState { output: None, error: None, ..e.state(id, worker_id) }).collect()
    }

    pub(super) fn metrics(&self) -> String {
        let levels = {
            let table = self.table();
            Levels { queued: table.queue.len(), running: table.running, held_bytes: table.held_bytes }
        };
        self.metrics.to_text(&levels, &self.hooks)
    }

    /// Whether a load balancer may send jobs; `None` while the model loads.
    pub(super) fn is_healthy(&self) -> Option<bool> {
        match self.table().runner {
            _ if *self.closing.borrow() => Some(false),
            RunnerSlot::Loading => None,
            RunnerSlot::Ready(_) => Some(true),
            RunnerSlot::Failed => Some(false),
        }
    }

    // --- The life of a job ---

    /// Starts jobs while there are free slots.
    fn dispatch(self: &Arc<Self>) {
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
    fn end(&self, table: &mut Table, id: &str, attempt: Option<u64>, end: End) {
        let now = Instant::now();
        let is_open = |entry: &&Entry| attempt.is_none_or(|a| a == entry.attempt) && !entry.status().is_final();
        let Some(entry) = table.entries.get(id).filter(is_open) else { return };
        let (waited, expires) = (entry.started.is_none(), (entry.submitted + entry.request.ttl).min(now + entry.request.keep));
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
        self.metrics.job_ended(status);
        while table.held_bytes > self.settings.max_held_bytes || table.finished.len() >= self.settings.max_finished {
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
