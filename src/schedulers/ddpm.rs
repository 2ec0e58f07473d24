//! Denoising diffusion probabilistic models, arXiv 2006.11239. Follows diffusers' `scheduling_ddpm.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig, TimestepSpacing};
use super::prediction::{Bounds, original_at};
use super::scalar::{exp, ln, sqrt, weighted_sum};
use super::schedule::{
    DDPM_BETAS, ZeroSnr, add_noise_at_alpha, alphas_cumprod, check_timesteps, refuse_zero_snr_epsilon, spaced_timesteps,
};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

pub(super) struct DdpmScheduler {
    timesteps: Vec<f64>,
    alphas_cumprod: Vec<f32>,
    prediction_type: PredictionType,
    bounds: Bounds,
    variance_type: VarianceType,
}

/// How strong the noise is that a step adds.
#[derive(Debug, Clone, Copy)]
enum VarianceType {
    Small,
    SmallLog,
    Large,
}

impl DdpmScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        refuse_zero_snr_epsilon(config, "DDPM")?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Exact);
        let timesteps: Vec<f64> = match &options.timesteps {
            Some(list) => list.iter().map(|&t| t as f64).collect(),
            None => {
                let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Leading);
                spaced_timesteps(spacing, config, steps).into_iter().map(f64::round_ties_even).collect()
            }
        };
        check_timesteps(&timesteps, &alphas_cumprod, steps)?;
        let variance_type = match config.variance_type.as_deref() {
            None | Some("fixed_small") => VarianceType::Small,
            Some("fixed_small_log") => VarianceType::SmallLog,
            Some("fixed_large") => VarianceType::Large,
            Some(other) => {
                let message = format!("scheduler_config.json: DDPM's `variance_type` {other} is not supported");
                return Err(Error::setup("unsupported_model", message).remedy("set `variance_type` to fixed_small"));
            }
        };
        Ok(DdpmScheduler {
            timesteps,
            alphas_cumprod,
            prediction_type: config.prediction_type(),
            bounds: Bounds::clipping(config, true),
            variance_type,
        })
    }
}

impl Scheduler for DdpmScheduler {
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
        let alpha_prod_t = self.alphas_cumprod[self.timesteps[step] as usize];
        let alpha_prod_t_prev = self.timesteps.get(step + 1).map_or(1.0, |&t| self.alphas_cumprod[t as usize]);
        let (beta_prod_t, beta_prod_t_prev) = (1.0 - alpha_prod_t, 1.0 - alpha_prod_t_prev);
        let current_alpha_t = alpha_prod_t / alpha_prod_t_prev;
        let current_beta_t = 1.0 - current_alpha_t;

        let at = (sqrt(alpha_prod_t), sqrt(beta_prod_t));
        let pred_original_sample = self.bounds.apply(original_at(self.prediction_type, model_output, sample, at));
        // formula (7) of the paper: the mean of the sample before
        let mean = weighted_sum(&[
            (sqrt(alpha_prod_t_prev) * current_beta_t / beta_prod_t, &pred_original_sample),
            (sqrt(current_alpha_t) * beta_prod_t_prev / beta_prod_t, sample),
        ]);
        if self.timesteps[step] == 0.0 {
            return Ok(mean);
        }
        let variance = (beta_prod_t_prev / beta_prod_t * current_beta_t).max(1e-20);
        let std_dev = match self.variance_type {
            VarianceType::Small => sqrt(variance),
            VarianceType::SmallLog => exp(0.5 * ln(variance)),
            VarianceType::Large => sqrt(current_beta_t),
        };
        Ok(mean + noise.randn_like(model_output)? * f64::from(std_dev))
    }
}
