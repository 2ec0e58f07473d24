use std::path::Path;

use tch::Device;

use super::{ColdStart, deliver, start_handler};
use crate::cli::{DoctorArgs, EngineArgs};
use crate::config;
use crate::context::JobContext;
use crate::device;
use crate::error::{Error, Result};
use crate::memory;
use crate::models::GraphSet;
use crate::pipeline::{Pipeline, Settings, StableDiffusionXlPipeline};
use crate::torch;

/// Says what works on this machine and what to do about the rest. The launcher answers where libtorch is missing.
///
/// # Errors
/// The first failure, after everything was printed.
pub fn doctor(arguments: &EngineArgs, options: &DoctorArgs) -> Result<()> {
    let phases = ColdStart::begin();
    println!("sdxl-worker {} ({})\n", env!("CARGO_PKG_VERSION"), env!("GIT_COMMIT"));
    let libtorch = std::env::var("SDXL_WORKER_LIBTORCH").unwrap_or_else(|_| "found by the system's loader".into());
    line("libtorch", &Ok(format!("{} ({})", libtorch, cuda_build())));
    line("device", &Ok(devices()));
    if let Some(obstacle) = device::obstacle() {
        line("gpu", &Err(obstacle.to_string()));
    }
    if let Some(free) = memory::available() {
        line("memory", &Ok(format!("{} free", memory::format_bytes(free))));
    }

    let here = deliver::find(arguments);
    let settings = config::devices(arguments).and_then(|devices| config::settings(&here?, &devices));
    let graphs = settings.as_ref().map_err(brief).and_then(|settings| describe_graphs(&settings[0].graphs));
    line("graphs", &graphs);
    tch::jit::set_graph_executor_optimize(false);
    let load = |settings: Settings| {
        let path = settings.model.display().to_string();
        let target = format!("{} {}", device::name(settings.device), crate::models::dtype_name(settings.kind));
        let started = std::time::Instant::now();
        let pipeline = StableDiffusionXlPipeline::load(settings)?;
        let facts = pipeline.facts();
        let seconds = started.elapsed().as_secs_f64();
        let (width, height) = (facts.default_width, facts.default_height);
        let scheduler = facts.default_scheduler.name();
        let unet = if pipeline.is_fused() { "fused UNet" } else { "plain UNet" };
        Ok(format!("{path}: all weights bound on {target} in {seconds:.2} s; {width}x{height}, {scheduler}, {unet}"))
    };
    let models = match settings {
        // one after the other, each on its device
        Ok(settings) => settings.into_iter().map(load).collect(),
        Err(error) => vec![Err(error)],
    };
    for model in &models {
        line("model", &model.as_ref().map_err(brief).cloned());
    }
    models.into_iter().try_for_each(|model| model.map(drop))?;
    if options.timing { timing(arguments, &phases) } else { Ok(()) }
}

/// Starts once more, as a worker does, now that the files are known to be good; they may be in the page cache by now.
fn timing(arguments: &EngineArgs, phases: &ColdStart) -> Result<()> {
    let handler = phases.time("load_model", || start_handler(arguments))?;
    phases.include(handler.load_times());
    let (first, _) = phases.time("first_picture", || handler.generate(&handler.warm_up(), JobContext::default()))?;
    phases.include(first.timings());
    println!("\n  phase of the start        ms");
    for (phase, time) in phases.phases() {
        println!("  {phase:<20} {:>9.1}", time.as_secs_f64() * 1000.0);
    }
    Ok(())
}

fn line(name: &str, found: &Result<String, String>) {
    match found {
        Ok(text) => println!("  {name:<9} ok       {text}"),
        Err(problem) => println!("  {name:<9} FAILED   {}", problem.replace('\n', "\n    ")),
    }
}

fn brief(error: &Error) -> String {
    let remedy = error.remedy.as_ref().map(|remedy| format!("\nto do: {remedy}")).unwrap_or_default();
    format!("{}{remedy}", error.message)
}

fn cuda_build() -> &'static str {
    if tch::utils::has_cuda() || tch::Cuda::device_count() > 0 { "with CUDA" } else { "no CUDA device in sight" }
}

fn devices() -> String {
    let mut devices: Vec<String> = (0..tch::Cuda::device_count().max(0) as usize)
        .map(|index| {
            let memory = torch::device_memory(Device::Cuda(index)).ok().flatten();
            let memory = memory.map(|(free, total)| {
                format!(" ({} of {} free)", memory::format_bytes(free), memory::format_bytes(total))
            });
            format!("cuda:{index}{}", memory.unwrap_or_default())
        })
        .collect();
    if tch::utils::has_mps() {
        devices.push("mps".into());
    }
    devices.push(format!("cpu with {} threads", tch::get_num_threads()));
    devices.join(", ")
}

fn describe_graphs(dir: &Path) -> Result<String, String> {
    let graphs = GraphSet::open(dir).map_err(|e| brief(&e))?;
    let entries: Vec<String> = graphs.entries().map(|entry| format!("\n{}", entry.describe())).collect();
    Ok(format!("{}{}", dir.display(), entries.concat().replace('\n', "\n                     ")))
}
