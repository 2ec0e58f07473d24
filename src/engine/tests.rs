use std::collections::BTreeMap;
use std::sync::Barrier;

use super::*;
use crate::api::{Limits, SchedulerKind, Timings, parse, validate};
use crate::lora::Wanted;
use crate::pipeline::Stepped;
use tch::{Device, Kind, Tensor};

/// Does with the prompt what the test says.
pub(super) struct FakePipeline;

/// For a pipeline whose jobs run alone.
macro_rules! no_groups {
    () => {
        type Running<'a> = ();

        fn can_join(&self, _: &Task, _: &[()]) -> bool {
            false
        }

        fn begin(&self, _: &Arc<Task>) -> Result<()> {
            unreachable!()
        }

        fn step(&self, _: &mut [()]) -> Stepped {
            unreachable!()
        }

        fn finish(&self, _: ()) -> Result<Generation> {
            unreachable!()
        }
    };
}

impl Pipeline for FakePipeline {
    no_groups!();

    fn facts(&self) -> ModelFacts {
        ModelFacts {
            name: "fake".into(),
            default_height: 64,
            default_width: 64,
            default_scheduler: SchedulerKind::EulerDiscrete,
            needs_image: false,
            needs_mask: false,
            preset: None,
            has_embedded_guidance: false,
            refiners: Vec::new(),
            controlnets: Vec::new(),
            load_times: Timings::default(),
        }
    }

    fn generate(&mut self, task: &Arc<Task>) -> Result<Generation> {
        match task.params.prompt.as_str() {
            "panic" => panic!("a fault in the pipeline"),
            "shapes" => {
                let _ = Tensor::zeros([2], (Kind::Float, Device::Cpu)) + Tensor::zeros([3], (Kind::Float, Device::Cpu));
            }
            "memory" => {
                let _ = Tensor::zeros([1 << 45], (Kind::Float, Device::Cpu));
            }
            "wait" => loop {
                task.context.check_cancelled()?;
            },
            _ => {}
        }
        let latents = Tensor::zeros([1, 4, 8, 8], (Kind::Float, Device::Cpu));
        let scheduler = SchedulerKind::EulerDiscrete;
        Ok(Generation {
            images: vec![],
            latents,
            scheduler,
            timings: Timings::default(),
            warnings: vec![],
            loras: vec![],
        })
    }
}

fn params(prompt: &str) -> GenerateParams {
    params_of(&serde_json::json!({ "prompt": prompt }))
}

