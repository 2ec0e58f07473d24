//! Which device and dtype the models run on. Asked once, at the start.

use tch::{Device, Kind};

use crate::error::{Error, Result};

/// The best device that works here: CUDA, else MPS, else the CPU.
pub fn best() -> Device {
    if tch::Cuda::is_available() {
        Device::Cuda(0)
    } else if tch::utils::has_mps() {
        Device::Mps
    } else {
        Device::Cpu
    }
}

/// # Errors
/// `device_not_available`, when libtorch cannot use the device that was asked for.
pub fn check(device: Device) -> Result<Device> {
    let missing = match device {
        Device::Cuda(index) if (index as i64) < tch::Cuda::device_count() => None,
        Device::Cuda(index) => {
            Some(format!("libtorch sees {} CUDA devices, not cuda:{index}", tch::Cuda::device_count()))
        }
        Device::Mps if !tch::utils::has_mps() => Some("this libtorch has no MPS".into()),
        Device::Vulkan => Some("Vulkan is not supported".into()),
        Device::Mps | Device::Cpu => None,
    };
    match missing {
        None => Ok(device),
        Some(message) => Err(Error::setup("device_not_available", message)
            .remedy("use --device cpu, or run `sdxl-worker doctor` to see what is missing")),
    }
}

/// float16 on CUDA; float32 on the CPU, where 16-bit arithmetic is slower and parity with diffusers is exact. Several devices
/// have one in common.
pub fn default_dtype(devices: &[Device]) -> Kind {
    if devices.iter().all(|device| device.is_cuda()) { Kind::Half } else { Kind::Float }
}

pub fn name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        Device::Cuda(index) => format!("cuda:{index}"),
        Device::Mps => "mps".into(),
        Device::Vulkan => "vulkan".into(),
    }
}
