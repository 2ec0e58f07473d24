//! Euler's method on the probability-flow ODE, algorithm 2 of arXiv 2206.00364 without churn.
//! Follows diffusers' `scheduling_euler_discrete.py`.

use tch::{Kind, Tensor};

use super::config::{
    FinalSigmasType, InterpolationType, PredictionType, SchedulerConfig, TimestepSpacing, TimestepType,
};
use super::schedule::{alphas_cumprod, interp, linspace, sigmas_of, spaced_timesteps};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

pub(super) struct EulerDiscreteScheduler {
    timesteps: Vec<f64>,
    /// One more than the timesteps: the last is where the run ends.
    sigmas: Vec<f32>,
    init_noise_sigma: f32,
    prediction_type: PredictionType,
}

impl EulerDiscreteScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Linspace);
        if config.use_beta_sigmas == Some(true) {
            let message = "scheduler_config.json asks for beta sigmas, which this version does not have";
            return Err(Error::setup("unsupported_feature", message).remedy("set `use_beta_sigmas` to false"));
        }

        let mut alphas_cumprod = alphas_cumprod(config);
        if config.rescale_betas_zero_snr() {
            // Not quite zero, so that the first sigma is finite.
            *alphas_cumprod.last_mut().expect("a schedule has timesteps") = 2f32.powi(-24);
        }
        let train_sigmas = sigmas_of(&alphas_cumprod);

        // float32 as in diffusers, also for the fractional timesteps of `linspace`
        let mut timesteps: Vec<f64> =
            spaced_timesteps(spacing, config, steps).into_iter().map(|t| t as f32 as f64).collect();
        let mut sigmas: Vec<f64> = match config.interpolation_type() {
            InterpolationType::Linear => timesteps.iter().map(|&t| interp(t, &train_sigmas)).collect(),
            InterpolationType::LogLinear => {
                let (first, last) = (train_sigmas[0].ln() as f64, train_sigmas[train_sigmas.len() - 1].ln() as f64);
                let logs = Tensor::linspace(last, first, steps as i64 + 1, (Kind::Float, tch::Device::Cpu));
                Vec::<f32>::try_from(logs.exp()).expect("a float32 vector").into_iter().map(f64::from).collect()
            }
        };
        let karras = config.use_karras_sigmas == Some(true);
        if karras || config.use_exponential_sigmas == Some(true) {
            let sigma_min = config.sigma_min.unwrap_or(sigmas[sigmas.len() - 1]);
            let sigma_max = config.sigma_max.unwrap_or(sigmas[0]);
            sigmas = if karras {
                karras_sigmas(sigma_min, sigma_max, steps)
            } else {
                linspace(sigma_max.ln(), sigma_min.ln(), steps).into_iter().map(f64::exp).collect()
            };
            let log_sigmas: Vec<f32> = train_sigmas.iter().map(|s| s.ln()).collect();
            timesteps = sigmas.iter().map(|&sigma| sigma_to_t(sigma, &log_sigmas) as f32 as f64).collect();
        }
        sigmas.push(match config.final_sigmas_type() {
            FinalSigmasType::Zero => 0.0,
            FinalSigmasType::SigmaMin => train_sigmas[0] as f64,
        });
        let sigmas: Vec<f32> = sigmas.into_iter().map(|s| s as f32).collect();

        let prediction_type = config.prediction_type();
        if config.timestep_type() == TimestepType::Continuous && prediction_type == PredictionType::VPrediction {
            timesteps = sigmas[..sigmas.len() - 1].iter().map(|s| (0.25 * s.ln()) as f64).collect();
        }
        let max_sigma = sigmas.iter().copied().fold(f32::MIN, f32::max);
        let init_noise_sigma = match spacing {
            TimestepSpacing::Linspace | TimestepSpacing::Trailing => max_sigma,
            TimestepSpacing::Leading => (max_sigma * max_sigma + 1.0).sqrt(),
        };
        Ok(EulerDiscreteScheduler { timesteps, sigmas, init_noise_sigma, prediction_type })
    }
}

impl Scheduler for EulerDiscreteScheduler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma as f64
    }

    fn scale_model_input(&self, sample: &Tensor, step: usize) -> Tensor {
        let sigma = self.sigmas[step];
        sample / ((sigma * sigma + 1.0).sqrt() as f64)
    }

    fn add_noise(&self, original: &Tensor, noise: &Tensor, step: usize) -> Tensor {
        original + noise * rounded(self.sigmas[step], original.kind())
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, _: &mut NoiseSource) -> Result<Tensor> {
        let sigma = self.sigmas[step];
        // float32, since neighbouring sigmas differ by less than half precision holds
        let sample = sample.to_kind(Kind::Float);
        let pred_original_sample = match self.prediction_type {
            PredictionType::Sample => model_output.shallow_clone(),
            PredictionType::Epsilon => &sample - model_output * sigma as f64,
            PredictionType::VPrediction => {
                let c = sigma * sigma + 1.0;
                model_output * ((-sigma / c.sqrt()) as f64) + &sample / c as f64
            }
        };
        let derivative = (&sample - pred_original_sample) / sigma as f64;
        let dt = self.sigmas[step + 1] - sigma;
        Ok((sample + derivative * dt as f64).to_kind(model_output.kind()))
    }
}

/// A number as a tensor of that dtype would hold it.
fn rounded(value: f32, kind: Kind) -> f64 {
    Tensor::from(value).to_kind(kind).double_value(&[])
}

/// Sigmas spaced evenly in their seventh root; equation 5 of arXiv 2206.00364.
fn karras_sigmas(sigma_min: f64, sigma_max: f64, steps: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (min, max) = (sigma_min.powf(1.0 / RHO), sigma_max.powf(1.0 / RHO));
    linspace(0.0, 1.0, steps).into_iter().map(|ramp| (max + ramp * (min - max)).powf(RHO)).collect()
}

/// The timestep whose training sigma is `sigma`, interpolated in the logarithm.
fn sigma_to_t(sigma: f64, log_sigmas: &[f32]) -> f64 {
    let log_sigma = sigma.max(1e-10).ln();
    // the last index whose sigma is not above; the training sigmas grow with the timestep
    let low = log_sigmas.partition_point(|&s| log_sigma >= s as f64).saturating_sub(1).min(log_sigmas.len() - 2);
    let (a, b) = (log_sigmas[low], log_sigmas[low + 1]);
    let w = ((a as f64 - log_sigma) / (a - b) as f64).clamp(0.0, 1.0);
    (1.0 - w) * low as f64 + w * (low + 1) as f64
}
