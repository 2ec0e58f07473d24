//! Which steps of a schedule a pass runs: `get_timesteps` and `denoising_end` of diffusers' pipelines.

use std::ops::Range;

use super::parts::ModelParts;
use super::{StableDiffusionXlPipeline, default_scheduler};
use crate::api::{GenerateParams, Preset, RefinerBegin};
use crate::error::{Error, Result};
use crate::schedulers::{self, Scheduler, StepOptions, TimestepSpacing};

/// One run through a schedule.
pub(super) struct Pass {
    pub(super) scheduler: Box<dyn Scheduler>,
    pub(super) begin: Begin,
    /// The steps that are run.
    pub(super) steps: Range<usize>,
    /// How many there would be without an early end: what parts of a run (guidance, ControlNets) are counted against.
    pub(super) all_steps: usize,
}

/// What a pass begins with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Begin {
    /// Noise, at the first step.
    Noise,
    /// A picture with noise for this share of the steps.
    Strength(f64),
    /// A picture that holds the noise of this part of the run.
    At(f64),
}

impl Pass {
    /// `num_inference_steps` is the number of which a strength is a share, `num_train_timesteps` the whole run.
    ///
    /// # Errors
    /// `out_of_range`, where no step is left between `begin` and `end`.
    pub(super) fn new(
        scheduler: Box<dyn Scheduler>,
        num_inference_steps: usize,
        num_train_timesteps: usize,
        begin: Begin,
        end: Option<f64>,
    ) -> Result<Self> {
        let timesteps = scheduler.timesteps();
        let train = num_train_timesteps as f64;
        let cutoff = |part: f64| (train - part * train).round_ties_even();
        let first = match begin {
            Begin::Noise => 0,
            Begin::Strength(strength) => {
                let run = ((num_inference_steps as f64 * strength) as usize).min(num_inference_steps);
                ((num_inference_steps - run) * scheduler.order()).min(timesteps.len())
            }
            Begin::At(start) => {
                let mut count = timesteps.iter().filter(|t| **t < cutoff(start)).count();
                if scheduler.order() == 2 && count.is_multiple_of(2) {
                    count += 1; // not between the two halves of a step
                }
                timesteps.len() - count.min(timesteps.len())
            }
        };
        let all_steps = timesteps.len() - first;
        let count = match end {
            Some(end) => timesteps[first..].iter().filter(|t| **t >= cutoff(end)).count(),
            None => all_steps,
        };
        if count == 0 {
            let field = match (end, begin) {
                (Some(_), _) => "denoising_end",
                (None, Begin::At(_)) => "denoising_start",
                (None, _) => "strength",
            };
            let message = format!("`{field}` leaves none of these steps to run");
            return Err(Error::invalid("out_of_range", field, message).remedy("run a larger part, or more steps"));
        }
        Ok(Pass { begin, steps: first..first + count, all_steps, scheduler })
    }

    /// Whether the picture that it begins with gets noise.
    pub(super) fn adds_noise(&self) -> bool {
        !matches!(self.begin, Begin::At(_))
    }
}

impl StableDiffusionXlPipeline {
    /// A pass of `parts` over the steps between `begin` and `end`, of a schedule with these options.
    fn pass(
        &self,
        parts: &ModelParts,
        params: &GenerateParams,
        options: &StepOptions,
        begin: Begin,
        end: Option<f64>,
    ) -> Result<Pass> {
        let config = &parts.scheduler_config;
        let kind = params.scheduler.map_or_else(|| default_scheduler(config), Ok)?;
        let scheduler = schedulers::build(kind, config, options)?;
        // of a list a strength is a share of as many as the scheduler makes of it, as in diffusers' `retrieve_timesteps`
        let steps = if options.is_custom() { scheduler.timesteps().len() } else { options.num_inference_steps };
        Pass::new(scheduler, steps, config.num_train_timesteps(), begin, end)
    }

    /// The schedules of a job: the base model's, and those of a second pass and of the refiner.
    pub(super) fn passes(&self, params: &GenerateParams) -> Result<(Pass, [Option<Pass>; 2])> {
        let options = |steps: usize| StepOptions {
            num_inference_steps: steps,
            eta: params.eta,
            sigma_schedule: params.sigma_schedule,
            timestep_spacing: params.preset.and_then(trailing_timesteps),
            ..StepOptions::default()
        };
        let begin = params.init.as_ref().map_or(Begin::Noise, |init| match init.denoising_start {
            Some(start) => Begin::At(start),
            None => Begin::Strength(init.strength),
        });
        // the base model's last pass is the one that may end early
        let end = params.denoising_end;
        let first_end = end.filter(|_| params.hires.is_none());
        // lists are for the first pass, whose steps they count
        let listed = StepOptions {
            timesteps: params.timesteps.clone(),
            sigmas: params.sigmas.clone(),
            ..options(params.num_inference_steps)
        };
        let base = self.pass(&self.base, params, &listed, begin, first_end)?;
        let hires = params.hires.as_ref().map(|hires| {
            let options = options(hires.num_inference_steps);
            self.pass(&self.base, params, &options, Begin::Strength(hires.strength), end)
        });
        let refiner = params.refiner.as_ref().map(|refiner| {
            let begin = match refiner.begin {
                RefinerBegin::At(start) => Begin::At(start),
                RefinerBegin::Strength(strength) => Begin::Strength(strength),
            };
            self.pass(self.refiners.get(), params, &options(refiner.num_inference_steps), begin, None)
        });
        Ok((base, [hires.transpose()?, refiner.transpose()?]))
    }
}

/// The spacing that few-step checkpoints want.
fn trailing_timesteps(preset: Preset) -> Option<TimestepSpacing> {
    preset.has_trailing_timesteps().then_some(TimestepSpacing::Trailing)
}
