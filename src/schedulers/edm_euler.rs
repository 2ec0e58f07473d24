//! Euler's method in the formulation of arXiv 2206.00364, with its preconditioning. Follows diffusers'
//! `scheduling_edm_euler.py`.

use tch::{Kind, Tensor};

use super::config::{FinalSigmasType, SchedulerConfig};
use super::discrete::add_noise;
use super::edm::Edm;
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::Result;

pub(super) struct EdmEulerScheduler {
    edm: Edm,
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
}

impl EdmEulerScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let edm = Edm::new(config, "EDM Euler")?;
        let mut sigmas = edm.sigmas(options.num_inference_steps, Kind::Double);
        let timesteps = Edm::timesteps(&sigmas);
        sigmas.push(match config.final_sigmas_type() {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => sigmas[sigmas.len() - 1],
        });
        Ok(EdmEulerScheduler { edm, timesteps, sigmas })
    }
}

impl Scheduler for EdmEulerScheduler {
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

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, _: &mut NoiseSource) -> Result<Tensor> {
        let sigma = self.sigmas[step];
        let sample = sample.to_kind(Kind::Float);
        let pred_original_sample = self.edm.precondition_outputs(&sample, model_output, sigma);
        let derivative = (&sample - pred_original_sample) / f64::from(sigma);
        let dt = self.sigmas[step + 1] - sigma;
        Ok((sample + derivative * f64::from(dt)).to_kind(model_output.kind()))
    }
}
