//! The schedulers by all the names that tools give them: diffusers' classes, A1111's labels, ComfyUI's and k-diffusion's
//! samplers, worker-sdxl's and Replicate's constants. Samplers that diffusers does not have are known by name, so that the
//! answer to them is "not supported" and not "unknown".

use super::sigma_schedule::SigmaSchedule::{self, Ays, Beta, Exponential, Karras, Lu, SgmUniform, Uniform};
use super::wording::{nearest, shorten, unsupported_feature};
use crate::error::{Error, Result};

/// A denoising algorithm: a class of diffusers, or one of the solvers that a class stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SchedulerKind {
    EulerDiscrete,
    EulerAncestralDiscrete,
    HeunDiscrete,
    Kdpm2Discrete,
    Kdpm2AncestralDiscrete,
    LmsDiscrete,
    Ddim,
    Ddpm,
    Pndm,
    Dpmpp2m,
    Dpmpp2mSde,
    Dpmpp2mSdeHeun,
    Dpmpp3mSde,
    Dpmpp2s,
    DpmppSde,
    DeisMultistep,
    UniPcMultistep,
    Lcm,
    Tcd,
    EdmEuler,
    EdmDpmpp2m,
}

/// What a name such as `DPM++ 2M Karras` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedScheduler {
    pub kind: SchedulerKind,
    /// The noise curve, where the name implies one.
    pub sigma_schedule: Option<SigmaSchedule>,
}

struct Row {
    kind: SchedulerKind,
    /// Our own name, written into replies and pictures.
    name: &'static str,
    /// diffusers' class, as in a model's `scheduler_config.json`.
    class_name: &'static str,
    /// What A1111 calls it, for the text it reads from pictures.
    label: &'static str,
    other_names: &'static [&'static str],
    sigma_schedules: &'static [SigmaSchedule],
}

const fn row(
    kind: SchedulerKind,
    name: &'static str,
    class_name: &'static str,
    label: &'static str,
    other_names: &'static [&'static str],
    sigma_schedules: &'static [SigmaSchedule],
) -> Row {
    Row { kind, name, class_name, label, other_names, sigma_schedules }
}

/// Noise curves by what a class's constructor and `set_timesteps` take in diffusers.
const CURVES: &[SigmaSchedule] = &[Karras, Exponential, Beta, SgmUniform, Uniform];
const CURVES_AND_TIMESTEPS: &[SigmaSchedule] = &[Karras, Exponential, Beta, Ays, SgmUniform, Uniform];
const MULTISTEP: &[SigmaSchedule] = &[Karras, Exponential, Beta, Lu, Ays, SgmUniform, Uniform];
const SINGLESTEP: &[SigmaSchedule] = &[Karras, Exponential, Beta, Ays, Uniform];
const SPACING: &[SigmaSchedule] = &[SgmUniform, Uniform];
const SPACING_AND_TIMESTEPS: &[SigmaSchedule] = &[Ays, SgmUniform, Uniform];
const EDM: &[SigmaSchedule] = &[Karras, Exponential];
const DISTILLED: &[SigmaSchedule] = &[];

const MULTISTEP_CLASS: &str = "DPMSolverMultistepScheduler";

