//! Diffusion exponential integrator, arXiv 2204.13902, log-rho multistep. Follows diffusers'
//! `scheduling_deis_multistep.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig};
use super::prediction::{Bounds, epsilon_at, original_at};
use super::scalar::{exp, numpy_ln, weighted_sum};
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod};
use super::sigmas::{Curve, curve};
use super::solver::{History, Point, SolverLevels, add_noise, alpha_and_sigma, solver_timesteps};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

pub(super) struct DeisMultistepScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    prediction_type: PredictionType,
    bounds: Bounds,
    lower_order_final: bool,
    outputs: History,
}

impl DeisMultistepScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let order = config.solver_order.unwrap_or(2);
        if !(1..=3).contains(&order) {
            let message = "scheduler_config.json: `solver_order` must be from 1 to 3";
            return Err(Error::setup("unsupported_model", message));
        }
        let curve = curve(config, false)?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Ignored);
        let timesteps = solver_timesteps(config, steps, alphas_cumprod.len());
        let levels =
            SolverLevels::new(config, &alphas_cumprod, timesteps, steps, curve, |curve| curve == Curve::Karras);
        // on a curve the last step goes nowhere
        let last = match curve {
            Some(_) => levels.sigmas[levels.sigmas.len() - 1] as f32,
            None => levels.train_sigmas[0],
        };
        let count = levels.timesteps.len();
        Ok(DeisMultistepScheduler {
            sigmas: levels.sigmas_to(last),
            timesteps: levels.timesteps,
            prediction_type: config.prediction_type(),
            bounds: Bounds::thresholding(config),
            lower_order_final: config.lower_order_final.unwrap_or(true) && count < 15,
            outputs: History::new(order),
        })
    }

    /// The order of `step`, which falls towards the end of a short run.
    fn order(&self, step: usize) -> usize {
        let left = self.timesteps.len() - step;
        if self.lower_order_final { self.outputs.len().min(left) } else { self.outputs.len() }
    }
}

impl Scheduler for DeisMultistepScheduler {
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
        add_noise(original, noise, self.sigmas[step])
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, _: &mut NoiseSource) -> Result<Tensor> {
        let at = alpha_and_sigma(self.sigmas[step]);
        let original = self.bounds.apply(original_at(self.prediction_type, model_output, sample, at));
        self.outputs.push(epsilon_at(PredictionType::Sample, &original, sample, at));
        let point = |step: usize| Point::new(self.sigmas[step]);
        let (t, s0) = (point(step + 1), point(step));
        let order = self.order(step);
        if order == 1 {
            let factor = -(t.sigma * (exp(t.lambda - s0.lambda) - 1.0));
            return Ok(weighted_sum(&[(t.alpha / s0.alpha, sample), (factor, self.outputs.ago(0))]));
        }
        let rho = |point: Point| point.sigma / point.alpha;
        let mut levels = vec![rho(s0), rho(point(step - 1))];
        if order == 3 {
            levels.push(rho(point(step - 2)));
        }
        let terms = factors(rho(t), &levels);
        let mut sum = sample / f64::from(s0.alpha);
        for (ago, factor) in terms.into_iter().enumerate() {
            sum += self.outputs.ago(ago) * f64::from(factor);
        }
        Ok(sum * f64::from(t.alpha))
    }
}

/// What the predictions at these levels, the newest first, are multiplied with: the integral from the first level to `t`
/// of the polynomial in the level's logarithm that is 1 at one of them and 0 at the others. In float32, whose noise in
/// these differences is larger than what a solver may be off.
fn factors(t: f32, levels: &[f32]) -> Vec<f32> {
    let count = levels.len();
    (0..count)
        .map(|i| {
            let others: Vec<f32> = (1..count).map(|j| levels[(i + j) % count]).collect();
            antiderivative(t, levels[i], &others) - antiderivative(levels[0], levels[i], &others)
        })
        .collect()
}

fn antiderivative(t: f32, b: f32, others: &[f32]) -> f32 {
    let (log_t, log_b) = (numpy_ln(t), numpy_ln(b));
    match *others {
        [c] => {
            let c = numpy_ln(c);
            t * (-c + log_t - 1.0) / (log_b - c)
        }
        [c, d] => {
            let (c, d) = (numpy_ln(c), numpy_ln(d));
            let numerator = t * (c * (d - log_t + 1.0) - d * log_t + d + log_t * log_t - 2.0 * log_t + 2.0);
            numerator / ((log_b - c) * (log_b - d))
        }
        _ => unreachable!("the order is at most 3"),
    }
}
