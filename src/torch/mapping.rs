use std::ffi::c_void;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use memmap2::{MmapOptions, MmapRaw};
use tch::{Kind, Tensor};

use super::ffi;

/// A file mapped privately with write permission: reads come from the page cache, and a write (a LoRA fused in place)
/// copies the page for this process alone. A read-only mapping would kill the process on the first in-place edit.
pub struct Mapping(MmapRaw);

impl Mapping {
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        // SAFETY: private mapping; other processes' writes to the file are outside the contract, as for any loader of
        // mapped weights. The length is checked against the header before any tensor is made.
        let map = unsafe { MmapOptions::new().map_copy(&file) };
        Ok(Arc::new(Mapping(map.with_context(|| format!("mapping {}", path.display()))?.into())))
    }

    /// The file's bytes. For its header and for copies; what a tensor is bound to changes through the tensor.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for the whole length as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.len()) }
    }

    /// A tensor over `bytes()[start..]`, without a copy where the address suits the dtype. It keeps the mapping alive.
    pub fn tensor(self: &Arc<Self>, start: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
        let numel = shape.iter().product::<i64>() as usize;
        let bytes =
            self.bytes().get(start..start + numel * kind.elt_size_in_bytes()).context("a tensor beyond the file")?;
        if !(bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes()) {
            return Ok(Tensor::f_from_data_size(bytes, shape, kind)?);
        }
        extern "C" fn release(owner: *mut c_void) {
            // SAFETY: `owner` is the `Arc` given away below, released once by the tensor's storage.
            drop(unsafe { Arc::from_raw(owner.cast::<Mapping>().cast_const()) });
        }
        let owner = Arc::into_raw(self.clone()).cast_mut().cast::<c_void>();
        let mut tensor = std::ptr::null_mut();
        // SAFETY: the range was checked above, is writable (copy-on-write), and lives until `release`. Tensors of one
        // file do not overlap (checked by the header's reader), so writes through one are not seen by another.
        unsafe {
            let data = self.0.as_mut_ptr().add(start).cast();
            let kind = ffi::kind_code(kind);
            ffi::check(ffi::shim_from_mapping(data, shape.as_ptr(), shape.len(), kind, owner, release, &mut tensor))?;
            Ok(Tensor::from_ptr(tensor))
        }
    }
}
