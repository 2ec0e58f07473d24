//! How much memory a request will take beyond the weights, estimated before anything is computed, and what is done where it
//! would be too much.

use serde_json::Value;
use tch::{Device, Kind};

use super::StableDiffusionXlPipeline;
use super::offload::{Offload, TEXT_ENCODERS, UNET};
use super::rescue::{Economy, Measure, OFFLOADS};
use crate::api::GenerateParams;
use crate::error::{Error, ErrorClass, Result};
use crate::memory::{available, format_bytes};
use crate::torch::{self, device_memory};
use crate::weights::Weights;

/// Bytes alive at once in the UNet, for each latent pixel and channel of the first level; and in the VAE's decoder, for
/// each pixel and channel of its second level. On the CPU as measured at full size in bfloat16, 256 to 768 pixels square,
/// where the kernels' own scratch is most of it; elsewhere the tensors alone.
struct Bytes {
    unet: u64,
    vae: u64,
}

const ON_CPU: Bytes = Bytes { unet: 1024, vae: 26 };

/// How a job is run: the settings, and what is done to need less.
#[derive(Clone, Copy)]
struct Plan {
    tiles: bool,
    one_by_one: bool,
    offload: Offload,
}

impl Plan {
    fn with(self, measure: Measure) -> Self {
        match measure {
            Measure::Tiles => Plan { tiles: true, ..self },
            Measure::OneByOne => Plan { one_by_one: true, ..self },
            Measure::Offload(offload) => Plan { offload, ..self },
        }
    }
}

/// Bytes that a job may take.
struct Limits {
    /// For the activations alone.
    configured: Option<u64>,
    free: Option<u64>,
}

/// The parts of a job that take the most memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Denoise,
    Decode,
}

const STAGES: [Stage; 2] = [Stage::Denoise, Stage::Decode];

impl StableDiffusionXlPipeline {
    /// Takes the measures without which the job would not fit.
    ///
    /// # Errors
    /// `memory_limit`, when even with all of them the estimate exceeds the configured limit or what is free on the device.
    pub(super) fn plan_memory(&self, params: &GenerateParams, economy: &Economy) -> Result<()> {
        let mut plan = Plan { tiles: false, one_by_one: false, offload: self.offload.get() };
        let mut limits = self.limits()?;
        if self.missing(&[params], plan, &limits) > 0 {
            // what torch keeps cached is not in use
            torch::empty_cache()?;
            limits = self.limits()?;
        }
        let mut measures = Vec::new();
        let tiles = self.may_use_tiles(params.final_size()).then_some(Measure::Tiles);
        for measure in tiles.into_iter().chain([Measure::OneByOne]).chain(OFFLOADS) {
            let next = plan.with(measure);
            if self.missing(&[params], next, &limits) < self.missing(&[params], plan, &limits) {
                plan = next;
                measures.push(measure);
            }
        }
        if self.missing(&[params], plan, &limits) > 0 {
            return Err(self.too_large(params, plan, &limits));
        }
        for measure in measures {
            self.take(economy, measure);
        }
        Ok(())
    }

    /// Whether these jobs, of one size, can be denoised in calls that they share.
    pub(super) fn has_room(&self, jobs: &[&GenerateParams]) -> Result<bool> {
        let plan = Plan { tiles: false, one_by_one: false, offload: self.offload.get() };
        let fits = || Ok(self.missing_at(Stage::Denoise, jobs, plan, &self.limits()?) == 0);
        if fits()? {
            return Ok(true);
        }
        torch::empty_cache()?;
        fits()
    }

    fn limits(&self) -> Result<Limits> {
        let free = match device_memory(self.settings.device)? {
            Some((free, _)) => Some(free),
            None => available(),
        };
        let share = |bytes: u64| bytes / (self.settings.neighbours as u64 + 1);
        Ok(Limits { configured: self.settings.memory_limit, free: free.map(share) })
    }

    /// Bytes by which jobs exceed the limits, summed over their stages.
    fn missing(&self, jobs: &[&GenerateParams], plan: Plan, limits: &Limits) -> u64 {
        STAGES.into_iter().map(|stage| self.missing_at(stage, jobs, plan, limits)).sum()
    }

    fn missing_at(&self, stage: Stage, jobs: &[&GenerateParams], plan: Plan, limits: &Limits) -> u64 {
        let needed = self.estimate(jobs, stage, plan);
        let (coming, leaving) = self.moving(jobs, stage, plan.offload);
        let above = limits.configured.map(|limit| needed.saturating_sub(limit));
        let beyond = limits.free.map(|free| (needed + coming).saturating_sub(free + leaving));
        above.max(beyond).unwrap_or(0)
    }

