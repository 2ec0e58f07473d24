//! What the command line can do, one file each.

mod bench;
mod deliver;
mod doctor;
mod fetch;
mod generate;
mod preprocess;
mod progress;
mod run_once;
mod runpod;
mod serve;
mod tokenize;

pub use bench::bench;
pub use doctor::doctor;
pub use fetch::fetch;
pub use generate::generate;
pub use preprocess::preprocess;
pub use run_once::run_once;
pub use runpod::runpod;
pub use serve::serve;
pub use tokenize::tokenize;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use serde_json::Value;
use tch::Device;
use tokio::task::spawn_blocking;

use crate::api::{Capabilities, Timings};
use crate::cli::EngineArgs;
use crate::config;
use crate::context::JobContext;
use crate::engine::Engine;
use crate::error::Result;
use crate::handler::Handler;
use crate::hub::{Delivered, Source};
use crate::job::Runner;
use crate::memory;
use crate::pipeline::StableDiffusionXlPipeline;

/// Loads the model that the options name on the first of the devices, and answers for it: for commands that run one job
/// at a time.
fn start_handler(arguments: &EngineArgs) -> Result<Handler> {
    start_on(&deliver::deliver(arguments)?.0, &config::devices(arguments)?[..1])
}

fn start_on(arguments: &EngineArgs, devices: &[Device]) -> Result<Handler> {
    let settings = config::settings(arguments, devices)?;
    let (model, dtype) = (settings[0].model.display().to_string(), crate::models::dtype_name(settings[0].kind));
    let names: Vec<String> = devices.iter().map(|device| crate::device::name(*device)).collect();
    let device = names.join(",");
    tracing::debug!(model, device, dtype, "loading");
    let started = Instant::now();
    let loads = settings.into_iter().map(|settings| move || StableDiffusionXlPipeline::load(settings));
    let engine = Engine::start_all(names.into_iter().zip(loads).collect(), arguments.max_batch.into())?;
    tracing::info!(model, device, seconds = format!("{:.2}", started.elapsed().as_secs_f64()), "model loaded");
    Ok(Handler::new(engine, config::limits(arguments), config::downloader(), config::adapters(arguments)))
}

/// What became of the start: how long its phases took, and who answers for the model. Clones share it.
#[derive(Clone)]
struct ColdStart {
    phases: Arc<Mutex<Vec<(&'static str, Duration)>>>,
    /// Where the models came from.
    delivered: Arc<OnceLock<Vec<Delivered>>>,
    handler: Arc<OnceLock<Arc<Handler>>>,
}

impl ColdStart {
    /// To be called first: how old the process is by then was the loader's work on libtorch.
    fn begin() -> Self {
        let age = memory::process_age().map(|age| ("load_libtorch", age));
        let phases = Arc::new(Mutex::new(age.into_iter().collect()));
        ColdStart { phases, delivered: Arc::default(), handler: Arc::default() }
    }

    /// Remembers where the models came from, and counts what took time.
    fn deliver(&self, delivered: Vec<Delivered>) {
        let downloads = delivered.iter().filter(|model| model.source == Source::Download).map(|model| model.time);
        let time: Duration = downloads.sum();
        if !time.is_zero() {
            self.phases.lock().expect("pushing does not panic").push(("download", time));
        }
        self.delivered.set(delivered).ok();
    }

    /// Where the models were found.
    fn model_sources(&self) -> Vec<&'static str> {
        self.delivered.get().into_iter().flatten().map(|model| model.source.name()).collect()
    }

    fn time<T>(&self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = work();
        self.phases.lock().expect("pushing does not panic").push((phase, started.elapsed()));
        result
    }

    /// What was timed elsewhere.
    fn include(&self, times: &Timings) {
        let mut phases = self.phases.lock().expect("pushing does not panic");
        phases.extend(times.iter().map(|(phase, ms)| (phase, Duration::from_secs_f64(ms / 1000.0))));
    }

    fn timings(&self) -> Timings {
        let mut timings = Timings::default();
        self.phases().into_iter().for_each(|(phase, time)| timings.add(phase, time));
        timings
    }

    fn phases(&self) -> Vec<(&'static str, Duration)> {
        self.phases.lock().expect("pushing does not panic").clone()
    }

    /// How many engines take jobs.
    fn engines(&self) -> usize {
        self.handler.get().map_or(0, |handler| handler.engine().count())
    }

    /// See [`Engine::calls`].
    fn calls(&self) -> BTreeMap<usize, u64> {
        self.handler.get().map_or_else(BTreeMap::new, |handler| handler.engine().calls())
    }

    /// What requests may ask for, once the model is loaded.
    fn capabilities(&self) -> Option<Capabilities> {
        self.handler.get().map(|handler| handler.capabilities())
    }
}

/// Loads the model on every device and runs a warm-up step on each, off the threads that talk to the network.
async fn load_runner(arguments: EngineArgs, start: ColdStart) -> Result<Arc<dyn Runner>> {
    let load = move || -> Result<Arc<dyn Runner>> {
        let devices = config::devices(&arguments)?;
        let (arguments, delivered) = deliver::deliver(&arguments)?;
        start.deliver(delivered);
        let handler = start.time("load_model", || start_on(&arguments, &devices))?;
        let requests: Vec<Value> = match &arguments.warm_up[..] {
            [] => vec![handler.warm_up()],
            sizes => sizes.iter().map(|size| handler.warm_up_at(size.width, size.height)).collect(),
        };
        let warm_up = || requests.iter().try_for_each(|request| warm_up(&handler, devices.len(), request));
        start.time("warm_up", warm_up)?;
        start.include(handler.load_times());
        handler.report_start(start.timings());
        let handler = Arc::new(handler);
        start.handler.set(handler.clone()).ok();
        Ok(Arc::new(handler))
    };
    spawn_blocking(load).await.map_err(anyhow::Error::from)?
}

/// One step for each engine; all of them are free, so each takes one.
fn warm_up(handler: &Handler, engines: usize, request: &Value) -> Result<()> {
    std::thread::scope(|scope| {
        let run = || scope.spawn(|| handler.generate(request, JobContext::default()).map(drop));
        let running: Vec<_> = (0..engines).map(|_| run()).collect();
        running.into_iter().try_for_each(|thread| thread.join().expect("a job's panic is an error"))
    })?;
    tracing::debug!(width = %request["width"], height = %request["height"], "warmed up");
    Ok(())
}

/// Runs `work` on a runtime of its own; threads that still block at the end are left behind.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(anyhow::Error::from)?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}
