use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::GraphSet;
use super::model_dir::integer;
use crate::error::Result;
use crate::torch::Module;
use crate::weights::{Checkpoint, Weights};

/// The decoding half of `AutoencoderKL`.
pub struct Vae {
    decoder: Module,
    kind: Kind,
    scaling_factor: f64,
    /// Per-channel mean and standard deviation of the latents, where the configuration has them.
    latents_mean_std: Option<(Vec<f32>, Vec<f32>)>,
    /// Pixels to a latent's side.
    pub scale_factor: i64,
    /// Side of a tile in pixels: the size the model was trained for.
    tile_sample_min_size: i64,
}

/// Share of a tile that overlaps its neighbour; diffusers' `tile_overlap_factor`.
const TILE_OVERLAP_FACTOR: f64 = 0.25;

impl Vae {
    pub fn load(
        graphs: &GraphSet,
        config: &Value,
        checkpoint: Checkpoint,
        model: &Path,
        (kind, device): (Kind, Device),
    ) -> Result<Self> {
        let decoder = graphs.find("vae_decoder", kind, config, model)?;
        decoder.expect_inputs(&["latents"])?;
        let encoder = graphs.find("vae_encoder", kind, config, model)?;
        let module = graphs.load(decoder, device)?;
        Weights::new(checkpoint, device, kind)
            .bind(&module, |name| decoder.has_parameter(name) || encoder.has_parameter(name))?;
        let levels = config.get("block_out_channels").and_then(Value::as_array).map_or(1, Vec::len);
        let floats = |key: &str| -> Option<Vec<f32>> {
            Some(config.get(key)?.as_array()?.iter().filter_map(Value::as_f64).map(|x| x as f32).collect())
        };
        Ok(Vae {
            decoder: module,
            kind,
            scaling_factor: config.get("scaling_factor").and_then(Value::as_f64).unwrap_or(0.18215),
            latents_mean_std: floats("latents_mean").zip(floats("latents_std")),
            scale_factor: 1 << (levels - 1),
            tile_sample_min_size: integer(config, "sample_size", 32),
        })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Pixels of a tile.
    pub fn tile_pixels(&self) -> u64 {
        (self.tile_sample_min_size * self.tile_sample_min_size) as u64
    }

    /// Latents as the UNet left them, `[1, 4, h, w]`, to the decoder's range and dtype.
    fn unscale(&self, latents: &Tensor) -> Tensor {
        let latents = latents.to_kind(self.kind);
        let Some((mean, std)) = &self.latents_mean_std else {
            return latents / self.scaling_factor;
        };
        let channel = |values: &[f32]| {
            Tensor::from_slice(values).view([1, -1, 1, 1]).to_device(latents.device()).to_kind(self.kind)
        };
        &latents * channel(std) / self.scaling_factor + channel(mean)
    }

    /// Pixels of one image, `[1, 3, height, width]` in -1 to 1.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decode_tile(&self.unscale(latents))
    }

    /// The same by overlapping tiles whose seams are blended: memory for one tile instead of the whole picture.
    /// As diffusers' `AutoencoderKL.tiled_decode`.
    pub fn tiled_decode(&self, latents: &Tensor) -> Result<Tensor> {
        let z = self.unscale(latents);
        let tile_latent_min_size = self.tile_sample_min_size / self.scale_factor;
        let stride = (tile_latent_min_size as f64 * (1.0 - TILE_OVERLAP_FACTOR)) as i64;
        let blend_extent = (self.tile_sample_min_size as f64 * TILE_OVERLAP_FACTOR) as i64;
        let row_limit = self.tile_sample_min_size - blend_extent;
        let (height, width) = (z.size()[2], z.size()[3]);
        let tile = |i: i64, j: i64| {
            let rows = z.narrow(2, i, tile_latent_min_size.min(height - i));
            self.decode_tile(&rows.narrow(3, j, tile_latent_min_size.min(width - j)))
        };

        let mut above: Vec<Tensor> = Vec::new();
        let mut result_rows = Vec::new();
        for i in (0..height).step_by(stride as usize) {
            let mut row: Vec<Tensor> = Vec::new();
            let mut result_row = Vec::new();
            for (column, j) in (0..width).step_by(stride as usize).enumerate() {
                let decoded = tile(i, j)?;
                if let Some(upper) = above.get(column) {
                    blend(upper, &decoded, 2, blend_extent);
                }
                if let Some(left) = row.last() {
                    blend(left, &decoded, 3, blend_extent);
                }
                let (h, w) = (decoded.size()[2].min(row_limit), decoded.size()[3].min(row_limit));
                result_row.push(decoded.narrow(2, 0, h).narrow(3, 0, w));
                row.push(decoded);
            }
            result_rows.push(Tensor::cat(&result_row, 3));
            above = row;
        }
        Ok(Tensor::cat(&result_rows, 2))
    }

    fn decode_tile(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.decoder.forward(&[z])?.pop().expect("a decoder has an output"))
    }
}

/// Fades the end of `a` into the beginning of `b`, in place, along `dim` over at most `extent` pixels.
fn blend(a: &Tensor, b: &Tensor, dim: i64, extent: i64) {
    let extent = extent.min(a.size()[dim as usize]).min(b.size()[dim as usize]);
    let mut shape = [1; 4];
    shape[dim as usize] = extent;
    let ramp = Tensor::arange(extent, (Kind::Float, Device::Cpu)) / extent as f64;
    let ramp = ramp.view(shape).to_device(b.device()).to_kind(b.kind());
    let end = a.narrow(dim, a.size()[dim as usize] - extent, extent);
    let mut start = b.narrow(dim, 0, extent);
    let mixed = end * (1.0 - &ramp) + &start * ramp;
    start.copy_(&mixed);
}
