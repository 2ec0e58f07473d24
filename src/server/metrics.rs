//! What `/metrics` shows, in the Prometheus text format. Labels are words of our own, never a client's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use serde_json::Value;

use super::settings::Hooks;
use super::wire::Status;

pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Label = [(&'static str, String); 1];
type Seconds = Gauge<f64, AtomicU64>;

/// Seconds: from a text encoder's milliseconds to an hour of waiting.
const BUCKETS: [f64; 18] =
    [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 600.0, 3600.0];

pub(super) struct Metrics {
    registry: Registry,
    jobs: Family<Label, Counter>,
    queue_length: Gauge,
    in_progress: Gauge,
    held_bytes: Gauge,
    phases: Family<Label, Histogram, fn() -> Histogram>,
    gpu_memory: Family<Label, Gauge>,
    engines: Gauge,
    unet_calls: Family<Label, Counter>,
    cold_start: Family<Label, Seconds>,
    models: Family<Label, Gauge>,
}

/// What is read off the job table when somebody asks.
pub(super) struct Levels {
    pub(super) queued: usize,
    pub(super) running: usize,
    pub(super) held_bytes: usize,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let buckets: fn() -> Histogram = || Histogram::new(BUCKETS);
        let mut metrics = Metrics {
            registry: Registry::with_prefix("sdxl_worker"),
            jobs: Family::default(),
            queue_length: Gauge::default(),
            in_progress: Gauge::default(),
            held_bytes: Gauge::default(),
            phases: Family::new_with_constructor(buckets),
            gpu_memory: Family::default(),
            engines: Gauge::default(),
            unet_calls: Family::default(),
            cold_start: Family::default(),
            models: Family::default(),
        };
        // so that a rate can be computed from the first job on
        for status in [Status::Completed, Status::Failed, Status::Cancelled, Status::TimedOut] {
            drop(metrics.jobs.get_or_create(&[("outcome", status.name().into())]));
        }
        let registry = &mut metrics.registry;
        registry.register("jobs", "Jobs that ended, by outcome", metrics.jobs.clone());
        registry.register("queue_length", "Jobs that wait", metrics.queue_length.clone());
        registry.register("jobs_in_progress", "Jobs that run", metrics.in_progress.clone());
        registry.register("held_bytes", "Inputs and results in memory", metrics.held_bytes.clone());
        registry.register("phase_seconds", "Duration of a job's phases", metrics.phases.clone());
        registry.register("gpu_memory_bytes", "Memory of the GPU", metrics.gpu_memory.clone());
        registry.register("engines", "Devices that take jobs", metrics.engines.clone());
        registry.register("unet_calls", "UNet calls that jobs may share, by images", metrics.unet_calls.clone());
        registry.register("cold_start_seconds", "Duration of the phases of the start", metrics.cold_start.clone());
        registry.register("models", "Models and ControlNets, by where they were found", metrics.models.clone());
        metrics
    }

    pub(super) fn job_ended(&self, status: Status) {
        self.jobs.get_or_create(&[("outcome", status.name().into())]).inc();
    }

    pub(super) fn phase(&self, phase: &str, duration: Duration) {
        self.phases.get_or_create(&[("phase", phase.into())]).observe(duration.as_secs_f64());
    }

    /// The `timings` of a reply, in milliseconds.
    pub(super) fn timings(&self, output: &Value) {
        for (phase, milliseconds) in output["timings"].as_object().into_iter().flatten() {
            if let Some(milliseconds) = milliseconds.as_f64().filter(|ms| (0.0..1e12).contains(ms)) {
                self.phase(phase, Duration::from_secs_f64(milliseconds / 1000.0));
            }
        }
    }

    pub(super) fn to_text(&self, levels: &Levels, hooks: &Hooks) -> String {
        self.queue_length.set(levels.queued as i64);
        self.in_progress.set(levels.running as i64);
        self.held_bytes.set(levels.held_bytes as i64);
        if let Some(memory) = hooks.gpu_memory.as_ref().and_then(|read| read()) {
            for (kind, bytes) in [("used", memory.used_bytes), ("total", memory.total_bytes)] {
                self.gpu_memory.get_or_create(&[("kind", kind.into())]).set(bytes as i64);
            }
        }
        self.engines.set(hooks.engines.as_ref().map_or(0, |count| count()) as i64);
        for (images, calls) in hooks.unet_calls.iter().flat_map(|count| count()) {
            self.unet_calls.get_or_create(&[("images", images.to_string())]).inner().store(calls, Ordering::Relaxed);
        }
        for (phase, duration) in hooks.cold_start.iter().flat_map(|read| read()) {
            self.cold_start.get_or_create(&[("phase", phase.into())]).set(duration.as_secs_f64());
        }
        let sources = hooks.model_sources.as_ref().map(|read| read()).unwrap_or_default();
        for source in &sources {
            let count = sources.iter().filter(|other| *other == source).count();
            self.models.get_or_create(&[("source", (*source).into())]).set(count as i64);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a string takes all that is written");
        text
    }
}