/// Names here need not repeat what [`normalized`] makes equal. A class that stands behind several algorithms is given to
/// the one that is its default.
static SCHEDULERS: &[Row] = {
    use SchedulerKind::*;
    &[
        row(EulerDiscrete, "euler", "EulerDiscreteScheduler", "Euler", &["euler discrete"], CURVES_AND_TIMESTEPS),
        row(
            EulerAncestralDiscrete,
            "euler_ancestral",
            "EulerAncestralDiscreteScheduler",
            "Euler a",
            &["euler ancestral discrete"],
            SPACING,
        ),
        row(HeunDiscrete, "heun", "HeunDiscreteScheduler", "Heun", &["heun discrete"], CURVES_AND_TIMESTEPS),
        row(Kdpm2Discrete, "dpm2", "KDPM2DiscreteScheduler", "DPM2", &["dpm2 discrete"], CURVES),
        row(
            Kdpm2AncestralDiscrete,
            "dpm2_ancestral",
            "KDPM2AncestralDiscreteScheduler",
            "DPM2 a",
            &["dpm2 ancestral discrete"],
            CURVES,
        ),
        row(LmsDiscrete, "lms", "LMSDiscreteScheduler", "LMS", &["lms discrete"], CURVES),
        row(Ddim, "ddim", "DDIMScheduler", "DDIM", &[], SPACING),
        row(Ddpm, "ddpm", "DDPMScheduler", "DDPM", &[], SPACING_AND_TIMESTEPS),
        row(Pndm, "pndm", "PNDMScheduler", "PLMS", &[], SPACING),
        row(
            Dpmpp2m,
            "dpmpp_2m",
            MULTISTEP_CLASS,
            "DPM++ 2M",
            &["dpmsolver multistep", "dpm multistep", "dpm++", "dpmsolver++", "dpm solver"],
            MULTISTEP,
        ),
        row(Dpmpp2mSde, "dpmpp_2m_sde", MULTISTEP_CLASS, "DPM++ 2M SDE", &["dpmpp_2m_sde_gpu"], MULTISTEP),
        row(
            Dpmpp2mSdeHeun,
            "dpmpp_2m_sde_heun",
            MULTISTEP_CLASS,
            "DPM++ 2M SDE Heun",
            &["dpmpp_2m_sde_heun_gpu"],
            MULTISTEP,
        ),
        row(Dpmpp3mSde, "dpmpp_3m_sde", MULTISTEP_CLASS, "DPM++ 3M SDE", &["dpmpp_3m_sde_gpu"], MULTISTEP),
        row(
            Dpmpp2s,
            "dpmpp_2s",
            "DPMSolverSinglestepScheduler",
            "DPM++ 2S",
            &["dpmsolver singlestep", "dpm singlestep"],
            SINGLESTEP,
        ),
        row(
            DpmppSde,
            "dpmpp_sde",
            "DPMSolverSDEScheduler",
            "DPM++ SDE",
            &["dpmsolver sde", "dpmpp_sde_gpu", "dpm sde"],
            CURVES,
        ),
        row(DeisMultistep, "deis", "DEISMultistepScheduler", "DEIS", &["deis multistep"], CURVES),
        row(
            UniPcMultistep,
            "unipc",
            "UniPCMultistepScheduler",
            "UniPC",
            &["unipc multistep", "uni_pc_bh2", "unipc_bh2"],
            CURVES,
        ),
        row(Lcm, "lcm", "LCMScheduler", "LCM", &[], DISTILLED),
        row(Tcd, "tcd", "TCDScheduler", "TCD", &[], DISTILLED),
        row(EdmEuler, "edm_euler", "EDMEulerScheduler", "EDM Euler", &[], EDM),
        row(
            EdmDpmpp2m,
            "edm_dpmpp_2m",
            "EDMDPMSolverMultistepScheduler",
            "EDM DPM++ 2M",
            &["edm dpmsolver multistep"],
            EDM,
        ),
    ]
};

/// Names that imply a noise curve without ending in its name: Replicate's.
static WITH_CURVE: &[(&str, SchedulerKind, SigmaSchedule)] = &[("karras dpm", SchedulerKind::Dpmpp2m, Karras)];

/// Samplers of other tools that diffusers has no like of, and the nearest that is here.
static NOT_IN_DIFFUSERS: &[(&str, &str)] = &[
    ("DPM++ 2S a", "dpmpp_2s or dpmpp_sde"),
    ("dpmpp_2s_ancestral", "dpmpp_2s or dpmpp_sde"),
    ("DPM fast", "dpmpp_2m"),
    ("DPM adaptive", "dpmpp_2m"),
    ("Restart", "heun"),
    ("heunpp2", "heun"),
    ("ipndm", "pndm"),
    ("ipndm_v", "pndm"),
    ("DDIM CFG++", "ddim"),
    ("euler_cfg_pp", "euler"),
    ("euler_ancestral_cfg_pp", "euler_ancestral"),
    ("dpmpp_2m_cfg_pp", "dpmpp_2m"),
    ("res_multistep", "dpmpp_2m"),
    ("gradient_estimation", "euler"),
];

