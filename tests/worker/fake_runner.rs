//! An engine that does what the job's input says.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sdxl_worker::context::{JobContext, Progress};
use sdxl_worker::error::{Error, ErrorClass, Result};
use sdxl_worker::job::{Job, PictureFile, Reply, Runner, Running};
use serde_json::{Value, json};

/// Inputs: `return` a value; run for `ms` in steps of 5 ms; fail with `fail` (`input`, `memory`, `device`, `panic`,
/// `encoding`); `progress` so many times; `preview` of so many bytes in each; `picture` of so many bytes.
#[derive(Default)]
pub struct FakeRunner {
    pub log: Mutex<Vec<(String, Event, Instant)>>,
    running: AtomicUsize,
    pub most_at_once: AtomicUsize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Started,
    Cancelled,
    Ended,
}

impl FakeRunner {
    fn note(&self, id: &str, event: Event) {
        self.log.lock().unwrap().push((id.into(), event, Instant::now()));
    }

    pub fn events(&self, event: Event) -> Vec<String> {
        self.log.lock().unwrap().iter().filter(|noted| noted.1 == event).map(|noted| noted.0.clone()).collect()
    }

    pub fn when(&self, id: &str, event: Event) -> Instant {
        self.log.lock().unwrap().iter().find(|noted| noted.0 == id && noted.1 == event).expect("it happened").2
    }
}

/// What the engine's thread would share with the test.
pub struct Shared(pub Arc<FakeRunner>);

impl Runner for Shared {
    fn run(&self, job: Job, context: JobContext) -> Running {
        let runner = self.0.clone();
        Box::pin(async move {
            let now = runner.running.fetch_add(1, Ordering::SeqCst) + 1;
            runner.most_at_once.fetch_max(now, Ordering::SeqCst);
            runner.note(&job.id, Event::Started);
            let outcome = do_as_told(&job, &context).await;
            let cancelled = matches!(&outcome, Err(error) if error.class == ErrorClass::Cancelled);
            runner.note(&job.id, if cancelled { Event::Cancelled } else { Event::Ended });
            runner.running.fetch_sub(1, Ordering::SeqCst);
            outcome
        })
    }
}

async fn do_as_told(job: &Job, context: &JobContext) -> Result<Box<dyn Reply>> {
    let number = |name: &str| job.input.get(name).and_then(Value::as_u64);
    let preview = number("preview").map(|bytes| "p".repeat(bytes as usize));
    let steps = number("progress").unwrap_or(0) as usize;
    for step in 1..=steps {
        context.check_cancelled()?;
        context.report(Progress::Denoising { step, steps, seconds_left: None, preview: preview.clone() });
        if let Some(pause) = number("every_ms") {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }
    let until = Instant::now() + Duration::from_millis(number("ms").unwrap_or(0));
    while Instant::now() < until {
        if job.input.get("deaf").is_none() {
            context.check_cancelled()?;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    match job.input.get("fail").and_then(Value::as_str) {
        Some("input") => Err(Error::invalid("invalid_value", "prompt", "`prompt` is wrong")),
        Some("memory") => Err(Error::new(ErrorClass::OutOfMemory, "out_of_memory", "memory ran out")),
        Some("device") => Err(Error::new(ErrorClass::DeviceLost, "device_lost", "the context is gone")),
        Some("panic") => panic!("a fault in the model"),
        Some("encoding") => Ok(Box::new(Unencodable)),
        Some("long") => Err(Error::new(ErrorClass::Internal, "internal", "x".repeat(200_000))),
        _ => Ok(match number("picture") {
            Some(bytes) => {
                let wants_links = job.input["response_format"] == "url";
                Box::new(Picture { bytes: bytes as usize, extension: "png", wants_links })
            }
            None => Box::new(Plain(job.input.get("return").cloned().unwrap_or(json!({ "done": job.id })))),
        }),
    }
}

struct Plain(Value);

impl Reply for Plain {
    fn to_json(&self) -> Value {
        self.0.clone()
    }

    fn pictures(&self) -> Vec<PictureFile> {
        vec![]
    }

    fn with_links(&self, _links: &[String]) -> Value {
        self.to_json()
    }

    fn smaller(&self) -> Option<Box<dyn Reply>> {
        None
    }
}

struct Unencodable;

impl Reply for Unencodable {
    fn to_json(&self) -> Value {
        panic!("no JSON can hold this")
    }

    fn pictures(&self) -> Vec<PictureFile> {
        vec![]
    }

    fn with_links(&self, _links: &[String]) -> Value {
        self.to_json()
    }

    fn smaller(&self) -> Option<Box<dyn Reply>> {
        None
    }
}

/// Each smaller form has a quarter of the bytes.
struct Picture {
    bytes: usize,
    extension: &'static str,
    wants_links: bool,
}

impl Reply for Picture {
    fn wants_links(&self) -> bool {
        self.wants_links
    }

    fn to_json(&self) -> Value {
        let warnings: &[&str] = if self.extension == "png" { &[] } else { &["the pictures were made smaller"] };
        json!({ "images": ["i".repeat(self.bytes)], "format": self.extension, "warnings": warnings,
            "timings": { "denoise": 1.5 } })
    }

    fn pictures(&self) -> Vec<PictureFile> {
        vec![PictureFile { bytes: vec![7; self.bytes], extension: self.extension }]
    }

    fn with_links(&self, links: &[String]) -> Value {
        json!({ "images": links, "format": self.extension, "warnings": [] })
    }

    fn smaller(&self) -> Option<Box<dyn Reply>> {
        let extension = match self.extension {
            "png" => "webp",
            "webp" => "jpeg",
            _ => return None,
        };
        Some(Box::new(Picture { bytes: self.bytes / 4, extension, ..*self }))
    }
}
