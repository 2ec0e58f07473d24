//! What the command line can do, one file each.

mod bench;
mod doctor;
mod generate;
mod preprocess;
mod progress;
mod run_once;
mod runpod;
mod serve;
mod tokenize;

pub use bench::bench;
pub use doctor::doctor;
pub use generate::generate;
pub use preprocess::preprocess;
pub use run_once::run_once;
pub use runpod::runpod;
pub use serve::serve;
pub use tokenize::tokenize;

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::spawn_blocking;

use crate::cli::EngineArgs;
use crate::config;
use crate::context::JobContext;
use crate::engine::Engine;
use crate::error::Result;
use crate::handler::Handler;
use crate::job::Runner;
use crate::pipeline::StableDiffusionXlPipeline;

/// Loads the model that the options name, and answers for it.
fn start_handler(arguments: &EngineArgs) -> Result<Handler> {
    let settings = config::settings(arguments)?;
    let (model, device) = (settings.model.display().to_string(), crate::device::name(settings.device));
    tracing::debug!(model, device, dtype = crate::models::dtype_name(settings.kind), "loading");
    let started = Instant::now();
    let engine = Engine::start(move || StableDiffusionXlPipeline::load(settings))?;
    tracing::info!(model, device, seconds = format!("{:.2}", started.elapsed().as_secs_f64()), "model loaded");
    Ok(Handler::new(engine, config::limits(arguments), config::downloader()))
}

/// How long the phases of the start took. Clones share the list.
#[derive(Clone, Default)]
struct ColdStart(Arc<Mutex<Vec<(&'static str, Duration)>>>);

impl ColdStart {
    fn time<T>(&self, phase: &'static str, work: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = work();
        self.0.lock().expect("pushing does not panic").push((phase, started.elapsed()));
        result
    }

    fn phases(&self) -> Vec<(&'static str, Duration)> {
        self.0.lock().expect("pushing does not panic").clone()
    }
}

/// Loads the model and runs one warm-up step, off the threads that talk to the network.
async fn load_runner(arguments: EngineArgs, phases: ColdStart) -> Result<Arc<dyn Runner>> {
    let load = move || -> Result<Arc<dyn Runner>> {
        let handler = phases.time("load_model", || start_handler(&arguments))?;
        let _picture = phases.time("warm_up", || handler.generate(&handler.warm_up(), JobContext::default()))?;
        Ok(Arc::new(Arc::new(handler)))
    };
    spawn_blocking(load).await.map_err(anyhow::Error::from)?
}

/// Runs `work` on a runtime of its own; threads that still block at the end are left behind.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(anyhow::Error::from)?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}
