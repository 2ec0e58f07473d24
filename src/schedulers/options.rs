//! What a job asks of its scheduler, and how that and the kind of scheduler change the model's configuration.

use super::ays;
use super::config::{AlgorithmType, EdmSigmaSchedule, SchedulerConfig, SolverType, TimestepSpacing};
use super::sigmas::Curve;
use crate::api::{SchedulerKind, SigmaSchedule};
use crate::error::{Error, Result};

/// What one job asks of its scheduler.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOptions {
    /// Taken from the length of `timesteps` or `sigmas` where one of them is given.
    pub num_inference_steps: usize,
    /// Weight of fresh noise in DDIM, from 0 (none) to 1 (as DDPM); how far TCD overshoots.
    pub eta: f64,
    /// The noise curve, in place of the configuration's own.
    pub sigma_schedule: Option<SigmaSchedule>,
    /// The timesteps to run, falling.
    pub timesteps: Option<Vec<i64>>,
    /// The noise levels to run through, falling; the last is where the run ends.
    pub sigmas: Option<Vec<f64>>,
    /// The spacing, in place of the configuration's own; a `sigma_schedule` that is a spacing wins.
    pub timestep_spacing: Option<TimestepSpacing>,
}

impl StepOptions {
    /// Whether the steps are those of a list and not spread by the scheduler.
    pub fn is_custom(&self) -> bool {
        self.timesteps.is_some() || self.sigmas.is_some() || self.sigma_schedule == Some(SigmaSchedule::Ays)
    }

    /// The same with Align Your Steps as the list that it is, and the number of steps of the list.
    pub(super) fn resolved(&self, kind: SchedulerKind, config: &SchedulerConfig) -> Result<Self> {
        self.check(kind)?;
        let mut options = self.clone();
        if options.sigma_schedule == Some(SigmaSchedule::Ays) {
            if kind.has_sigmas() {
                options.sigmas = Some(ays::sigmas(self.num_inference_steps));
            } else {
                options.timesteps = Some(ays::timesteps(self.num_inference_steps, config)?);
            }
        }
        if let Some(list) = &options.timesteps {
            let train = config.num_train_timesteps() as i64;
            let falls = list.windows(2).all(|pair| pair[1] < pair[0]);
            if list.is_empty() || !falls || list[list.len() - 1] < 0 || list[0] >= train {
                let message = format!("`timesteps` must fall, from at most {} to at least 0", train - 1);
                return Err(Error::invalid("out_of_range", "timesteps", message));
            }
            options.num_inference_steps = list.len();
        }
        if let Some(list) = &options.sigmas {
            if list.len() < 2 || list.windows(2).any(|pair| pair[1] >= pair[0]) || list[list.len() - 1] < 0.0 {
                return Err(Error::invalid("out_of_range", "sigmas", "`sigmas` must fall, to at least 0"));
            }
            options.num_inference_steps = list.len() - 1;
        }
        Ok(options)
    }

    /// Refuses what the scheduler does not have.
    fn check(&self, kind: SchedulerKind) -> Result<()> {
        let lacks = [
            ("eta", self.eta > 0.0 && !kind.has_eta()),
            ("timesteps", self.timesteps.is_some() && !kind.has_timesteps()),
            ("sigmas", self.sigmas.is_some() && !kind.has_sigmas()),
            ("sigma_schedule", self.sigma_schedule.is_some_and(|curve| !kind.sigma_schedules().contains(&curve))),
        ];
        match lacks.iter().find(|(_, lacks)| *lacks) {
            Some((field, _)) => {
                let message = format!("the scheduler {} has no such `{field}`", kind.name());
                Err(Error::invalid("unsupported_option", *field, message)
                    .remedy(format!("leave `{field}` out, or choose another `scheduler`")))
            }
            None => Ok(()),
        }
    }
}

/// A list of timesteps says which noise levels to run through; so does a curve of the model's own configuration.
pub(super) fn refuse_timesteps_beside_curve(options: &StepOptions, curve: Option<Curve>) -> Result<()> {
    match curve {
        Some(curve) if options.timesteps.is_some() => {
            let message = format!(
                "the model's own noise levels follow a curve ({curve:?}), beside which a list of \
                timesteps has no place"
            );
            Err(Error::invalid("unsupported_option", "timesteps", message)
                .remedy("leave `timesteps` out, or give `sigma_schedule` ays or uniform in their place"))
        }
        _ => Ok(()),
    }
}

impl SchedulerConfig {
    /// The scheduler that the model names; `None` for a class that is not known.
    pub fn kind(&self) -> Option<SchedulerKind> {
        let kind = SchedulerKind::from_class_name(self.class_name.as_deref().unwrap_or("EulerDiscreteScheduler"))?;
        let with_noise =
            matches!(self.algorithm_type, Some(AlgorithmType::SdeDpmSolver | AlgorithmType::SdeDpmSolverPlusPlus));
        Some(match kind {
            SchedulerKind::Dpmpp2m if with_noise => match (self.solver_order, self.solver_type) {
                (Some(3), _) => SchedulerKind::Dpmpp3mSde,
                (_, Some(SolverType::Heun)) => SchedulerKind::Dpmpp2mSdeHeun,
                _ => SchedulerKind::Dpmpp2mSde,
            },
            kind => kind,
        })
    }

