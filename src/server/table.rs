//! The job table as data: what is known of every job, and the sums over all of them. `jobs` changes it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::wire::{Chunk, JobState, Json, Status};
use crate::context::JobContext;
use crate::error::Error;
use crate::job::Runner;

#[derive(Default)]
pub(super) struct Table {
    pub(super) entries: HashMap<String, Entry>,
    /// Ids of the jobs that wait.
    pub(super) queue: VecDeque<String>,
    /// When to look at a job again: its TTL, or the end of its result's time.
    pub(super) deadlines: BTreeSet<(Instant, String)>,
    /// Ids of the jobs that are over, the first first, with the attempt that was; an entry may be out of date.
    pub(super) finished: VecDeque<(u64, String)>,
    /// Slots that are taken, also by jobs that were cancelled and have not stopped yet.
    pub(super) running: usize,
    pub(super) held_bytes: usize,
    /// Jobs that have no final state.
    pub(super) open: usize,
    pub(super) runner: RunnerSlot,
    /// Why the server has to end.
    pub(super) fatal: Option<Error>,
    pub(super) pending_webhooks: usize,
    /// Numbers every attempt at a job.
    pub(super) attempts: u64,
    pub(super) completed: u64,
    pub(super) failed: u64,
    pub(super) retried: u64,
}

#[derive(Default)]
pub(super) enum RunnerSlot {
    #[default]
    Loading,
    Ready(Arc<dyn Runner>),
    Failed,
}

/// What a client submitted.
#[derive(Clone)]
pub(super) struct Request {
    pub(super) input: Json,
    pub(super) webhook: Option<String>,
    pub(super) s3_config: Option<Json>,
    pub(super) streams: bool,
    pub(super) execution_timeout: Duration,
    pub(super) ttl: Duration,
    pub(super) keep: Duration,
}

pub(super) struct Entry {
    pub(super) request: Request,
    pub(super) status: watch::Sender<Status>,
    pub(super) attempt: u64,
    pub(super) submitted: Instant,
    pub(super) started: Option<Instant>,
    pub(super) ended: Option<Instant>,
    pub(super) deadline: Instant,
    /// The reply, or the last progress.
    pub(super) output: Option<Json>,
    pub(super) error: Option<String>,
    pub(super) chunks: VecDeque<Chunk>,
    /// Of the job that runs.
    pub(super) context: Option<JobContext>,
    /// Somebody has seen the final state.
    pub(super) delivered: bool,
    pub(super) ended_while_closing: bool,
}

impl Entry {
    pub(super) fn status(&self) -> Status {
        *self.status.borrow()
    }

    pub(super) fn bytes(&self) -> usize {
        let chunks: usize = self.chunks.iter().map(|chunk| chunk.output.get().len()).sum();
        self.request.input.get().len() + self.output.as_ref().map_or(0, |output| output.get().len()) + chunks
    }

    pub(super) fn state(&self, id: &str, worker_id: &str) -> JobState {
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
    pub(super) fn change<T>(&mut self, id: &str, change: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        let entry = self.entries.get_mut(id)?;
        let before = entry.bytes();
        let result = change(entry);
        self.held_bytes = self.held_bytes - before + entry.bytes();
        Some(result)
    }

    pub(super) fn set_deadline(&mut self, id: &str, deadline: Instant) {
        if let Some(entry) = self.entries.get_mut(id) {
            self.deadlines.remove(&(entry.deadline, id.to_owned()));
            entry.deadline = deadline;
            self.deadlines.insert((deadline, id.to_owned()));
        }
    }

    pub(super) fn remove(&mut self, id: &str) {
        if let Some(entry) = self.entries.remove(id) {
            self.held_bytes -= entry.bytes();
            self.deadlines.remove(&(entry.deadline, id.to_owned()));
        }
    }

    /// Forgets one result: the oldest that somebody has seen, else the oldest.
    pub(super) fn forget_one(&mut self) -> bool {
        self.drop_outdated();
        let current = |(attempt, id): &(u64, String)| self.entries.get(id).filter(|entry| entry.attempt == *attempt);
        let seen = self.finished.iter().position(|finished| current(finished).is_some_and(|entry| entry.delivered));
        let Some((_, id)) = self.finished.remove(seen.unwrap_or(0)) else { return false };
        if seen.is_none() {
            tracing::warn!(job = %id, "a result was dropped before anybody fetched it: too many results are held");
        }
        self.remove(&id);
        true
    }

    /// So that the front of `finished` is a job that is still here.
    pub(super) fn drop_outdated(&mut self) {
        if self.finished.len() > 2 * self.entries.len() + 64 {
            let entries = &self.entries;
            self.finished.retain(|(attempt, id)| entries.get(id).is_some_and(|entry| entry.attempt == *attempt));
        }
        while let Some((attempt, id)) = self.finished.front()
            && self.entries.get(id).is_none_or(|entry| entry.attempt != *attempt)
        {
            self.finished.pop_front();
        }
    }

    pub(super) fn free_slots(&self, concurrency: usize) -> usize {
        match self.runner {
            RunnerSlot::Ready(_) => concurrency.saturating_sub(self.running),
            _ => 0,
        }
    }
}
