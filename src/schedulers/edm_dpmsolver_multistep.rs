//! DPM-Solver++ with several steps' memory in the formulation of arXiv 2206.00364. Follows diffusers'
//! `scheduling_edm_dpmsolver_multistep.py`.

use tch::{Kind, Tensor};

use super::config::{AlgorithmType, FinalSigmasType, SchedulerConfig};
use super::discrete::add_noise;
use super::dpmsolver::Solver;
use super::dpmsolver_multistep::{FinalSteps, multistep};
use super::edm::Edm;
use super::prediction::Bounds;
use super::solver::{History, Point};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

pub(super) struct EdmDpmSolverMultistepScheduler {
    edm: Edm,
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    bounds: Bounds,
    solver: Solver,
    final_steps: FinalSteps,
    outputs: History,
}

impl EdmDpmSolverMultistepScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let edm = Edm::new(config, "EDM DPM++ 2M")?;
        let solver = Solver::new(config)?;
        let with_noise = solver.algorithm == AlgorithmType::SdeDpmSolverPlusPlus;
        if !solver.predicts_original() || with_noise && solver.order == 3 {
            let message = "scheduler_config.json: EDM has dpmsolver++, and sde-dpmsolver++ up to `solver_order` 2";
            return Err(Error::setup("unsupported_model", message));
        }
        let mut sigmas = edm.sigmas(options.num_inference_steps, Kind::Float);
        let timesteps = Edm::timesteps(&sigmas);
        sigmas.push(match config.final_sigmas_type() {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => edm.sigma_min(),
        });
        Ok(EdmDpmSolverMultistepScheduler {
            edm,
            final_steps: FinalSteps::new(config, timesteps.len()),
            timesteps,
            sigmas,
            bounds: Bounds::thresholding(config),
            solver,
            outputs: History::new(solver.order),
        })
    }
}

impl Scheduler for EdmDpmSolverMultistepScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.edm.init_noise_sigma()
    }

    fn scale_model_input(&self, sample: &Tensor, step: usize) -> Tensor {
        self.edm.precondition_inputs(sample, self.sigmas[step])
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor {
        add_noise(original, noise, self.sigmas[step])
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, noise: &mut NoiseSource) -> Result<Tensor> {
        let original = self.edm.precondition_outputs(sample, model_output, self.sigmas[step]);
        self.outputs.push(self.bounds.apply(original));
        let noise = if self.solver.adds_noise() { Some(noise.randn_like(self.outputs.ago(0))?) } else { None };
        let order = self.final_steps.order(step, self.outputs.len());
        let point = |step: usize| Point::of_edm(self.sigmas[step]);
        Ok(multistep(&self.solver, order, step, point, &self.outputs, sample, noise.as_ref()))
    }
}
