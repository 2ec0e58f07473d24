use std::ffi::c_void;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use memmap2::{MmapOptions, MmapRaw};
use tch::{Kind, Tensor};

use super::ffi;

/// A file mapped privately with write permission: reads come from the page cache, and a write (a LoRA fused in place)
/// copies the page for this process alone. A read-only mapping would kill the process on the first in-place edit.
///
/// Or the bytes of a file that was read whole, for files that others may change or cut short while they are in use.
pub struct Mapping {
    map: MmapRaw,
    /// What the pages were mapped from; `None` for one that was read.
    file: Option<File>,
}

impl Mapping {
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        // SAFETY: private mapping; other processes' writes to the file are outside the contract, as for any loader of
        // mapped weights. The length is checked against the header before any tensor is made.
        let map = unsafe { MmapOptions::new().map_copy(&file) };
        let map = map.with_context(|| format!("mapping {}", path.display()))?.into();
        Ok(Arc::new(Mapping { map, file: Some(file) }))
    }

    /// The first `length` bytes of `file`, read into memory of their own, which goes back to the system with the last
    /// tensor.
    ///
    /// # Errors
    /// A file that is shorter.
    pub fn read(file: &File, length: usize) -> Result<Arc<Self>> {
        let mut map = MmapOptions::new().len(length.max(1)).map_anon().context("reserving memory for a file")?;
        file.read_exact_at(&mut map[..length], 0).context("reading a file")?;
        Ok(Arc::new(Mapping { map: map.into(), file: None }))
    }

    /// Undoes every write to these bytes: they are again what the file holds. On Linux the pages that were copied for
    /// the writes go back to the system, also those shared with neighbours, whose writes are undone with them: restore
    /// all that was written, or nothing.
    ///
    /// # Errors
    /// When the file is gone in a way that does not let it be read; not possible for one that was read.
    pub fn restore(&self, start: usize, length: usize) -> Result<()> {
        let file = self.file.as_ref().context("bytes that were read cannot be restored")?;
        let inside = start.checked_add(length).is_some_and(|end| end <= self.map.len());
        anyhow::ensure!(inside, "a range beyond the file");
        // SAFETY: the pages belong to a private mapping of a file, so that dropping them brings the file's bytes back.
        // Nobody holds a reference into them: tensors read and write through pointers, and on one thread.
        #[cfg(target_os = "linux")]
        unsafe {
            let _ = file;
            self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, length)?;
        }
        #[cfg(not(target_os = "linux"))]
        {
            // SAFETY: inside the mapping, writable, and referred to by nobody else for the time of the call.
            let bytes = unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().add(start), length) };
            file.read_exact_at(bytes, start as u64).context("reading the file again")?;
        }
        Ok(())
    }

    /// Whether the address lies in this mapping.
    pub fn contains(&self, address: usize) -> bool {
        (self.map.as_ptr() as usize..self.map.as_ptr() as usize + self.map.len()).contains(&address)
    }

    /// The file's bytes. For its header and for copies; what a tensor is bound to changes through the tensor.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for the whole length as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), self.map.len()) }
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
            let data = self.map.as_mut_ptr().add(start).cast();
            let kind = ffi::kind_code(kind);
            ffi::check(ffi::shim_from_mapping(data, shape.as_ptr(), shape.len(), kind, owner, release, &mut tensor))?;
            Ok(Tensor::from_ptr(tensor))
        }
    }
}
