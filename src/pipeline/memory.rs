//! How much memory a request will take beyond the weights, estimated before anything is computed.

use serde_json::Value;
use tch::{Device, Kind};

use super::StableDiffusionXlPipeline;
use super::denoise::Guidance;
use crate::api::GenerateParams;
use crate::error::{Error, ErrorClass, Result};
use crate::memory::{available, format_bytes};
use crate::torch::device_memory;

/// Bytes alive at once in the UNet, for each latent pixel and channel of the first level; and in the VAE's decoder, for
/// each pixel and channel of its second level. On the CPU as measured at full size in bfloat16, 256 to 768 pixels square,
/// where the kernels' own scratch is most of it; elsewhere the tensors alone.
struct Bytes {
    unet: u64,
    vae: u64,
}

const ON_CPU: Bytes = Bytes { unet: 1024, vae: 26 };

impl StableDiffusionXlPipeline {
    /// # Errors
    /// `memory_limit`, when the estimate exceeds the configured limit or what is free on the device.
    pub(super) fn check_memory(&self, params: &GenerateParams, guidance: &Guidance) -> Result<()> {
        let needed = self.estimate(params, guidance);
        let free = match device_memory(self.settings.device)? {
            Some((free, _)) => Some(free),
            None => available(),
        };
        let (limit, whose) = match (self.settings.memory_limit, free) {
            (Some(limit), free) if free.is_none_or(|free| limit <= free) => (limit, "the configured limit is"),
            (_, Some(free)) => (free, "free are"),
            (_, None) => return Ok(()),
        };
        if needed <= limit {
            return Ok(());
        }
        let GenerateParams { width, height, num_images, .. } = params;
        let message = format!(
            "{num_images} x {width}x{height} needs about {}, {whose} {}",
            format_bytes(needed),
            format_bytes(limit)
        );
        Err(Error::new(ErrorClass::TooLarge, "memory_limit", message).field("width").remedy(
            "ask for a smaller size or fewer images, decode in tiles (--vae-tiling on), or raise --memory-limit",
        ))
    }

    /// Bytes of activations at the peak. The UNet runs all images at once, the VAE one by one.
    fn estimate(&self, params: &GenerateParams, guidance: &Guidance) -> u64 {
        let pixels = u64::from(params.height) * u64::from(params.width);
        let latent_pixels = pixels / (self.vae.scale_factor as u64).pow(2);
        let batch = u64::from(params.num_images) * if guidance.is_on() { 2 } else { 1 };
        let bytes = match self.settings.device {
            Device::Cpu => ON_CPU,
            _ => Bytes { unet: 96 * size_of(self.settings.kind), vae: 4 * size_of(self.vae.kind()) },
        };
        let unet = batch * latent_pixels * channels(&self.unet_config, 0) * bytes.unet;
        // a ControlNet's residuals are as many as the UNet's own skips, and wait for it
        let unet = if params.controls.is_empty() { unet } else { unet / 2 * 3 };

        let decoded = if self.decodes_in_tiles(params) { pixels.min(self.vae.tile_pixels()) } else { pixels };
        let vae = decoded * channels(&self.vae_config, 1) * bytes.vae;
        // the finished pictures, as floats and as bytes
        unet.max(vae) + pixels * 3 * 8 * u64::from(params.num_images)
    }
}

fn channels(config: &Value, level: usize) -> u64 {
    config["block_out_channels"].get(level).and_then(Value::as_u64).unwrap_or(320)
}

fn size_of(kind: Kind) -> u64 {
    kind.elt_size_in_bytes() as u64
}
