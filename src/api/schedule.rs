//! The fields of a request that say which noise levels are run through, and whether the scheduler has what they ask for.

use super::scheduler_kind::{NamedScheduler, SchedulerKind};
use super::sigma_schedule::SigmaSchedule;
use super::wording::in_range;
use crate::error::{Error, Result};

pub(super) struct ScheduleRequest {
    pub(super) scheduler: Option<String>,
    pub(super) sigma_schedule: Option<String>,
    pub(super) timesteps: Option<Vec<i64>>,
    pub(super) sigmas: Option<Vec<f64>>,
    pub(super) eta: f64,
}

#[derive(Debug, PartialEq)]
pub(super) struct Schedule {
    pub(super) scheduler: Option<SchedulerKind>,
    pub(super) sigma_schedule: Option<SigmaSchedule>,
    pub(super) timesteps: Option<Vec<i64>>,
    pub(super) sigmas: Option<Vec<f64>>,
}

/// Far above any model's noisiest level.
const MAX_SIGMA: f64 = 1e6;

impl ScheduleRequest {
    /// `default` acts where no scheduler is named. An empty list asks for nothing.
    pub(super) fn check(self, default: SchedulerKind, max_steps: u32) -> Result<Schedule> {
        let named = self.scheduler.map(|name| SchedulerKind::from_name(&name, "scheduler")).transpose()?;
        let acting = named.map_or(default, |named| named.kind);
        if self.eta > 0.0 && !acting.has_eta() {
            return Err(unsupported_option("eta", acting));
        }
        let timesteps = self.timesteps.filter(|list| !list.is_empty());
        let sigmas = self.sigmas.filter(|list| !list.is_empty());
        if timesteps.is_some() && !acting.has_timesteps() {
            return Err(unsupported_option("timesteps", acting));
        }
        if sigmas.is_some() && !acting.has_sigmas() {
            return Err(unsupported_option("sigmas", acting));
        }
        let sigma_schedule = curve(self.sigma_schedule, named, acting)?;
        one_of([
            ("timesteps", timesteps.is_some()),
            ("sigmas", sigmas.is_some()),
            ("sigma_schedule", sigma_schedule.is_some()),
        ])?;
        if let Some(list) = &timesteps {
            in_range("timesteps.length", list.len(), 1..=max_steps as usize)?;
            falling("timesteps", list)?;
            in_range("timesteps", list[list.len() - 1], 0..=i64::MAX)?;
        }
        if let Some(list) = &sigmas {
            in_range("sigmas.length", list.len(), 2..=max_steps as usize + 1)?;
            falling("sigmas", list)?;
            in_range("sigmas", list[0], 0.0..=MAX_SIGMA)?;
            in_range("sigmas", list[list.len() - 1], 0.0..=MAX_SIGMA)?;
        }
        Ok(Schedule { scheduler: named.map(|named| named.kind), sigma_schedule, timesteps, sigmas })
    }
}

/// The curve that is asked for; one that is named itself wins over one that the scheduler's name implies.
fn curve(name: Option<String>, named: Option<NamedScheduler>, acting: SchedulerKind) -> Result<Option<SigmaSchedule>> {
    let own = name.map(|name| SigmaSchedule::from_name(&name)).transpose()?;
    let Some(schedule) = own.or(named.and_then(|named| named.sigma_schedule)) else { return Ok(None) };
    let known: Vec<_> = acting.sigma_schedules().iter().map(|schedule| schedule.name()).collect();
    if known.contains(&schedule.name()) {
        return Ok(Some(schedule));
    }
    let message = format!("the scheduler {} has no `sigma_schedule` {}", acting.name(), schedule.name());
    let remedy = match known[..] {
        [] => "leave `sigma_schedule` out, or choose another `scheduler`".to_owned(),
        _ => format!("choose one of {}, or another `scheduler`", known.join(", ")),
    };
    Err(Error::invalid("unsupported_option", "sigma_schedule", message).remedy(remedy))
}

fn unsupported_option(field: &str, scheduler: SchedulerKind) -> Error {
    let message = format!("the scheduler {} has no `{field}`", scheduler.name());
    Error::invalid("unsupported_option", field, message)
        .remedy(format!("leave `{field}` out, or choose another `scheduler`"))
}

