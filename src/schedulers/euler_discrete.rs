//! Euler's method on the probability-flow ODE, algorithm 2 of arXiv 2206.00364 without churn.
//! Follows diffusers' `scheduling_euler_discrete.py`.

use tch::{Device, Kind, Tensor};

use super::config::{FinalSigmasType, InterpolationType, PredictionType, SchedulerConfig, TimestepType};
use super::discrete::{Levels, add_noise, float, init_noise_sigma, scale, spacing};
use super::prediction::original_at_sigma;
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod, to_vec};
use super::sigmas::{curve, sigma_to_t_float};
use super::{NoiseSource, Scheduler, StepOptions, refuse_timesteps_beside_curve};
use crate::error::{Error, Result};

pub(super) struct EulerDiscreteScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
}

impl EulerDiscreteScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let curve = curve(config, false)?;
        refuse_timesteps_beside_curve(options, curve)?;
        let prediction_type = config.prediction_type();
        let continuous =
            config.timestep_type() == TimestepType::Continuous && prediction_type == PredictionType::VPrediction;
        if continuous && options.timesteps.is_some() {
            let message = "this model counts in continuous timesteps and takes no list of them";
            return Err(Error::invalid("unsupported_option", "timesteps", message).remedy("leave `timesteps` out"));
        }

        let mut levels = Levels::new(config, options, &alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Nearly), float);
        if config.interpolation_type() == InterpolationType::LogLinear {
            levels.sigmas = log_linear(&levels.train_sigmas, steps);
        }
        if let Some(curve) = curve {
            levels.follow(curve, config, steps);
        }
        let sigmas = match &options.sigmas {
            Some(list) => list.iter().map(|&sigma| sigma as f32).collect(),
            None => levels.sigmas_to(match config.final_sigmas_type() {
                FinalSigmasType::Zero => 0.0,
                FinalSigmasType::SigmaMin => levels.train_sigmas[0],
            }),
        };
        let run = &sigmas[..sigmas.len() - 1];
        // float32 as in diffusers
        let timesteps = if continuous {
            run.iter().map(|sigma| f64::from(0.25 * sigma.ln())).collect()
        } else if options.sigmas.is_some() {
            run.iter().map(|&sigma| f64::from(sigma_to_t_float(sigma, &levels.log_sigmas))).collect()
        } else {
            levels.timesteps.into_iter().map(float).collect()
        };
        Ok(EulerDiscreteScheduler {
            timesteps,
            init_noise_sigma: init_noise_sigma(&sigmas, spacing(config)),
            sigmas,
            prediction_type,
        })
    }
}

/// One level more than there are steps, even in the logarithm; diffusers takes it so.
fn log_linear(train_sigmas: &[f32], steps: usize) -> Vec<f64> {
    let (first, last) = (train_sigmas[0].ln() as f64, train_sigmas[train_sigmas.len() - 1].ln() as f64);
    let logs = Tensor::linspace(last, first, steps as i64 + 1, (Kind::Float, Device::Cpu));
    to_vec(&logs.exp()).into_iter().map(f64::from).collect()
}

impl Scheduler for EulerDiscreteScheduler {
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
        // float32, since neighbouring sigmas differ by less than half precision holds
        let sample = sample.to_kind(Kind::Float);
        let pred_original_sample = original_at_sigma(self.prediction_type, model_output, &sample, sigma);
        let derivative = (&sample - pred_original_sample) / f64::from(sigma);
        let dt = self.sigmas[step + 1] - sigma;
        Ok((sample + derivative * f64::from(dt)).to_kind(model_output.kind()))
    }
}
