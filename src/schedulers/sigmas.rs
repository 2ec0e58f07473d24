//! Curves of noise levels, and the way from a level back to its timestep. Shared by all classes that count in sigmas;
//! source: the `_convert_to_...` and `_sigma_to_t` methods that diffusers has in each of them.

use super::config::SchedulerConfig;
use super::scalar::numpy_ln;
use super::schedule::linspace;
use crate::error::{Error, Result};
use statrs::function::beta::inv_beta_reg;

/// A curve in place of the noise levels of evenly spread timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Curve {
    Karras,
    Exponential,
    Beta,
    Lu,
}

/// The curve that the configuration asks for.
pub(super) fn curve(config: &SchedulerConfig, has_lu: bool) -> Result<Option<Curve>> {
    let flags = [
        (config.use_karras_sigmas, Curve::Karras),
        (config.use_exponential_sigmas, Curve::Exponential),
        (config.use_beta_sigmas, Curve::Beta),
    ];
    let mut curves = flags.iter().filter(|(flag, _)| *flag == Some(true)).map(|(_, curve)| *curve);
    let first = curves.next();
    if curves.next().is_some() {
        let message = "scheduler_config.json asks for more than one of Karras, exponential and beta sigmas";
        return Err(Error::setup("model_invalid", message).remedy("set all of them but one to false"));
    }
    let lu = has_lu && config.use_lu_lambdas == Some(true);
    // in diffusers' order: Karras, Lu, the others
    Ok(match first {
        Some(Curve::Karras) => Some(Curve::Karras),
        _ if lu => Some(Curve::Lu),
        other => other,
    })
}

impl Curve {
    /// `steps` noise levels from `sigma_max` down to `sigma_min`.
    pub(super) fn sigmas(self, sigma_min: f64, sigma_max: f64, steps: usize) -> Vec<f64> {
        match self {
            Curve::Karras => karras(sigma_min, sigma_max, 7.0, steps),
            Curve::Exponential | Curve::Lu => even_in_logarithm(sigma_min.ln(), sigma_max.ln(), steps),
            Curve::Beta => linspace(0.0, 1.0, steps)
                .into_iter()
                .map(|ramp| sigma_min + beta_quantile(1.0 - ramp) * (sigma_max - sigma_min))
                .collect(),
        }
    }
}

/// From one logarithm of a level down to another.
pub(super) fn even_in_logarithm(min: f64, max: f64, steps: usize) -> Vec<f64> {
    linspace(max, min, steps).into_iter().map(f64::exp).collect()
}

/// Sigmas spaced evenly in their `rho`-th root; equation 5 of arXiv 2206.00364.
fn karras(sigma_min: f64, sigma_max: f64, rho: f64, steps: usize) -> Vec<f64> {
    let (min, max) = (sigma_min.powf(1.0 / rho), sigma_max.powf(1.0 / rho));
    linspace(0.0, 1.0, steps).into_iter().map(|ramp| (max + ramp * (min - max)).powf(rho)).collect()
}

/// The quantile of the beta distribution with both parameters 0.6, as in arXiv 2407.12173.
fn beta_quantile(probability: f64) -> f64 {
    inv_beta_reg(0.6, 0.6, probability)
}

/// The ends of a curve: the configuration's, else those of `sigmas`, which fall.
pub(super) fn ends(config: &SchedulerConfig, sigmas: &[f64]) -> (f64, f64) {
    (config.sigma_min.unwrap_or(sigmas[sigmas.len() - 1]), config.sigma_max.unwrap_or(sigmas[0]))
}

pub(super) fn logarithms(sigmas: &[f32]) -> Vec<f32> {
    sigmas.iter().map(|&sigma| numpy_ln(sigma)).collect()
}

/// The timestep whose training sigma is `sigma`, interpolated in the logarithm.
pub(super) fn sigma_to_t(sigma: f64, log_sigmas: &[f32]) -> f64 {
    let log_sigma = sigma.max(1e-10).ln();
    // the last index whose sigma is not above; the training sigmas grow with the timestep
    let low = log_sigmas.partition_point(|&s| log_sigma >= s as f64).saturating_sub(1).min(log_sigmas.len() - 2);
    let (a, b) = (log_sigmas[low], log_sigmas[low + 1]);
    let w = ((a as f64 - log_sigma) / (a - b) as f64).clamp(0.0, 1.0);
    (1.0 - w) * low as f64 + w * (low + 1) as f64
}

/// The same in float32 throughout, as where diffusers passes a tensor.
pub(super) fn sigma_to_t_float(sigma: f32, log_sigmas: &[f32]) -> f32 {
    let log_sigma = numpy_ln(sigma.max(1e-10));
    let low = log_sigmas.partition_point(|&s| log_sigma >= s).saturating_sub(1).min(log_sigmas.len() - 2);
    let (a, b) = (log_sigmas[low], log_sigmas[low + 1]);
    let w = ((a - log_sigma) / (a - b)).clamp(0.0, 1.0);
    (1.0 - w) * low as f32 + w * (low + 1) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_curve_begins_and_ends_where_it_is_told() {
        for curve in [Curve::Karras, Curve::Exponential, Curve::Beta, Curve::Lu] {
            let sigmas = curve.sigmas(0.03, 14.6, 9);
            assert!((sigmas[0] - 14.6).abs() < 1e-12 && (sigmas[8] - 0.03).abs() < 1e-12, "{curve:?} {sigmas:?}");
            assert!(sigmas.windows(2).all(|pair| pair[1] < pair[0]), "{curve:?} {sigmas:?}");
            assert_eq!(curve.sigmas(0.03, 14.6, 1), [sigmas[0]]);
        }
    }

    #[test]
    fn the_beta_quantile_equals_scipy() {
        // scipy.stats.beta.ppf(p, 0.6, 0.6)
        let expected = [
            (0.0, 0.0),
            (0.001, 1.855873851745199e-05),
            (0.1, 0.03958440558878085),
            (0.3, 0.23401700387523572),
            (0.5, 0.5),
            (0.75, 0.824319621347305),
            (0.999, 0.9999814412614826),
            (1.0, 1.0),
        ];
        for (probability, quantile) in expected {
            let ours = beta_quantile(probability);
            assert!((ours - quantile).abs() <= 1e-9 * quantile, "{probability}: {ours}");
        }
    }

    #[test]
    fn a_training_sigma_is_its_timestep() {
        let log_sigmas = logarithms(&[0.1, 0.5, 2.0, 9.0]);
        for (sigma, t) in [(0.01, 0.0), (0.1, 0.0), (1.0, 1.5), (2.0, 2.0), (9.0, 3.0), (20.0, 3.0)] {
            assert!((sigma_to_t(sigma, &log_sigmas) - t).abs() < 1e-6, "{sigma}");
            assert!((sigma_to_t_float(sigma as f32, &log_sigmas) as f64 - t).abs() < 1e-6, "{sigma}");
        }
    }
}
