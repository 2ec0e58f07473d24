//! Pseudo numerical methods, arXiv 2202.09778: PLMS, with or without Runge-Kutta's steps before. Follows diffusers'
//! `scheduling_pndm.py`.

use tch::Tensor;

use super::config::{PredictionType, SchedulerConfig, TimestepSpacing};
use super::prediction::{epsilon_at, refuse_sample_prediction};
use super::scalar::{sqrt, weighted_sum};
use super::schedule::{DDPM_BETAS, ZeroSnr, add_noise_at_alpha, alphas_cumprod, check_timesteps, spaced_timesteps};
use super::{NoiseSource, Scheduler, StepOptions};
use crate::error::{Error, Result};

/// Evaluations of one Runge-Kutta step, and how many such steps there are.
const EVALUATIONS: usize = 4;
const PRK_STEPS: usize = 3;

pub(super) struct PndmScheduler {
    timesteps: Vec<f64>,
    /// How many of the timesteps are Runge-Kutta's.
    prk_timesteps: usize,
    alphas_cumprod: Vec<f32>,
    final_alpha_cumprod: f32,
    /// Training timesteps per step.
    step_ratio: i64,
    prediction_type: PredictionType,
    /// Evaluations so far.
    counter: usize,
    /// The last predictions of whole steps, the newest last.
    ets: Vec<Tensor>,
    /// The weighed predictions of the Runge-Kutta step in progress.
    cur_model_output: Option<Tensor>,
    /// Where the step in progress began.
    cur_sample: Option<Tensor>,
}

impl PndmScheduler {
    pub(super) fn new(config: &SchedulerConfig, options: &StepOptions) -> Result<Self> {
        let steps = options.num_inference_steps;
        let prediction_type = refuse_sample_prediction(config, "PNDM")?;
        let alphas_cumprod = alphas_cumprod(config, &DDPM_BETAS, ZeroSnr::Ignored);
        let spacing = config.timestep_spacing.unwrap_or(TimestepSpacing::Leading);
        let spread: Vec<f64> = spaced_timesteps(spacing, config, steps).into_iter().map(f64::round_ties_even).collect();
        let step_ratio = (alphas_cumprod.len() / steps) as i64;
        let (timesteps, prk_timesteps) = if config.skip_prk_steps.unwrap_or(false) {
            (plms_timesteps(&spread), 0)
        } else if spread.len() > PRK_STEPS {
            let prk = prk_timesteps(&spread[..=PRK_STEPS], step_ratio / 2);
            let count = prk.len();
            (prk.into_iter().chain(spread[PRK_STEPS..].iter().copied()).collect(), count)
        } else {
            let message = format!("PNDM with this model's Runge-Kutta steps needs at least 4 steps, got {steps}");
            return Err(Error::invalid("out_of_range", "num_inference_steps", message)
                .remedy("ask for 4 steps or more, or set `skip_prk_steps` in scheduler_config.json"));
        };
        check_timesteps(&timesteps, &alphas_cumprod, steps)?;
        Ok(PndmScheduler {
            timesteps,
            prk_timesteps,
            final_alpha_cumprod: if config.set_alpha_to_one.unwrap_or(false) { 1.0 } else { alphas_cumprod[0] },
            alphas_cumprod,
            step_ratio,
            prediction_type,
            counter: 0,
            ets: Vec::new(),
            cur_model_output: None,
            cur_sample: None,
        })
    }

    /// One evaluation of four of a Runge-Kutta step.
    fn step_prk(&mut self, model_output: &Tensor, timestep: i64, sample: &Tensor) -> Result<Tensor> {
        let (whole, part) = (self.counter / EVALUATIONS, self.counter % EVALUATIONS);
        let prev_timestep = if self.counter % 2 == 1 { timestep } else { timestep - self.step_ratio / 2 };
        let from = self.timesteps[whole * EVALUATIONS] as i64;
        let weighed = |weight: f64| match &self.cur_model_output {
            Some(sum) => sum + model_output * weight,
            None => model_output * weight,
        };
        let mut direction = model_output.shallow_clone();
        self.cur_model_output = match part {
            0 => {
                let sum = weighed(1.0 / 6.0);
                self.ets.push(model_output.shallow_clone());
                self.cur_sample = Some(sample.shallow_clone());
                Some(sum)
            }
            1 | 2 => Some(weighed(1.0 / 3.0)),
            _ => {
                direction = weighed(1.0 / 6.0);
                None
            }
        };
        let sample = self.cur_sample.as_ref().unwrap_or(sample);
        self.prev_sample(sample, from, prev_timestep, &direction)
    }

