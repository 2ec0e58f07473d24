//! The loop that asks for jobs: a take goes out the moment a slot is free.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::Worker;
use super::backoff::{Backoff, jittered};
use super::client::{Refusal, Taken};
use super::execute::execute;
use super::job::Delivered;
use super::jobs::Admission;

/// Takes jobs until the worker drains. Every job holds a clone of `running` until it is answered.
pub async fn take_jobs(worker: Arc<Worker>, running: mpsc::Sender<()>) {
    let mut pace = Pace::new(&worker);
    while worker.phases.is_taking() {
        let free = tokio::select! {
            free = worker.slots.free_ones() => if worker.load_failed() { 1 } else { free },
            () = worker.phases.draining() => break,
        };
        let size = if pace.no_batches { 1 } else { free };
        let asked = Instant::now();
        let mut take = Box::pin(worker.client.take(size, !worker.jobs.is_empty()));
        let taken = tokio::select! {
            taken = &mut take => taken,
            () = worker.phases.draining() => match close(&worker, &mut take).await {
                Some(taken) => taken,
                None => break,
            },
        };
        drop(take);
        let wait = match taken {
            Taken::Jobs(jobs) => {
                let none = jobs.is_empty();
                jobs.into_iter().for_each(|delivered| accept(&worker, delivered, &running));
                pace.after_jobs(none, asked.elapsed())
            }
            other => pace.after(other, size, asked.elapsed()),
        };
        tokio::select! {
            () = sleep(wait) => {}
            () = worker.phases.draining() => {}
        }
    }
}

/// A job may be on its way in a take that is no longer wanted: waits for it a little.
async fn close(worker: &Worker, take: &mut (impl Future<Output = Taken> + Unpin)) -> Option<Taken> {
    tokio::select! {
        taken = timeout(worker.settings.take_close_grace, take) => taken.ok(),
        _ = worker.phases.stopping() => None,
    }
}

/// From here on the job is ours, and is answered.
fn accept(worker: &Arc<Worker>, delivered: Delivered, running: &mpsc::Sender<()>) {
    let (id, job) = match delivered {
        Delivered::Job(job) => (job.id.clone(), Ok(job)),
        Delivered::Invalid { id, error } => (id, Err(error)),
        Delivered::Nameless(why) => return tracing::error!("the host sent a job that cannot be answered: {why}"),
    };
    let held = match worker.jobs.admit(&id) {
        Admission::Held(held) => held,
        Admission::Duplicate => return tracing::warn!(request_id = id, "the job is in progress already"),
        Admission::Stopped => return tracing::info!(request_id = id, "the job was stopped before it came"),
    };
    if worker.load_failed() {
        worker.phases.drain();
    }
    let (worker, slot, running) = (worker.clone(), worker.slots.hold(), running.clone());
    tokio::spawn(async move {
        execute(worker, job, held, slot).await;
        drop(running);
    });
}

/// A worker that was paused and is wanted again hears 400 for a moment only.
const PAUSED_CAP: Duration = Duration::from_secs(3);

/// When to ask again.
struct Pace {
    backoff: Backoff,
    base: Duration,
    held_poll: Duration,
    busy_wait: Duration,
    no_batches: bool,
    /// What went wrong last, so that each trouble is one line.
    trouble: Option<String>,
}

impl Pace {
    fn new(worker: &Worker) -> Pace {
        let settings = &worker.settings;
        Pace {
            backoff: Backoff::new(settings.backoff, settings.backoff_cap),
            base: settings.backoff,
            held_poll: settings.held_poll,
            busy_wait: settings.busy_wait,
            no_batches: !worker.client.has_batch(),
            trouble: None,
        }
    }

    fn after_jobs(&mut self, none: bool, held: Duration) -> Duration {
        if none {
            return self.after(Taken::Nothing, 1, held);
        }
        self.well();
        Duration::ZERO
    }

    fn after(&mut self, taken: Taken, size: usize, held: Duration) -> Duration {
        match taken {
            Taken::Jobs(_) | Taken::TimedOut => {
                self.well();
                Duration::ZERO
            }
            Taken::Nothing => {
                self.well();
                if held >= self.held_poll { Duration::ZERO } else { jittered(self.base) }
            }
            Taken::Paused => self.back_off("400 Bad Request".into(), None).min(PAUSED_CAP),
            Taken::NoJob => self.back_off("an answer that is no job".into(), None),
            Taken::Refused(refusal) => self.refused(refusal, size),
        }
    }

    fn refused(&mut self, refusal: Refusal, size: usize) -> Duration {
        match refusal.status.map(|status| status.as_u16()) {
            Some(404 | 405) if size > 1 => {
                tracing::info!("the host has no batch route; jobs are taken one by one");
                self.no_batches = true;
                Duration::ZERO
            }
            Some(429) => {
                self.say(refusal.reason);
                refusal.retry_after.map_or_else(|| jittered(self.busy_wait), |asked| self.backoff.next(Some(asked)))
            }
            _ => self.back_off(refusal.reason, refusal.retry_after),
        }
    }

    fn back_off(&mut self, trouble: String, retry_after: Option<Duration>) -> Duration {
        self.say(trouble);
        self.backoff.next(retry_after)
    }

    fn say(&mut self, trouble: String) {
        if self.trouble.as_ref() != Some(&trouble) {
            tracing::warn!("no jobs can be taken: {trouble}");
            self.trouble = Some(trouble);
        }
    }

    fn well(&mut self) {
        self.backoff.reset();
        if self.trouble.take().is_some() {
            tracing::info!("jobs can be taken again");
        }
    }
}
