//! The formulation of arXiv 2206.00364: noise levels that do not come from betas, and how the model's input and output are
//! brought to unit variance. Shared by the EDM classes.

use tch::{Device, Kind, Tensor};

use super::config::{EdmSigmaSchedule, PredictionType, SchedulerConfig};
use super::prediction::refuse_sample_prediction;
use super::scalar::sqrt;
use super::schedule::to_vec;
use crate::error::Result;

pub(super) struct Edm {
    sigma_min: f64,
    sigma_max: f64,
    sigma_data: f64,
    rho: f64,
    schedule: EdmSigmaSchedule,
    prediction_type: PredictionType,
}

impl Edm {
    pub(super) fn new(config: &SchedulerConfig, scheduler: &str) -> Result<Self> {
        Ok(Edm {
            sigma_min: config.sigma_min.unwrap_or(0.002),
            sigma_max: config.sigma_max.unwrap_or(80.0),
            sigma_data: config.sigma_data.unwrap_or(0.5),
            rho: config.rho.unwrap_or(7.0),
            schedule: config.sigma_schedule.unwrap_or(EdmSigmaSchedule::Karras),
            prediction_type: refuse_sample_prediction(config, scheduler)?,
        })
    }

    pub(super) fn init_noise_sigma(&self) -> f64 {
        (self.sigma_max * self.sigma_max + 1.0).sqrt()
    }

    pub(super) fn sigma_min(&self) -> f32 {
        self.sigma_min as f32
    }

    /// `steps` levels from the noisiest down, by torch in `kind` where they follow Karras, in float32 else.
    pub(super) fn sigmas(&self, steps: usize, kind: Kind) -> Vec<f32> {
        let linspace = |from: f64, to: f64, kind: Kind| Tensor::linspace(from, to, steps as i64, (kind, Device::Cpu));
        let sigmas = match self.schedule {
            EdmSigmaSchedule::Karras => {
                let (min, max) = (self.sigma_min.powf(1.0 / self.rho), self.sigma_max.powf(1.0 / self.rho));
                (linspace(0.0, 1.0, kind) * (min - max) + max).pow_tensor_scalar(self.rho)
            }
            EdmSigmaSchedule::Exponential => {
                linspace(self.sigma_min.ln(), self.sigma_max.ln(), Kind::Float).exp().flip([0])
            }
        };
        to_vec(&sigmas.to_kind(Kind::Float))
    }

    /// What the model is told of the levels.
    pub(super) fn timesteps(sigmas: &[f32]) -> Vec<f64> {
        let timesteps = Tensor::from_slice(sigmas).log() * 0.25;
        to_vec(&timesteps).into_iter().map(f64::from).collect()
    }

    pub(super) fn precondition_inputs(&self, sample: &Tensor, sigma: f32) -> Tensor {
        sample * f64::from(1.0 / sqrt(self.variance(sigma)))
    }

    /// The clean sample.
    pub(super) fn precondition_outputs(&self, sample: &Tensor, model_output: &Tensor, sigma: f32) -> Tensor {
        let data = (self.sigma_data * self.sigma_data) as f32;
        let c_skip = 1.0 / self.variance(sigma) * data;
        let sign = if self.prediction_type == PredictionType::VPrediction { -1.0 } else { 1.0 };
        let c_out = sign * sigma * self.sigma_data as f32 / sqrt(self.variance(sigma));
        sample * f64::from(c_skip) + model_output * f64::from(c_out)
    }

    fn variance(&self, sigma: f32) -> f32 {
        sigma * sigma + (self.sigma_data * self.sigma_data) as f32
    }
}