pub(super) fn params_of(request: &serde_json::Value) -> GenerateParams {
    let (request, _) = parse(request).unwrap();
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

/// Two engines and a thread for each job; `in_step` is how many jobs the prompt "meet" waits for.
fn start_two(in_step: &Arc<Barrier>) -> Engine {
    let load = |name: &str| {
        let in_step = in_step.clone();
        (name.to_owned(), move || Ok(MeetingPipeline(in_step)))
    };
    Engine::start_all(vec![load("first"), load("second")], 1).unwrap()
}

/// Does what [`FakePipeline`] does, and more. Says in the warnings which thread it was.
struct MeetingPipeline(Arc<Barrier>);

impl Pipeline for MeetingPipeline {
    no_groups!();

    fn facts(&self) -> ModelFacts {
        FakePipeline.facts()
    }

    fn generate(&mut self, task: &Arc<Task>) -> Result<Generation> {
        match task.params.prompt.as_str() {
            "meet" => drop(self.0.wait()),
            "lose" => panic!("CUDA error: an illegal memory access was encountered"),
            "lose together" => {
                self.0.wait();
                panic!("CUDA error: unspecified launch failure");
            }
            _ => {}
        }
        let mut generation = FakePipeline.generate(task)?;
        generation.warnings.push(format!("{:?}", thread::current().id()));
        Ok(generation)
    }
}

fn start_job(engine: &Engine, prompt: &str, loras: &[&str]) -> thread::JoinHandle<Result<Generation>> {
    let file = || Arc::new(tempfile::tempfile().unwrap());
    let wanted = |name: &&str| Wanted {
        name: name.to_string(),
        field: String::new(),
        scale: 1.0,
        sha256: name.to_string(),
        file: file(),
    };
    let inputs = InputImages { loras: loras.iter().map(wanted).collect(), ..InputImages::default() };
    let (engine, params) = (engine.clone(), params(prompt));
    thread::spawn(move || engine.generate(params, inputs, JobContext::default()))
}

/// Waits for this many free engines and waiting jobs.
pub(super) fn until(engine: &Engine, free: usize, waiting: usize) {
    while engine.handle.queue.levels() != (free, waiting) {
        thread::yield_now();
    }
}

/// Which engine's thread ran the job.
fn thread_of(job: thread::JoinHandle<Result<Generation>>) -> String {
    job.join().unwrap().unwrap().warnings.pop().unwrap()
}

#[test]
fn two_jobs_run_at_the_same_time_on_two_engines() {
    let engine = start_two(&Arc::new(Barrier::new(2)));
    // neither would end without the other
    let jobs = [start_job(&engine, "meet", &[]), start_job(&engine, "meet", &[])];
    let threads = jobs.map(thread_of);
    assert_ne!(threads[0], threads[1]);
}

#[test]
fn a_queue_is_shared_and_every_job_is_answered() {
    let engine = start_two(&Arc::new(Barrier::new(2)));
    let jobs: Vec<_> = (0..40).map(|_| start_job(&engine, "meet", &[])).collect();
    let mut count = BTreeMap::new();
    for job in jobs {
        *count.entry(thread_of(job)).or_insert(0) += 1;
    }
    assert_eq!(count.into_values().collect::<Vec<_>>(), [20, 20]);
}

#[test]
fn a_free_engine_that_has_the_loras_is_preferred() {
    let engine = start_two(&Arc::new(Barrier::new(2)));
    let jobs = [start_job(&engine, "meet", &["ink"]), start_job(&engine, "meet", &["wool"])];
    let [ink, wool] = jobs.map(thread_of);
    for _ in 0..20 {
        for (lora, thread) in [("wool", &wool), ("ink", &ink)] {
            until(&engine, 2, 0);
            assert_eq!(thread_of(start_job(&engine, "fine", &[lora])), *thread);
        }
    }
}

#[test]
fn the_others_go_on_when_a_device_is_lost_and_the_last_one_ends_the_worker() {
    let engine = start_two(&Arc::new(Barrier::new(1)));
    let error = outcome(&engine, "lose").err().unwrap();
    assert_eq!((error.code, error.class), ("device_lost", ErrorClass::Internal));
    assert_eq!(engine.count(), 1);
    for _ in 0..5 {
        assert!(outcome(&engine, "fine").is_ok());
    }
    let error = outcome(&engine, "lose").err().unwrap();
    assert_eq!((error.code, error.class), ("device_lost", ErrorClass::DeviceLost));
    assert_eq!(engine.count(), 0);
    let error = outcome(&engine, "fine").err().unwrap();
    assert_eq!((error.code, error.class), ("device_lost", ErrorClass::DeviceLost));
}

#[test]
fn jobs_that_wait_for_the_last_device_are_answered_when_it_is_lost() {
    let in_step = Arc::new(Barrier::new(3));
    let engine = start_two(&in_step);
    until(&engine, 2, 0);
    let jobs: Vec<_> = (0..2).map(|_| start_job(&engine, "lose together", &[])).collect();
    until(&engine, 0, 0);
    let waiting: Vec<_> = (0..3).map(|_| start_job(&engine, "fine", &[])).collect();
    until(&engine, 0, 3);
    in_step.wait();
    let class = |job: thread::JoinHandle<Result<Generation>>| job.join().unwrap().err().unwrap().class;
    let mut classes: Vec<_> = jobs.into_iter().map(class).collect();
    classes.sort_by_key(|class| *class == ErrorClass::DeviceLost);
    assert_eq!(classes, [ErrorClass::Internal, ErrorClass::DeviceLost]);
    assert!(waiting.into_iter().all(|job| class(job) == ErrorClass::DeviceLost));
}

#[test]
fn a_device_that_cannot_load_is_named() {
    let load = |fails: bool| {
        move || match fails {
            true => Err(Error::setup("model_not_found", "none")),
            false => Ok(FakePipeline),
        }
    };
    let loads = vec![("cuda:0".into(), load(false)), ("cuda:1".into(), load(true))];
    let error = Engine::start_all(loads, 1).err().unwrap();
    assert_eq!((error.code, error.message.as_str()), ("model_not_found", "cuda:1: none"));
}
