use std::cell::RefCell;
use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::GraphSet;
use super::compiled::CompiledModule;
use super::model_dir::integer;
use crate::error::Result;
use crate::weights::{InUse, Weights, in_use};

/// The decoding half of `AutoencoderKL`.
pub struct Vae {
    half: Half,
    pub latent_channels: i64,
    /// Pixels to a latent's side.
    pub scale_factor: i64,
}

/// The encoding half, which only jobs that start from a picture need.
pub struct VaeEncoder(Half);

/// What the halves have in common.
struct Half {
    module: CompiledModule,
    weights: RefCell<Weights>,
    kind: Kind,
    latents: LatentSpace,
    /// Side of a tile in pixels: the size the model was trained for.
    tile_sample_min_size: i64,
    /// The same in latents.
    tile_latent_min_size: i64,
}

/// How the VAE's own latents become those of the UNet.
struct LatentSpace {
    scaling_factor: f64,
    /// Per-channel mean and standard deviation, where the configuration has them.
    mean_std: Option<(Vec<f32>, Vec<f32>)>,
}

/// Share of a tile that overlaps its neighbour; diffusers' `tile_overlap_factor`.
const TILE_OVERLAP_FACTOR: f64 = 0.25;

impl Vae {
    pub fn load(
        graphs: &GraphSet,
        config: &Value,
        weights: Weights,
        model: &Path,
        target: (Kind, Device),
    ) -> Result<Self> {
        Ok(Vae {
            half: Half::load(["vae_decoder", "vae_encoder"], "latents", graphs, config, weights, model, target)?,
            latent_channels: integer(config, "latent_channels", 4),
            scale_factor: scale_factor(config),
        })
    }

    pub fn kind(&self) -> Kind {
        self.half.kind
    }

    pub(crate) fn weights(&self) -> &RefCell<Weights> {
        &self.half.weights
    }

    /// What is computed while the result lives finds the weights on the device.
    pub(crate) fn in_use(&self) -> Result<InUse<'_>> {
        in_use(&self.half.weights)
    }

    /// Whether decoding in tiles is the same as decoding whole, for a picture of this size in pixels.
    pub fn is_one_tile(&self, (height, width): (u32, u32)) -> bool {
        i64::from(height.max(width)) <= self.half.tile_sample_min_size
    }

    /// Pixels of a tile.
    pub fn tile_pixels(&self) -> u64 {
        (self.half.tile_sample_min_size * self.half.tile_sample_min_size) as u64
    }

    /// Pixels of one image, `[1, 3, height, width]` in -1 to 1, from latents as the UNet left them, `[1, 4, h, w]`.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.half.run(&self.half.latents.unscale(&latents.to_kind(self.half.kind)))
    }

    /// The same by overlapping tiles whose seams are blended: memory for one tile instead of the whole picture.
    /// As diffusers' `AutoencoderKL.tiled_decode`.
    pub fn tiled_decode(&self, latents: &Tensor) -> Result<Tensor> {
        let half = &self.half;
        let z = half.latents.unscale(&latents.to_kind(half.kind));
        tiled(&z, half.tile_latent_min_size, half.tile_sample_min_size, |tile| half.run(tile))
    }
}

impl VaeEncoder {
    pub fn load(
        graphs: &GraphSet,
        config: &Value,
        weights: Weights,
        model: &Path,
        target: (Kind, Device),
    ) -> Result<Self> {
        Half::load(["vae_encoder", "vae_decoder"], "image", graphs, config, weights, model, target).map(VaeEncoder)
    }

    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    pub(crate) fn weights(&self) -> &RefCell<Weights> {
        &self.0.weights
    }

    /// What is computed while the result lives finds the weights on the device.
    pub(crate) fn in_use(&self) -> Result<InUse<'_>> {
        in_use(&self.0.weights)
    }

    /// The distribution of the latents of one image, `[1, 3, height, width]` in -1 to 1; by tiles as
    /// [`Vae::tiled_decode`] where asked.
    pub fn encode(&self, image: &Tensor, by_tiles: bool) -> Result<LatentDistribution> {
        let half = &self.0;
        let image = image.to_kind(half.kind);
        let moments = match by_tiles {
            true => tiled(&image, half.tile_sample_min_size, half.tile_latent_min_size, |tile| half.run(tile))?,
            false => half.run(&image)?,
        };
        let mut halves = moments.chunk(2, 1);
        let log_variance = halves.pop().expect("two halves").clamp(-30.0, 20.0);
        Ok(LatentDistribution { mean: halves.pop().expect("two halves"), std: (log_variance * 0.5).exp() })
    }

    /// The VAE's latents as the UNet's; `centred` also applies the configuration's mean and standard deviation.
    pub fn scale(&self, latents: &Tensor, centred: bool) -> Tensor {
        self.0.latents.scale(latents, centred)
    }
}

