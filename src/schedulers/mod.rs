//! Noise schedules and their steps, one file per diffusers class, equal to diffusers number by number.
//!
//! diffusers keeps betas and `alphas_cumprod` in float32 and passes through numpy's float64 in places; where the result
//! depends on it, so does this module. Steps are indices, never timesteps looked up by comparing floats.

mod config;
mod ddim;
mod euler_discrete;
mod noise;
mod schedule;

use tch::Tensor;

use crate::api::SchedulerKind;
use crate::error::{Error, Result};

pub use config::SchedulerConfig;
pub use noise::NoiseSource;

/// One denoising schedule, set up for one job.
pub trait Scheduler {
    /// What the UNet is told at each step; fractional for some spacings.
    fn timesteps(&self) -> &[f64];

    /// Factor from unit noise to the first latents.
    fn init_noise_sigma(&self) -> f64;

    /// The UNet's input for `sample` at `step`.
    fn scale_model_input(&self, sample: &Tensor, step: usize) -> Tensor;

    /// `original` as it is before `step`, given this noise: where a run starts that does not start from noise alone.
    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor;

    /// The sample one step less noisy. `model_output` and `sample` have the shape of the latents.
    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor>;
}

/// What one job asks of its scheduler.
#[derive(Debug, Clone, Copy)]
pub struct StepOptions {
    pub num_inference_steps: usize,
    /// Weight of fresh noise in DDIM, from 0 (none) to 1 (as DDPM).
    pub eta: f64,
}

/// Builds the scheduler `kind` from the model's `scheduler_config.json`, as `Kind.from_config(config)` does in diffusers:
/// a key that the file does not have takes the default of the class that is built, not of the class it was written for.
pub fn build(kind: SchedulerKind, config: &SchedulerConfig, options: StepOptions) -> Result<Box<dyn Scheduler>> {
    let train = config.num_train_timesteps();
    if options.num_inference_steps > train {
        let message =
            format!("{} steps are more than the {train} the model was trained on", options.num_inference_steps);
        return Err(Error::invalid("out_of_range", "num_inference_steps", message));
    }
    Ok(match kind {
        SchedulerKind::EulerDiscrete => Box::new(euler_discrete::EulerDiscreteScheduler::new(config, options)?),
        SchedulerKind::Ddim => Box::new(ddim::DdimScheduler::new(config, options)?),
    })
}
