//! Denoising diffusion implicit models, arXiv 2010.02502. Follows diffusers' `scheduling_ddim.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig, TimestepSpacing};
use super::prediction::{Bounds, epsilon_at, original_at};
use super::scalar::sqrt;
use super::schedule::{
    DDPM_BETAS, ZeroSnr, add_noise_at_alpha, alphas_cumprod, check_timesteps, refuse_zero_snr_epsilon, spaced_timesteps,
};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

pub(super) struct DdimScheduler {
    timesteps: Vec<f64>,
    alphas_cumprod: Vec<f32>,
    final_alpha_cumprod: f32,
    /// Training timesteps per step.
    step_ratio: i64,
    prediction_type: PredictionType,
    bounds: Bounds,
    eta: f64,
}

impl DdimScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        refuse_zero_snr_epsilon(config, "DDIM")?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Exact);
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Leading);
        let timesteps: Vec<f64> =
            spaced_timesteps(spacing, config, steps).into_iter().map(f64::round_ties_even).collect();
        check_timesteps(&timesteps, &alphas_cumprod, steps)?;
        Ok(DdimScheduler {
            timesteps,
            final_alpha_cumprod: if config.set_alpha_to_one.unwrap_or(true) { 1.0 } else { alphas_cumprod[0] },
            step_ratio: (alphas_cumprod.len() / steps) as i64,
            alphas_cumprod,
            prediction_type: config.prediction_type(),
            bounds: Bounds::clipping(config, true),
            eta: options.eta,
        })
    }
}

impl Scheduler for DdimScheduler {
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
        let timestep = self.timesteps[step] as i64;
        let prev_timestep = timestep - self.step_ratio;
        let alpha_prod_t = self.alphas_cumprod[timestep as usize];
        let alpha_prod_t_prev =
            if prev_timestep >= 0 { self.alphas_cumprod[prev_timestep as usize] } else { self.final_alpha_cumprod };
        let beta_prod_t = 1.0 - alpha_prod_t;
        let at = (sqrt(alpha_prod_t), sqrt(beta_prod_t));

        // formula (12) of the paper: the predicted clean sample, and the noise it implies
        let pred_original_sample = self.bounds.apply(original_at(self.prediction_type, model_output, sample, at));
        let pred_epsilon = epsilon_at(self.prediction_type, model_output, sample, at);

        // formula (16): how much of the noise is drawn anew
        let variance = ((1.0 - alpha_prod_t_prev) / beta_prod_t) * (1.0 - alpha_prod_t / alpha_prod_t_prev);
        let std_dev_t = self.eta as f32 * sqrt(variance);

        let direction = pred_epsilon * f64::from(sqrt(1.0 - alpha_prod_t_prev - std_dev_t * std_dev_t));
        let prev_sample = pred_original_sample * f64::from(sqrt(alpha_prod_t_prev)) + direction;
        if self.eta > 0.0 {
            return Ok(prev_sample + noise.randn_like(model_output)? * f64::from(std_dev_t));
        }
        Ok(prev_sample)
    }
}
