//! Unified predictor-corrector, arXiv 2302.04867. Follows diffusers' `scheduling_unipc_multistep.py`.

use tch::Tensor;

use super::config::{FinalSigmasType, PredictionType, SchedulerConfig, SolverType};
use super::prediction::{Bounds, epsilon_at, original_at};
use super::scalar::{expm1, weighted_sum};
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod, to_vec};
use super::sigmas::{Curve, curve};
use super::solver::{History, Point, SolverLevels, add_noise, alpha_and_sigma, solver_timesteps};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

pub(super) struct UniPcMultistepScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    prediction_type: PredictionType,
    bounds: Bounds,
    solver_order: usize,
    /// Works with the predicted clean sample; else with the predicted noise.
    predict_x0: bool,
    is_bh1: bool,
    lower_order_final: bool,
    /// Steps after which the sample is not corrected.
    disable_corrector: Vec<usize>,
    outputs: History,
    /// The sample of the step before, and that step's order.
    last: Option<(Tensor, usize)>,
}

impl UniPcMultistepScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let solver_order = config.solver_order.unwrap_or(2);
        if !(1..=4).contains(&solver_order) {
            let message = "scheduler_config.json: `solver_order` must be from 1 to 4";
            return Err(Error::setup("unsupported_model", message));
        }
        let curve = curve(config, false)?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Nearly);
        let timesteps = solver_timesteps(config, steps, alphas_cumprod.len());
        let levels =
            SolverLevels::new(config, &alphas_cumprod, timesteps, steps, curve, |curve| curve == Curve::Karras);
        let last = match (curve, config.final_sigmas_type()) {
            (Some(_), FinalSigmasType::SigmaMin) => levels.sigmas[levels.sigmas.len() - 1] as f32,
            _ => levels.final_sigma(config),
        };
        Ok(UniPcMultistepScheduler {
            sigmas: levels.sigmas_to(last),
            timesteps: levels.timesteps,
            prediction_type: config.prediction_type(),
            bounds: Bounds::thresholding(config),
            solver_order,
            predict_x0: config.predict_x0.unwrap_or(true),
            is_bh1: config.solver_type == Some(SolverType::Bh1),
            lower_order_final: config.lower_order_final.unwrap_or(true),
            disable_corrector: config.disable_corrector.clone().unwrap_or_default(),
            outputs: History::new(solver_order),
            last: None,
        })
    }

    fn convert(&self, model_output: &Tensor, step: usize, sample: &Tensor) -> Tensor {
        let at = alpha_and_sigma(self.sigmas[step]);
        if self.predict_x0 {
            self.bounds.apply(original_at(self.prediction_type, model_output, sample, at))
        } else {
            epsilon_at(self.prediction_type, model_output, sample, at)
        }
    }

    /// The system of equations for a move from level `from` to level `to` of that order.
    fn bh(&self, from: usize, to: usize, order: usize) -> Bh {
        let point = |step: usize| Point::new(self.sigmas[step]);
        let (t, s0) = (point(to), point(from));
        let h = t.lambda - s0.lambda;
        let mut rks: Vec<f32> = (1..order).map(|i| (point(from - i).lambda - s0.lambda) / h).collect();
        rks.push(1.0);
        let hh = if self.predict_x0 { -h } else { h };
        let h_phi_1 = expm1(hh);
        let b_h = if self.is_bh1 { hh } else { expm1(hh) };
        let (mut h_phi_k, mut factorial) = (h_phi_1 / hh - 1.0, 1.0f32);
        let mut b = Vec::new();
        for i in 1..=order {
            b.push(h_phi_k * factorial / b_h);
            factorial *= (i + 1) as f32;
            h_phi_k = h_phi_k / hh - 1.0 / factorial;
        }
        let (sample, scale) =
            if self.predict_x0 { (t.sigma / s0.sigma, t.alpha) } else { (t.alpha / s0.alpha, t.sigma) };
        Bh { rks, b, sample, m0: -(scale * h_phi_1), scale: scale * b_h }
    }

    /// The predictions before the newest, as differences from it.
    fn differences(&self, bh: &Bh, order: usize) -> Vec<Tensor> {
        let m0 = self.outputs.ago(0);
        (1..order).map(|i| (self.outputs.ago(i) - m0) / f64::from(bh.rks[i - 1])).collect()
    }

    /// The sample at `step`, better than it was predicted, now that the model has seen it.
    fn correct(&self, model_output: &Tensor, step: usize, last_sample: &Tensor, order: usize) -> Tensor {
        let bh = self.bh(step - 1, step, order);
        let rhos = if order == 1 { vec![0.5] } else { bh.solve(order) };
        let m0 = self.outputs.ago(0);
        let mut residual = (model_output - m0) * f64::from(rhos[order - 1]);
        for (difference, rho) in self.differences(&bh, order).iter().zip(&rhos) {
            residual += difference * f64::from(*rho);
        }
        weighted_sum(&[(bh.sample, last_sample), (bh.m0, m0), (-bh.scale, &residual)])
    }

    /// The sample after `step`.
    fn predict(&self, step: usize, sample: &Tensor, order: usize) -> Tensor {
        let bh = self.bh(step, step + 1, order);
        let m0 = self.outputs.ago(0);
        let start = weighted_sum(&[(bh.sample, sample), (bh.m0, m0)]);
        let rhos = match order {
            1 => return start,
            2 => vec![0.5],
            _ => bh.solve(order - 1),
        };
        let differences = self.differences(&bh, order);
        let terms: Vec<(f32, &Tensor)> = rhos.into_iter().zip(&differences).collect();
        start - weighted_sum(&terms) * f64::from(bh.scale)
    }
}

/// What a move of several predictions rests on.
struct Bh {
    /// Where the predictions stand, in units of the move; the last is where it goes.
    rks: Vec<f32>,
    b: Vec<f32>,
    /// Factors of the sample, the newest prediction and what is weighed from the differences.
    sample: f32,
    m0: f32,
    scale: f32,
}

impl Bh {
    /// The weights of the first `count` predictions: the solution of a Vandermonde system in float32 by torch.
    fn solve(&self, count: usize) -> Vec<f32> {
        let rks = Tensor::from_slice(&self.rks[..count]);
        let rows: Vec<Tensor> = (0..count as i64).map(|power| rks.pow_tensor_scalar(power)).collect();
        to_vec(&Tensor::linalg_solve(&Tensor::stack(&rows, 0), &Tensor::from_slice(&self.b[..count]), true))
    }
}

impl Scheduler for UniPcMultistepScheduler {
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
        let output = self.convert(model_output, step, sample);
        let sample = match &self.last {
            Some((last_sample, order)) if !self.disable_corrector.contains(&(step - 1)) => {
                self.correct(&output, step, last_sample, *order)
            }
            _ => sample.shallow_clone(),
        };
        self.outputs.push(output);
        let left = self.timesteps.len() - step;
        let order = if self.lower_order_final { self.solver_order.min(left) } else { self.solver_order };
        let order = order.min(self.outputs.len());
        let next = self.predict(step, &sample, order);
        self.last = Some((sample, order));
        Ok(next)
    }
}
