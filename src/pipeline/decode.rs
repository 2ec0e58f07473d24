//! From latents to pictures: in tiles where they are large, and again in float32 where 16 bits overflow.

use std::time::Instant;

use image::RgbImage;
use tch::{Kind, Tensor};

use super::denoise::is_finite;
use super::{Run, StableDiffusionXlPipeline, VaeTiling, image_processor, load_vae};
use crate::context::Progress;
use crate::error::{Error, ErrorClass, Result};
use crate::models::Vae;
use crate::torch::Mark;

impl StableDiffusionXlPipeline {
    /// Image by image: the decoder's activations are the largest of the run.
    pub(super) fn decode_all(&self, run: &mut Run, latents: &Tensor) -> Result<Vec<RgbImage>> {
        let _vae = self.bring(&run.economy, || self.vae.in_use())?;
        let started = Instant::now();
        run.task.context.report(Progress::Decoding);
        let mut images = Vec::new();
        for i in 0..latents.size()[0] {
            run.task.context.check_cancelled()?;
            images.push(self.decode(run, &latents.narrow(0, i, 1))?);
        }
        run.timings.add("decode", started.elapsed());
        Ok(images)
    }

    /// `[1, 4, h, w]` to a picture.
    fn decode(&self, run: &mut Run, latents: &Tensor) -> Result<RgbImage> {
        let side = |latents: i64| (latents * self.vae.scale_factor) as u32;
        let size = (side(latents.size()[2]), side(latents.size()[3]));
        let economy = &run.economy;
        let pixels = |vae: &Vae| {
            self.with_tiles(economy, size, |tiled| if tiled { vae.tiled_decode(latents) } else { vae.decode(latents) })
        };
        let mut image = pixels(&self.vae)?;
        if let Some(mark) = Mark::set(image.device())? {
            mark.wait()?;
        }
        if !is_finite(&image) && self.vae.kind() != Kind::Float {
            let vae = self.with_offload(economy, || self.vae_in_float32())?;
            let _vae = self.bring(economy, || vae.in_use())?;
            run.warnings.push("the VAE overflowed in 16 bits; the picture was decoded again in float32".into());
            image = pixels(vae)?;
        }
        if !is_finite(&image) {
            let message = "the decoded picture is not finite: the VAE's weights are damaged";
            let remedy = "download the VAE again, or try --vae-dtype float32";
            return Err(Error::new(ErrorClass::Internal, "non_finite_image", message).remedy(remedy));
        }
        Ok(image_processor::postprocess(&image))
    }

    fn vae_in_float32(&self) -> Result<&Vae> {
        if let Some(vae) = self.vae_float32.get() {
            return Ok(vae);
        }
        let (model, graphs) = (self.settings.open_model()?, self.settings.open_graphs()?);
        let vae = load_vae(&self.settings_now(), &model, &graphs, &self.vae_config, Kind::Float)?;
        Ok(self.vae_float32.get_or_init(|| vae))
    }

    /// Whether tiles would be another way for a picture of this size, and nobody forbade them.
    pub(super) fn may_use_tiles(&self, size: (u32, u32)) -> bool {
        self.settings.vae_tiling != VaeTiling::Never && !self.decodes_in_tiles(size) && !self.vae.is_one_tile(size)
    }

    pub(super) fn decodes_in_tiles(&self, (height, width): (u32, u32)) -> bool {
        match self.settings.vae_tiling {
            VaeTiling::Always => true,
            VaeTiling::Never => false,
            VaeTiling::Above(pixels) => u64::from(height) * u64::from(width) > pixels,
        }
    }
}
