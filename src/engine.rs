//! The thread that owns the model. Everything torch lives and dies on it; the rest of the crate holds an [`Engine`].

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use crate::api::GenerateParams;
use crate::context::JobContext;
use crate::error::{Error, ErrorClass, Result};
use crate::pipeline::{Generation, InputImages, ModelFacts, Pipeline};
use crate::torch;

/// Jobs that may wait behind the running one.
const QUEUE: usize = 16;

/// A handle to the engine's thread. It ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    jobs: SyncSender<Job>,
    facts: ModelFacts,
}

struct Job {
    params: GenerateParams,
    inputs: InputImages,
    context: JobContext,
    answer: SyncSender<Result<Generation>>,
}

impl Engine {
    /// Starts the thread and loads the model on it; returns when it is ready for jobs.
    pub fn start<P: Pipeline>(load: impl FnOnce() -> Result<P> + Send + 'static) -> Result<Engine> {
        let (jobs, queue) = sync_channel(QUEUE);
        let (ready, loaded) = sync_channel(1);
        thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                // The optimiser profiles a graph's first calls and costs seconds on a full UNet; thread-local.
                tch::jit::set_graph_executor_optimize(false);
                let _no_grad = tch::no_grad_guard();
                let mut pipeline = match catch(load) {
                    Ok(pipeline) => pipeline,
                    Err(error) => return drop(ready.send(Err(error))),
                };
                if ready.send(Ok(pipeline.facts())).is_ok() {
                    serve(&mut pipeline, &queue);
                }
            })
            .map_err(|e| Error::setup("internal", "the engine's thread cannot be started").source(e))?;
        let facts = loaded.recv().map_err(|_| lost())??;
        Ok(Engine { jobs, facts })
    }

    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// Runs one job and waits for it.
    pub fn generate(&self, params: GenerateParams, inputs: InputImages, context: JobContext) -> Result<Generation> {
        let (answer, result) = sync_channel(1);
        self.jobs.send(Job { params, inputs, context, answer }).map_err(|_| lost())?;
        result.recv().map_err(|_| lost())?
    }
}

fn lost() -> Error {
    Error::new(ErrorClass::Internal, "engine_lost", "the engine's thread has ended").remedy("start the worker again")
}

fn serve(pipeline: &mut impl Pipeline, queue: &Receiver<Job>) {
    for Job { params, inputs, context, answer } in queue {
        let result = catch(|| {
            context.check_cancelled()?;
            pipeline.generate(&params, &inputs, &context)
        });
        if matches!(&result, Err(error) if error.class == ErrorClass::OutOfMemory) {
            torch::empty_cache().ok();
        }
        // a caller that no longer waits has no use for the answer
        answer.send(result).ok();
    }
}

/// Runs `work`; a panic in it becomes an error, and so does an error of torch's that means something to the caller.
///
/// tch turns a C++ exception behind a tensor operator into a panic, so this is a boundary that jobs cross in practice.
fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Err(error)) if error.code == "internal" => {
            let causes = error.source.iter().flat_map(|e| e.chain().map(|cause| cause.to_string()).collect::<Vec<_>>());
            let text = causes.collect::<Vec<_>>().join("\n");
            Err(meaning(&text))
        }
        Ok(result) => result,
        Err(payload) => Err(meaning(&panic_text(payload.as_ref()))),
    }
}

/// What torch's words mean to a caller.
fn meaning(text: &str) -> Error {
    if is_out_of_memory(text) {
        out_of_memory(text)
    } else if is_device_lost(text) {
        Error::new(ErrorClass::DeviceLost, "device_lost", "the accelerator failed; this process cannot use it any more")
            .source(anyhow::anyhow!(first_line(text).to_owned()))
            .remedy("try again: a new worker starts with a new context")
    } else {
        fault_of_ours(text)
    }
}

/// After one of these every call into CUDA fails until the process ends.
fn is_device_lost(text: &str) -> bool {
    let fatal =
        ["illegal memory access", "device-side assert", "launch failure", "uncorrectable ECC", "misaligned address"];
    text.contains("CUDA error") && fatal.iter().any(|words| text.contains(words))
}

fn fault_of_ours(text: &str) -> Error {
    Error::new(ErrorClass::Internal, "internal", "the job failed for a reason of ours")
        .source(anyhow::anyhow!(first_line(text).to_owned()))
        .remedy("report it, with the request")
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".into())
}

/// torch's words, on CUDA and on the CPU.
fn is_out_of_memory(text: &str) -> bool {
    ["out of memory", "not enough memory", "allocate memory"].iter().any(|words| text.contains(words))
}