/// Refuses two fields that both say which noise levels to run through.
fn one_of(fields: [(&str, bool); 3]) -> Result<()> {
    let given: Vec<_> = fields.iter().filter(|(_, given)| *given).map(|(field, _)| *field).collect();
    let [first, second, ..] = given[..] else { return Ok(()) };
    let message = format!("`{first}` and `{second}` both say which noise levels to run through");
    Err(Error::invalid("conflicting_fields", second, message).remedy("give one of them"))
}

fn falling<T: PartialOrd + std::fmt::Display>(field: &str, list: &[T]) -> Result<()> {
    let Some(pair) = list.windows(2).find(|pair| pair[0].partial_cmp(&pair[1]) != Some(std::cmp::Ordering::Greater))
    else {
        return Ok(());
    };
    let message = format!("`{field}` must fall, got {} and then {}", pair[0], pair[1]);
    Err(Error::invalid("invalid_value", field, message).remedy("order the list from the noisiest step down"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(scheduler: &str, sigma_schedule: Option<&str>, timesteps: &[i64], sigmas: &[f64]) -> Result<Schedule> {
        let request = ScheduleRequest {
            scheduler: Some(scheduler.into()),
            sigma_schedule: sigma_schedule.map(str::to_owned),
            timesteps: Some(timesteps.to_vec()),
            sigmas: Some(sigmas.to_vec()),
            eta: 0.0,
        };
        request.check(SchedulerKind::EulerDiscrete, 10)
    }

    #[test]
    fn a_curve_that_is_named_wins_over_an_implied_one() {
        let curve = |scheduler, own| check(scheduler, own, &[], &[]).unwrap().sigma_schedule;
        assert_eq!(curve("DPM++ 2M Karras", None), Some(SigmaSchedule::Karras));
        assert_eq!(curve("DPM++ 2M Karras", Some("lu")), Some(SigmaSchedule::Lu));
        assert_eq!(curve("DPM++ 2M", None), None);
    }

    #[test]
    fn what_a_scheduler_has_not_is_refused_with_its_name() {
        for (scheduler, curve, timesteps, sigmas, field) in [
            ("ddim", Some("karras"), &[][..], &[][..], "sigma_schedule"),
            ("euler", Some("lu"), &[], &[], "sigma_schedule"),
            ("lcm", Some("uniform"), &[], &[], "sigma_schedule"),
            ("unipc", Some("ays"), &[], &[], "sigma_schedule"),
            ("pndm", None, &[], &[1.0, 0.0], "sigmas"),
            ("dpmpp_2m", None, &[], &[1.0, 0.0], "sigmas"),
            ("dpm2", None, &[999], &[], "timesteps"),
        ] {
            let error = check(scheduler, curve, timesteps, sigmas).unwrap_err();
            assert_eq!((error.code, error.field.as_deref()), ("unsupported_option", Some(field)), "{scheduler}");
            assert!(error.message.contains(scheduler), "{}", error.message);
        }
    }

    #[test]
    fn lists_fall_and_are_not_too_long() {
        assert_eq!(check("euler", None, &[999, 0], &[]).unwrap().timesteps, Some(vec![999, 0]));
        assert_eq!(check("euler", None, &[], &[14.6, 0.0]).unwrap().sigmas, Some(vec![14.6, 0.0]));
        let code = |timesteps: &[i64], sigmas: &[f64]| check("euler", None, timesteps, sigmas).unwrap_err().code;
        assert_eq!(code(&[10, 20], &[]), "invalid_value");
        assert_eq!(code(&[10, 10], &[]), "invalid_value");
        assert_eq!(code(&[10, -1], &[]), "out_of_range");
        assert_eq!(code(&[11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1], &[]), "out_of_range");
        assert_eq!(code(&[], &[1.0]), "out_of_range");
        assert_eq!(code(&[], &[1.0, 1.0]), "invalid_value");
        assert_eq!(code(&[], &[1.0, -1.0]), "out_of_range");
        assert_eq!(code(&[], &[1e9, 1.0]), "out_of_range");
    }

    #[test]
    fn two_fields_that_say_the_same_thing_are_refused() {
        assert_eq!(check("euler", None, &[9], &[1.0, 0.0]).unwrap_err().code, "conflicting_fields");
        assert_eq!(check("euler", Some("karras"), &[9], &[]).unwrap_err().code, "conflicting_fields");
        assert_eq!(check("DPM++ 2M Karras", None, &[9], &[]).unwrap_err().code, "conflicting_fields");
    }
}
