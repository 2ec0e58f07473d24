//! The jobs, and what clients can ask of them. What happens to a job by itself is in `attempts`, to all of them in
//! `lifecycle`.
//!
//! One lock guards the whole table. It is a std mutex, since nothing is awaited while it is held and no section does more
//! than move a few words. A final state is left only by a retry.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::attempts::End;
use super::metrics::{Levels, Metrics};
use super::settings::{Hooks, Settings};
use super::table::{Entry, Request, RunnerSlot, Table};
use super::wire::{
    HealthReply, JobCounts, JobState, JobStatus, Policy, RunRequest, Status, StreamReply, WorkerCounts, asks_for_stream,
};
use crate::error::{Error, ErrorClass, Result};

pub(super) struct Jobs {
    pub(super) settings: Settings,
    pub(super) hooks: Hooks,
    pub(super) metrics: Metrics,
    table: Mutex<Table>,
    /// Told after every change of the table but progress: a nearer deadline, a free slot, an answer that was fetched.
    pub(super) changes: watch::Sender<()>,
    /// No job is accepted any more.
    pub(super) closing: watch::Sender<bool>,
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

impl Jobs {
    pub(super) fn new(settings: Settings, hooks: Hooks) -> Arc<Self> {
        let (changes, closing) = (watch::Sender::new(()), watch::Sender::new(false));
        Arc::new(Jobs { settings, hooks, metrics: Metrics::new(), table: Mutex::default(), changes, closing })
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changed(&self) {
        self.changes.send_replace(());
    }

    /// Takes a job in. A realtime job brings its own id.
    ///
    /// # Errors
    /// `queue_full`, `memory_full`, `shutting_down`, `duplicate_id`.
    pub(super) fn submit(self: &Arc<Self>, request: RunRequest, mode: Mode, id: Option<String>) -> Result<Ticket> {
        let uuid = uuid::Uuid::new_v4();
        let id =
            id.unwrap_or_else(|| if mode == Mode::Sync { format!("sync-{uuid}-u1") } else { format!("{uuid}-u1") });
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
        table.open += 1;
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
    pub(super) fn cancel(self: &Arc<Self>, id: &str) -> Option<JobStatus> {
        let mut table = self.table();
        self.end(&mut table, id, None, End::cancelled());
        let status = table.entries.get(id)?.status();
        drop(table);
        self.changed();
        Some(JobStatus { id: id.to_owned(), status })
    }

    /// Removes a job altogether.
    pub(super) fn forget(self: &Arc<Self>, id: &str) {
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
            let message =
                format!("only a job that failed or timed out can be tried again; this one is {}", status.name());
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
        table.open += 1;
        table.retried += 1;
        drop(table);
        self.dispatch();
        self.changed();
        Some(Ok(JobStatus { id: id.to_owned(), status: Status::InQueue }))
    }

    /// Cancels all jobs that wait, and says how many.
    pub(super) fn purge(self: &Arc<Self>) -> usize {
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
}

/// An error as the string that a failed job carries.
pub(super) fn error_text(error: &Error) -> String {
    error.to_json().to_string()
}

fn next(counter: &mut u64) -> u64 {
    *counter += 1;
    *counter
}

fn clamp(asked: Option<Duration>, default: Duration, range: &RangeInclusive<Duration>) -> Duration {
    asked.map_or(default, |asked| asked.clamp(*range.start(), *range.end()))
}

pub(super) fn shutting_down() -> Error {
    Error::new(ErrorClass::Overloaded, "shutting_down", "the server is stopping").remedy("send the job again, later")
}
