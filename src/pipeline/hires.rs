//! From the first pass's latents to the start of a second one at a larger size.

use tch::{Kind, Tensor};

use super::latents::{InitImage, Start, from_image, from_latents};
use super::passes::Pass;
use super::{Run, StableDiffusionXlPipeline, image_processor};
use crate::api::{HiresParams, Upscaler};
use crate::error::Result;
use crate::media;

impl StableDiffusionXlPipeline {
    /// Enlarges `latents`, `[num_images, 4, h, w]`, or the pictures they decode to, and adds the noise of the pass.
    pub(super) fn enlarge(&self, run: &mut Run, hires: &HiresParams, pass: &Pass, latents: &Tensor) -> Result<Start> {
        let size = (hires.height, hires.width);
        let shape = self.latent_shape(size);
        let sides = [shape[1], shape[2]];
        // in float32 like diffusers' processors: 16-bit interpolation rounds between neighbours
        let wide = latents.to_kind(Kind::Float);
        let enlarged = match hires.upscaler {
            Upscaler::Latent => wide.upsample_bilinear2d(sides, false, None, None),
            Upscaler::LatentBicubic => wide.upsample_bicubic2d(sides, false, None, None),
            Upscaler::LatentNearest => wide.upsample_nearest2d(sides, None, None),
            Upscaler::Lanczos => {
                let pictures = self.decode_all(run, latents)?;
                let enlarged = pictures.iter().map(|picture| media::resize(picture, hires.width, hires.height));
                let encoder = self.vae_encoder.as_ref().expect("required before");
                let _encoder = self.bring(&run.economy, || encoder.in_use())?;
                let init = InitImage {
                    images: enlarged.map(|picture| image_processor::normalized(&picture)).collect(),
                    mask: None,
                    encoder,
                    encode: &|image| self.with_tiles(&run.economy, size, |tiled| encoder.encode(image, tiled)),
                };
                let target = (self.settings.kind, self.settings.device);
                return from_image(&init, shape, target, false, pass, &mut run.noise);
            }
        };
        from_latents(enlarged.to_kind(latents.kind()), pass, &mut run.noise)
    }
}
