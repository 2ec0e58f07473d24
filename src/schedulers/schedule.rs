//! The arithmetic that schedulers share: betas, timestep spacing, interpolation. Sources: diffusers'
//! `scheduling_euler_discrete.py`, `scheduling_ddim.py`, and numpy where they call it.

use tch::{Device, Kind, Tensor};

use super::config::{BetaSchedule, PredictionType, SchedulerConfig, TimestepSpacing};
use crate::error::{Error, Result};

/// What a class puts in the place of keys that the configuration does not have.
pub(super) struct BetaDefaults {
    start: f64,
    end: f64,
    schedule: BetaSchedule,
}

pub(super) const DDPM_BETAS: BetaDefaults = BetaDefaults { start: 0.0001, end: 0.02, schedule: BetaSchedule::Linear };
/// Of the classes that follow k-diffusion.
pub(super) const STABLE_BETAS: BetaDefaults =
    BetaDefaults { start: 0.00085, end: 0.012, schedule: BetaSchedule::Linear };
/// Of LCM and TCD.
pub(super) const DISTILLED_BETAS: BetaDefaults =
    BetaDefaults { start: 0.00085, end: 0.012, schedule: BetaSchedule::ScaledLinear };

/// What a class does with `rescale_betas_zero_snr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ZeroSnr {
    /// The class has no such key.
    Ignored,
    /// The last alpha is zero.
    Exact,
    /// The last alpha is not quite zero, so that the first sigma is finite.
    Nearly,
}

/// `alphas_cumprod`, in float32 by torch's own operators so that every bit agrees.
pub(super) fn alphas_cumprod(config: &SchedulerConfig, defaults: &BetaDefaults, zero_snr: ZeroSnr) -> Vec<f32> {
    let count = config.num_train_timesteps();
    let (start, end) = (config.beta_start.unwrap_or(defaults.start), config.beta_end.unwrap_or(defaults.end));
    let linspace = |start: f64, end: f64| Tensor::linspace(start, end, count as i64, (Kind::Float, Device::Cpu));
    let mut betas = match (&config.trained_betas, config.beta_schedule.unwrap_or(defaults.schedule)) {
        (Some(betas), _) => Tensor::from_slice(betas).to_kind(Kind::Float),
        (None, BetaSchedule::Linear) => linspace(start, end),
        (None, BetaSchedule::ScaledLinear) => linspace(start.sqrt(), end.sqrt()).square(),
        (None, BetaSchedule::SquaredcosCapV2) => Tensor::from_slice(&betas_for_alpha_bar(count)).to_kind(Kind::Float),
    };
    let rescaled = config.rescale_betas_zero_snr() && zero_snr != ZeroSnr::Ignored;
    if rescaled {
        betas = rescale_zero_terminal_snr(&betas);
    }
    let mut alphas_cumprod = to_vec(&(1f64 - betas).cumprod(0, None::<Kind>));
    if rescaled && zero_snr == ZeroSnr::Nearly {
        *alphas_cumprod.last_mut().expect("a schedule has timesteps") = 2f32.powi(-24);
    }
    alphas_cumprod
}

/// The noise level at each `alphas_cumprod`, the sample's scale taken out. By torch, whose vectorised root may round the
/// last bit otherwise than Rust's; at zero terminal SNR that bit is 2e-4 of a sample.
pub(super) fn sigmas_of(alphas_cumprod: &[f32]) -> Vec<f32> {
    let alphas_cumprod = Tensor::from_slice(alphas_cumprod);
    to_vec(&((1f64 - &alphas_cumprod) / alphas_cumprod).pow_tensor_scalar(0.5))
}

pub(super) fn to_vec(tensor: &Tensor) -> Vec<f32> {
    Vec::<f32>::try_from(tensor).expect("a float32 vector")
}

/// The cosine schedule. The divisions are of floats: integer division here zeroes every beta but the last.
fn betas_for_alpha_bar(count: usize) -> Vec<f64> {
    let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::PI / 2.0).cos().powi(2);
    (0..count)
        .map(|i| {
            let (t1, t2) = (i as f64 / count as f64, (i + 1) as f64 / count as f64);
            (1.0 - alpha_bar(t2) / alpha_bar(t1)).min(0.999)
        })
        .collect()
}

