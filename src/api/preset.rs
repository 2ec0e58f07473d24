//! Checkpoints distilled to few steps want their own scheduler, spacing and guidance: one name sets them all.

use super::scheduler_kind::SchedulerKind;
use super::wording::invalid_value;
use crate::error::Result;

/// What a few-step checkpoint (or LoRA) was distilled by; its values are those of the model cards. A request's own fields
/// win over them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Preset {
    /// `stabilityai/sdxl-turbo`
    Turbo,
    /// `ByteDance/SDXL-Lightning`
    Lightning,
    /// `latent-consistency/lcm-sdxl`, `lcm-lora-sdxl`
    Lcm,
    /// `ByteDance/Hyper-SD`
    Hyper,
}

impl Preset {
    pub const ALL: [Preset; 4] = [Preset::Turbo, Preset::Lightning, Preset::Lcm, Preset::Hyper];

    /// The preset of that name; `None` for `none`, which takes away the one that the model's configuration asks for.
    ///
    /// # Errors
    /// `invalid_value`.
    pub(super) fn from_name(name: &str) -> Result<Option<Preset>> {
        let wanted = name.to_lowercase();
        match Preset::ALL.into_iter().find(|preset| preset.name() == wanted) {
            None if wanted != "none" => {
                Err(invalid_value("preset", &["turbo", "lightning", "lcm", "hyper", "none"], name))
            }
            found => Ok(found),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Preset::Turbo => "turbo",
            Preset::Lightning => "lightning",
            Preset::Lcm => "lcm",
            Preset::Hyper => "hyper",
        }
    }

    /// For that many steps.
    pub(super) fn scheduler(self, steps: usize) -> SchedulerKind {
        match self {
            Preset::Turbo => SchedulerKind::EulerAncestralDiscrete,
            Preset::Lightning => SchedulerKind::EulerDiscrete,
            Preset::Hyper if steps > 1 => SchedulerKind::Ddim,
            Preset::Lcm | Preset::Hyper => SchedulerKind::Lcm,
        }
    }

    /// Hyper's one step is not the schedule's first.
    pub(super) fn timesteps(self, steps: usize) -> Option<Vec<i64>> {
        (self == Preset::Hyper && steps == 1).then(|| vec![800])
    }

    pub fn num_inference_steps(self) -> i64 {
        match self {
            Preset::Turbo => 1,
            Preset::Lightning | Preset::Lcm | Preset::Hyper => 4,
        }
    }

    /// Whether the steps end at the last training timestep, whatever the model's configuration says.
    pub fn has_trailing_timesteps(self) -> bool {
        self != Preset::Lcm
    }

    /// A UNet that takes the scale as an input was distilled for scales as of ordinary guidance; the others ran without.
    pub fn guidance_scale(self, has_embedded_guidance: bool) -> f64 {
        if has_embedded_guidance { 8.0 } else { 1.0 }
    }
}
