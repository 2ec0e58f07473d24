//! DPM-Solver++ as a stochastic equation, singlestep of second order: DPM++ SDE. Follows diffusers'
//! `scheduling_dpmsolver_sde.py`, but for where the noise is from: each step draws its own, where diffusers reads the
//! increments of one Brownian path, which have the same distribution.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::discrete::{Levels, add_noise, doubled, init_noise_sigma, scale, spacing};
use super::prediction::{original_at_sigma, refuse_sample_prediction};
use super::scalar::{exp, expm1, ln, sqrt};
use super::schedule::{STABLE_BETAS, ZeroSnr, alphas_cumprod};
use super::sigmas::{curve, sigma_to_t};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

pub(super) struct DpmSolverSdeScheduler {
    /// The begin of a step and its middle by turns.
    timesteps: Vec<f64>,
    /// The level where each step begins twice, but for the first; and where the run ends.
    sigmas: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
    /// Where the step in progress began.
    sample: Option<Tensor>,
}

impl DpmSolverSdeScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let prediction_type = refuse_sample_prediction(config, "DPM++ SDE")?;
        let alphas_cumprod = alphas_cumprod(config, &STABLE_BETAS, ZeroSnr::Ignored);
        let mut levels = Levels::new(config, options, &alphas_cumprod, |t| t);
        if let Some(curve) = curve(config, false)? {
            levels.follow_own_karras(curve, config, options.num_inference_steps);
        }
        let mut timesteps = doubled(&levels.timesteps);
        for (i, pair) in levels.sigmas.windows(2).enumerate() {
            let (t, t_next) = (-pair[0].ln(), -pair[1].ln());
            timesteps[2 * i + 1] = sigma_to_t((-(t + (t_next - t) * 0.5)).exp(), &levels.log_sigmas);
        }
        let mut sigmas = doubled(&levels.sigmas_to(0.0));
        sigmas.pop();
        Ok(DpmSolverSdeScheduler {
            timesteps,
            init_noise_sigma: init_noise_sigma(&sigmas, spacing(config)),
            sigmas,
            prediction_type,
            sample: None,
        })
    }

    /// The level in the middle of a step that goes to `next`.
    fn middle(sigma: f32, next: f32) -> f32 {
        exp(-midpoint(sigma, next))
    }
}

/// Half way in the negative logarithm.
fn midpoint(sigma: f32, next: f32) -> f32 {
    let (t, t_next) = (-ln(sigma), -ln(next));
    t + (t_next - t) * 0.5
}

impl Scheduler for DpmSolverSdeScheduler {
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
        if step.is_multiple_of(2) {
            scale(sample, self.sigmas[step])
        } else {
            scale(sample, Self::middle(self.sigmas[step - 1], self.sigmas[step]))
        }
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor {
        add_noise(original, noise, self.sigmas[step])
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor> {
        let begin = self.sample.take();
        let at_begin = begin.is_none();
        let (sigma, sigma_next) = if at_begin {
            (self.sigmas[step], self.sigmas[step + 1])
        } else {
            (self.sigmas[step - 1], self.sigmas[step])
        };
        let at = if at_begin { sigma } else { Self::middle(sigma, sigma_next) };
        let pred_original_sample = original_at_sigma(self.prediction_type, model_output, sample, at);
        if sigma_next == 0.0 {
            let derivative = (sample - pred_original_sample) / f64::from(sigma);
            return Ok(sample + derivative * f64::from(sigma_next - sigma));
        }
        let t = -ln(sigma);
        let t_next = if at_begin { midpoint(sigma, sigma_next) } else { -ln(sigma_next) };
        let (from, to) = (exp(-t), exp(-t_next));
        let up = to.min(sqrt(to * to * (from * from - to * to) / (from * from)));
        let down = sqrt(to * to - up * up);
        let ancestral_t = -ln(down);
        let start = begin.as_ref().unwrap_or(sample);
        let next =
            start * f64::from(exp(-ancestral_t) / from) - pred_original_sample * f64::from(expm1(t - ancestral_t));
        let next = next + noise.randn_like(sample)? * f64::from(up);
        if at_begin {
            self.sample = Some(sample.shallow_clone());
        }
        Ok(next)
    }
}