    fn too_large(&self, params: &GenerateParams, plan: Plan, limits: &Limits) -> Error {
        let needed = STAGES.into_iter().map(|stage| self.estimate(&[params], stage, plan)).max().unwrap_or(0);
        let (limit, whose) = match (limits.configured, limits.free) {
            (Some(limit), free) if free.is_none_or(|free| limit <= free) => (limit, "the configured limit is"),
            (_, free) => (free.unwrap_or(0), "free are"),
        };
        let num_images = params.num_images;
        let (height, width) = params.final_size();
        let message = format!(
            "{num_images} x {width}x{height} needs about {}, {whose} {}",
            format_bytes(needed),
            format_bytes(limit)
        );
        Error::new(ErrorClass::TooLarge, "memory_limit", message).field("width").remedy(
            "ask for a smaller size or fewer images, decode in tiles (--vae-tiling on), or raise --memory-limit",
        )
    }

    /// Bytes of activations at the peak of a stage of jobs of one size. The UNet runs all images at once or one by one, the
    /// VAE one by one.
    fn estimate(&self, jobs: &[&GenerateParams], stage: Stage, plan: Plan) -> u64 {
        let (height, width) = jobs[0].final_size();
        let pixels = u64::from(height) * u64::from(width);
        let bytes = match self.settings.device {
            Device::Cpu => ON_CPU,
            _ => Bytes { unet: 96 * size_of(self.settings.kind), vae: 4 * size_of(self.vae.kind()) },
        };
        let activations = match stage {
            Stage::Denoise => {
                let latent_pixels = pixels / (self.vae.scale_factor as u64).pow(2);
                let rows = |params: &&GenerateParams| {
                    let images = if plan.one_by_one { 1 } else { u64::from(params.num_images) };
                    images * if self.base.guidance(params).is_on() { 2 } else { 1 }
                };
                let unet = jobs.iter().map(rows).sum::<u64>()
                    * latent_pixels
                    * channels(&self.base.unet_config, 0)
                    * bytes.unet;
                // a ControlNet's residuals are as many as the UNet's own skips, and wait for it
                if has_controls(jobs) { unet / 2 * 3 } else { unet }
            }
            Stage::Decode => {
                let tiled = plan.tiles || self.decodes_in_tiles((height, width));
                let decoded = if tiled { pixels.min(self.vae.tile_pixels()) } else { pixels };
                decoded * channels(&self.vae_config, 1) * bytes.vae
            }
        };
        // the finished pictures, as floats and as bytes
        activations + pixels * 3 * 8 * jobs.iter().map(|params| u64::from(params.num_images)).sum::<u64>()
    }

    /// Bytes of weights that a stage brings to the device, and of those that are there and may leave for it.
    fn moving(&self, jobs: &[&GenerateParams], stage: Stage, offload: Offload) -> (u64, u64) {
        let (mut coming, mut leaving) = (0, 0);
        let mut count = |weights: &Weights, component: &str, is_used: bool| match (weights.is_here(), is_used) {
            (false, true) => coming += weights.device_bytes(),
            (true, false) if offload.takes(component) => leaving += weights.device_bytes(),
            _ => {}
        };
        for (index, parts) in self.all_parts().enumerate() {
            let parts = parts.weights.borrow();
            let is_used = index == 0 && stage == Stage::Denoise;
            parts.weights(&UNET).for_each(|weights| count(weights, "unet", is_used));
            parts.weights(&TEXT_ENCODERS).for_each(|weights| count(weights, "text_encoder", false));
        }
        for (index, half) in self.vae_halves().enumerate() {
            count(&half.borrow(), "vae", index == 0 && stage == Stage::Decode);
        }
        let is_used = has_controls(jobs) && stage == Stage::Denoise;
        self.controlnets.loaded().for_each(|net| count(&net.weights().borrow(), "controlnet", is_used));
        (coming, leaving)
    }
}

fn has_controls(jobs: &[&GenerateParams]) -> bool {
    jobs.iter().any(|params| !params.controls.is_empty())
}

fn channels(config: &Value, level: usize) -> u64 {
    config["block_out_channels"].get(level).and_then(Value::as_u64).unwrap_or(320)
}

fn size_of(kind: Kind) -> u64 {
    kind.elt_size_in_bytes() as u64
}
