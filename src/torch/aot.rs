use std::ffi::{CString, c_char, c_int};
use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::{Device, Tensor};

use super::ffi::{self, C_tensor};
use super::module::collect;

/// A graph compiled ahead of time for one device and one size of its inputs (an AOTInductor package). It holds no weights:
/// it computes with the tensors it is given, and sees what is written to them later.
pub struct Package(*mut ffi::Package);

// SAFETY: the package and the tensors it points to are owned by this value, and it is neither cloned nor `Sync`: one
// thread at a time uses it, as `run_single_threaded` asks.
unsafe impl Send for Package {}

/// What compiled code may take for granted of an address.
const ALIGNMENT: usize = 16;

impl Package {
    /// Unpacks the file into the temporary folder, loads its library from there, and binds its constants to the tensors of
    /// the same names. Tensors that it does not compute with are left alone.
    ///
    /// # Errors
    /// When the file cannot be loaded, computes with a tensor that is not here, or would not fit one that is.
    pub fn load(path: &Path, device: Device, tensors: &[(String, Tensor)]) -> Result<Self> {
        let index: c_int = match device {
            Device::Cpu => -1,
            Device::Cuda(index) => index as c_int,
            Device::Mps | Device::Vulkan => bail!("packages are for the CPU and for CUDA"),
        };
        // The code has the strides of a contiguous tensor in it, and on a GPU loads 16 bytes at once; on a CPU it does
        // not care for addresses.
        let suits = |tensor: &Tensor| tensor.is_contiguous() && (device == Device::Cpu || is_aligned(tensor));
        if let Some((name, _)) = tensors.iter().find(|(_, tensor)| tensor.device() != device || !suits(tensor)) {
            bail!("{name} lies in memory as compiled code does not expect it");
        }
        let file = CString::new(path.to_string_lossy().as_ref()).context("a path with a NUL byte")?;
        let names = tensors.iter().map(|(name, _)| CString::new(name.as_str())).collect::<Result<Vec<_>, _>>()?;
        let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
        let pointers: Vec<*const C_tensor> = tensors.iter().map(|(_, tensor)| tensor.as_ptr()).collect();
        let mut package = std::ptr::null_mut();
        // SAFETY: strings and tensors are borrowed for the whole call; the shim copies handles of the tensors.
        ffi::check(unsafe {
            ffi::shim_package_load(file.as_ptr(), index, names.as_ptr(), pointers.as_ptr(), names.len(), &mut package)
        })?;
        Ok(Package(package))
    }

    /// Runs the graph; its outputs in order. The inputs have the sizes, dtypes and device it was compiled for.
    pub fn run(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let inputs: Vec<Tensor> = inputs
            .iter()
            .map(|tensor| tensor.contiguous())
            .map(|tensor| if is_aligned(&tensor) { tensor } else { tensor.copy() })
            .collect();
        let pointers: Vec<*const C_tensor> = inputs.iter().map(|tensor| tensor.as_ptr()).collect();
        // SAFETY: the package is alive, the inputs are borrowed for the whole call; `collect` keeps the sink's context.
        let outputs = collect(|context, sink| unsafe {
            ffi::shim_package_run(self.0, pointers.as_ptr(), pointers.len(), context, sink)
        })?;
        Ok(outputs.into_iter().map(|(_, tensor)| tensor).collect())
    }
}

impl Drop for Package {
    fn drop(&mut self) {
        // SAFETY: made by `shim_package_load`, freed once.
        unsafe { ffi::shim_package_free(self.0) }
    }
}

fn is_aligned(tensor: &Tensor) -> bool {
    (tensor.data_ptr() as usize).is_multiple_of(ALIGNMENT)
}
