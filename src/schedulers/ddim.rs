//! Denoising diffusion implicit models, arXiv 2010.02502. Follows diffusers' `scheduling_ddim.py`.

use tch::{Kind, Tensor};

use super::config::{PredictionType, SchedulerConfig, TimestepSpacing};
use super::schedule::{alphas_cumprod, spaced_timesteps};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

pub(super) struct DdimScheduler {
    timesteps: Vec<f64>,
    alphas_cumprod: Vec<f32>,
    final_alpha_cumprod: f32,
    /// Training timesteps per step.
    step_ratio: i64,
    prediction_type: PredictionType,
    clip_sample_range: Option<f64>,
    thresholding: Option<(f64, f64)>,
    eta: f64,
}

impl DdimScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Leading);
        let prediction_type = config.prediction_type();
        if config.rescale_betas_zero_snr() && prediction_type == PredictionType::Epsilon {
            // the first alpha is zero, and epsilon prediction divides by it
            let message = "DDIM cannot run an epsilon-prediction model with rescale_betas_zero_snr";
            return Err(Error::invalid("unsupported_option", "scheduler", message).remedy("use Euler for this model"));
        }
        let alphas_cumprod = alphas_cumprod(config);
        let final_alpha_cumprod = if config.set_alpha_to_one() { 1.0 } else { alphas_cumprod[0] };
        let timesteps: Vec<f64> =
            spaced_timesteps(spacing, config, steps).into_iter().map(f64::round_ties_even).collect();
        if let Some(t) = timesteps.iter().find(|&&t| t < 0.0 || t >= alphas_cumprod.len() as f64) {
            let message = format!("{steps} steps with this model's spacing reach timestep {t}, which it does not have");
            return Err(Error::invalid("out_of_range", "num_inference_steps", message));
        }
        Ok(DdimScheduler {
            timesteps,
            final_alpha_cumprod,
            step_ratio: (alphas_cumprod.len() / steps) as i64,
            alphas_cumprod,
            prediction_type,
            clip_sample_range: config.clip_sample_range(),
            thresholding: config.thresholding(),
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
        let alpha_prod = Tensor::from(self.alphas_cumprod[self.timesteps[step] as usize]).to_kind(original.kind());
        let root = |tensor: Tensor| tensor.pow_tensor_scalar(0.5).double_value(&[]);
        original * root(alpha_prod.shallow_clone()) + noise * root(1.0 - alpha_prod)
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor> {
        let timestep = self.timesteps[step] as i64;
        let prev_timestep = timestep - self.step_ratio;
        let alpha_prod_t = self.alphas_cumprod[timestep as usize];
        let alpha_prod_t_prev =
            if prev_timestep >= 0 { self.alphas_cumprod[prev_timestep as usize] } else { self.final_alpha_cumprod };
        let beta_prod_t = 1.0 - alpha_prod_t;
        let (alpha_sqrt, beta_sqrt) = (alpha_prod_t.sqrt() as f64, beta_prod_t.sqrt() as f64);

        // formula (12) of the paper: the predicted clean sample, and the noise it implies
        let (mut pred_original_sample, pred_epsilon) = match self.prediction_type {
            PredictionType::Epsilon => ((sample - model_output * beta_sqrt) / alpha_sqrt, model_output.shallow_clone()),
            PredictionType::Sample => (model_output.shallow_clone(), (sample - model_output * alpha_sqrt) / beta_sqrt),
            PredictionType::VPrediction => {
                (sample * alpha_sqrt - model_output * beta_sqrt, model_output * alpha_sqrt + sample * beta_sqrt)
            }
        };
        if let Some((ratio, max)) = self.thresholding {
            pred_original_sample = threshold_sample(&pred_original_sample, ratio, max);
        } else if let Some(range) = self.clip_sample_range {
            pred_original_sample = pred_original_sample.clamp(-range, range);
        }

        // formula (16): how much of the noise is drawn anew
        let variance = ((1.0 - alpha_prod_t_prev) / beta_prod_t) * (1.0 - alpha_prod_t / alpha_prod_t_prev);
        let std_dev_t = self.eta as f32 * variance.sqrt();

        let direction = pred_epsilon * ((1.0 - alpha_prod_t_prev - std_dev_t * std_dev_t).sqrt() as f64);
        let prev_sample = pred_original_sample * (alpha_prod_t_prev.sqrt() as f64) + direction;
        if self.eta > 0.0 {
            return Ok(prev_sample + noise.randn_like(model_output)? * std_dev_t as f64);
        }
        Ok(prev_sample)
    }
}

/// Dynamic thresholding, arXiv 2205.11487: each image is cut at a quantile of its own values, and scaled back.
fn threshold_sample(sample: &Tensor, ratio: f64, max: f64) -> Tensor {
    let size = sample.size();
    let flat = sample.to_kind(Kind::Float).reshape([size[0], -1]);
    let s = flat.abs().quantile_scalar(ratio, 1, true, "linear").clamp(1.0, max);
    (flat.clamp_tensor(Some(&-&s), Some(&s)) / s).reshape(&size).to_kind(sample.kind())
}
