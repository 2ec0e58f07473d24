use tch::{Kind, Tensor};

use crate::error::Result;
use crate::torch::Generator;

/// Where a job's randomness comes from: one CPU generator per image, seeded `seed`, `seed + 1`, ..., so that each image
/// is what it would be if asked for alone. As diffusers' `randn_tensor` with a list of generators.
pub struct NoiseSource(Vec<Generator>);

impl NoiseSource {
    pub fn new(seed: u64, num_images: usize) -> Result<Self> {
        let generators = (0..num_images as u64).map(|i| Generator::new(seed + i));
        Ok(NoiseSource(generators.collect::<anyhow::Result<_>>()?))
    }

    pub fn num_images(&self) -> usize {
        self.0.len()
    }

    /// Noise `[num_images, ...shape]` on the CPU, drawn in `kind`: the draw depends on the dtype.
    pub fn randn(&mut self, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let one: Vec<i64> = std::iter::once(1).chain(shape.iter().copied()).collect();
        let images: Vec<Tensor> = self.0.iter_mut().map(|g| g.randn(&one, kind)).collect::<anyhow::Result<_>>()?;
        Ok(Tensor::cat(&images, 0))
    }

    /// Noise `shape` on the CPU, from the generator of one image.
    pub fn randn_of(&mut self, image: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
        Ok(self.0[image].randn(shape, kind)?)
    }

    /// Noise with the shape, dtype and device of `tensor`, `[num_images, ...]`.
    pub fn randn_like(&mut self, tensor: &Tensor) -> Result<Tensor> {
        Ok(self.randn(&tensor.size()[1..], tensor.kind())?.to_device(tensor.device()))
    }
}
