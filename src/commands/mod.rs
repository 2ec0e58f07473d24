//! What the command line can do, one file each.

mod bench;
mod doctor;
mod generate;
mod progress;
mod run_once;
mod tokenize;

pub use bench::bench;
pub use doctor::doctor;
pub use generate::generate;
pub use run_once::run_once;
pub use tokenize::tokenize;

use crate::cli::EngineArgs;
use crate::config;
use crate::engine::Engine;
use crate::error::Result;
use crate::handler::Handler;
use crate::pipeline::StableDiffusionXlPipeline;

/// Loads the model that the options name, and answers for it.
fn start_handler(arguments: &EngineArgs) -> Result<Handler> {
    let settings = config::settings(arguments)?;
    let (model, device) = (settings.model.display().to_string(), crate::device::name(settings.device));
    tracing::debug!(model, device, dtype = crate::models::dtype_name(settings.kind), "loading");
    let started = std::time::Instant::now();
    let engine = Engine::start(move || StableDiffusionXlPipeline::load(settings))?;
    tracing::info!(model, device, seconds = format!("{:.2}", started.elapsed().as_secs_f64()), "model loaded");
    Ok(Handler::new(engine, arguments.max_pixels, arguments.max_num_images))
}