    /// A linear multistep from the predictions so far.
    fn step_plms(&mut self, model_output: &Tensor, mut timestep: i64, sample: &Tensor) -> Result<Tensor> {
        let mut prev_timestep = timestep - self.step_ratio;
        if self.counter == 1 {
            // the first step once more, with what was seen at its end
            (prev_timestep, timestep) = (timestep, timestep + self.step_ratio);
        } else {
            let drop = self.ets.len().saturating_sub(3);
            self.ets.drain(..drop);
            self.ets.push(model_output.shallow_clone());
        }
        let mut sample = sample.shallow_clone();
        let ago = |i: usize| &self.ets[self.ets.len() - 1 - i];
        let direction = match self.ets.len() {
            1 if self.counter == 0 => {
                self.cur_sample = Some(sample.shallow_clone());
                model_output.shallow_clone()
            }
            1 => {
                let direction = (model_output + ago(0)) / 2.0;
                sample = self.cur_sample.take().expect("the first step is kept until the second");
                direction
            }
            2 => weighted_sum(&[(3.0, ago(0)), (-1.0, ago(1))]) / 2.0,
            3 => weighted_sum(&[(23.0, ago(0)), (-16.0, ago(1)), (5.0, ago(2))]) / 12.0,
            _ => weighted_sum(&[(55.0, ago(0)), (-59.0, ago(1)), (37.0, ago(2)), (-9.0, ago(3))]) * (1.0 / 24.0),
        };
        self.prev_sample(&sample, timestep, prev_timestep, &direction)
    }

    /// Formula (9) of the paper.
    fn prev_sample(&self, sample: &Tensor, timestep: i64, prev_timestep: i64, model_output: &Tensor) -> Result<Tensor> {
        let Some(&alpha_prod_t) = self.alphas_cumprod.get(timestep as usize) else {
            let message = format!("PNDM reaches timestep {timestep}, which the model does not have");
            return Err(Error::invalid("out_of_range", "num_inference_steps", message));
        };
        let alpha_prod_t_prev =
            if prev_timestep >= 0 { self.alphas_cumprod[prev_timestep as usize] } else { self.final_alpha_cumprod };
        let (beta_prod_t, beta_prod_t_prev) = (1.0 - alpha_prod_t, 1.0 - alpha_prod_t_prev);
        let epsilon = epsilon_at(self.prediction_type, model_output, sample, (sqrt(alpha_prod_t), sqrt(beta_prod_t)));
        let denominator = alpha_prod_t * sqrt(beta_prod_t_prev) + sqrt(alpha_prod_t * beta_prod_t * alpha_prod_t_prev);
        Ok(sample * f64::from(sqrt(alpha_prod_t_prev / alpha_prod_t))
            - epsilon * f64::from(alpha_prod_t_prev - alpha_prod_t) / f64::from(denominator))
    }
}

/// The second one twice.
fn plms_timesteps(spread: &[f64]) -> Vec<f64> {
    spread.iter().take(2).chain(spread.iter().skip(1)).copied().collect()
}

/// Each Runge-Kutta step looks at its begin, twice at its middle, and at its end.
fn prk_timesteps(spread: &[f64], half: i64) -> Vec<f64> {
    let begin_middle_end = |pair: &[f64]| {
        let middle = pair[1] + half as f64;
        [pair[0], middle, middle, pair[1]]
    };
    spread.windows(2).flat_map(begin_middle_end).collect()
}

impl Scheduler for PndmScheduler {
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
        add_noise_at_alpha(self.alphas_cumprod[self.timesteps[step] as usize], original, noise)
    }

    fn step(&mut self, model_output: &Tensor, step: usize, sample: &Tensor, _: &mut NoiseSource) -> Result<Tensor> {
        let timestep = self.timesteps[step] as i64;
        let next = if self.counter < self.prk_timesteps {
            self.step_prk(model_output, timestep, sample)
        } else {
            self.step_plms(model_output, timestep, sample)
        };
        self.counter += 1;
        next
    }
}
