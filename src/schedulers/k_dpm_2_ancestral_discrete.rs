//! DPM-Solver-2 as k-diffusion has it, with fresh noise at every step. Follows diffusers'
//! `scheduling_k_dpm_2_ancestral_discrete.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::discrete::{add_noise, init_noise_sigma, scale, spacing};
use super::k_dpm_2_discrete::{interleaved, kdpm2_levels, middles};
use super::prediction::{original_at_sigma, refuse_sample_prediction};
use super::schedule::to_vec;
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

pub(super) struct Kdpm2AncestralDiscreteScheduler {
    /// The begin of a step and its middle by turns.
    timesteps: Vec<f64>,
    /// The level where each step begins, and where the run ends.
    sigmas: Vec<f32>,
    /// The level in the middle of each step.
    sigmas_interpol: Vec<f32>,
    /// How far each step goes before noise is added, and how much is.
    sigmas_down: Vec<f32>,
    sigmas_up: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
    /// Where the step in progress began.
    sample: Option<Tensor>,
}

impl Kdpm2AncestralDiscreteScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let prediction_type = refuse_sample_prediction(config, "DPM2 ancestral")?;
        let levels = kdpm2_levels(config, options)?;
        let sigmas = levels.sigmas_to(0.0);
        let steps = sigmas.len() - 1;
        let (from, to) = (Tensor::from_slice(&sigmas[..steps]).square(), Tensor::from_slice(&sigmas[1..]).square());
        let up = (&to * (&from - &to) / from).sqrt();
        let down = (to - up.square()).sqrt();
        let (sigmas_up, sigmas_down) = (to_vec(&up), to_vec(&down));
        let mut sigmas_interpol = middles(&sigmas[..steps], &sigmas_down);
        sigmas_interpol[steps - 1] = 0.0;
        Ok(Kdpm2AncestralDiscreteScheduler {
            timesteps: interleaved(&levels, &sigmas_interpol),
            init_noise_sigma: init_noise_sigma(&sigmas, spacing(config)),
            sigmas,
            sigmas_interpol,
            sigmas_down,
            sigmas_up,
            prediction_type,
            sample: None,
        })
    }
}

impl Scheduler for Kdpm2AncestralDiscreteScheduler {
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

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor> {
        let (sigma, middle) = (self.sigmas[step / 2], self.sigmas_interpol[step / 2]);
        let at = if self.sample.is_none() { sigma } else { middle };
        let pred_original_sample = original_at_sigma(self.prediction_type, model_output, sample, at);
        let derivative = (sample - pred_original_sample) / f64::from(at);
        match self.sample.take() {
            None => {
                self.sample = Some(sample.shallow_clone());
                Ok(sample + derivative * f64::from(middle - sigma))
            }
            Some(begin) => {
                let prev_sample = begin + derivative * f64::from(self.sigmas_down[step / 2] - sigma);
                Ok(prev_sample + noise.randn_like(model_output)? * f64::from(self.sigmas_up[step / 2]))
            }
        }
    }
}
