//! The one module that binds libtorch beyond tch, and the only one with `unsafe`: modules, memory-mapped tensors,
//! generators and the few process-wide switches that tch has no words for. See `shim.cpp` for the other side.
#![allow(unsafe_code, reason = "foreign functions; each block says what makes it sound")]

mod ffi;
mod mapping;
mod module;

pub use mapping::Mapping;
pub use module::Module;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};

/// A CPU random generator with a state of its own, equal to `torch.Generator("cpu").manual_seed(seed)`.
///
/// Requests never share one, so what one draws cannot change another's picture.
pub struct Generator(*mut ffi::Generator);

impl Generator {
    pub fn new(seed: u64) -> Result<Self> {
        let mut generator = std::ptr::null_mut();
        // SAFETY: `generator` is valid for the write, and owned by the value built from it.
        ffi::check(unsafe { ffi::shim_generator_new(seed, &mut generator) }).context("creating a generator")?;
        Ok(Generator(generator))
    }

    /// Standard normal noise on the CPU, as `torch.randn(size, generator=self, dtype=kind)` draws it.
    ///
    /// The draw depends on `kind`: a float16 draw is not the float32 one rounded.
    pub fn randn(&mut self, size: &[i64], kind: Kind) -> Result<Tensor> {
        let mut tensor = std::ptr::null_mut();
        // SAFETY: the generator lives as long as `self`; the shim copies `size` and gives us the tensor.
        unsafe {
            ffi::check(ffi::shim_randn(self.0, size.as_ptr(), size.len(), ffi::kind_code(kind), &mut tensor))?;
            Ok(Tensor::from_ptr(tensor))
        }
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        // SAFETY: made by `shim_generator_new`, freed once.
        unsafe { ffi::shim_generator_free(self.0) }
    }
}

// SAFETY: `at::Generator` is a counted pointer to a state that only `&mut self` methods touch.
unsafe impl Send for Generator {}

/// Gives unused device memory that torch keeps cached back to the driver.
pub fn empty_cache() -> Result<()> {
    // SAFETY: takes no pointers.
    ffi::check(unsafe { ffi::shim_empty_cache() }).context("emptying the device's memory cache")
}

/// Free and total bytes of an accelerator; `None` for the CPU.
pub fn device_memory(device: Device) -> Result<Option<(u64, u64)>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are valid for the write.
    ffi::check(unsafe { ffi::shim_memory_info(index as i32, &mut free, &mut total) }).context("asking for memory")?;
    Ok(Some((free, total)))
}

/// Which kernels `scaled_dot_product_attention` may choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBackend {
    /// libtorch's own order of preference.
    Auto,
    Flash,
    Efficient,
    Cudnn,
    Math,
}

pub fn set_attention_backend(backend: AttentionBackend) -> Result<()> {
    use AttentionBackend::*;
    let may = |one: AttentionBackend| backend == Auto || backend == one;
    // `math` stays allowed beside a chosen one: shapes that its kernels do not take still run.
    // SAFETY: takes no pointers.
    ffi::check(unsafe { ffi::shim_set_attention(may(Flash), may(Efficient), may(Cudnn), true) })
        .context("choosing the attention backend")
}

/// Whether float32 matrix products and convolutions on CUDA may use TF32.
pub fn allow_tf32(allow: bool) -> Result<()> {
    // SAFETY: takes no pointers.
    ffi::check(unsafe { ffi::shim_allow_tf32(allow) }).context("switching TF32")
}
