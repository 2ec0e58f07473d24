//! Which jobs run side by side, with a pipeline whose steps the test lets pass one by one.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::{Value, json};

use super::tests::{FakePipeline, params_of, until};
use super::*;
use crate::pipeline::Stepped;

/// Says who is in a step, and waits until it may pass. What happens to a job is its prompt.
struct SteppedPipeline {
    entered: Sender<String>,
    pass: Arc<Mutex<Receiver<()>>>,
}

impl SteppedPipeline {
    fn wait(&self, who: String) {
        self.entered.send(who).ok();
        self.pass.lock().unwrap().recv().ok();
    }
}

struct FakeRunning {
    task: Arc<Task>,
    steps_left: usize,
}

impl FakeRunning {
    fn step(&mut self) -> Result<bool> {
        self.task.context.check_cancelled()?;
        match self.task.params.prompt.as_str() {
            "fails" => return Err(Error::new(ErrorClass::Internal, "non_finite_latents", "not finite")),
            "loses the device" => return Err(Error::new(ErrorClass::DeviceLost, "device_lost", "gone")),
            _ => self.steps_left -= 1,
        }
        Ok(self.steps_left == 0)
    }
}

impl Pipeline for SteppedPipeline {
    type Running<'a> = FakeRunning;

    fn facts(&self) -> ModelFacts {
        FakePipeline.facts()
    }

    fn generate(&mut self, task: &Arc<Task>) -> Result<Generation> {
        self.wait(format!("{} alone", task.params.prompt));
        FakePipeline.generate(task)
    }

    fn can_join(&self, task: &Task, group: &[FakeRunning]) -> bool {
        assert_ne!(task.params.prompt, "panics when asked");
        task.params.prompt != "other" && group.iter().all(|other| other.task.params.width == task.params.width)
    }

    fn begin(&self, task: &Arc<Task>) -> Result<FakeRunning> {
        assert_ne!(task.params.prompt, "panics at the beginning");
        Ok(FakeRunning { task: task.clone(), steps_left: task.params.num_inference_steps })
    }

    fn step(&self, group: &mut [FakeRunning]) -> Stepped {
        let prompts: Vec<&str> = group.iter().map(|running| running.task.params.prompt.as_str()).collect();
        self.wait(prompts.join(", "));
        assert!(!prompts.contains(&"panics"));
        let images = group.iter().map(|running| running.task.params.num_images as usize).sum();
        Stepped { outcomes: group.iter_mut().map(FakeRunning::step).collect(), calls: vec![images] }
    }

    fn finish(&self, running: FakeRunning) -> Result<Generation> {
        assert_ne!(running.task.params.prompt, "panics at the end");
        FakePipeline.generate(&running.task)
    }
}

/// The steps of the engines, in order.
struct Steps {
    entered: Receiver<String>,
    pass: Sender<()>,
}

impl Steps {
    /// Waits for the next step; says who is in it.
    fn enter(&self) -> String {
        self.entered.recv().unwrap()
    }

    /// Lets the step pass in which somebody waits.
    fn pass(&self) {
        self.pass.send(()).unwrap();
    }
}

fn start(engines: usize, max_batch: usize) -> (Engine, Steps) {
    let ((entered, who), (pass, may_pass)) = (channel(), channel());
    let may_pass = Arc::new(Mutex::new(may_pass));
    let load = |_| {
        let pipeline = SteppedPipeline { entered: entered.clone(), pass: may_pass.clone() };
        ("the device".to_owned(), move || Ok(pipeline))
    };
    let engine = Engine::start_all((0..engines).map(load).collect(), max_batch).unwrap();
    (engine, Steps { entered: who, pass })
}

struct Started {
    context: JobContext,
    answer: JoinHandle<Result<Generation>>,
}

impl Started {
    /// The code of its error, or `ok`.
    fn outcome(self) -> &'static str {
        self.answer.join().unwrap().map_or_else(|error| error.code, |_| "ok")
    }
}

