//! Memory that runs out during a job: the part of the job that failed is tried again with less. What is finished stays.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use tch::Tensor;

use super::StableDiffusionXlPipeline;
use super::denoise::Forward;
use super::offload::Offload;
use crate::error::{ErrorClass, Result};
use crate::fault;
use crate::models::UNetInputs;
use crate::torch;
use crate::weights::InUse;

/// What a job does with less memory, in the order in which it is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Measure {
    /// The VAE runs in tiles.
    Tiles,
    /// The UNet runs for one image after the other.
    OneByOne,
    /// Parts of the model leave the device; stays on for later jobs.
    Offload(Offload),
}

/// Helps wherever memory runs out.
pub(super) const OFFLOADS: [Measure; 2] = [Measure::Offload(Offload::TextEncoders), Measure::Offload(Offload::All)];
const WITH_TILES: [Measure; 3] = [Measure::Tiles, OFFLOADS[0], OFFLOADS[1]];
const WITH_ONE_BY_ONE: [Measure; 3] = [Measure::OneByOne, OFFLOADS[0], OFFLOADS[1]];

impl Measure {
    /// For the reply's `warnings`.
    pub(super) fn warning(self) -> &'static str {
        match self {
            Measure::Tiles => "memory was short: the VAE ran in tiles, as with --vae-tiling on",
            Measure::OneByOne => "memory was short: the images were denoised one by one",
            Measure::Offload(Offload::All) => {
                "memory was short: every part of the model now leaves the device when it is idle, as with --offload all"
            }
            Measure::Offload(_) => {
                "memory was short: the text encoders now leave the device when they are idle, as with --offload text-encoders"
            }
        }
    }
}

/// What one job does to need less memory, and what that costs.
pub(super) struct Economy {
    pub(super) tiles: Cell<bool>,
    pub(super) one_by_one: Cell<bool>,
    num_images: i64,
    warnings: RefCell<Vec<String>>,
    /// Time in which weights were brought back to the device.
    pub(super) upload: Cell<Duration>,
}

impl Economy {
    pub(super) fn new(num_images: u32) -> Self {
        Economy {
            tiles: Cell::new(false),
            one_by_one: Cell::new(false),
            num_images: num_images.into(),
            warnings: RefCell::default(),
            upload: Cell::default(),
        }
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        self.warnings.borrow().clone()
    }
}

/// Runs `work`; each time memory runs out in it the cache is emptied and the next of the possible measures is taken.
/// `take` says whether a measure was one: what is in force already, or changes nothing, is passed over.
///
/// # Errors
/// Those of `work`; `out_of_memory` when no measure is left.
pub(super) fn with_less<C: ?Sized, T>(
    context: &mut C,
    possible: &[Measure],
    take: impl Fn(&mut C, Measure) -> bool,
    mut work: impl FnMut(&mut C) -> Result<T>,
) -> Result<T> {
    let mut left = possible.iter();
    loop {
        let error = match fault::catch(|| work(context)) {
            Err(error) if error.class == ErrorClass::OutOfMemory => error,
            result => return result,
        };
        if !left.any(|measure| take(context, *measure)) {
            return Err(error);
        }
        torch::empty_cache().ok();
    }
}

impl StableDiffusionXlPipeline {
    /// Puts a measure into force. Gives whether that changes anything.
    pub(super) fn take(&self, economy: &Economy, measure: Measure) -> bool {
        let taken = match measure {
            Measure::Tiles => !economy.tiles.replace(true),
            Measure::OneByOne => economy.num_images > 1 && !economy.one_by_one.replace(true),
            Measure::Offload(offload) => self.raise_offload(offload),
        };
        if taken {
            let lasting = matches!(measure, Measure::Offload(_));
            tracing::warn!(?measure, lasting, "memory is short: going on with less");
            economy.warnings.borrow_mut().push(measure.warning().into());
        }
        taken
    }

    /// `work`, and again with less of the model on the device.
    pub(super) fn with_offload<T>(&self, economy: &Economy, mut work: impl FnMut() -> Result<T>) -> Result<T> {
        with_less(&mut (), &OFFLOADS, |(), measure| self.take(economy, measure), |()| work())
    }

    /// Brings weights to the device.
    pub(super) fn bring<'a>(&self, economy: &Economy, enter: impl Fn() -> Result<InUse<'a>>) -> Result<InUse<'a>> {
        let started = Instant::now();
        let in_use = self.with_offload(economy, enter)?;
        if in_use.uploaded {
            economy.upload.set(economy.upload.get() + started.elapsed());
        }
        Ok(in_use)
    }

    /// The VAE's `work` on a picture of this size, height and width in pixels; it is told whether to use tiles.
    pub(super) fn with_tiles<T>(
        &self,
        economy: &Economy,
        size: (u32, u32),
        work: impl Fn(bool) -> Result<T>,
    ) -> Result<T> {
        let possible = if self.may_use_tiles(size) { &WITH_TILES[..] } else { &OFFLOADS };
        let tiled = || self.decodes_in_tiles(size) || economy.tiles.get() && self.may_use_tiles(size);
        with_less(&mut (), possible, |(), measure| self.take(economy, measure), |()| work(tiled()))
    }

    /// The UNet's prediction for a batch: at once, or image by image.
    pub(super) fn predict(&self, economy: &Economy, inputs: &UNetInputs, forward: &Forward) -> Result<Tensor> {
        let work = |(): &mut ()| match economy.one_by_one.get() {
            true => one_by_one(inputs, economy.num_images, forward),
            false => forward(inputs),
        };
        with_less(&mut (), &WITH_ONE_BY_ONE, |(), measure| self.take(economy, measure), work)
    }
}

/// Runs `forward` for the rows of each image alone. A batch has one row for each image, with guidance twice.
fn one_by_one(inputs: &UNetInputs, num_images: i64, forward: &Forward) -> Result<Tensor> {
    let outputs = (0..num_images)
        .map(|image| forward(&inputs.map(|tensor| tensor.slice(0, image, None, num_images).contiguous())));
    // [1 or 2, num_images, 4, h, w]: an image's rows come back to their places
    Ok(Tensor::stack(&outputs.collect::<Result<Vec<_>>>()?, 1).flatten(0, 1))
}

#[cfg(test)]
#[path = "rescue_tests.rs"]
mod tests;
