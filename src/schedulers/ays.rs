//! Align Your Steps, arXiv 2404.14507: noise levels for ten steps of SDXL that were found by search (diffusers'
//! `AysSchedules`), interpolated in the logarithm for other numbers of steps.

use super::config::SchedulerConfig;
use super::schedule::{DDPM_BETAS, ZeroSnr, alphas_cumprod, linspace, sigmas_of};
use super::sigmas::{logarithms, sigma_to_t};
use crate::error::{Error, Result};

const TIMESTEPS: [i64; 10] = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13];
const SIGMAS: [f64; 10] = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113];

/// `steps` levels and the 0 where the run ends.
pub(super) fn sigmas(steps: usize) -> Vec<f64> {
    levels(steps).into_iter().chain([0.0]).collect()
}

/// `steps` timesteps of a model: for ten the published ones, for others those of the levels.
pub(super) fn timesteps(steps: usize, config: &SchedulerConfig) -> Result<Vec<i64>> {
    if steps == TIMESTEPS.len() {
        return Ok(TIMESTEPS.to_vec());
    }
    let log_sigmas = logarithms(&sigmas_of(&alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Nearly)));
    let mut timesteps: Vec<i64> = Vec::with_capacity(steps);
    for sigma in levels(steps) {
        let t = sigma_to_t(sigma, &log_sigmas).round_ties_even() as i64;
        // many steps would meet in one timestep
        timesteps.push(timesteps.last().map_or(t, |last| t.min(last - 1)));
    }
    match timesteps.last() {
        Some(last) if *last < 0 => {
            let message = format!("Align Your Steps has no {steps} timesteps for this model");
            Err(Error::invalid("out_of_range", "num_inference_steps", message).remedy("ask for fewer steps"))
        }
        _ => Ok(timesteps),
    }
}

fn levels(steps: usize) -> Vec<f64> {
    if steps == SIGMAS.len() {
        return SIGMAS.to_vec();
    }
    let at = |position: f64| {
        let low = (position.floor() as usize).min(SIGMAS.len() - 2);
        let (a, b) = (SIGMAS[low].ln(), SIGMAS[low + 1].ln());
        (a + (b - a) * (position - low as f64)).exp()
    };
    linspace(0.0, (SIGMAS.len() - 1) as f64, steps).into_iter().map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_numbers_of_steps_pass_through_the_published_levels() {
        let levels = levels(19);
        for (i, sigma) in SIGMAS.iter().enumerate() {
            assert!((levels[2 * i] - sigma).abs() < 1e-12);
        }
        assert!((levels[1] - (14.615f64 * 6.315).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn timesteps_fall_for_every_number_of_steps() {
        let json = r#"{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}"#;
        let config = SchedulerConfig::from_json(json).unwrap();
        for steps in [1, 2, 4, 9, 11, 20, 50, 100, 200] {
            let timesteps = timesteps(steps, &config).unwrap();
            assert_eq!(timesteps.len(), steps);
            assert!(timesteps.windows(2).all(|pair| pair[1] < pair[0]), "{timesteps:?}");
            assert!((0..1000).contains(&timesteps[0]) && timesteps[steps - 1] >= 0);
        }
        assert_eq!(timesteps(10, &config).unwrap(), TIMESTEPS);
        // the published timesteps are nearly those of the published levels
        let eleven = timesteps(11, &config).unwrap();
        assert_eq!((eleven[0], eleven[10]), (999, 13));
    }
}
