use std::marker::PhantomData;

use anyhow::{Context, Result, ensure};
use tch::{Device, Tensor};

use super::ffi;

/// A way for bytes from pageable memory onto a device: through pinned buffers in turn, on a stream of its own, so that
/// reading, copying and sending overlap. On the CPU it copies. Belongs to the thread that made it, whose work on the
/// device goes to the lane's stream as long as it lives.
pub struct Lane {
    lane: *mut ffi::Lane,
    device: Device,
    /// Not `Send`: the stream is the thread's.
    _thread: PhantomData<*const ()>,
}

impl Lane {
    pub fn new(device: Device, buffer_bytes: usize, buffers: usize) -> Result<Self> {
        let index = match device {
            Device::Cpu => -1,
            Device::Cuda(index) => index as i32,
            other => anyhow::bail!("{other:?} has no lanes"),
        };
        let mut lane = std::ptr::null_mut();
        // SAFETY: `lane` is valid for the write, and owned by the value built from it.
        ffi::check(unsafe { ffi::shim_lane_new(index, buffer_bytes, buffers, &mut lane) }).context("opening a lane")?;
        Ok(Lane { lane, device, _thread: PhantomData })
    }

    /// Copies `source`, contiguous and on the CPU, into `target`, contiguous and on the lane's device, of the same shape
    /// and dtype. It may still be on its way when this returns; `source` may go all the same.
    pub fn copy(&mut self, target: &mut Tensor, source: &Tensor) -> Result<()> {
        ensure!(source.device() == Device::Cpu && target.device() == self.device, "a copy between the wrong devices");
        ensure!(source.is_contiguous() && target.is_contiguous(), "a lane copies contiguous tensors");
        ensure!(source.kind() == target.kind() && source.size() == target.size(), "a copy of another shape or dtype");
        // SAFETY: both tensors live through the call and hold the same number of bytes; the shim reads from the source
        // only before it returns.
        ffi::check(unsafe { ffi::shim_lane_copy(self.lane, target.as_mut_ptr(), source.data_ptr().cast()) })
    }

    /// Waits until all has arrived.
    pub fn finish(&mut self) -> Result<()> {
        // SAFETY: the lane is alive.
        ffi::check(unsafe { ffi::shim_lane_finish(self.lane) }).context("waiting for copies to the device")
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // SAFETY: made by `shim_lane_new`, freed once, on the same thread.
        unsafe { ffi::shim_lane_free(self.lane) }
    }
}
