//! Linear multistep method on the probability-flow ODE. Follows diffusers' `scheduling_lms_discrete.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::discrete::{Levels, add_noise, float, init_noise_sigma, scale, spacing};
use super::prediction::original_at_sigma;
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod};
use super::sigmas::curve;
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

const ORDER: usize = 4;

pub(super) struct LmsDiscreteScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
    /// The last ones, the newest first.
    derivatives: Vec<Tensor>,
}

impl LmsDiscreteScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Ignored);
        let mut levels = Levels::new(config, options, &alphas_cumprod, float);
        if let Some(curve) = curve(config, false)? {
            levels.follow_own_karras(curve, config, options.num_inference_steps);
        }
        let sigmas = levels.sigmas_to(0.0);
        Ok(LmsDiscreteScheduler {
            timesteps: levels.timesteps.into_iter().map(float).collect(),
            init_noise_sigma: init_noise_sigma(&sigmas, spacing(config)),
            sigmas,
            prediction_type: config.prediction_type(),
            derivatives: Vec::new(),
        })
    }
}

impl Scheduler for LmsDiscreteScheduler {
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

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, _: &mut NoiseSource) -> Result<Tensor> {
        let sigma = self.sigmas[step];
        let pred_original_sample = original_at_sigma(self.prediction_type, model_output, sample, sigma);
        self.derivatives.insert(0, (sample - pred_original_sample) / f64::from(sigma));
        self.derivatives.truncate(ORDER);
        // a run that begins in the middle has fewer derivatives than its order says; diffusers does not mind
        let order = ORDER.min(step + 1);
        let levels: Vec<f64> = (0..order).map(|k| f64::from(self.sigmas[step - k])).collect();
        let mut sum = sample.shallow_clone();
        for (i, derivative) in self.derivatives.iter().take(order).enumerate() {
            sum += derivative * lms_coefficient(&levels, i, f64::from(self.sigmas[step + 1]));
        }
        Ok(sum)
    }
}

/// The integral from `levels[0]` to `end` of the polynomial that is 1 at the level `i` and 0 at the others. Its degree is
/// at most 3, for which two points of Gauss and Legendre are exact.
fn lms_coefficient(levels: &[f64], i: usize, end: f64) -> f64 {
    let polynomial = |x: f64| -> f64 {
        let others = levels.iter().enumerate().filter(|(k, _)| *k != i);
        others.map(|(_, level)| (x - level) / (levels[i] - level)).product()
    };
    let (middle, half) = ((levels[0] + end) / 2.0, (end - levels[0]) / 2.0);
    let point = half / 3f64.sqrt();
    half * (polynomial(middle - point) + polynomial(middle + point))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coefficients_on_even_levels_are_those_of_adams_and_bashforth() {
        let levels = [0.0, -1.0, -2.0, -3.0];
        let ours: Vec<f64> = (0..4).map(|i| 24.0 * lms_coefficient(&levels, i, 1.0)).collect();
        for (ours, expected) in ours.iter().zip([55.0, -59.0, 37.0, -9.0]) {
            assert!((ours - expected).abs() < 1e-12, "{ours} {expected}");
        }
    }
}