impl Half {
    /// Loads the graph of the first component; the second's tensors in the file are known, and left alone.
    fn load(
        [component, other]: [&str; 2],
        input: &str,
        graphs: &GraphSet,
        config: &Value,
        mut weights: Weights,
        model: &Path,
        (kind, device): (Kind, Device),
    ) -> Result<Self> {
        let entry = graphs.find(component, kind, config, model)?;
        entry.expect_inputs(&[input])?;
        let other = graphs.find(other, kind, config, model)?;
        let module = graphs.load(entry, device)?;
        weights.bind(&module, |name| entry.has_parameter(name) || other.has_parameter(name))?;
        let module = CompiledModule::load(graphs, component, config, module, &mut weights, (kind, device));
        let tile_sample_min_size = integer(config, "sample_size", 32);
        Ok(Half {
            module,
            weights: RefCell::new(weights),
            kind,
            latents: LatentSpace::of(config),
            tile_sample_min_size,
            tile_latent_min_size: tile_sample_min_size / scale_factor(config),
        })
    }

    fn run(&self, input: &Tensor) -> Result<Tensor> {
        Ok(self.module.forward(&[input])?.pop().expect("half an autoencoder has an output"))
    }
}

/// diffusers' `DiagonalGaussianDistribution`: `[1, 4, h, w]` each.
pub struct LatentDistribution {
    mean: Tensor,
    std: Tensor,
}

impl LatentDistribution {
    /// `noise` is of unit variance.
    pub fn sample(&self, noise: &Tensor) -> Tensor {
        &self.mean + &self.std * noise
    }
}

impl LatentSpace {
    fn of(config: &Value) -> Self {
        let floats = |key: &str| -> Option<Vec<f32>> {
            Some(config.get(key)?.as_array()?.iter().filter_map(Value::as_f64).map(|x| x as f32).collect())
        };
        LatentSpace {
            scaling_factor: config.get("scaling_factor").and_then(Value::as_f64).unwrap_or(0.18215),
            mean_std: floats("latents_mean").zip(floats("latents_std")),
        }
    }

    fn unscale(&self, latents: &Tensor) -> Tensor {
        match self.channels(latents) {
            None => latents / self.scaling_factor,
            Some((mean, std)) => latents * std / self.scaling_factor + mean,
        }
    }

    fn scale(&self, latents: &Tensor, centred: bool) -> Tensor {
        match self.channels(latents).filter(|_| centred) {
            None => latents * self.scaling_factor,
            Some((mean, std)) => (latents - mean) * self.scaling_factor / std,
        }
    }

    /// Mean and standard deviation, to broadcast over `latents`.
    fn channels(&self, latents: &Tensor) -> Option<(Tensor, Tensor)> {
        let channel = |values: &[f32]| {
            Tensor::from_slice(values).view([1, -1, 1, 1]).to_device(latents.device()).to_kind(latents.kind())
        };
        self.mean_std.as_ref().map(|(mean, std)| (channel(mean), channel(std)))
    }
}

fn scale_factor(config: &Value) -> i64 {
    let levels = config.get("block_out_channels").and_then(Value::as_array).map_or(1, Vec::len);
    1 << (levels - 1)
}

/// Runs `work` over overlapping square tiles of `input` and blends their seams. `input_size` and `output_size` are a
/// tile's sides before and after `work`; an input that is no larger than a tile is one.
fn tiled(
    input: &Tensor,
    input_size: i64,
    output_size: i64,
    work: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (height, width) = (input.size()[2], input.size()[3]);
    if height <= input_size && width <= input_size {
        return work(input);
    }
    let stride = (input_size as f64 * (1.0 - TILE_OVERLAP_FACTOR)) as usize;
    let blend_extent = (output_size as f64 * TILE_OVERLAP_FACTOR) as i64;
    let row_limit = output_size - blend_extent;
    let mut above: Vec<Tensor> = Vec::new();
    let mut result_rows = Vec::new();
    for i in (0..height).step_by(stride) {
        let rows = input.narrow(2, i, input_size.min(height - i));
        let mut row: Vec<Tensor> = Vec::new();
        let mut result_row = Vec::new();
        for (column, j) in (0..width).step_by(stride).enumerate() {
            let tile = work(&rows.narrow(3, j, input_size.min(width - j)))?;
            if let Some(upper) = above.get(column) {
                blend(upper, &tile, 2, blend_extent);
            }
            if let Some(left) = row.last() {
                blend(left, &tile, 3, blend_extent);
            }
            let (h, w) = (tile.size()[2].min(row_limit), tile.size()[3].min(row_limit));
            result_row.push(tile.narrow(2, 0, h).narrow(3, 0, w));
            row.push(tile);
        }
        result_rows.push(Tensor::cat(&result_row, 3));
        above = row;
    }
    Ok(Tensor::cat(&result_rows, 2))
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
