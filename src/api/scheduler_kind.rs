//! The schedulers by all the names that tools give them: diffusers' classes, A1111's labels, k-diffusion's and Replicate's
//! constants. One row each; those diffusers has and this version has not are known by name, so that the answer to them
//! is "not supported" and not "unknown".

use super::wording::{nearest, shorten, unsupported_feature};
use crate::error::{Error, Result};

/// A denoising algorithm of diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SchedulerKind {
    EulerDiscrete,
    Ddim,
}

struct Row {
    kind: Option<SchedulerKind>,
    /// Our own name, written into replies and pictures.
    name: &'static str,
    /// diffusers' class, as in a model's `scheduler_config.json`.
    class_name: &'static str,
    /// What A1111 calls it, for the text it reads from pictures.
    label: &'static str,
    other_names: &'static [&'static str],
}

const fn supported(
    kind: SchedulerKind,
    name: &'static str,
    class_name: &'static str,
    label: &'static str,
    other_names: &'static [&'static str],
) -> Row {
    Row { kind: Some(kind), name, class_name, label, other_names }
}

const fn later(
    name: &'static str,
    class_name: &'static str,
    label: &'static str,
    other_names: &'static [&'static str],
) -> Row {
    Row { kind: None, name, class_name, label, other_names }
}

/// Names here need not repeat what [`normalized`] makes equal. A class that stands behind several algorithms is given to
/// the one that is its default.
static SCHEDULERS: &[Row] = &[
    supported(SchedulerKind::EulerDiscrete, "euler", "EulerDiscreteScheduler", "Euler", &["euler discrete"]),
    supported(SchedulerKind::Ddim, "ddim", "DDIMScheduler", "DDIM", &[]),
    later("euler_ancestral", "EulerAncestralDiscreteScheduler", "Euler a", &["euler ancestral discrete"]),
    later("ddpm", "DDPMScheduler", "DDPM", &[]),
    later("pndm", "PNDMScheduler", "PLMS", &["ipndm"]),
    later("lms", "LMSDiscreteScheduler", "LMS", &["lms karras"]),
    later("heun", "HeunDiscreteScheduler", "Heun", &["heun discrete"]),
    later("dpm2", "KDPM2DiscreteScheduler", "DPM2", &["dpm2 karras"]),
    later("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler", "DPM2 a", &["dpm2 a karras"]),
    later(
        "dpmpp_2m",
        "DPMSolverMultistepScheduler",
        "DPM++ 2M",
        &["dpmsolver multistep", "dpm++ 2m karras", "karras dpm", "dpm++", "dpmsolver++"],
    ),
    later("dpmpp_2m_sde", "DPMSolverMultistepScheduler", "DPM++ 2M SDE", &["dpm++ 2m sde karras"]),
    later("dpmpp_3m_sde", "DPMSolverMultistepScheduler", "DPM++ 3M SDE", &["dpm++ 3m sde karras"]),
    later("dpmpp_sde", "DPMSolverSDEScheduler", "DPM++ SDE", &["dpm++ sde karras"]),
    later("dpmpp_2s", "DPMSolverSinglestepScheduler", "DPM++ 2S", &["dpmsolver singlestep"]),
    later("dpmpp_2s_ancestral", "DPMSolverSinglestepScheduler", "DPM++ 2S a", &["dpm++ 2s a karras"]),
    later("deis", "DEISMultistepScheduler", "DEIS", &["deis multistep"]),
    later("unipc", "UniPCMultistepScheduler", "UniPC", &["unipc multistep"]),
    later("lcm", "LCMScheduler", "LCM", &[]),
    later("tcd", "TCDScheduler", "TCD", &[]),
    later("edm_euler", "EDMEulerScheduler", "EDM Euler", &[]),
    later("edm_dpmpp_2m", "EDMDPMSolverMultistepScheduler", "EDM DPM++ 2M", &[]),
];

/// What names have in common: `K_EULER`, `Euler` and `EulerScheduler` are `euler`; `DPM++` is `dpmpp`.
fn normalized(name: &str) -> String {
    let name = name.to_lowercase().replace([' ', '_', '-'], "").replace("++", "pp");
    let name = name.strip_suffix("scheduler").unwrap_or(&name);
    name.strip_prefix('k').unwrap_or(name).to_owned()
}

impl Row {
    fn all_names(&self) -> impl Iterator<Item = &'static str> {
        [self.name, self.class_name, self.label].into_iter().chain(self.other_names.iter().copied())
    }
}

