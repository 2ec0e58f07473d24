//! The threads that own the model, one for each device. Everything torch lives and dies on them; the rest of the crate
//! holds an [`Engine`].

mod group;
#[cfg(test)]
mod group_tests;
mod queue;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::api::{GenerateParams, Timings};
use crate::context::JobContext;
use crate::error::{Error, ErrorClass, Result};
use crate::fault::catch;
use crate::pipeline::{Generation, InputImages, ModelFacts, Pipeline, Task};
use crate::torch;
use group::{Batching, may_share, run_together};
use queue::{Place, Queue};

/// A handle to the engines' threads. They end when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
    facts: ModelFacts,
}

struct Job {
    task: Arc<Task>,
    answer: SyncSender<Result<Generation>>,
}

impl Job {
    /// A caller that no longer waits has no use for it.
    fn answer(self, result: Result<Generation>) {
        self.answer.send(result).ok();
    }

    /// Answers, unless the job ends the engine.
    fn end(self, result: Result<Generation>) -> Result<(), Lost> {
        match result {
            Err(error) if error.class == ErrorClass::DeviceLost => Err(Lost { error: error.into(), jobs: vec![self] }),
            result => {
                if result.as_ref().is_err_and(|error| error.class == ErrorClass::OutOfMemory) {
                    torch::empty_cache().ok();
                }
                self.answer(result);
                Ok(())
            }
        }
    }
}

/// The device is gone, and with it these jobs.
struct Lost {
    error: Box<Error>,
    jobs: Vec<Job>,
}

/// Waits until the threads have ended: what lies on a device must be gone before the driver is.
struct Handle {
    queue: Arc<Queue>,
    batching: Arc<Batching>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.queue.close();
        for thread in self.threads.drain(..) {
            thread.join().ok(); // one that panicked has ended too
        }
    }
}

impl Engine {
    /// Starts a thread and loads the model on it; returns when it is ready for jobs.
    pub fn start<P: Pipeline>(load: impl FnOnce() -> Result<P> + Send + 'static) -> Result<Engine> {
        Engine::start_all(vec![("the device".into(), load)], 1)
    }

    /// Starts a thread for each device, named for messages, and loads the model on all of them at the same time. Jobs share
    /// calls of the UNet for up to `max_batch` images.
    ///
    /// # Errors
    /// The first that cannot load, or `engines_differ`.
    pub fn start_all<P, L>(loads: Vec<(String, L)>, max_batch: usize) -> Result<Engine>
    where
        P: Pipeline,
        L: FnOnce() -> Result<P> + Send + 'static,
    {
        let count = loads.len();
        let (queue, batching) = (Arc::new(Queue::new(count)), Arc::new(Batching::new(max_batch)));
        let mut handle = Handle { queue, batching, threads: Vec::new() };
        let (ready, loaded) = sync_channel(count);
        for (index, (device, load)) in loads.into_iter().enumerate() {
            let (place, ready) = (Place::new(&handle.queue, index), ready.clone());
            let batching = handle.batching.clone();
            let work = move || {
                // The optimiser profiles a graph's first calls and costs seconds on a full UNet; thread-local.
                tch::jit::set_graph_executor_optimize(false);
                let _no_grad = tch::no_grad_guard();
                let mut pipeline = match catch(load) {
                    Ok(pipeline) => pipeline,
                    Err(error) => return drop(ready.send(Err(if count > 1 { on(&device, error) } else { error }))),
                };
                if ready.send(Ok(pipeline.facts())).is_ok() {
                    drop(ready);
                    pipeline.foresee(place.upcoming());
                    if serve(&mut pipeline, &place, &device, &batching) == End::DeviceLost {
                        // nothing can be freed there any more
                        std::mem::forget(pipeline);
                    }
                }
            };
            let thread = thread::Builder::new().name("engine".into()).spawn(work);
            let not_started = |e| Error::setup("internal", "an engine's thread cannot be started").source(e);
            handle.threads.push(thread.map_err(not_started)?);
        }
        drop(ready);
        let facts: Vec<ModelFacts> = (0..count).map(|_| loaded.recv().map_err(|_| lost())?).collect::<Result<_>>()?;
        let model = |facts: &ModelFacts| ModelFacts { load_times: Timings::default(), ..facts.clone() };
        if facts.iter().any(|other| model(other) != model(&facts[0])) {
            return Err(Error::setup("engines_differ", "the devices loaded different models")
                .remedy("leave the model's folder alone while the worker starts"));
        }
        Ok(Engine { handle: Arc::new(handle), facts: facts.into_iter().next().ok_or_else(lost)? })
    }

    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// How many engines take jobs: as many as there were devices, less those that were lost.
    pub fn count(&self) -> usize {
        self.handle.queue.count()
    }

    /// The UNet's calls of jobs that may share them: how many there were, by the number of images in them.
    pub fn calls(&self) -> BTreeMap<usize, u64> {
        self.handle.batching.calls()
    }

    /// Runs one job, on the engine that is free first, and waits for it.
    pub fn generate(&self, params: GenerateParams, inputs: InputImages, context: JobContext) -> Result<Generation> {
        let (answer, result) = sync_channel(1);
        let task = Arc::new(Task { params, inputs, context });
        self.handle.queue.push(Job { task, answer })?;
        result.recv().map_err(|_| lost())?
    }
}

fn lost() -> Error {
    Error::new(ErrorClass::Internal, "engine_lost", "the engine's thread has ended").remedy("start the worker again")
}

/// An error while loading, where there are several devices.
fn on(device: &str, error: Error) -> Error {
    Error { message: format!("{device}: {}", error.message), ..error }
}

#[derive(PartialEq)]
enum End {
    NoMoreJobs,
    DeviceLost,
}

fn serve(pipeline: &mut impl Pipeline, place: &Place, device: &str, batching: &Batching) -> End {
    while let Some(job) = place.take() {
        let result = if may_share(pipeline, &job, batching) {
            run_together(pipeline, job, place, batching)
        } else {
            let result = catch(|| {
                job.task.context.check_cancelled()?;
                pipeline.generate(&job.task)
            });
            job.end(result)
        };
        if let Err(Lost { error, jobs }) = result {
            leave(place, device, &error, jobs);
            return End::DeviceLost;
        }
    }
    End::NoMoreJobs
}

/// Takes no more jobs. As long as other devices go on, the loss concerns these jobs alone and not the whole worker.
fn leave(place: &Place, device: &str, error: &Error, jobs: Vec<Job>) {
    let others = place.leave();
    tracing::error!(device, others, jobs = jobs.len(), "a device is lost");
    for job in jobs {
        let error = error.again();
        job.answer(Err(match others {
            0 => error,
            _ => Error {
                class: ErrorClass::Internal,
                message: format!("the accelerator failed ({device}); this worker goes on without it"),
                remedy: Some("try again".into()),
                ..error
            },
        }));
    }
}
