//! DPM-Solver++ whose every step of higher order is made of several evaluations: DPM++ 2S. Follows diffusers'
//! `scheduling_dpmsolver_singlestep.py`.

use tch::Tensor;

use super::config::{AlgorithmType, FinalSigmasType, PredictionType, SchedulerConfig, SolverType};
use super::dpmsolver::Solver;
use super::prediction::{Bounds, epsilon_at, original_at};
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod};
use super::sigmas::{Curve, curve};
use super::solver::{History, Point, SolverLevels, add_noise, alpha_and_sigma, last_timestep, linspaced};
use super::{NoiseSource, Scheduler, StepOptions, refuse_timesteps_beside_curve};
use crate::error::{Error, Result};

pub(super) struct DpmSolverSinglestepScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    prediction_type: PredictionType,
    bounds: Bounds,
    solver: Solver,
    /// The order of each step.
    orders: Vec<usize>,
    outputs: History,
    /// Where the steps of one evaluation after the other began.
    sample: Option<Tensor>,
}

impl DpmSolverSinglestepScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let solver = Solver::new(config)?;
        if solver.algorithm == AlgorithmType::SdeDpmSolver {
            let message = "scheduler_config.json: the singlestep solver has no sde-dpmsolver";
            return Err(Error::setup("unsupported_model", message).remedy("set `algorithm_type` to sde-dpmsolver++"));
        }
        let bounds = Bounds::thresholding(config);
        if !solver.predicts_original() && matches!(bounds, Bounds::Threshold(..)) {
            let message = "scheduler_config.json: the singlestep dpmsolver has no thresholding";
            return Err(Error::setup("unsupported_model", message).remedy("set `thresholding` to false"));
        }
        let curve = curve(config, false)?;
        refuse_timesteps_beside_curve(options, curve)?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Ignored);
        let timesteps = match &options.timesteps {
            Some(list) => list.iter().map(|&t| t as f64).collect(),
            None => linspaced(steps, last_timestep(config, &alphas_cumprod) as f64 - 1.0),
        };
        let round = |curve| curve == Curve::Karras;
        let levels = SolverLevels::new(config, &alphas_cumprod, timesteps, steps, curve, round);
        Ok(DpmSolverSinglestepScheduler {
            sigmas: levels.sigmas_to(levels.final_sigma(config)),
            timesteps: levels.timesteps,
            prediction_type: config.prediction_type(),
            bounds,
            solver,
            orders: orders(config, solver.order, steps),
            outputs: History::new(solver.order),
            sample: None,
        })
    }
}

/// The order of each step: 1, 2, 1, 2, ... or 1, 2, 3, ..., lower at the end where the steps do not come out even or the
/// run ends at no noise.
fn orders(config: &SchedulerConfig, order: usize, steps: usize) -> Vec<usize> {
    let to_zero = config.final_sigmas_type() == FinalSigmasType::Zero;
    let lower_order_final = config.lower_order_final.unwrap_or(false) || !steps.is_multiple_of(order) || to_zero;
    let mut orders: Vec<usize> = (0..steps).map(|step| step % order + 1).collect();
    if lower_order_final && steps.is_multiple_of(order) && order > 1 {
        // the last round of evaluations is one lower: 1, 1 or 1, 2, 1
        orders[steps - 1] = 1;
    }
    if to_zero {
        orders[steps - 1] = 1;
    }
    orders
}

impl Scheduler for DpmSolverSinglestepScheduler {
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

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor> {
        let at = alpha_and_sigma(self.sigmas[step]);
        self.outputs.push(if self.solver.predicts_original() {
            self.bounds.apply(original_at(self.prediction_type, model_output, sample, at))
        } else {
            epsilon_at(self.prediction_type, model_output, sample, at)
        });
        let noise = if self.solver.adds_noise() { Some(noise.randn_like(self.outputs.ago(0))?) } else { None };
        // a run that begins in the middle has no memory yet
        let order = self.orders[step].min(self.outputs.len());
        if order == 1 {
            self.sample = Some(sample.shallow_clone());
        }
        let sample = self.sample.as_ref().expect("the first step is of first order");
        Ok(self.update(order, step, sample, noise.as_ref()))
    }
}

impl DpmSolverSinglestepScheduler {
    /// The sample after `order` evaluations, from where they began.
    fn update(&self, order: usize, step: usize, sample: &Tensor, noise: Option<&Tensor>) -> Tensor {
        let point = |step: usize| Point::new(self.sigmas[step]);
        let m = |ago| self.outputs.ago(ago);
        let (t, s0) = (point(step + 1), point(step));
        match order {
            1 => self.solver.first_order(t, s0, sample, m(0), noise),
            2 => {
                let s1 = point(step - 1);
                let r0 = (s0.lambda - s1.lambda) / (t.lambda - s1.lambda);
                let d1 = (m(0) - m(1)) * f64::from(1.0 / r0);
                self.solver.second_order((t, s1), sample, (m(1), &d1), noise)
            }
            _ => {
                let (s1, s2) = (point(step - 1), point(step - 2));
                let h = t.lambda - s2.lambda;
                let (r0, r1) = ((s0.lambda - s2.lambda) / h, (s1.lambda - s2.lambda) / h);
                let d1_0 = (m(1) - m(2)) * f64::from(1.0 / r1);
                let d1_1 = (m(0) - m(2)) * f64::from(1.0 / r0);
                if self.solver.solver_type == SolverType::Midpoint {
                    return self.solver.third_order((t, s2), sample, (m(2), &d1_1, None), noise);
                }
                let d1 = (&d1_0 * f64::from(r0) - &d1_1 * f64::from(r1)) / f64::from(r0 - r1);
                let d2 = (&d1_1 - &d1_0) * 2.0 / f64::from(r0 - r1);
                self.solver.third_order((t, s2), sample, (m(2), &d1, Some(&d2)), noise)
            }
        }
    }
}
