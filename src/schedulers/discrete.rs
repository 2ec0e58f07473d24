//! What the classes that follow k-diffusion share: noise levels at evenly spread timesteps or on a curve, samples that are
//! `original + sigma * noise`.

use tch::Tensor;

use super::StepOptions;
use super::config::{SchedulerConfig, TimestepSpacing};
use super::scalar::sqrt;
use super::schedule::{interp, rounded, sigmas_of, spaced_timesteps};
use super::sigmas::{Curve, ends, logarithms, sigma_to_t};

/// Timesteps and their noise levels, from the noisiest down; the last level of the run is not yet among them.
pub(super) struct Levels {
    pub(super) timesteps: Vec<f64>,
    pub(super) sigmas: Vec<f64>,
    /// Of all training timesteps.
    pub(super) train_sigmas: Vec<f32>,
    pub(super) log_sigmas: Vec<f32>,
}

impl Levels {
    /// At the timesteps that the options list, else at spread ones. `to_float` is float32's rounding for classes that
    /// keep timesteps so.
    pub(super) fn new(
        config: &SchedulerConfig,
        options: &StepOptions,
        alphas_cumprod: &[f32],
        to_float: fn(f64) -> f64,
    ) -> Self {
        let train_sigmas = sigmas_of(alphas_cumprod);
        let timesteps: Vec<f64> = match &options.timesteps {
            Some(list) => list.iter().map(|&t| t as f64).collect(),
            None => spaced_timesteps(spacing(config), config, options.num_inference_steps),
        };
        let timesteps: Vec<f64> = timesteps.into_iter().map(to_float).collect();
        let sigmas = timesteps.iter().map(|&t| interp(t, &train_sigmas)).collect();
        Levels { timesteps, sigmas, log_sigmas: logarithms(&train_sigmas), train_sigmas }
    }

    /// Puts `steps` levels of the curve in the place of these; its ends are the configuration's or those of the levels.
    pub(super) fn follow(&mut self, curve: Curve, config: &SchedulerConfig, steps: usize) {
        self.set(curve.sigmas(ends(config, &self.sigmas).0, ends(config, &self.sigmas).1, steps));
    }

    /// The same for the classes whose Karras curve does not look at the configuration.
    pub(super) fn follow_own_karras(&mut self, curve: Curve, config: &SchedulerConfig, steps: usize) {
        match curve {
            Curve::Karras => self.set(curve.sigmas(self.sigmas[self.sigmas.len() - 1], self.sigmas[0], steps)),
            _ => self.follow(curve, config, steps),
        }
    }

    fn set(&mut self, sigmas: Vec<f64>) {
        self.timesteps = sigmas.iter().map(|&sigma| sigma_to_t(sigma, &self.log_sigmas)).collect();
        self.sigmas = sigmas;
    }

    /// The levels in float32, with the one where the run ends.
    pub(super) fn sigmas_to(&self, last: f32) -> Vec<f32> {
        self.sigmas.iter().map(|&sigma| sigma as f32).chain([last]).collect()
    }
}

/// The spacing; these classes' default is `linspace`.
pub(super) fn spacing(config: &SchedulerConfig) -> TimestepSpacing {
    config.timestep_spacing.unwrap_or(TimestepSpacing::Linspace)
}

/// float32's rounding of a timestep.
pub(super) fn float(t: f64) -> f64 {
    t as f32 as f64
}

/// The factor of the first latents.
pub(super) fn init_noise_sigma(sigmas: &[f32], spacing: TimestepSpacing) -> f32 {
    let max_sigma = sigmas.iter().copied().fold(f32::MIN, f32::max);
    match spacing {
        TimestepSpacing::Linspace | TimestepSpacing::Trailing => max_sigma,
        TimestepSpacing::Leading => sqrt(max_sigma * max_sigma + 1.0),
    }
}

/// The UNet's input: a sample of the variance that it was trained on.
pub(super) fn scale(sample: &Tensor, sigma: f32) -> Tensor {
    sample / f64::from(sqrt(sigma * sigma + 1.0))
}

pub(super) fn add_noise(original: &Tensor, noise: &Tensor, sigma: f32) -> Tensor {
    original + noise * rounded(sigma, original.kind())
}

/// Each but the first twice: a method of second order looks at a level twice.
pub(super) fn doubled<T: Copy>(values: &[T]) -> Vec<T> {
    values.iter().take(1).chain(values.iter().skip(1).flat_map(|value| [value, value])).copied().collect()
}