/// What names have in common: `K_EULER`, `Euler` and `EulerScheduler` are `euler`; `DPM++` is `dpmpp`.
fn normalized(name: &str) -> String {
    let name = name.to_lowercase().replace([' ', '_', '-'], "").replace("++", "pp");
    let name = name.strip_suffix("scheduler").unwrap_or(&name);
    let name = name.strip_prefix("sample").unwrap_or(name);
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
    /// `unsupported_feature` for a known sampler that diffusers does not have, `unknown_scheduler` otherwise; `field`
    /// names the place in the request.
    pub fn from_name(name: &str, field: &str) -> Result<NamedScheduler> {
        let wanted = normalized(&shorten(name, 80));
        if let Some(kind) = find(&wanted) {
            return Ok(NamedScheduler { kind, sigma_schedule: None });
        }
        if let Some((_, kind, curve)) = WITH_CURVE.iter().find(|(name, ..)| normalized(name) == wanted) {
            return Ok(NamedScheduler { kind: *kind, sigma_schedule: Some(*curve) });
        }
        let (bare, curve) = match SigmaSchedule::split_suffix(&wanted) {
            Some((bare, curve)) => (bare, Some(curve)),
            None => (wanted.as_str(), None),
        };
        if let (Some(kind), Some(curve)) = (find(bare), curve)
            && kind.sigma_schedules().contains(&curve)
        {
            return Ok(NamedScheduler { kind, sigma_schedule: Some(curve) });
        }
        if let Some((known, near)) = NOT_IN_DIFFUSERS.iter().find(|(name, _)| normalized(name) == bare) {
            return Err(unsupported_feature(field, &format!("the scheduler {known}"))
                .remedy(format!("the nearest that this version has is {near}")));
        }
        let known = known_names();
        let message = format!("`{field}` must be one of {known}, got {:?}", shorten(name, 40));
        let close = nearest(name, SCHEDULERS.iter().map(|row| row.name)).unwrap_or_default();
        Err(Error::invalid("unknown_scheduler", field, message)
            .remedy(format!("choose one of {known}; the nearest known name is {close}")))
    }

    /// The kind that is a class's default, by diffusers' name of the class.
    pub fn from_class_name(class_name: &str) -> Option<SchedulerKind> {
        SCHEDULERS.iter().find(|row| row.class_name == class_name).map(|row| row.kind)
    }

    /// All of them, in the order of the documentation.
    pub fn all() -> impl Iterator<Item = SchedulerKind> {
        SCHEDULERS.iter().map(|row| row.kind)
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

    /// The noise curves it can follow.
    pub fn sigma_schedules(self) -> &'static [SigmaSchedule] {
        self.row().sigma_schedules
    }

    /// Whether `eta` (noise added at each step) means something to it.
    pub fn has_eta(self) -> bool {
        matches!(self, SchedulerKind::Ddim | SchedulerKind::Tcd)
    }

    /// Whether it runs a custom list of timesteps.
    pub fn has_timesteps(self) -> bool {
        use SchedulerKind::*;
        matches!(
            self,
            EulerDiscrete
                | HeunDiscrete
                | Ddpm
                | Dpmpp2m
                | Dpmpp2mSde
                | Dpmpp2mSdeHeun
                | Dpmpp3mSde
                | Dpmpp2s
                | Lcm
                | Tcd
        )
    }

    /// Whether it runs a custom list of noise levels.
    pub fn has_sigmas(self) -> bool {
        self == SchedulerKind::EulerDiscrete
    }

    fn row(self) -> &'static Row {
        SCHEDULERS.iter().find(|row| row.kind == self).expect("every kind has a row")
    }
}

fn find(wanted: &str) -> Option<SchedulerKind> {
    SCHEDULERS.iter().find(|row| row.all_names().any(|name| normalized(name) == wanted)).map(|row| row.kind)
}

fn known_names() -> String {
    let names: Vec<_> = SCHEDULERS.iter().map(|row| row.name).collect();
    names.join(", ")
}

#[cfg(test)]
#[path = "scheduler_kind_tests.rs"]
mod tests;
