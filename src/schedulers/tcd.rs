//! Trajectory consistency distillation, arXiv 2402.19159. Follows diffusers' `scheduling_tcd.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::lcm::distilled_timesteps;
use super::prediction::{epsilon_at, original_at};
use super::scalar::{sqrt, weighted_sum};
use super::schedule::{
    DISTILLED_BETAS, ZeroSnr, add_noise_at_alpha, alphas_cumprod, check_timesteps, refuse_zero_snr_epsilon,
};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

pub(super) struct TcdScheduler {
    timesteps: Vec<f64>,
    alphas_cumprod: Vec<f32>,
    prediction_type: PredictionType,
    /// How far a step overshoots, to come back with fresh noise; the paper's gamma.
    eta: f64,
}

impl TcdScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        refuse_zero_snr_epsilon(config, "TCD")?;
        let alphas_cumprod = alphas_cumprod(config, &DISTILLED_BETAS, ZeroSnr::Exact);
        let timesteps = distilled_timesteps(config, options)?;
        check_timesteps(&timesteps, &alphas_cumprod, options.num_inference_steps)?;
        Ok(TcdScheduler { timesteps, alphas_cumprod, prediction_type: config.prediction_type(), eta: options.eta })
    }
}

impl Scheduler for TcdScheduler {
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
        let prev_timestep = self.timesteps.get(step + 1).copied().unwrap_or(0.0);
        let timestep_s = ((1.0 - self.eta) as f32 * prev_timestep as f32).floor();
        let alpha_prod_t = self.alphas_cumprod[self.timesteps[step] as usize];
        let alpha_prod_s = self.alphas_cumprod[timestep_s as usize];

        let at = (sqrt(alpha_prod_t), sqrt(1.0 - alpha_prod_t));
        let pred_original_sample = original_at(self.prediction_type, model_output, sample, at);
        let pred_epsilon = epsilon_at(self.prediction_type, model_output, sample, at);
        let pred_noised_sample =
            weighted_sum(&[(sqrt(alpha_prod_s), &pred_original_sample), (sqrt(1.0 - alpha_prod_s), &pred_epsilon)]);
        if self.eta <= 0.0 || step + 1 == self.timesteps.len() {
            return Ok(pred_noised_sample);
        }
        let ratio = self.alphas_cumprod[prev_timestep as usize] / alpha_prod_s;
        let noise = noise.randn_like(&pred_noised_sample)?;
        Ok(weighted_sum(&[(sqrt(ratio), &pred_noised_sample), (sqrt(1.0 - ratio), &noise)]))
    }
}