/// Shifts and scales the schedule so that the last step is pure noise; algorithm 1 of arXiv 2305.08891.
fn rescale_zero_terminal_snr(betas: &Tensor) -> Tensor {
    let alphas_bar_sqrt = (1f64 - betas).cumprod(0, None::<Kind>).sqrt();
    let (first, last) = (alphas_bar_sqrt.get(0), alphas_bar_sqrt.get(-1));
    let alphas_bar = ((alphas_bar_sqrt - &last) * (&first / (&first - &last))).square();
    let length = alphas_bar.size()[0];
    let alphas = alphas_bar.narrow(0, 1, length - 1) / alphas_bar.narrow(0, 0, length - 1);
    1f64 - Tensor::cat(&[alphas_bar.narrow(0, 0, 1), alphas], 0)
}

/// Timesteps from the noisiest down. Not yet rounded to float32 or integers for `linspace`: the classes differ there.
pub(super) fn spaced_timesteps(spacing: TimestepSpacing, config: &SchedulerConfig, steps: usize) -> Vec<f64> {
    let train = config.num_train_timesteps();
    match spacing {
        TimestepSpacing::Linspace => linspace(0.0, (train - 1) as f64, steps).into_iter().rev().collect(),
        TimestepSpacing::Leading => {
            let ratio = (train / steps) as i64;
            (0..steps as i64).rev().map(|i| (i * ratio + config.steps_offset()) as f64).collect()
        }
        TimestepSpacing::Trailing => {
            // numpy's arange(train, 0, -ratio): its length comes from a division that may round up to one more.
            let ratio = train as f64 / steps as f64;
            let length = (-(train as f64) / -ratio).ceil() as usize;
            let delta = (train as f64 - ratio) - train as f64;
            (0..length).map(|i| (train as f64 + i as f64 * delta).round_ties_even() - 1.0).collect()
        }
    }
}

/// numpy's `linspace`, end point included.
pub(super) fn linspace(start: f64, stop: f64, count: usize) -> Vec<f64> {
    if count == 1 {
        return vec![start];
    }
    let step = (stop - start) / (count - 1) as f64;
    let mut values: Vec<f64> = (0..count).map(|i| i as f64 * step + start).collect();
    values[count - 1] = stop;
    values
}

/// numpy's `interp` of `x` over `table` at 0, 1, 2, ...
pub(super) fn interp(x: f64, table: &[f32]) -> f64 {
    let last = table.len() - 1;
    if x <= 0.0 {
        return table[0] as f64;
    }
    if x >= last as f64 {
        return table[last] as f64;
    }
    let low = x.floor() as usize;
    let (a, b) = (table[low] as f64, table[low + 1] as f64);
    if x == low as f64 { a } else { (b - a) * (x - low as f64) + a }
}

/// A number as a tensor of that dtype would hold it.
pub(super) fn rounded(value: f32, kind: Kind) -> f64 {
    Tensor::from(value).to_kind(kind).double_value(&[])
}

/// `original` with noise, at a level given as the share of the signal's variance.
pub(super) fn add_noise_at_alpha(alpha_prod: f32, original: &Tensor, noise: &Tensor) -> Tensor {
    let alpha_prod = Tensor::from(alpha_prod).to_kind(original.kind());
    let root = |tensor: Tensor| tensor.pow_tensor_scalar(0.5).double_value(&[]);
    original * root(alpha_prod.shallow_clone()) + noise * root(1.0 - alpha_prod)
}

/// Refuses timesteps for which there is no `alphas_cumprod`.
pub(super) fn check_timesteps(timesteps: &[f64], alphas_cumprod: &[f32], steps: usize) -> Result<()> {
    match timesteps.iter().find(|&&t| t < 0.0 || t >= alphas_cumprod.len() as f64) {
        Some(t) => {
            let message = format!("{steps} steps with this model's spacing reach timestep {t}, which it does not have");
            Err(Error::invalid("out_of_range", "num_inference_steps", message))
        }
        None => Ok(()),
    }
}

/// Refuses an epsilon-prediction model whose last alpha is zero: the first step divides by it.
pub(super) fn refuse_zero_snr_epsilon(config: &SchedulerConfig, scheduler: &str) -> Result<()> {
    if config.rescale_betas_zero_snr() && config.prediction_type() == PredictionType::Epsilon {
        let message = format!("{scheduler} cannot run an epsilon-prediction model with rescale_betas_zero_snr");
        return Err(Error::invalid("unsupported_option", "scheduler", message).remedy("use Euler for this model"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_beta_of_the_cosine_schedule_is_zero() {
        assert!(betas_for_alpha_bar(1000).iter().all(|&beta| beta > 0.0));
    }

    #[test]
    fn interpolation_meets_the_table_at_whole_numbers_and_halves_between_them() {
        let table = [1.0, 3.0, 7.0];
        assert_eq!(
            [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 9.0].map(|x| interp(x, &table)),
            [1.0, 1.0, 2.0, 3.0, 5.0, 7.0, 7.0]
        );
    }
}
