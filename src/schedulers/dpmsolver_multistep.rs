//! DPM-Solver++ and its SDE form with several steps' memory: DPM++ 2M, 2M SDE, 3M SDE. Follows diffusers'
//! `scheduling_dpmsolver_multistep.py`.

use tch::{Kind, Tensor};

use super::config::{AlgorithmType, BetaSchedule, FinalSigmasType, PredictionType, SchedulerConfig};
use super::dpmsolver::Solver;
use super::prediction::{Bounds, epsilon_at, original_at};
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod};
use super::sigmas::{Curve, curve};
use super::solver::{History, Point, SolverLevels, add_noise, alpha_and_sigma, last_timestep, solver_timesteps};
use super::{NoiseSource, Scheduler, StepOptions, refuse_timesteps_beside_curve};
use crate::error::{Error, Result};

pub(super) struct DpmSolverMultistepScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    prediction_type: PredictionType,
    bounds: Bounds,
    solver: Solver,
    final_steps: FinalSteps,
    outputs: History,
}

impl DpmSolverMultistepScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let solver = Solver::new(config)?;
        if solver.algorithm == AlgorithmType::SdeDpmSolver && solver.order == 3 {
            let message = "scheduler_config.json: sde-dpmsolver has no third order";
            return Err(Error::setup("unsupported_model", message).remedy("set `solver_order` to 2"));
        }
        let curve = curve(config, true)?;
        refuse_timesteps_beside_curve(options, curve)?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Nearly);
        let timesteps = match &options.timesteps {
            Some(list) => list.iter().map(|&t| t as f64).collect(),
            None => solver_timesteps(config, steps, last_timestep(config, &alphas_cumprod)),
        };
        let rounds = config.beta_schedule != Some(BetaSchedule::SquaredcosCapV2);
        let round = |curve| matches!(curve, Curve::Karras | Curve::Lu) && rounds;
        let levels = SolverLevels::new(config, &alphas_cumprod, timesteps, steps, curve, round);
        let sigmas = levels.sigmas_to(levels.final_sigma(config));
        Ok(DpmSolverMultistepScheduler {
            final_steps: FinalSteps::new(config, levels.timesteps.len()),
            timesteps: levels.timesteps,
            sigmas,
            prediction_type: config.prediction_type(),
            bounds: Bounds::thresholding(config),
            solver,
            outputs: History::new(solver.order),
        })
    }

    /// The clean sample, or the noise, as the solver wants it.
    fn convert(&self, model_output: &Tensor, step: usize, sample: &Tensor) -> Tensor {
        let at = alpha_and_sigma(self.sigmas[step]);
        if self.solver.predicts_original() {
            return self.bounds.apply(original_at(self.prediction_type, model_output, sample, at));
        }
        let epsilon = epsilon_at(self.prediction_type, model_output, sample, at);
        let Bounds::Threshold(..) = self.bounds else { return epsilon };
        let original = self.bounds.apply(original_at(PredictionType::Epsilon, &epsilon, sample, at));
        epsilon_at(PredictionType::Sample, &original, sample, at)
    }
}

impl Scheduler for DpmSolverMultistepScheduler {
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
        let output = self.convert(model_output, step, sample);
        let kind = output.kind();
        self.outputs.push(output);
        let sample = sample.to_kind(Kind::Float);
        let noise = if self.solver.adds_noise() { Some(noise.randn_like(&sample)?) } else { None };
        let order = self.final_steps.order(step, self.outputs.len());
        let points = |step: usize| Point::new(self.sigmas[step]);
        let next = multistep(&self.solver, order, step, points, &self.outputs, &sample, noise.as_ref());
        Ok(next.to_kind(kind))
    }
}

/// How the order falls towards the end of a run.
pub(super) struct FinalSteps {
    steps: usize,
    /// The last step is of first order.
    first_order_last: bool,
    /// The last but one is at most of second.
    second_order_before: bool,
}

impl FinalSteps {
    pub(super) fn new(config: &SchedulerConfig, steps: usize) -> Self {
        let lower = config.lower_order_final.unwrap_or(true) && steps < 15;
        let first_order_last =
            config.euler_at_final.unwrap_or(false) || lower || config.final_sigmas_type() == FinalSigmasType::Zero;
        FinalSteps { steps, first_order_last, second_order_before: lower }
    }

    /// The order of `step` where so many predictions are at hand.
    pub(super) fn order(&self, step: usize, predictions: usize) -> usize {
        if self.first_order_last && step + 1 == self.steps {
            1
        } else if self.second_order_before && step + 2 == self.steps {
            predictions.min(2)
        } else {
            predictions
        }
    }
}

/// One step of that order from the levels and predictions so far.
pub(super) fn multistep(
    solver: &Solver,
    order: usize,
    step: usize,
    point: impl Fn(usize) -> Point,
    outputs: &History,
    sample: &Tensor,
    noise: Option<&Tensor>,
) -> Tensor {
    let (t, s0) = (point(step + 1), point(step));
    let m0 = outputs.ago(0);
    if order == 1 {
        return solver.first_order(t, s0, sample, m0, noise);
    }
    let s1 = point(step - 1);
    let (h, h_0) = (t.lambda - s0.lambda, s0.lambda - s1.lambda);
    let r0 = h_0 / h;
    let d1_0 = (m0 - outputs.ago(1)) * f64::from(1.0 / r0);
    if order == 2 {
        return solver.second_order((t, s0), sample, (m0, &d1_0), noise);
    }
    let r1 = (s1.lambda - point(step - 2).lambda) / h;
    let d1_1 = (outputs.ago(1) - outputs.ago(2)) * f64::from(1.0 / r1);
    let d1 = &d1_0 + (&d1_0 - &d1_1) * f64::from(r0 / (r0 + r1));
    let d2 = (&d1_0 - &d1_1) * f64::from(1.0 / (r0 + r1));
    solver.third_order((t, s0), sample, (m0, &d1, Some(&d2)), noise)
}
