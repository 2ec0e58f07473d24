//! Heun's method on the probability-flow ODE, algorithm 2 of arXiv 2206.00364 without churn: every step but the last is
//! looked at from both ends. Follows diffusers' `scheduling_heun_discrete.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::discrete::{Levels, add_noise, doubled, float, init_noise_sigma, scale, spacing};
use super::prediction::original_at_sigma;
use super::schedule::{STABLE_BETAS, ZeroSnr, alphas_cumprod};
use super::sigmas::curve;
use super::{NoiseSource, Scheduler, StepOptions, refuse_timesteps_beside_curve};
use crate::error::Result;

pub(super) struct HeunDiscreteScheduler {
    /// Each but the first twice.
    timesteps: Vec<f64>,
    /// Of each timestep, and where the run ends.
    sigmas: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
    clip_sample_range: Option<f64>,
    /// The sample where the step in progress began, and the derivative there.
    begin: Option<(Tensor, Tensor)>,
}

impl HeunDiscreteScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let curve = curve(config, false)?;
        refuse_timesteps_beside_curve(options, curve)?;
        let alphas_cumprod = alphas_cumprod(config, &STABLE_BETAS, ZeroSnr::Ignored);
        let mut levels = Levels::new(config, options, &alphas_cumprod, float);
        if let Some(curve) = curve {
            levels.follow(curve, config, options.num_inference_steps);
        }
        let mut sigmas = doubled(&levels.sigmas_to(0.0));
        sigmas.pop();
        Ok(HeunDiscreteScheduler {
            timesteps: doubled(&levels.timesteps).into_iter().map(float).collect(),
            init_noise_sigma: init_noise_sigma(&sigmas, spacing(config)),
            sigmas,
            prediction_type: config.prediction_type(),
            clip_sample_range: config.clip_sample_range(false),
            begin: None,
        })
    }
}

impl Scheduler for HeunDiscreteScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn order(&self) -> usize {
        2
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

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, _: &mut NoiseSource) -> Result<Tensor> {
        let sigma = self.sigmas[step];
        let mut pred_original_sample = original_at_sigma(self.prediction_type, model_output, sample, sigma);
        if let Some(range) = self.clip_sample_range {
            pred_original_sample = pred_original_sample.clamp(-range, range);
        }
        let derivative = (sample - pred_original_sample) / f64::from(sigma);
        match self.begin.take() {
            None => {
                let next = sample + &derivative * f64::from(self.sigmas[step + 1] - sigma);
                self.begin = Some((sample.shallow_clone(), derivative));
                Ok(next)
            }
            Some((begin, first)) => {
                let dt = sigma - self.sigmas[step - 1];
                Ok(begin + (first + derivative) / 2.0 * f64::from(dt))
            }
        }
    }
}
