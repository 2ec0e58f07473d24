//! Where the denoising starts: noise, a picture with noise, or for inpainting a picture that keeps what is not masked.
//! `prepare_latents` and `prepare_mask_latents` of diffusers' pipelines.

use std::rc::Rc;

use image::GrayImage;
use tch::{Device, Kind, Tensor};

use super::image_processor::preprocess;
use super::passes::{Begin, Pass};
use crate::error::Result;
use crate::models::{LatentDistribution, VaeEncoder};
use crate::schedulers::{NoiseSource, Scheduler};

/// What the denoising loop begins with.
pub(super) struct Start {
    /// `[num_images, 4, h, w]`
    pub(super) latents: Tensor,
    pub(super) inpaint: Option<Rc<Inpaint>>,
}

/// How inpainting enters a step.
pub(super) enum Inpaint {
    /// A UNet for inpainting is shown the mask and the masked picture's latents beside the sample: `[1, 5, h, w]`.
    Show(Tensor),
    /// With any other, what is not masked is put back after the step, with the noise that the next step expects.
    PutBack {
        /// 1 where it is repainted: `[1, 1, h, w]`.
        mask: Tensor,
        /// `[1, 4, h, w]`
        image_latents: Tensor,
        /// `[num_images, 4, h, w]`
        noise: Tensor,
    },
}

/// The pictures of a job as they are needed here.
pub(super) struct InitImage<'a> {
    /// float32 `[1, 3, height, width]` in -1 to 1: one for all images, or one for each
    pub(super) images: Vec<Tensor>,
    pub(super) mask: Option<&'a GrayImage>,
    pub(super) encoder: &'a VaeEncoder,
    /// The encoder's own `encode`, with as much memory as there is.
    pub(super) encode: &'a dyn Fn(&Tensor) -> Result<LatentDistribution>,
}

/// Noise alone.
pub(super) fn from_noise(
    shape: [i64; 3],
    (kind, device): (Kind, Device),
    scheduler: &dyn Scheduler,
    noise: &mut NoiseSource,
) -> Result<Start> {
    let latents = noise.randn(&shape, kind)?.to_device(device) * scheduler.init_noise_sigma();
    Ok(Start { latents, inpaint: None })
}

/// Latents `[num_images, 4, h, w]` that an earlier pass made, with noise where the pass adds some.
pub(super) fn from_latents(latents: Tensor, pass: &Pass, noise: &mut NoiseSource) -> Result<Start> {
    let latents = if pass.adds_noise() {
        pass.scheduler.add_noise(&latents, &noise.randn_like(&latents)?, pass.steps.start)
    } else {
        latents
    };
    Ok(Start { latents, inpaint: None })
}

/// A picture with as much noise as the pass asks for.
///
/// The draws come in diffusers' order. For inpainting that is: the picture's latents from the first image's generator
/// alone, every image's noise, the masked picture's latents from the first again. Those latents only a UNet for inpainting
/// needs; for another the draw is made and the picture is not encoded.
pub(super) fn from_image(
    init: &InitImage,
    shape: [i64; 3],
    (kind, device): (Kind, Device),
    has_inpainting_unet: bool,
    pass: &Pass,
    noise: &mut NoiseSource,
) -> Result<Start> {
    let (scheduler, step) = (&pass.scheduler, pass.steps.start);
    let images: Vec<Tensor> = init.images.iter().map(|image| image.to_kind(kind).to_device(device)).collect();
    let encoder = init.encoder;
    let one = [1, shape[0], shape[1], shape[2]];
    let sample = |latents: &LatentDistribution, generator: usize, noise: &mut NoiseSource, centred: bool| {
        let drawn = noise.randn_of(generator, &one, encoder.kind())?.to_device(device);
        Ok(encoder.scale(&latents.sample(&drawn).to_kind(kind), centred))
    };
    let Some(mask) = init.mask else {
        let encoded: Vec<LatentDistribution> =
            images.iter().map(|image| (init.encode)(image)).collect::<Result<_>>()?;
        let samples = (0..noise.num_images()).map(|i| sample(&encoded[i % encoded.len()], i, noise, true));
        return from_latents(Tensor::cat(&samples.collect::<Result<Vec<_>>>()?, 0), pass, noise);
    };

    let mask = mask_tensor(mask).to_device(device);
    let from_noise_alone = pass.begin == Begin::Strength(1.0);
    let image_latents = if has_inpainting_unet && from_noise_alone {
        None
    } else {
        Some(sample(&(init.encode)(&images[0])?, 0, noise, false)?)
    };
    let drawn = noise.randn(&shape, kind)?.to_device(device);
    let latents = match &image_latents {
        Some(image_latents) if !pass.adds_noise() => image_latents.expand_as(&drawn),
        Some(image_latents) if !from_noise_alone => scheduler.add_noise(image_latents, &drawn, step),
        _ => &drawn * scheduler.init_noise_sigma(),
    };
    let latent_mask = mask.upsample_nearest2d([shape[1], shape[2]], None, None).to_kind(kind);
    let inpaint = match image_latents {
        Some(image_latents) if !has_inpainting_unet => {
            let _for_the_order_of_draws = noise.randn_of(0, &one, encoder.kind())?;
            Inpaint::PutBack { mask: latent_mask, image_latents, noise: drawn }
        }
        _ => {
            let masked_image = (&init.images[0].to_device(device) * mask.lt(0.5)).to_kind(kind);
            let latents = sample(&(init.encode)(&masked_image)?, 0, noise, false)?;
            Inpaint::Show(Tensor::cat(&[latent_mask, latents], 1))
        }
    };
    Ok(Start { latents, inpaint: Some(Rc::new(inpaint)) })
}

impl Inpaint {
    /// What the UNet is given: the scaled latents, for a UNet for inpainting with what it is shown.
    pub(super) fn model_input(&self, scaled: &Tensor) -> Tensor {
        match self {
            Inpaint::Show(extra) => Tensor::cat(&[scaled, &extra.expand([scaled.size()[0], -1, -1, -1], false)], 1),
            Inpaint::PutBack { .. } => scaled.shallow_clone(),
        }
    }

    /// The latents after `step`, what is not masked put back.
    pub(super) fn after_step(&self, latents: Tensor, step: usize, scheduler: &dyn Scheduler) -> Tensor {
        let Inpaint::PutBack { mask, image_latents, noise } = self else { return latents };
        let next = step + 1;
        let kept = if next < scheduler.timesteps().len() {
            scheduler.add_noise(image_latents, noise, next)
        } else {
            image_latents.shallow_clone()
        };
        (1.0 - mask) * kept + mask * latents
    }
}

/// float32 `[1, 1, height, width]`: 1 where it is repainted.
fn mask_tensor(mask: &GrayImage) -> Tensor {
    preprocess(mask.as_raw(), mask.width(), mask.height(), 1).ge(0.5).to_kind(Kind::Float)
}
