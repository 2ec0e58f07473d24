//! Noise schedules and their steps, one file per diffusers class, equal to diffusers number by number.
//!
//! diffusers keeps betas and `alphas_cumprod` in float32 and passes through numpy's float64 in places; where the result
//! depends on it, so does this module. Steps are indices, never timesteps looked up by comparing floats.

mod ays;
mod config;
mod ddim;
mod ddpm;
mod deis_multistep;
mod discrete;
mod dpmsolver;
mod dpmsolver_multistep;
mod dpmsolver_sde;
mod dpmsolver_singlestep;
mod edm;
mod edm_dpmsolver_multistep;
mod edm_euler;
mod euler_ancestral_discrete;
mod euler_discrete;
mod heun_discrete;
mod k_dpm_2_ancestral_discrete;
mod k_dpm_2_discrete;
mod lcm;
mod lms_discrete;
mod noise;
mod options;
mod pndm;
mod prediction;
mod scalar;
mod schedule;
mod sigmas;
mod solver;
mod tcd;
mod unipc_multistep;

use tch::Tensor;

use crate::api::SchedulerKind;
use crate::error::{Error, Result};

pub use config::{SchedulerConfig, TimestepSpacing};
pub use noise::NoiseSource;
pub use options::StepOptions;
use options::refuse_timesteps_beside_curve;

/// One denoising schedule, set up for one job.
pub trait Scheduler {
    /// What the UNet is told at each step; fractional for some spacings.
    fn timesteps(&self) -> &[f64];

    /// How many of the timesteps make one step of the method: 2 where every step but the last looks twice.
    fn order(&self) -> usize {
        1
    }

    /// Factor from unit noise to the first latents.
    fn init_noise_sigma(&self) -> f64;

    /// The UNet's input for `sample` at `step`.
    fn scale_model_input(&self, sample: &Tensor, step: usize) -> Tensor;

    /// `original` as it is before `step`, given this noise: where a run starts that does not start from noise alone.
    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor;

    /// The sample one step less noisy. `model_output` and `sample` have the shape of the latents. Steps are run in order;
    /// the first may be any multiple of `order`.
    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor>;
}

/// Builds the scheduler `kind` from the model's `scheduler_config.json`, as `Kind.from_config(config)` does in diffusers:
/// a key that the file does not have takes the default of the class that is built, not of the class it was written for.
///
/// # Errors
///
/// `out_of_range` for a number of steps that the model or the class cannot run, `unsupported_option` for an option that
/// the scheduler does not have and for a model it cannot run, `unsupported_model` and `model_invalid` for a configuration
/// that says what is not supported or makes no sense.
pub fn build(kind: SchedulerKind, config: &SchedulerConfig, options: &StepOptions) -> Result<Box<dyn Scheduler>> {
    let options = options.resolved(kind, config)?;
    let config = &config.for_kind(kind).with_options(&options);
    let train = config.num_train_timesteps();
    if options.num_inference_steps == 0 || options.num_inference_steps > train {
        let steps = options.num_inference_steps;
        let message = format!("the model was trained on {train} timesteps and cannot run {steps} steps");
        return Err(Error::invalid("out_of_range", "num_inference_steps", message));
    }
    let options = &options;
    Ok(match kind {
        SchedulerKind::EulerDiscrete => Box::new(euler_discrete::EulerDiscreteScheduler::new(config, options)?),
        SchedulerKind::EulerAncestralDiscrete => {
            Box::new(euler_ancestral_discrete::EulerAncestralDiscreteScheduler::new(config, options)?)
        }
        SchedulerKind::HeunDiscrete => Box::new(heun_discrete::HeunDiscreteScheduler::new(config, options)?),
        SchedulerKind::Kdpm2Discrete => Box::new(k_dpm_2_discrete::Kdpm2DiscreteScheduler::new(config, options)?),
        SchedulerKind::Kdpm2AncestralDiscrete => {
            Box::new(k_dpm_2_ancestral_discrete::Kdpm2AncestralDiscreteScheduler::new(config, options)?)
        }
        SchedulerKind::LmsDiscrete => Box::new(lms_discrete::LmsDiscreteScheduler::new(config, options)?),
        SchedulerKind::Ddim => Box::new(ddim::DdimScheduler::new(config, options)?),
        SchedulerKind::Ddpm => Box::new(ddpm::DdpmScheduler::new(config, options)?),
        SchedulerKind::Pndm => Box::new(pndm::PndmScheduler::new(config, options)?),
        SchedulerKind::Dpmpp2m
        | SchedulerKind::Dpmpp2mSde
        | SchedulerKind::Dpmpp2mSdeHeun
        | SchedulerKind::Dpmpp3mSde => {
            Box::new(dpmsolver_multistep::DpmSolverMultistepScheduler::new(config, options)?)
        }
        SchedulerKind::Dpmpp2s => Box::new(dpmsolver_singlestep::DpmSolverSinglestepScheduler::new(config, options)?),
        SchedulerKind::DpmppSde => Box::new(dpmsolver_sde::DpmSolverSdeScheduler::new(config, options)?),
        SchedulerKind::DeisMultistep => Box::new(deis_multistep::DeisMultistepScheduler::new(config, options)?),
        SchedulerKind::UniPcMultistep => Box::new(unipc_multistep::UniPcMultistepScheduler::new(config, options)?),
        SchedulerKind::Lcm => Box::new(lcm::LcmScheduler::new(config, options)?),
        SchedulerKind::Tcd => Box::new(tcd::TcdScheduler::new(config, options)?),
        SchedulerKind::EdmEuler => Box::new(edm_euler::EdmEulerScheduler::new(config, options)?),
        SchedulerKind::EdmDpmpp2m => {
            Box::new(edm_dpmsolver_multistep::EdmDpmSolverMultistepScheduler::new(config, options)?)
        }
    })
}
