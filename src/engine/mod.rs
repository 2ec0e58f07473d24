//! The threads that own the model, one for each device. Everything torch lives and dies on them; the rest of the crate
//! holds an [`Engine`].

mod queue;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::api::{GenerateParams, Timings};
use crate::context::JobContext;
use crate::error::{Error, ErrorClass, Result};
use crate::fault::catch;
use crate::pipeline::{Generation, InputImages, ModelFacts, Pipeline};
use crate::torch;
use queue::{Place, Queue};

/// A handle to the engines' threads. They end when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
    facts: ModelFacts,
}

struct Job {
    params: GenerateParams,
    inputs: InputImages,
    context: JobContext,
    answer: SyncSender<Result<Generation>>,
}

/// Waits until the threads have ended: what lies on a device must be gone before the driver is.
struct Handle {
    queue: Arc<Queue>,
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
        Engine::start_all(vec![("the device".into(), load)])
    }

    /// Starts a thread for each device, named for messages, and loads the model on all of them at the same time.
    ///
    /// # Errors
    /// The first that cannot load, or `engines_differ`.
    pub fn start_all<P, L>(loads: Vec<(String, L)>) -> Result<Engine>
    where
        P: Pipeline,
        L: FnOnce() -> Result<P> + Send + 'static,
    {
        let count = loads.len();
        let mut handle = Handle { queue: Arc::new(Queue::new(count)), threads: Vec::new() };
        let (ready, loaded) = sync_channel(count);
        for (index, (device, load)) in loads.into_iter().enumerate() {
            let (place, ready) = (Place::new(&handle.queue, index), ready.clone());
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
                    if serve(&mut pipeline, &place, &device) == End::DeviceLost {
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

    /// Runs one job, on the engine that is free first, and waits for it.
    pub fn generate(&self, params: GenerateParams, inputs: InputImages, context: JobContext) -> Result<Generation> {
        let (answer, result) = sync_channel(1);
        self.handle.queue.push(Job { params, inputs, context, answer })?;
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

fn serve(pipeline: &mut impl Pipeline, place: &Place, device: &str) -> End {
    while let Some(Job { params, inputs, context, answer }) = place.take() {
        let result = catch(|| {
            context.check_cancelled()?;
            pipeline.generate(&params, &inputs, &context)
        });
        let failure = result.as_ref().err().map(|error| error.class);
        if failure == Some(ErrorClass::OutOfMemory) {
            torch::empty_cache().ok();
        }
        let is_lost = failure == Some(ErrorClass::DeviceLost);
        let result = if is_lost { result.map_err(|error| leave(place, device, error)) } else { result };
        // a caller that no longer waits has no use for the answer
        answer.send(result).ok();
        if is_lost {
            return End::DeviceLost;
        }
    }
    End::NoMoreJobs
}

/// Takes no more jobs. As long as other devices go on, the loss concerns this job alone and not the whole worker.
fn leave(place: &Place, device: &str, error: Error) -> Error {
    let others = place.leave();
    tracing::error!(device, others, "a device is lost");
    if others == 0 {
        return error;
    }
    let Error { code, message: _, field, source, .. } = error;
    let message = format!("the accelerator failed ({device}); this worker goes on without it");
    Error { class: ErrorClass::Internal, code, message, field, remedy: Some("try again".into()), source }
}