fn job(engine: &Engine, prompt: &str, steps: usize, fields: Value) -> Started {
    let mut request = json!({ "prompt": prompt, "num_inference_steps": steps });
    request
        .as_object_mut()
        .unwrap()
        .extend(fields.as_object().into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
    let (engine, context) = (engine.clone(), JobContext::default());
    let job_context = context.clone();
    let answer = thread::spawn(move || engine.generate(params_of(&request), InputImages::default(), job_context));
    Started { context, answer }
}

/// A job that is in the queue before this returns, with so many others.
fn waiting(engine: &Engine, prompt: &str, steps: usize, fields: Value, others: usize) -> Started {
    let started = job(engine, prompt, steps, fields);
    until(engine, 0, others + 1);
    started
}

#[test]
fn jobs_join_between_steps_and_leave_when_they_are_done() {
    let (engine, steps) = start(1, 4);
    let first = job(&engine, "first", 3, json!({}));
    assert_eq!(steps.enter(), "first");
    let second = waiting(&engine, "second", 1, json!({ "num_images": 2 }), 0);
    let third = waiting(&engine, "third", 3, json!({}), 1);
    steps.pass();
    assert_eq!(steps.enter(), "first, second, third");
    steps.pass();
    assert_eq!(second.outcome(), "ok");
    assert_eq!(steps.enter(), "first, third");
    steps.pass();
    assert_eq!(first.outcome(), "ok");
    assert_eq!(steps.enter(), "third");
    steps.pass();
    assert_eq!(third.outcome(), "ok");
    assert_eq!(engine.calls(), BTreeMap::from([(1, 2), (2, 1), (4, 1)]));
}

#[test]
fn a_job_waits_for_room_and_is_not_overtaken() {
    let (engine, steps) = start(1, 4);
    let small = job(&engine, "small", 4, json!({}));
    assert_eq!(steps.enter(), "small");
    let large = waiting(&engine, "large", 2, json!({ "num_images": 3 }), 0);
    steps.pass();
    assert_eq!(steps.enter(), "small, large");
    let next = waiting(&engine, "next", 1, json!({ "num_images": 2 }), 0);
    let last = waiting(&engine, "last", 1, json!({}), 1);
    steps.pass();
    assert_eq!(steps.enter(), "small, large");
    steps.pass();
    assert_eq!(large.outcome(), "ok");
    assert_eq!(steps.enter(), "small, next, last");
    steps.pass();
    assert_eq!([small, next, last].map(Started::outcome), ["ok"; 3]);
}

#[test]
fn a_job_that_cannot_join_closes_the_group() {
    for (prompt, fields, runs_as) in [
        ("other", json!({}), "other alone"),
        ("many", json!({ "num_images": 5 }), "many alone"),
        ("wide", json!({ "width": 128 }), "wide"),
        ("panics when asked", json!({}), "panics when asked alone"),
    ] {
        let (engine, steps) = start(1, 4);
        let first = job(&engine, "first", 3, json!({}));
        assert_eq!(steps.enter(), "first");
        let one = waiting(&engine, prompt, 1, fields, 0);
        let behind = waiting(&engine, "behind", 1, json!({}), 1);
        for _ in 0..2 {
            steps.pass();
            assert_eq!(steps.enter(), "first");
        }
        steps.pass();
        assert_eq!(first.outcome(), "ok");
        assert_eq!(steps.enter(), runs_as);
        steps.pass();
        assert_eq!(one.outcome(), "ok");
        assert_eq!(steps.enter(), "behind");
        steps.pass();
        assert_eq!(behind.outcome(), "ok");
    }
}

#[test]
fn a_cancelled_job_leaves_alone_and_one_that_waits_is_answered_at_once() {
    let (engine, steps) = start(1, 2);
    let first = job(&engine, "first", 3, json!({}));
    assert_eq!(steps.enter(), "first");
    let second = waiting(&engine, "second", 9, json!({}), 0);
    steps.pass();
    assert_eq!(steps.enter(), "first, second");
    second.context.cancel();
    // it could not join, and is not waited for
    let other = job(&engine, "other", 1, json!({}));
    until(&engine, 0, 1);
    other.context.cancel();
    steps.pass();
    assert_eq!([second, other].map(Started::outcome), ["cancelled"; 2]);
    assert_eq!(steps.enter(), "first");
    steps.pass();
    assert_eq!(first.outcome(), "ok");
}

#[test]
fn a_failure_is_one_jobs_own() {
    for (prompt, code) in
        [("fails", "non_finite_latents"), ("panics at the beginning", "internal"), ("panics at the end", "internal")]
    {
        let (engine, steps) = start(1, 2);
        let first = job(&engine, "first", 3, json!({}));
        assert_eq!(steps.enter(), "first");
        let second = waiting(&engine, prompt, 1, json!({}), 0);
        steps.pass();
        if prompt != "panics at the beginning" {
            assert_eq!(steps.enter(), format!("first, {prompt}"));
            steps.pass();
        }
        assert_eq!(second.outcome(), code);
        drop(steps.pass);
        assert_eq!(first.outcome(), "ok");
    }
}

#[test]
fn a_panic_in_a_step_answers_every_job_and_the_next_one_runs() {
    let (engine, steps) = start(1, 3);
    let first = job(&engine, "first", 3, json!({}));
    assert_eq!(steps.enter(), "first");
    let second = waiting(&engine, "panics", 3, json!({}), 0);
    steps.pass();
    assert_eq!(steps.enter(), "first, panics");
    let third = waiting(&engine, "third", 1, json!({}), 0);
    steps.pass();
    assert_eq!([first, second].map(Started::outcome), ["internal"; 2]);
    assert_eq!(steps.enter(), "third");
    steps.pass();
    assert_eq!(third.outcome(), "ok");
}

#[test]
fn a_lost_device_ends_every_job_of_the_group_and_those_that_wait() {
    let (engine, steps) = start(1, 3);
    let first = job(&engine, "first", 3, json!({}));
    assert_eq!(steps.enter(), "first");
    let second = waiting(&engine, "loses the device", 3, json!({}), 0);
    steps.pass();
    assert_eq!(steps.enter(), "first, loses the device");
    let third = waiting(&engine, "third", 1, json!({ "width": 128 }), 0);
    steps.pass();
    assert_eq!([first, second, third].map(Started::outcome), ["device_lost"; 3]);
    assert_eq!(engine.count(), 0);
}

#[test]
fn a_free_engine_is_preferred_to_a_group() {
    let (engine, steps) = start(2, 3);
    let first = job(&engine, "first", 3, json!({}));
    assert_eq!(steps.enter(), "first");
    let second = job(&engine, "second", 3, json!({}));
    assert_eq!(steps.enter(), "second");
    let third = waiting(&engine, "third", 1, json!({}), 0);
    steps.pass();
    assert!(["first, third", "second, third"].contains(&steps.enter().as_str()));
    // the other's second step, and whatever comes then
    drop(steps.pass);
    assert_eq!([first, second, third].map(Started::outcome), ["ok"; 3]);
}

#[test]
fn without_batching_jobs_run_one_after_the_other() {
    let (engine, steps) = start(1, 1);
    let first = job(&engine, "first", 3, json!({}));
    assert_eq!(steps.enter(), "first alone");
    let second = waiting(&engine, "second", 3, json!({}), 0);
    steps.pass();
    assert_eq!(first.outcome(), "ok");
    assert_eq!(steps.enter(), "second alone");
    steps.pass();
    assert_eq!(second.outcome(), "ok");
    assert!(engine.calls().is_empty());
}
