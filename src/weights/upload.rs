//! Weights on their way to a device: read in the order of the file, by several threads, each with pinned buffers of its
//! own, so that reading, converting and sending overlap.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use tch::Tensor;

use super::Checkpoint;
use crate::error::Result;
use crate::torch::Lane;

/// How tensors are sent.
pub(super) struct Lanes {
    /// Threads that send side by side.
    pub(super) count: usize,
    pub(super) buffers: usize,
    pub(super) buffer_bytes: usize,
}

/// 144 MB of pinned memory: pinning costs time too.
pub(super) const PINNED: Lanes = Lanes { count: 3, buffers: 3, buffer_bytes: 16 << 20 };

/// Fills tensors on a device with the parameters of these names. What is stored in another dtype is converted before it is
/// sent: never are two copies of it on the device.
pub(super) fn upload(
    checkpoint: &Checkpoint,
    mut targets: Vec<(String, Tensor)>,
    lanes: &Lanes,
) -> Result<Vec<(String, Tensor)>> {
    let Some((_, first)) = targets.first() else { return Ok(targets) };
    let (device, kind) = (first.device(), first.kind());
    targets.sort_by_key(|(name, _)| checkpoint.position(name));
    let work: Vec<Mutex<(String, Tensor)>> = targets.into_iter().map(Mutex::new).collect();
    let next = AtomicUsize::new(0);
    let send = || -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let mut lane = Lane::new(device, lanes.buffer_bytes, lanes.buffers)?;
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(target) = work.get(index) else { return Ok(lane.finish()?) };
            let (name, target) = &mut *target.lock().expect("one thread has it");
            let source = checkpoint.tensor(name)?.f_to_kind(kind).map_err(anyhow::Error::from)?;
            lane.copy(target, &source)?;
        }
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..lanes.count).map(|_| scope.spawn(send)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("sending does not panic"))
    })?;
    Ok(work.into_iter().map(|target| target.into_inner().expect("nobody panicked")).collect())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn what_arrives_is_what_was_stored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("diffusion_pytorch_model.safetensors");
        let tensors: Vec<(String, Tensor)> = (0..40)
            .map(|n| (format!("layers.{n}.weight"), Tensor::randn([n % 7 + 1, 3 + n], (Kind::Float, Device::Cpu))))
            .collect();
        Tensor::write_safetensors(&tensors, &path).unwrap();
        let checkpoint = Checkpoint::open("unet", folder.path(), &[None]).unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let lanes = Lanes { count: 4, buffers: 2, buffer_bytes: 64 };
            let empty = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.empty_like().to_kind(kind));
            let arrived = upload(&checkpoint, tensors.iter().map(empty).collect(), &lanes).unwrap();
            assert_eq!(arrived.len(), tensors.len());
            for (name, tensor) in &arrived {
                let stored = &tensors.iter().find(|(stored, _)| stored == name).unwrap().1;
                assert_eq!(tensor, &stored.to_kind(kind), "{name}");
                assert!(!checkpoint.holds(name, tensor), "it is a copy");
            }
        }
    }
}