fn out_of_memory(text: &str) -> Error {
    Error::new(ErrorClass::OutOfMemory, "out_of_memory", "memory ran out while the job ran")
        .source(anyhow::anyhow!(first_line(text).to_owned()))
        .remedy("ask for a smaller size or fewer images, or decode in tiles (--vae-tiling on)")
}

/// torch's messages go on with a C++ stack; in tch's panics its line breaks are escaped.
fn first_line(text: &str) -> &str {
    text.split(['\n']).next().and_then(|line| line.split("\\n").next()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Limits, SchedulerKind, Timings, parse, validate};
    use tch::{Device, Kind, Tensor};

    /// Does with the prompt what the test says.
    struct FakePipeline;

    impl Pipeline for FakePipeline {
        fn facts(&self) -> ModelFacts {
            ModelFacts {
                name: "fake".into(),
                default_height: 64,
                default_width: 64,
                default_scheduler: SchedulerKind::EulerDiscrete,
                needs_mask: false,
                controlnets: Vec::new(),
            }
        }

        fn generate(&mut self, params: &GenerateParams, _: &InputImages, context: &JobContext) -> Result<Generation> {
            match params.prompt.as_str() {
                "panic" => panic!("a fault in the pipeline"),
                "shapes" => {
                    let _ =
                        Tensor::zeros([2], (Kind::Float, Device::Cpu)) + Tensor::zeros([3], (Kind::Float, Device::Cpu));
                }
                "memory" => {
                    let _ = Tensor::zeros([1 << 45], (Kind::Float, Device::Cpu));
                }
                "wait" => loop {
                    context.check_cancelled()?;
                },
                _ => {}
            }
            let latents = Tensor::zeros([1, 4, 8, 8], (Kind::Float, Device::Cpu));
            let scheduler = SchedulerKind::EulerDiscrete;
            Ok(Generation { images: vec![], latents, scheduler, timings: Timings::default(), warnings: vec![] })
        }
    }

    fn params(prompt: &str) -> GenerateParams {
        let (request, _) = parse(&serde_json::json!({ "prompt": prompt })).unwrap();
        validate(request, &Limits::default(), None).unwrap()
    }

    fn outcome(engine: &Engine, prompt: &str) -> Result<Generation> {
        engine.generate(params(prompt), InputImages::default(), JobContext::default())
    }

    #[test]
    fn a_job_that_panics_is_answered_and_the_next_one_runs() {
        let engine = Engine::start(|| Ok(FakePipeline)).unwrap();
        for prompt in ["panic", "shapes"] {
            assert_eq!(outcome(&engine, prompt).err().unwrap().code, "internal");
            assert!(outcome(&engine, "fine").is_ok());
        }
    }

    #[test]
    fn memory_that_runs_out_has_its_own_code() {
        let engine = Engine::start(|| Ok(FakePipeline)).unwrap();
        let error = outcome(&engine, "memory").err().unwrap();
        assert_eq!((error.code, error.class), ("out_of_memory", ErrorClass::OutOfMemory));
        assert!(outcome(&engine, "fine").is_ok());
    }

    #[test]
    fn only_a_lost_context_asks_for_a_new_worker() {
        let class = |text: &str| meaning(text).class;
        assert_eq!(class("CUDA error: an illegal memory access was encountered"), ErrorClass::DeviceLost);
        assert_eq!(class("CUDA error: device-side assert triggered"), ErrorClass::DeviceLost);
        assert_eq!(class("CUDA out of memory. Tried to allocate 2.00 GiB"), ErrorClass::OutOfMemory);
        assert_eq!(class("CUDA error: invalid argument"), ErrorClass::Internal);
        assert_eq!(class("The size of tensor a (2) must match the size of tensor b (3)"), ErrorClass::Internal);
    }

    #[test]
    fn a_cancelled_job_stops_and_so_does_one_that_still_waits() {
        let engine = Engine::start(|| Ok(FakePipeline)).unwrap();
        let (running, waiting) = (JobContext::default(), JobContext::default());
        let start = |context: &JobContext, prompt| {
            let (engine, context, params) = (engine.clone(), context.clone(), params(prompt));
            thread::spawn(move || engine.generate(params, InputImages::default(), context))
        };
        let first = start(&running, "wait");
        waiting.cancel();
        let second = start(&waiting, "fine");
        running.cancel();
        for job in [first, second] {
            assert_eq!(job.join().unwrap().err().unwrap().code, "cancelled");
        }
    }

    #[test]
    fn a_model_that_cannot_be_loaded_says_why() {
        let error = Engine::start(|| -> Result<FakePipeline> { Err(Error::setup("model_not_found", "none")) });
        assert_eq!(error.err().unwrap().code, "model_not_found");
        let error = Engine::start(|| -> Result<FakePipeline> { panic!("while loading") });
        assert_eq!(error.err().unwrap().code, "internal");
    }
}
