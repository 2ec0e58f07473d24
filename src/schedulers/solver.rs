//! What the DPM, DEIS and UniPC solvers share: integer timesteps of which one more is spread than is run, samples that
//! are `alpha * original + sigma * noise`, and points on the way counted in half the logarithm of the signal-to-noise
//! ratio.

use tch::Tensor;

use super::config::{FinalSigmasType, SchedulerConfig, TimestepSpacing};
use super::scalar::{ln, sqrt};
use super::schedule::{interp, linspace, rounded, sigmas_of};
use super::sigmas::{Curve, ends, even_in_logarithm, logarithms, sigma_to_t};

/// A noise level.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) alpha: f32,
    pub(super) sigma: f32,
    pub(super) lambda: f32,
}

impl Point {
    /// Of a sample of unit variance, from the ratio of noise to signal.
    pub(super) fn new(sigma: f32) -> Self {
        let (alpha, sigma) = alpha_and_sigma(sigma);
        Point { alpha, sigma, lambda: ln(alpha) - ln(sigma) }
    }

    /// Of a sample whose signal keeps its size.
    pub(super) fn of_edm(sigma: f32) -> Self {
        Point { alpha: 1.0, sigma, lambda: 0.0 - ln(sigma) }
    }
}

pub(super) fn alpha_and_sigma(sigma: f32) -> (f32, f32) {
    let alpha = 1.0 / sqrt(sigma * sigma + 1.0);
    (alpha, sigma * alpha)
}

pub(super) fn add_noise(original: &Tensor, noise: &Tensor, sigma: f32) -> Tensor {
    // the level in the dtype of the samples, as diffusers has it
    let (alpha, sigma) = alpha_and_sigma(rounded(sigma, original.kind()) as f32);
    original * f64::from(alpha) + noise * f64::from(sigma)
}

/// `steps` timesteps, the noisiest first; at the noisy end as many training timesteps are left out as `last` is below
/// their number.
pub(super) fn solver_timesteps(config: &SchedulerConfig, steps: usize, last: usize) -> Vec<f64> {
    match config.timestep_spacing.unwrap_or(TimestepSpacing::Linspace) {
        TimestepSpacing::Linspace => linspaced(steps, last as f64 - 1.0),
        TimestepSpacing::Leading => {
            let ratio = (last / (steps + 1)) as i64;
            (1..=steps as i64).rev().map(|i| (i * ratio + config.steps_offset()) as f64).collect()
        }
        TimestepSpacing::Trailing => {
            let ratio = config.num_train_timesteps() as f64 / steps as f64;
            let length = (-(last as f64) / -ratio).ceil() as usize;
            let delta = (last as f64 - ratio) - last as f64;
            (0..length).map(|i| (last as f64 + i as f64 * delta).round_ties_even() - 1.0).collect()
        }
    }
}

/// One more than `steps` evenly from `top` down to 0, of which the 0 is not run.
pub(super) fn linspaced(steps: usize, top: f64) -> Vec<f64> {
    let mut timesteps = linspace(0.0, top, steps + 1);
    timesteps.remove(0);
    timesteps.into_iter().rev().map(f64::round_ties_even).collect()
}

/// How many training timesteps remain where those of least noise, below `lambda_min_clipped`, are left out.
pub(super) fn last_timestep(config: &SchedulerConfig, alphas_cumprod: &[f32]) -> usize {
    let Some(min) = config.lambda_min_clipped else { return alphas_cumprod.len() };
    let lambda = |alpha: f32| ln(sqrt(alpha)) - ln(sqrt(1.0 - alpha));
    let clipped = alphas_cumprod.iter().rev().take_while(|alpha| f64::from(lambda(**alpha)) < min).count();
    alphas_cumprod.len() - clipped
}

/// Timesteps and their noise levels; the last level of the run is not yet among them.
pub(super) struct SolverLevels {
    pub(super) timesteps: Vec<f64>,
    pub(super) sigmas: Vec<f64>,
    pub(super) train_sigmas: Vec<f32>,
}

impl SolverLevels {
    /// At these timesteps, or on a curve over all training sigmas; `round` says whether timesteps found on that curve
    /// are rounded, and not cut, to integers.
    pub(super) fn new(
        config: &SchedulerConfig,
        alphas_cumprod: &[f32],
        timesteps: Vec<f64>,
        steps: usize,
        curve: Option<Curve>,
        round: impl Fn(Curve) -> bool,
    ) -> Self {
        let train_sigmas = sigmas_of(alphas_cumprod);
        let Some(curve) = curve else {
            let sigmas = timesteps.iter().map(|&t| interp(t, &train_sigmas)).collect();
            return SolverLevels { timesteps, sigmas, train_sigmas };
        };
        let falling: Vec<f64> = train_sigmas.iter().rev().map(|&sigma| f64::from(sigma)).collect();
        let log_sigmas = logarithms(&train_sigmas);
        let sigmas = if curve == Curve::Lu {
            // between float32's logarithms of the ends, whatever the configuration says of ends
            even_in_logarithm(log_sigmas[0].into(), log_sigmas[log_sigmas.len() - 1].into(), steps)
        } else {
            let (sigma_min, sigma_max) = ends(config, &falling);
            curve.sigmas(sigma_min, sigma_max, steps)
        };
        let timesteps = sigmas.iter().map(|&sigma| sigma_to_t(sigma, &log_sigmas));
        let to_integer = if round(curve) { f64::round_ties_even } else { f64::trunc };
        SolverLevels { timesteps: timesteps.map(to_integer).collect(), sigmas, train_sigmas }
    }

    /// The levels in float32, with the one where the run ends.
    pub(super) fn sigmas_to(&self, last: f32) -> Vec<f32> {
        self.sigmas.iter().map(|&sigma| sigma as f32).chain([last]).collect()
    }

    /// Where a run ends that ends at the least training sigma or at none.
    pub(super) fn final_sigma(&self, config: &SchedulerConfig) -> f32 {
        match config.final_sigmas_type() {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => self.train_sigmas[0],
        }
    }
}

/// The model's last predictions, the newest last.
pub(super) struct History {
    outputs: Vec<Tensor>,
    order: usize,
}

impl History {
    pub(super) fn new(order: usize) -> Self {
        History { outputs: Vec::new(), order }
    }

    pub(super) fn push(&mut self, output: Tensor) {
        if self.outputs.len() == self.order {
            drop(self.outputs.remove(0));
        }
        self.outputs.push(output);
    }

    /// How many there are, at most the solver's order.
    pub(super) fn len(&self) -> usize {
        self.outputs.len()
    }

    /// The prediction so many steps ago; 0 is the newest.
    pub(super) fn ago(&self, steps: usize) -> &Tensor {
        &self.outputs[self.outputs.len() - 1 - steps]
    }
}
