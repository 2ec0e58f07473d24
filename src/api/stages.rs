//! What runs after the first pass: a second one at a larger size, and the refiner.

use serde_json::{Value, json};

use super::request::{HiresRequest, RefinerRequest};
use super::validate::{Limits, SIZE_STEP, steps_remain, too_large};
use super::wording::{in_range, invalid_value, nearest};
use crate::error::{Error, ErrorClass, Result};

/// A second pass over the enlarged result of the first.
#[derive(Debug, Clone, PartialEq)]
pub struct HiresParams {
    /// Pixels, a multiple of 8.
    pub height: u32,
    pub width: u32,
    /// The share of the steps that the second pass runs.
    pub strength: f64,
    pub upscaler: Upscaler,
    pub num_inference_steps: usize,
    scale: f64,
}

/// How the first result is enlarged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Upscaler {
    /// The latents, bilinear.
    Latent,
    /// The latents, bicubic.
    LatentBicubic,
    /// The latents, each repeated.
    LatentNearest,
    /// The decoded picture, by Lanczos' filter: sharper edges, and two more runs of the VAE.
    Lanczos,
}

/// A refiner takes over from the base model, or goes over its finished latents once more.
#[derive(Debug, Clone, PartialEq)]
pub struct RefinerParams {
    /// The name it is configured under.
    pub model: String,
    pub num_inference_steps: usize,
    pub begin: RefinerBegin,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RefinerBegin {
    /// At this part of the run, without more noise: `denoising_start`.
    At(f64),
    /// With noise for this share of the steps.
    Strength(f64),
}

/// diffusers' `strength` for image to image.
const REFINER_STRENGTH: f64 = 0.3;

const MAX_SCALE: f64 = 4.0;

impl Upscaler {
    const NAMES: [&'static str; 4] = ["latent", "latent_bicubic", "latent_nearest", "lanczos"];
    const ALL: [Upscaler; 4] = [Upscaler::Latent, Upscaler::LatentBicubic, Upscaler::LatentNearest, Upscaler::Lanczos];

    /// Reads our names and A1111's, such as `Latent (bicubic)`.
    fn from_name(name: &str) -> Result<Self> {
        let wanted = name.to_lowercase().replace(['(', ')'], "").trim().replace([' ', '-'], "_");
        let index = Self::NAMES.iter().position(|known| *known == wanted);
        index.map(|index| Self::ALL[index]).ok_or_else(|| invalid_value("hires.upscaler", &Self::NAMES, name))
    }

    /// Whether the VAE has a part in it.
    pub fn needs_pixels(self) -> bool {
        self == Upscaler::Lanczos
    }

    fn name(self) -> &'static str {
        Self::NAMES[Self::ALL.iter().position(|upscaler| *upscaler == self).expect("all are listed")]
    }
}

impl HiresParams {
    /// `size` and `steps` are those of the first pass.
    ///
    /// # Errors
    /// `out_of_range`, `invalid_value`, `too_large`; `unsupported_option` for a job that starts from a picture.
    pub(super) fn new(
        request: HiresRequest,
        (height, width): (u32, u32),
        steps: usize,
        has_image: bool,
        limits: &Limits,
    ) -> Result<Self> {
        if has_image {
            let message = "`hires` enlarges what a prompt made, and this job starts from a picture";
            return Err(Error::invalid("unsupported_option", "hires", message)
                .remedy("leave `hires` out, and ask for a larger `width` and `height`"));
        }
        let scale = in_range("hires.scale", request.scale.unwrap_or(2.0), 1.0..=MAX_SCALE)?;
        let enlarged = |pixels: u32| (f64::from(pixels) * scale / f64::from(SIZE_STEP)) as u32 * SIZE_STEP;
        let (height, width) = (enlarged(height), enlarged(width));
        let pixels = u64::from(height) * u64::from(width);
        if pixels > limits.max_pixels {
            let message = format!("`hires` makes {width} x {height}, more than {} pixels", limits.max_pixels);
            return Err(
                too_large("hires.scale", message).remedy("give a smaller `hires.scale`, or a smaller first size")
            );
        }
        let max_steps = i64::from(limits.max_num_inference_steps);
        // 0 is A1111's way of saying the same
        let own = request.steps.filter(|steps| *steps != 0).unwrap_or(steps as i64);
        let num_inference_steps = in_range("hires.steps", own, 1..=max_steps)? as usize;
        let strength = request.strength.unwrap_or(0.7);
        steps_remain("hires.strength", strength, num_inference_steps)?;
        let upscaler = request.upscaler.map_or(Ok(Upscaler::Latent), |name| Upscaler::from_name(&name))?;
        Ok(HiresParams { height, width, strength, upscaler, num_inference_steps, scale })
    }

    pub(super) fn to_json(&self) -> Value {
        let HiresParams { height: _, width: _, strength, upscaler, num_inference_steps, scale } = self;
        json!({ "scale": scale, "strength": strength, "upscaler": upscaler.name(), "steps": num_inference_steps })
    }
}

impl RefinerParams {
    /// `steps` are those of the first pass, `start` the part of the run at which the refiner takes over, `strength` what
    /// it does with finished latents.
    ///
    /// # Errors
    /// `refiner_not_available`, `out_of_range`.
    pub(super) fn new(
        request: RefinerRequest,
        steps: usize,
        start: Option<f64>,
        strength: Option<f64>,
        limits: &Limits,
    ) -> Result<Self> {
        let not_available = |message: String| Error::new(ErrorClass::NotFound, "refiner_not_available", message);
        let Some(default) = limits.refiners.first() else {
            return Err(not_available("this worker has no refiner".into())
                .field("refiner")
                .remedy("start it with --refiner DIR (REFINER_ID), or leave `refiner` out"));
        };
        let model = request.model.unwrap_or_else(|| default.clone());
        if !limits.refiners.contains(&model) {
            let known = limits.refiners.join(", ");
            let close = nearest(&model, limits.refiners.iter().map(String::as_str)).unwrap_or(default);
            return Err(not_available(format!("this worker has no refiner {model:?}"))
                .field("refiner.model")
                .remedy(format!("choose one of {known}; the nearest is {close}")));
        }
        let max_steps = i64::from(limits.max_num_inference_steps);
        let steps = request.num_inference_steps.unwrap_or(steps as i64);
        let num_inference_steps = in_range("refiner.num_inference_steps", steps, 1..=max_steps)? as usize;
        let begin = match start {
            Some(start) => RefinerBegin::At(start),
            None => {
                let strength = strength.unwrap_or(REFINER_STRENGTH);
                steps_remain("strength", strength, num_inference_steps)?;
                RefinerBegin::Strength(strength)
            }
        };
        Ok(RefinerParams { model, num_inference_steps, begin })
    }

    pub(super) fn to_json(&self) -> Value {
        json!({ "model": self.model, "num_inference_steps": self.num_inference_steps })
    }
}
