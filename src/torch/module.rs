use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::{Device, Tensor};

use super::ffi::{self, C_tensor, CModule_};

/// A TorchScript module. Like `tch::CModule`, with its buffers in reach and tuples as plain lists.
pub struct Module(*mut CModule_);

// SAFETY: a script module is a counted pointer; torch allows its use from one thread at a time, and `Module` is neither
// cloned nor shared (`forward` takes `&self`, but the type is not `Sync`).
unsafe impl Send for Module {}

impl Module {
    /// Loads a `.pt` straight onto `device`: moving it later would materialise every stride-0 parameter.
    pub fn load(path: &Path, device: Device) -> Result<Self> {
        let device: c_int = match device {
            Device::Cpu => -1,
            Device::Cuda(index) => index as c_int,
            Device::Mps => -2,
            Device::Vulkan => bail!("no graph runs on Vulkan"),
        };
        let file = CString::new(path.to_string_lossy().as_ref()).context("a path with a NUL byte")?;
        // SAFETY: `file` outlives the call.
        let module = unsafe { ffi::atm_load_on_device(file.as_ptr(), device) };
        ffi::check_last_error()?;
        Ok(Module(module))
    }

    /// Handles to the module's own parameters: `set_data` on one changes what the graph computes with.
    pub fn named_parameters(&self) -> Result<Vec<(String, Tensor)>> {
        // SAFETY: the module is alive; `collect` keeps the sink's context alive through the call.
        collect(|context, sink| unsafe { ffi::shim_module_parameters(self.0, context, sink) })
    }

    /// The tensors that belong to the graph itself, such as frequency tables.
    pub fn named_buffers(&self) -> Result<Vec<(String, Tensor)>> {
        // SAFETY: as above.
        collect(|context, sink| unsafe { ffi::shim_module_buffers(self.0, context, sink) })
    }

    /// Runs the graph; its outputs in order.
    pub fn forward(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let pointers: Vec<*const C_tensor> = inputs.iter().map(|t| t.as_ptr()).collect();
        // SAFETY: the inputs are borrowed for the whole call, and the shim only reads them.
        let outputs = collect(|context, sink| unsafe {
            ffi::shim_module_forward(self.0, pointers.as_ptr(), pointers.len(), context, sink)
        })?;
        Ok(outputs.into_iter().map(|(_, tensor)| tensor).collect())
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: made by `atm_load_on_device`, freed once.
        unsafe { ffi::atm_free(self.0) }
    }
}

pub(super) type Named = Vec<(String, Tensor)>;

pub(super) fn collect(call: impl FnOnce(*mut c_void, ffi::TensorSink) -> *mut c_char) -> Result<Named> {
    extern "C" fn push(context: *mut c_void, name: *const c_char, tensor: *mut C_tensor) {
        // SAFETY: `context` is the list below, alive through the call; the name is NUL-terminated; the tensor is ours.
        unsafe {
            let name = CStr::from_ptr(name).to_string_lossy().into_owned();
            (*context.cast::<Named>()).push((name, Tensor::from_ptr(tensor)));
        }
    }
    let mut tensors = Named::new();
    ffi::check(call((&raw mut tensors).cast(), push))?;
    Ok(tensors)
}
