//! Euler's method with fresh noise at every step. Follows diffusers' `scheduling_euler_ancestral_discrete.py`.

use tch::{Kind, Tensor};

use super::config::{PredictionType, SchedulerConfig};
use super::discrete::{Levels, add_noise, float, init_noise_sigma, scale, spacing};
use super::prediction::{original_at_sigma, refuse_sample_prediction};
use super::scalar::sqrt;
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

pub(super) struct EulerAncestralDiscreteScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
}

impl EulerAncestralDiscreteScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let prediction_type = refuse_sample_prediction(config, "Euler ancestral")?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Nearly);
        let levels = Levels::new(config, options, &alphas_cumprod, float);
        let sigmas = levels.sigmas_to(0.0);
        Ok(EulerAncestralDiscreteScheduler {
            timesteps: levels.timesteps,
            init_noise_sigma: init_noise_sigma(&sigmas, spacing(config)),
            sigmas,
            prediction_type,
        })
    }
}

impl Scheduler for EulerAncestralDiscreteScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma as f64
    }

    fn scale_model_input(&self, sample: &Tensor, step: usize) -> Tensor {
        scale(sample, self.sigmas[step])
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor {
        add_noise(original, noise, self.sigmas[step])
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor> {
        let (sigma, sigma_to) = (self.sigmas[step], self.sigmas[step + 1]);
        // float32, since neighbouring sigmas differ by less than half precision holds
        let sample = sample.to_kind(Kind::Float);
        let pred_original_sample = original_at_sigma(self.prediction_type, model_output, &sample, sigma);
        let (sigma_up, sigma_down) = ancestral(sigma, sigma_to);
        let derivative = (&sample - pred_original_sample) / f64::from(sigma);
        let prev_sample = sample + derivative * f64::from(sigma_down - sigma);
        let noise = noise.randn_like(model_output)?;
        Ok((prev_sample + noise * f64::from(sigma_up)).to_kind(model_output.kind()))
    }
}

/// How much noise a step to `to` adds, and how far it goes before.
fn ancestral(from: f32, to: f32) -> (f32, f32) {
    let up = sqrt(to * to * (from * from - to * to) / (from * from));
    (up, sqrt(to * to - up * up))
}
