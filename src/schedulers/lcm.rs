//! Latent consistency models, arXiv 2310.04378. Follows diffusers' `scheduling_lcm.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::prediction::{Bounds, original_at};
use super::scalar::{sqrt, weighted_sum};
use super::schedule::{
    DISTILLED_BETAS, ZeroSnr, add_noise_at_alpha, alphas_cumprod, check_timesteps, refuse_zero_snr_epsilon,
};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

pub(super) struct LcmScheduler {
    timesteps: Vec<f64>,
    alphas_cumprod: Vec<f32>,
    prediction_type: PredictionType,
    bounds: Bounds,
    timestep_scaling: f32,
}

impl LcmScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        refuse_zero_snr_epsilon(config, "LCM")?;
        let alphas_cumprod = alphas_cumprod(config, &DISTILLED_BETAS, ZeroSnr::Exact);
        let timesteps = distilled_timesteps(config, options)?;
        check_timesteps(&timesteps, &alphas_cumprod, options.num_inference_steps)?;
        Ok(LcmScheduler {
            timesteps,
            alphas_cumprod,
            prediction_type: config.prediction_type(),
            bounds: Bounds::clipping(config, false),
            timestep_scaling: config.timestep_scaling.unwrap_or(10.0) as f32,
        })
    }
}

/// The timesteps of a distilled model: those that the options list, else a choice of the ones it was distilled at.
pub(super) fn distilled_timesteps(config: &SchedulerConfig, options: &StepOptions) -> Result<Vec<f64>> {
    if let Some(list) = &options.timesteps {
        return Ok(list.iter().map(|&t| t as f64).collect());
    }
    let (steps, train) = (options.num_inference_steps, config.num_train_timesteps());
    let original = config.original_inference_steps.unwrap_or(50);
    if original == 0 || original > train {
        let message = format!("scheduler_config.json: `original_inference_steps` must be from 1 to {train}");
        return Err(Error::setup("model_invalid", message));
    }
    if steps > original {
        let message = format!("{steps} steps are more than the {original} the model was distilled at");
        return Err(Error::invalid("out_of_range", "num_inference_steps", message)
            .remedy(format!("ask for at most {original} steps, or choose another `scheduler`")));
    }
    let spacing = train / original;
    // numpy's linspace without its end point
    let stride = original as f64 / steps as f64;
    let chosen = (0..steps).map(|i| (i as f64 * stride).floor() as usize);
    Ok(chosen.map(|index| ((original - index) * spacing - 1) as f64).collect())
}

impl Scheduler for LcmScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn scale_model_input(&self, sample: &Tensor, _: usize) -> Tensor {
        sample.shallow_clone()
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor {
        add_noise_at_alpha(self.alphas_cumprod[self.timesteps[step] as usize], original, noise)
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor> {
        const SIGMA_DATA: f32 = 0.5;
        let timestep = self.timesteps[step];
        let alpha_prod_t = self.alphas_cumprod[timestep as usize];
        let at = (sqrt(alpha_prod_t), sqrt(1.0 - alpha_prod_t));
        let predicted = self.bounds.apply(original_at(self.prediction_type, model_output, sample, at));

        // the boundary condition of a consistency model: at the timestep 0 it changes nothing
        let scaled = timestep as f32 * self.timestep_scaling;
        let sum = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        let denoised = weighted_sum(&[(scaled / sqrt(sum), &predicted), (SIGMA_DATA * SIGMA_DATA / sum, sample)]);
        let Some(&prev_timestep) = self.timesteps.get(step + 1) else { return Ok(denoised) };
        let alpha_prod_t_prev = self.alphas_cumprod[prev_timestep as usize];
        let noise = noise.randn_like(&denoised)?;
        Ok(weighted_sum(&[(sqrt(alpha_prod_t_prev), &denoised), (sqrt(1.0 - alpha_prod_t_prev), &noise)]))
    }
}