impl SchedulerKind {
    /// Reads a name in any of the spellings tools use.
    ///
    /// # Errors
    ///
    /// `unsupported_feature` for a scheduler of diffusers that this version has not, `unknown_scheduler` otherwise;
    /// `field` names the place in the request.
    pub fn from_name(name: &str, field: &str) -> Result<SchedulerKind> {
        let wanted = normalized(&shorten(name, 80));
        match SCHEDULERS.iter().find(|row| row.all_names().any(|name| normalized(name) == wanted)) {
            Some(Row { kind: Some(kind), .. }) => Ok(*kind),
            Some(row) => Err(unsupported_feature(field, &format!("the scheduler {}", row.label))
                .remedy(format!("choose one of {}, or leave `{field}` out", supported_names()))),
            None => {
                let known = supported_names();
                let message = format!("`{field}` must be one of {known}, got {:?}", shorten(name, 40));
                let close = nearest(name, SCHEDULERS.iter().filter(|row| row.kind.is_some()).map(|row| row.name))
                    .unwrap_or_default();
                Err(Error::invalid("unknown_scheduler", field, message)
                    .remedy(format!("choose one of {known}; the nearest known name is {close}")))
            }
        }
    }

    /// Our name for it, such as `euler`.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// diffusers' class, such as `EulerDiscreteScheduler`.
    pub fn class_name(self) -> &'static str {
        self.row().class_name
    }

    /// A1111's label, such as `Euler`.
    pub fn label(self) -> &'static str {
        self.row().label
    }

    /// Whether `eta` (noise added at each step) means something to it.
    pub fn has_eta(self) -> bool {
        match self {
            SchedulerKind::Ddim => true,
            SchedulerKind::EulerDiscrete => false,
        }
    }

    /// Whether its noise levels can follow another curve, such as Karras'.
    pub fn has_sigma_schedules(self) -> bool {
        match self {
            SchedulerKind::EulerDiscrete => true,
            SchedulerKind::Ddim => false,
        }
    }

    fn row(self) -> &'static Row {
        SCHEDULERS.iter().find(|row| row.kind == Some(self)).expect("every kind has a row")
    }
}

fn supported_names() -> String {
    let names: Vec<_> = SCHEDULERS.iter().filter(|row| row.kind.is_some()).map(|row| row.name).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_supported_scheduler_is_read() {
        for name in ["euler", "Euler", "EULER", "K_EULER", "k-euler", "EulerDiscrete", "EulerDiscreteScheduler"] {
            assert_eq!(SchedulerKind::from_name(name, "scheduler").unwrap(), SchedulerKind::EulerDiscrete, "{name}");
        }
        for name in ["DDIM", "ddim", "DDIMScheduler", "DdimScheduler", " ddim "] {
            assert_eq!(SchedulerKind::from_name(name, "scheduler").unwrap(), SchedulerKind::Ddim, "{name}");
        }
    }

    #[test]
    fn a_scheduler_of_diffusers_that_is_not_built_yet_is_not_unknown() {
        let names = [
            "Euler a",
            "K_EULER_ANCESTRAL",
            "euler_a",
            "EulerAncestralDiscreteScheduler",
            "DPM++ 2M",
            "dpmpp_2m",
            "DPM++ 2M Karras",
            "DPM++ 2M SDE",
            "DPM++ 3M SDE",
            "DPM++ SDE",
            "DPM++ 2S a",
            "DPMSolverMultistep",
            "DPMSolverSinglestepScheduler",
            "UniPC",
            "UniPCMultistepScheduler",
            "KLMS",
            "LMS",
            "Heun",
            "HeunDiscrete",
            "PNDM",
            "PLMS",
            "DDPM",
            "LCM",
            "TCD",
            "DEIS",
            "DPM2",
            "KDPM2DiscreteScheduler",
            "dpm2_ancestral",
            "KarrasDPM",
            "EDMEulerScheduler",
        ];
        for name in names {
            let error = SchedulerKind::from_name(name, "scheduler").unwrap_err();
            assert_eq!((error.code, error.field.as_deref()), ("unsupported_feature", Some("scheduler")), "{name}");
        }
    }

    #[test]
    fn an_unknown_scheduler_is_answered_with_the_known_ones_and_the_nearest() {
        let error = SchedulerKind::from_name("eulr", "scheduler").unwrap_err();
        assert_eq!(error.code, "unknown_scheduler");
        assert_eq!(error.message, "`scheduler` must be one of euler, ddim, got \"eulr\"");
        assert_eq!(error.remedy.unwrap(), "choose one of euler, ddim; the nearest known name is euler");
        for name in ["", "k", "scheduler", &"x".repeat(1_000_000)] {
            assert_eq!(SchedulerKind::from_name(name, "scheduler").unwrap_err().code, "unknown_scheduler");
        }
    }

    #[test]
    fn no_two_schedulers_share_a_name() {
        let mut seen = std::collections::HashMap::new();
        for row in SCHEDULERS {
            // One class is several algorithms in diffusers; the first row has it.
            for name in row.all_names().filter(|name| *name != row.class_name) {
                let other = seen.insert(normalized(name), row.name);
                assert!(other.is_none_or(|other| other == row.name), "{name} is {other:?} and {}", row.name);
            }
        }
    }
}
