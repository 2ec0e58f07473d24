//! The jobs that wait for an engine, in the order in which they came. A job goes to the engine that is free first; of
//! several free ones to one that has its LoRAs in the weights.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use super::Job;
use crate::error::{Error, ErrorClass, Result};
use crate::lora::Wanted;
use crate::pipeline::Upcoming;

/// Needs no bound: whoever brings a job waits for it.
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    waiting: VecDeque<Job>,
    engines: Vec<EngineState>,
    closed: bool,
}

#[derive(Default)]
struct EngineState {
    is_gone: bool,
    is_free: bool,
    /// Those of its last job.
    loras: Loras,
}

/// Checksums and scales of a job's LoRAs, the scales bit by bit.
type Loras = Vec<(String, u64)>;

fn loras(job: &Job) -> Loras {
    job.task.inputs.loras.iter().map(Wanted::key).collect()
}

impl Queue {
    pub(super) fn new(engines: usize) -> Self {
        // free even before their threads have come to the queue: jobs come when all are loaded
        let engines = (0..engines).map(|_| EngineState { is_free: true, ..EngineState::default() }).collect();
        Queue { state: Mutex::new(State { waiting: VecDeque::new(), engines, closed: false }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds the queue")
    }

    /// # Errors
    /// `device_lost`, when no engine is left.
    pub(super) fn push(&self, job: Job) -> Result<()> {
        let mut state = self.lock();
        if state.count() == 0 {
            return Err(no_device());
        }
        state.waiting.push_back(job);
        self.changed.notify_all();
        Ok(())
    }

    /// No jobs will come any more.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Engines that take jobs.
    pub(super) fn count(&self) -> usize {
        self.lock().count()
    }

    /// Free engines, and jobs that wait.
    #[cfg(test)]
    pub(super) fn levels(&self) -> (usize, usize) {
        let state = self.lock();
        (state.engines.iter().filter(|engine| engine.is_free).count(), state.waiting.len())
    }
}

impl State {
    fn count(&self) -> usize {
        self.engines.iter().filter(|engine| !engine.is_gone).count()
    }

    /// Whether the job is for `engine` to take, rather than for another that is free too and has its LoRAs.
    fn is_for(&self, engine: usize, job: &Job) -> bool {
        let loras = loras(job);
        self.engines[engine].loras == loras || !self.engines.iter().any(|other| other.is_free && other.loras == loras)
    }
}

/// One engine's place at the queue, left when it is dropped.
pub(super) struct Place {
    queue: Arc<Queue>,
    engine: usize,
}

impl Place {
    pub(super) fn new(queue: &Arc<Queue>, engine: usize) -> Self {
        Place { queue: queue.clone(), engine }
    }

    /// Waits for a job; `None` when no more will come.
    pub(super) fn take(&self) -> Option<Job> {
        let mut state = self.queue.lock();
        state.engines[self.engine].is_free = true;
        loop {
            if state.waiting.front().is_some_and(|job| state.is_for(self.engine, job)) {
                let job = state.waiting.pop_front()?;
                state.engines[self.engine] = EngineState { is_gone: false, is_free: false, loras: loras(&job) };
                // the next may be for one that waited for this one to go
                self.queue.changed.notify_all();
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.queue.changed.wait(state).expect("nothing panics while it holds the queue");
        }
    }

    /// Tells what is at the head of the queue.
    pub(super) fn upcoming(&self) -> Upcoming {
        let queue = self.queue.clone();
        Box::new(move || queue.lock().waiting.front().map(|job| job.task.clone()))
    }

    /// The job at the head, where `wanted` wants it, for an engine that is busy with jobs beside which it can run. Does
    /// not wait. While an engine is free the job is left to that one.
    pub(super) fn take_beside(&self, wanted: impl FnOnce(&Job) -> bool) -> Option<Job> {
        let mut state = self.queue.lock();
        if state.engines.iter().any(|engine| engine.is_free) || !state.waiting.front().is_some_and(wanted) {
            return None;
        }
        state.waiting.pop_front()
    }

    /// Takes no more jobs; says how many engines still do. The last one answers those that wait.
    pub(super) fn leave(&self) -> usize {
        let mut state = self.queue.lock();
        state.engines[self.engine] = EngineState { is_gone: true, ..EngineState::default() };
        let others = state.count();
        if others == 0 {
            for job in state.waiting.drain(..) {
                job.answer(Err(no_device()));
            }
        }
        // a job may have waited for this one
        self.queue.changed.notify_all();
        others
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

fn no_device() -> Error {
    Error::new(ErrorClass::DeviceLost, "device_lost", "every accelerator of this worker failed")
        .remedy("try again: a new worker starts with a new context")
}