    /// The configuration for a scheduler of that kind: what makes it another solver of its class is set, unless the model
    /// is of that kind already.
    pub(super) fn for_kind(&self, kind: SchedulerKind) -> Self {
        let mut config = self.clone();
        if self.kind() == Some(kind) {
            return config;
        }
        use AlgorithmType::{DpmSolverPlusPlus, SdeDpmSolverPlusPlus};
        let (algorithm_type, solver_order, solver_type) = match kind {
            SchedulerKind::Dpmpp2m | SchedulerKind::Dpmpp2s | SchedulerKind::EdmDpmpp2m => (DpmSolverPlusPlus, 2, None),
            SchedulerKind::Dpmpp2mSde => (SdeDpmSolverPlusPlus, 2, Some(SolverType::Midpoint)),
            SchedulerKind::Dpmpp2mSdeHeun => (SdeDpmSolverPlusPlus, 2, Some(SolverType::Heun)),
            SchedulerKind::Dpmpp3mSde => (SdeDpmSolverPlusPlus, 3, None),
            _ => return config,
        };
        config.algorithm_type = Some(algorithm_type);
        config.solver_order = Some(solver_order);
        config.solver_type = solver_type.or(config.solver_type);
        config
    }

    /// The same with what the job asks for in its own keys' place.
    pub(super) fn with_options(mut self, options: &StepOptions) -> Self {
        self.timestep_spacing = options.timestep_spacing.or(self.timestep_spacing);
        let Some(schedule) = options.sigma_schedule else { return self };
        self.use_karras_sigmas = Some(schedule == SigmaSchedule::Karras);
        self.use_exponential_sigmas = Some(schedule == SigmaSchedule::Exponential);
        self.use_beta_sigmas = Some(schedule == SigmaSchedule::Beta);
        self.use_lu_lambdas = Some(schedule == SigmaSchedule::Lu);
        match schedule {
            SigmaSchedule::SgmUniform => self.timestep_spacing = Some(TimestepSpacing::Trailing),
            SigmaSchedule::Karras => self.sigma_schedule = Some(EdmSigmaSchedule::Karras),
            SigmaSchedule::Exponential => self.sigma_schedule = Some(EdmSigmaSchedule::Exponential),
            _ => {}
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(json: &str) -> Option<SchedulerKind> {
        SchedulerConfig::from_json(json).unwrap().kind()
    }

    #[test]
    fn a_class_that_stands_for_several_kinds_is_told_apart_by_its_configuration() {
        let multistep = |more: &str| kind(&format!(r#"{{"_class_name": "DPMSolverMultistepScheduler"{more}}}"#));
        assert_eq!(multistep(""), Some(SchedulerKind::Dpmpp2m));
        assert_eq!(multistep(r#", "solver_order": 3, "lambda_min_clipped": -Infinity"#), Some(SchedulerKind::Dpmpp2m));
        assert_eq!(multistep(r#", "algorithm_type": "sde-dpmsolver++""#), Some(SchedulerKind::Dpmpp2mSde));
        let third = r#", "algorithm_type": "sde-dpmsolver++", "solver_order": 3"#;
        assert_eq!(multistep(third), Some(SchedulerKind::Dpmpp3mSde));
        let heun = r#", "algorithm_type": "sde-dpmsolver++", "solver_type": "heun""#;
        assert_eq!(multistep(heun), Some(SchedulerKind::Dpmpp2mSdeHeun));
        assert_eq!(kind("{}"), Some(SchedulerKind::EulerDiscrete));
        assert_eq!(kind(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler"}"#), None);
    }

    #[test]
    fn a_named_kind_is_that_solver_whatever_the_model_s_own_was() {
        let json = r#"{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++",
            "solver_order": 3, "solver_type": "heun"}"#;
        let config = SchedulerConfig::from_json(json).unwrap();
        for kind in [SchedulerKind::Dpmpp2m, SchedulerKind::Dpmpp2mSde, SchedulerKind::Dpmpp2mSdeHeun] {
            let mut changed = config.for_kind(kind);
            changed.class_name = Some("DPMSolverMultistepScheduler".into());
            assert_eq!(changed.kind(), Some(kind));
            assert_eq!(changed.solver_order, Some(2));
        }
        // its own kind is left as it is
        assert_eq!(config.for_kind(SchedulerKind::Dpmpp3mSde).solver_type, Some(SolverType::Heun));
    }

    #[test]
    fn a_curve_that_is_asked_for_takes_the_place_of_the_model_s_own() {
        let config = SchedulerConfig::from_json(r#"{"use_karras_sigmas": true}"#).unwrap();
        let with = |schedule| {
            let options = StepOptions { sigma_schedule: Some(schedule), ..StepOptions::default() };
            let config = config.clone().with_options(&options);
            super::super::sigmas::curve(&config, true).unwrap()
        };
        assert_eq!(with(SigmaSchedule::Exponential), Some(Curve::Exponential));
        assert_eq!(with(SigmaSchedule::Lu), Some(Curve::Lu));
        assert_eq!(with(SigmaSchedule::Uniform), None);
        assert_eq!(with(SigmaSchedule::Ays), None);
    }
}
