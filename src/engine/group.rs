//! Jobs that an engine runs side by side. They come and go between steps: who waits at the head of the queue and fits in
//! joins, who is done is answered at once.
//!
//! Nobody overtakes. A job at the head that cannot join closes the group: those in it go on, no other comes in, and the job
//! is the next when they are done.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::queue::Place;
use super::{Job, Lost};
use crate::error::Result;
use crate::fault::catch;
use crate::pipeline::Pipeline;

/// How many images may share a call of the UNet, and how many did.
pub(super) struct Batching {
    max: usize,
    calls: Mutex<BTreeMap<usize, u64>>,
}

impl Batching {
    pub(super) fn new(max: usize) -> Self {
        Batching { max, calls: Mutex::default() }
    }

    pub(super) fn calls(&self) -> BTreeMap<usize, u64> {
        self.calls.lock().expect("nobody panics with it").clone()
    }

    fn count(&self, calls: Vec<usize>) {
        let mut counts = self.calls.lock().expect("nobody panics with it");
        calls.into_iter().for_each(|images| *counts.entry(images).or_default() += 1);
    }

    /// Whether a job fits in beside so many images of others. Never, where batching is off.
    fn has_room(&self, images: usize, job: &Job) -> bool {
        self.max > 1 && images + num_images(job) <= self.max
    }
}

fn num_images(job: &Job) -> usize {
    job.task.params.num_images as usize
}

fn can_join<'a, P: Pipeline>(pipeline: &'a P, job: &Job, group: &[P::Running<'a>]) -> bool {
    catch(|| Ok(pipeline.can_join(&job.task, group))).unwrap_or(false)
}

/// Whether a job may be one of a group.
pub(super) fn may_share(pipeline: &impl Pipeline, job: &Job, batching: &Batching) -> bool {
    batching.has_room(0, job) && can_join(pipeline, job, &[])
}

/// Runs `first` and those that join it, until none is left.
///
/// # Errors
/// When the device is lost, with the jobs that nobody has answered.
pub(super) fn run_together<P: Pipeline>(
    pipeline: &P,
    first: Job,
    place: &Place,
    batching: &Batching,
) -> Result<(), Lost> {
    let mut group = Group { pipeline, batching, jobs: Vec::new(), running: Vec::new(), is_open: true };
    group.run(first, place).map_err(|lost| Lost { jobs: lost.jobs.into_iter().chain(group.jobs).collect(), ..lost })
}

struct Group<'a, P: Pipeline + 'a> {
    pipeline: &'a P,
    batching: &'a Batching,
    jobs: Vec<Job>,
    /// One for each of `jobs`.
    running: Vec<P::Running<'a>>,
    is_open: bool,
}

impl<P: Pipeline> Group<'_, P> {
    fn run(&mut self, first: Job, place: &Place) -> Result<(), Lost> {
        self.admit(first)?;
        while !self.jobs.is_empty() {
            while let Some(job) = self.newcomer(place) {
                self.admit(job)?;
            }
            self.step()?;
        }
        Ok(())
    }

    fn newcomer(&mut self, place: &Place) -> Option<Job> {
        if !self.is_open {
            return None;
        }
        let images = self.jobs.iter().map(num_images).sum();
        place.take_beside(|job| {
            // one that was cancelled is answered at once
            if job.task.context.is_cancelled() {
                return true;
            }
            let has_room = self.batching.has_room(images, job);
            self.is_open = self.batching.has_room(0, job) && (!has_room || can_join(self.pipeline, job, &self.running));
            has_room && self.is_open
        })
    }

    fn admit(&mut self, job: Job) -> Result<(), Lost> {
        let begin = || {
            job.task.context.check_cancelled()?;
            self.pipeline.begin(&job.task)
        };
        match catch(begin) {
            Ok(running) => {
                self.jobs.push(job);
                self.running.push(running);
                Ok(())
            }
            Err(error) => job.end(Err(error)),
        }
    }

    /// One step of each; those for which it was the last leave.
    fn step(&mut self) -> Result<(), Lost> {
        let outcomes = match catch(|| Ok(self.pipeline.step(&mut self.running))) {
            Ok(stepped) => {
                self.batching.count(stepped.calls);
                stepped.outcomes
            }
            Err(error) => self.jobs.iter().map(|_| Err(error.again())).collect(),
        };
        let mut index = 0;
        for outcome in outcomes {
            if let Ok(false) = outcome {
                index += 1;
                continue;
            }
            let (job, running) = (self.jobs.remove(index), self.running.remove(index));
            job.end(outcome.and_then(|_| catch(|| self.pipeline.finish(running))))?;
        }
        Ok(())
    }
}
