//! From what the UNet predicts (`prediction_type`) to the clean sample it means, and how that is kept in range.

use tch::{Kind, Tensor};

use super::config::{PredictionType, SchedulerConfig};
use super::scalar::sqrt;
use crate::error::{Error, Result};

/// The clean sample, for classes whose samples are `original + sigma * noise`.
pub(super) fn original_at_sigma(kind: PredictionType, model_output: &Tensor, sample: &Tensor, sigma: f32) -> Tensor {
    match kind {
        PredictionType::Sample => model_output.shallow_clone(),
        PredictionType::Epsilon => sample - model_output * f64::from(sigma),
        PredictionType::VPrediction => {
            let c = sigma * sigma + 1.0;
            model_output * f64::from(-sigma / sqrt(c)) + sample / f64::from(c)
        }
    }
}

/// The clean sample, for classes whose samples are `alpha * original + sigma * noise`.
pub(super) fn original_at(
    kind: PredictionType,
    model_output: &Tensor,
    sample: &Tensor,
    (alpha, sigma): (f32, f32),
) -> Tensor {
    let (alpha, sigma) = (f64::from(alpha), f64::from(sigma));
    match kind {
        PredictionType::Sample => model_output.shallow_clone(),
        PredictionType::Epsilon => (sample - model_output * sigma) / alpha,
        PredictionType::VPrediction => sample * alpha - model_output * sigma,
    }
}

/// The noise, for the same classes.
pub(super) fn epsilon_at(
    kind: PredictionType,
    model_output: &Tensor,
    sample: &Tensor,
    (alpha, sigma): (f32, f32),
) -> Tensor {
    let (alpha, sigma) = (f64::from(alpha), f64::from(sigma));
    match kind {
        PredictionType::Epsilon => model_output.shallow_clone(),
        PredictionType::Sample => (sample - model_output * alpha) / sigma,
        PredictionType::VPrediction => model_output * alpha + sample * sigma,
    }
}

/// Refuses a model that predicts the clean sample, for classes that cannot read that in diffusers.
pub(super) fn refuse_sample_prediction(config: &SchedulerConfig, scheduler: &str) -> Result<PredictionType> {
    match config.prediction_type() {
        PredictionType::Sample => {
            let message = format!("{scheduler} cannot run a model that predicts the clean sample");
            Err(Error::invalid("unsupported_option", "scheduler", message).remedy("use Euler for this model"))
        }
        kind => Ok(kind),
    }
}

/// How a predicted clean sample is kept in range.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bounds {
    None,
    Clip(f64),
    /// Quantile and cap of dynamic thresholding.
    Threshold(f64, f64),
}

impl Bounds {
    /// For classes that clip by their own default, or not.
    pub(super) fn clipping(config: &SchedulerConfig, clip_by_default: bool) -> Self {
        match (Self::thresholding(config), config.clip_sample_range(clip_by_default)) {
            (Bounds::None, Some(range)) => Bounds::Clip(range),
            (bounds, _) => bounds,
        }
    }

    /// For classes that never clip.
    pub(super) fn thresholding(config: &SchedulerConfig) -> Self {
        config.thresholding().map_or(Bounds::None, |(ratio, max)| Bounds::Threshold(ratio, max))
    }

    pub(super) fn apply(self, sample: Tensor) -> Tensor {
        match self {
            Bounds::None => sample,
            Bounds::Clip(range) => sample.clamp(-range, range),
            Bounds::Threshold(ratio, max) => threshold_sample(&sample, ratio, max),
        }
    }
}

/// Dynamic thresholding, arXiv 2205.11487: each image is cut at a quantile of its own values, and scaled back.
fn threshold_sample(sample: &Tensor, ratio: f64, max: f64) -> Tensor {
    let size = sample.size();
    let flat = sample.to_kind(Kind::Float).reshape([size[0], -1]);
    let s = flat.abs().quantile_scalar(ratio, 1, true, "linear").clamp(1.0, max);
    (flat.clamp_tensor(Some(&-&s), Some(&s)) / s).reshape(&size).to_kind(sample.kind())
}
