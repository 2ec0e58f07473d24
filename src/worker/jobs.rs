//! The jobs this worker holds. The heartbeat reads them, the stop channel ends them; a lock is held for moments only.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::context::JobContext;

/// How long a stop for an unknown job is remembered: it may overtake the take that brings the job. Not longer, since a
/// client may send a stopped job again under its id.
const STOP_MEMORY: Duration = Duration::from_secs(5);
const FINISHED_MEMORY: usize = 64;

#[derive(Default)]
pub struct Jobs {
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Table {
    held: HashMap<String, Arc<Held>>,
    /// Stops for jobs that were unknown, oldest first.
    early_stops: VecDeque<(String, Instant)>,
    /// Stops for these came late, and mean nothing.
    finished: VecDeque<String>,
    accepted: usize,
}

/// One job in progress: waiting, running, or with its result unsent.
pub struct Held {
    pub id: String,
    stopped: watch::Sender<bool>,
    /// Set once the job runs.
    context: Mutex<Option<JobContext>>,
}

pub enum Admission {
    Held(Arc<Held>),
    /// It is in progress already.
    Duplicate,
    /// It was stopped before it came.
    Stopped,
}

impl Held {
    fn new(id: String) -> Held {
        Held { id, stopped: watch::Sender::new(false), context: Mutex::default() }
    }

    /// Whom a stop has to reach.
    pub fn runs_with(&self, context: JobContext) {
        *lock(&self.context) = Some(context);
        if *self.stopped.borrow() {
            self.cancel();
        }
    }

    pub fn cancel(&self) {
        if let Some(context) = &*lock(&self.context) {
            context.cancel();
        }
    }

    /// The host wants nothing more of this job: no result, no error.
    pub fn stop(&self) {
        self.stopped.send_replace(true);
        self.cancel();
    }

    /// Waits until the host has stopped the job.
    pub async fn stopped(&self) {
        // the sender lives in `self`, so waiting cannot fail
        self.stopped.subscribe().wait_for(|stopped| *stopped).await.ok();
    }
}

impl Jobs {
    pub fn admit(&self, id: &str) -> Admission {
        let mut table = lock(&self.table);
        table.early_stops.retain(|(_, at)| at.elapsed() < STOP_MEMORY);
        if let Some(at) = table.early_stops.iter().position(|(stopped, _)| stopped == id) {
            table.early_stops.remove(at);
            return Admission::Stopped;
        }
        if table.held.contains_key(id) {
            return Admission::Duplicate;
        }
        let held = Arc::new(Held::new(id.into()));
        table.held.insert(id.into(), held.clone());
        table.accepted += 1;
        self.tell(table);
        Admission::Held(held)
    }

    /// Forgets a job that has ended; its id may come again.
    pub fn release(&self, held: &Arc<Held>) {
        let mut table = lock(&self.table);
        if table.held.get(&held.id).is_some_and(|current| Arc::ptr_eq(current, held)) {
            table.held.remove(&held.id);
        }
        table.finished.push_back(held.id.clone());
        if table.finished.len() > FINISHED_MEMORY {
            table.finished.pop_front();
        }
        self.tell(table);
    }

    /// Stops a job, now or when it comes. Whether it was known.
    pub fn stop(&self, id: &str) -> bool {
        let mut table = lock(&self.table);
        if let Some(held) = table.held.remove(id) {
            held.stop();
            self.tell(table);
            return true;
        }
        if !table.finished.iter().any(|finished| finished == id) {
            table.early_stops.push_back((id.into(), Instant::now()));
            if table.early_stops.len() > 256 {
                table.early_stops.pop_front();
            }
        }
        false
    }

    /// In order, so that a heartbeat can be compared with the last.
    pub fn ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = lock(&self.table).held.keys().cloned().collect();
        ids.sort();
        ids
    }

    pub fn is_empty(&self) -> bool {
        lock(&self.table).held.is_empty()
    }

    /// How many were taken since the start.
    pub fn accepted(&self) -> usize {
        lock(&self.table).accepted
    }

    /// Marks every change of the set.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn tell(&self, table: MutexGuard<'_, Table>) {
        drop(table);
        self.changed.send_modify(|count| *count += 1);
    }
}

/// A job's panic elsewhere is no reason to lose all others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(jobs: &Jobs, id: &str) -> Arc<Held> {
        match jobs.admit(id) {
            Admission::Held(held) => held,
            _ => panic!("{id} was not admitted"),
        }
    }

    #[test]
    fn an_id_in_progress_is_a_duplicate_and_a_finished_one_may_come_again() {
        let jobs = Jobs::default();
        let held = admitted(&jobs, "a");
        assert!(matches!(jobs.admit("a"), Admission::Duplicate));
        jobs.release(&held);
        admitted(&jobs, "a");
    }

    #[test]
    fn a_stop_before_the_take_works_once() {
        let jobs = Jobs::default();
        assert!(!jobs.stop("a"));
        assert!(matches!(jobs.admit("a"), Admission::Stopped));
        admitted(&jobs, "a");
    }

    #[test]
    fn a_stop_that_comes_after_the_end_does_not_touch_a_retry() {
        let jobs = Jobs::default();
        let held = admitted(&jobs, "a");
        jobs.release(&held);
        jobs.stop("a");
        admitted(&jobs, "a");
    }

    #[test]
    fn a_stopped_job_leaves_the_heartbeat_and_cancels_its_context_whenever_that_comes() {
        let jobs = Jobs::default();
        let held = admitted(&jobs, "a");
        let context = JobContext::default();
        assert!(jobs.stop("a"));
        assert!(jobs.ids().is_empty());
        held.runs_with(context.clone());
        assert!(context.is_cancelled());

        // The id again, while the first is still on its way out: both are told apart.
        let again = admitted(&jobs, "a");
        jobs.release(&held);
        assert_eq!(jobs.ids(), ["a"]);
        jobs.release(&again);
        assert!(jobs.is_empty());
    }
}
