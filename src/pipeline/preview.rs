//! Small pictures of unfinished latents, by a linear map instead of the VAE.

use image::RgbImage;
use tch::{Device, Kind, Tensor};

use super::image_processor::postprocess;
use crate::error::Result;
use crate::models::Vae;

/// Latents of the sample that the map is fitted on: one image, this many to a side.
const SIDE: i64 = 16;

/// The map from a latent's channels to a colour that comes nearest to what the VAE makes of it.
pub(super) struct PreviewMap {
    /// `[channels + 1, 3]`; the last row is the constant.
    weights: Tensor,
}

impl PreviewMap {
    /// Fits the map by least squares on one small decode of smooth random latents, so that it suits any VAE.
    pub(super) fn fit(vae: &Vae, channels: i64, kind: Kind, device: Device) -> Result<Self> {
        let mut generator = crate::torch::Generator::new(0)?;
        let coarse = generator.randn(&[1, channels, SIDE / 4, SIDE / 4], Kind::Float)?;
        let latents = coarse.upsample_bilinear2d([SIDE, SIDE], false, None, None);
        let pixels = vae.decode(&latents.to_kind(kind).to_device(device))?;
        let pixels = pixels.to_device(Device::Cpu).to_kind(Kind::Float);
        let colours = pixels.adaptive_avg_pool2d([SIDE, SIDE]).clamp(-1.0, 1.0);
        let (known, wanted) = (with_constant(&rows(&latents)), rows(&colours));
        // the normal equations: five unknowns, and a little damping for a decoder that ignores a channel
        let damping = Tensor::eye(channels + 1, (Kind::Float, Device::Cpu)) * 1e-4;
        let square = known.tr().matmul(&known) + damping;
        Ok(PreviewMap { weights: square.inverse().matmul(&known.tr().matmul(&wanted)) })
    }

    /// One pixel for each latent; `latents` is `[1, channels, h, w]`, scaled to unit noise.
    pub(super) fn picture(&self, latents: &Tensor) -> RgbImage {
        let (h, w) = (latents.size()[2], latents.size()[3]);
        let latents = latents.to_device(Device::Cpu).to_kind(Kind::Float);
        let colours = with_constant(&rows(&latents)).matmul(&self.weights);
        postprocess(&colours.tr().reshape([1, 3, h, w]))
    }
}

/// `[1, c, h, w]` as `[h * w, c]`.
fn rows(image: &Tensor) -> Tensor {
    image.squeeze_dim(0).flatten(1, 2).tr()
}

fn with_constant(rows: &Tensor) -> Tensor {
    Tensor::cat(&[rows, &rows.narrow(1, 0, 1).ones_like()], 1)
}
