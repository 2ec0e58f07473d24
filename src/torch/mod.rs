//! The one module that binds libtorch beyond tch, and the only one with `unsafe`: modules, memory-mapped tensors,
//! generators and the few process-wide switches that tch has no words for. See `shim.cpp` for the other side.
#![allow(unsafe_code, reason = "foreign functions; each block says what makes it sound")]

mod aot;
mod ffi;
mod graph;
mod lane;
mod mapping;
mod mark;
mod module;

pub use aot::Package;
pub use graph::{CapturedCall, GraphPool, capture_epoch, forget_captured_calls};
pub use lane::Lane;
pub use mapping::Mapping;
pub use mark::Mark;
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

/// Gives unused memory back: a device's, which torch keeps cached, to the driver, and the host's, which the allocator keeps,
/// to the system.
pub fn empty_cache() -> Result<()> {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes no pointers; glibc locks its arenas itself.
    unsafe {
        ffi::malloc_trim(0);
    }
    // SAFETY: takes no pointers.
    ffi::check(unsafe { ffi::shim_empty_cache() }).context("emptying the device's memory cache")
}

/// Ends the process at once. The destructors of libtorch's and CUDA's libraries, which a return from `main` would run, crash
/// where a thread still computes, such as one whose job outlived the drain.
pub fn exit(status: u8) -> ! {
    // SAFETY: takes no pointers; what is buffered is the caller's to write before.
    unsafe { ffi::_exit(status.into()) }
}

/// Free and total bytes of an accelerator; `None` for the CPU.
pub fn device_memory(device: Device) -> Result<Option<(u64, u64)>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are valid for the write.
    ffi::check(unsafe { ffi::shim_memory_info(index as i32, &mut free, &mut total) }).context("asking for memory")?;
    Ok(Some((free, total)))
}

/// The release of libtorch this program was compiled against, such as `2.11.0`.
pub fn version() -> &'static str {
    // SAFETY: a string constant of the shim.
    unsafe { std::ffi::CStr::from_ptr(ffi::shim_torch_version()) }.to_str().expect("a version is ASCII")
}

/// Major and minor number of a release of CUDA.
pub type CudaVersion = (u32, u32);

/// The newest CUDA that the installed driver runs, and the one that libtorch was built with. `None` where there is none.
pub fn cuda_versions() -> (Option<CudaVersion>, Option<CudaVersion>) {
    let (mut driver, mut build) = (0, 0);
    // SAFETY: both are valid for the write.
    unsafe { ffi::shim_cuda_versions(&mut driver, &mut build) };
    let version = |number: i32| u32::try_from(number).ok().filter(|&n| n > 0).map(|n| (n / 1000, n % 1000 / 10));
    (version(driver), version(build))
}

/// Major and minor number of a CUDA device's architecture: 9 and 0 for `sm_90`.
pub fn compute_capability(index: usize) -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: both are valid for the write.
    ffi::check(unsafe { ffi::shim_compute_capability(index as i32, &mut major, &mut minor) })
        .context("asking for the device's architecture")?;
    Ok((major, minor))
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
