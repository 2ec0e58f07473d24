//! DPM-Solver-2 as k-diffusion has it: every step but the last looks at its middle. Follows diffusers'
//! `scheduling_k_dpm_2_discrete.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::discrete::{Levels, add_noise, float, init_noise_sigma, scale, spacing};
use super::prediction::{original_at_sigma, refuse_sample_prediction};
use super::schedule::{STABLE_BETAS, ZeroSnr, alphas_cumprod, to_vec};
use super::sigmas::{Curve, curve, sigma_to_t_float};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

pub(super) struct Kdpm2DiscreteScheduler {
    /// The begin of a step and its middle by turns.
    timesteps: Vec<f64>,
    /// The level where each step begins, and where the run ends.
    sigmas: Vec<f32>,
    /// The level in the middle of each step; of the last its end.
    sigmas_interpol: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
    /// Where the step in progress began.
    sample: Option<Tensor>,
}

impl Kdpm2DiscreteScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let prediction_type = refuse_sample_prediction(config, "DPM2")?;
        let levels = kdpm2_levels(config, options)?;
        let sigmas = levels.sigmas_to(0.0);
        let sigmas_interpol = middles(&sigmas[1..], &sigmas[..sigmas.len() - 1]);
        Ok(Kdpm2DiscreteScheduler {
            timesteps: interleaved(&levels, &sigmas_interpol),
            init_noise_sigma: init_noise_sigma(&sigmas, spacing(config)),
            sigmas,
            sigmas_interpol,
            prediction_type,
            sample: None,
        })
    }
}

/// The levels where the steps begin, for the ancestral form too.
pub(super) fn kdpm2_levels(config: &SchedulerConfig, options: &StepOptions) -> Result<Levels> {
    let alphas_cumprod = alphas_cumprod(config, &STABLE_BETAS, ZeroSnr::Ignored);
    let mut levels = Levels::new(config, options, &alphas_cumprod, float);
    if let Some(curve) = curve(config, false)? {
        levels.follow(curve, config, options.num_inference_steps);
        if curve == Curve::Karras {
            levels.timesteps.iter_mut().for_each(|t| *t = t.round_ties_even());
        }
    }
    Ok(levels)
}

/// The levels half way in the logarithm, by torch.
pub(super) fn middles(a: &[f32], b: &[f32]) -> Vec<f32> {
    let log = |sigmas: &[f32]| Tensor::from_slice(sigmas).log();
    to_vec(&log(a).lerp(&log(b), 0.5).exp())
}

/// The timesteps of the levels, with those of the middles between them.
pub(super) fn interleaved(levels: &Levels, sigmas_interpol: &[f32]) -> Vec<f64> {
    let middles = sigmas_interpol.iter().map(|&sigma| f64::from(sigma_to_t_float(sigma, &levels.log_sigmas)));
    let pairs = levels.timesteps.iter().zip(middles).flat_map(|(&t, middle)| [t, middle]);
    // the last step ends at no noise and has no middle
    pairs.take(levels.timesteps.len() * 2 - 1).collect()
}

impl Scheduler for Kdpm2DiscreteScheduler {
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
        let sigmas = if step.is_multiple_of(2) { &self.sigmas } else { &self.sigmas_interpol };
        scale(sample, sigmas[step / 2])
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor {
        // a step in progress counts as the next, as in diffusers
        add_noise(original, noise, self.sigmas[step.div_ceil(2)])
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, _: &mut NoiseSource) -> Result<Tensor> {
        let (sigma, middle, next) = (self.sigmas[step / 2], self.sigmas_interpol[step / 2], self.sigmas[step / 2 + 1]);
        let (at, to) = if self.sample.is_none() { (sigma, middle) } else { (middle, next) };
        let pred_original_sample = original_at_sigma(self.prediction_type, model_output, sample, at);
        let derivative = (sample - pred_original_sample) / f64::from(at);
        let dt = f64::from(to - sigma);
        match self.sample.take() {
            None => {
                self.sample = Some(sample.shallow_clone());
                Ok(sample + derivative * dt)
            }
            Some(begin) => Ok(begin + derivative * dt),
        }
    }
}
