//! Which device and dtype the models run on. Asked once, at the start.

use std::fmt;
use std::path::Path;

use tch::{Device, Kind};

use crate::error::{Error, Result};
use crate::torch::{self, CudaVersion};

/// The best device that works here: CUDA, else MPS, else the CPU. A GPU that is here and cannot be used is warned about.
pub fn best() -> Device {
    if tch::Cuda::is_available() {
        return Device::Cuda(0);
    }
    if let Some(obstacle) = obstacle() {
        tracing::warn!("{obstacle}");
    }
    if tch::utils::has_mps() { Device::Mps } else { Device::Cpu }
}

/// What stands between libtorch and this machine's GPU.
#[derive(Debug, PartialEq, Eq)]
pub struct Obstacle {
    pub problem: String,
    pub remedy: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\nto do: {}", self.problem, self.remedy)
    }
}

/// `None` where a GPU can be used, and where there is none.
pub fn obstacle() -> Option<Obstacle> {
    if tch::Cuda::device_count() > 0 {
        return None;
    }
    // The kernel's half of the driver shows itself in every container of the machine, whether it was given the GPU or not.
    let has_driver = Path::new("/proc/driver/nvidia/version").exists();
    let (driver, build) = torch::cuda_versions();
    obstacle_of(has_driver, driver, build)
}

fn obstacle_of(has_driver: bool, driver: Option<CudaVersion>, build: Option<CudaVersion>) -> Option<Obstacle> {
    let obstacle = |problem: String, remedy: String| Some(Obstacle { problem, remedy });
    match (driver, build) {
        (None, _) if !has_driver => None,
        (_, None) => obstacle(
            "this machine has an NVIDIA driver, and this libtorch was built without CUDA".into(),
            "set LIBTORCH to a libtorch with CUDA, such as that of pip install torch==2.11.0".into(),
        ),
        (None, Some(_)) => obstacle(
            "this machine has an NVIDIA driver, and its libcuda.so.1 is not to be seen from here".into(),
            "start the container with --gpus all".into(),
        ),
        // Within one major number an older driver runs newer builds.
        (Some(driver), Some(build)) if driver.0 < build.0 => {
            let release = if build.0 >= 13 { 580 } else { 525 };
            obstacle(
                format!(
                    "the NVIDIA driver runs CUDA {}.{} and older, and this libtorch was built for CUDA {}.{}",
                    driver.0, driver.1, build.0, build.1
                ),
                format!(
                    "take a driver of the {release} series or newer, or a libtorch for CUDA {}; \
                     on RunPod, allow hosts of CUDA {}.0 and newer alone",
                    driver.0, build.0
                ),
            )
        }
        (Some(driver), Some(_)) => obstacle(
            format!("the NVIDIA driver, for CUDA {}.{}, shows no GPU", driver.0, driver.1),
            "start the container with --gpus all, unset CUDA_VISIBLE_DEVICES, and look at nvidia-smi".into(),
        ),
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
    let Some(message) = missing else { return Ok(device) };
    let error = |message: String| Error::setup("device_not_available", message);
    Err(match obstacle().filter(|_| device.is_cuda()) {
        Some(obstacle) => error(format!("{message}: {}", obstacle.problem)).remedy(obstacle.remedy),
        None => error(message).remedy("use --device cpu, or run `sdxl-worker doctor` to see what is missing"),
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(has_driver: bool, driver: Option<CudaVersion>, build: Option<CudaVersion>) -> String {
        obstacle_of(has_driver, driver, build).map_or_else(String::new, |obstacle| obstacle.problem)
    }

    #[test]
    fn a_machine_without_a_driver_has_no_obstacle() {
        assert_eq!(obstacle_of(false, None, Some((13, 0))), None);
        assert_eq!(obstacle_of(false, None, None), None);
    }

    #[test]
    fn a_driver_older_than_the_build_is_named_with_both_releases_and_what_to_do() {
        let obstacle = obstacle_of(true, Some((12, 8)), Some((13, 0))).unwrap();
        assert!(obstacle.problem.contains("CUDA 12.8 and older") && obstacle.problem.contains("built for CUDA 13.0"));
        assert!(obstacle.remedy.contains("580 series") && obstacle.remedy.contains("libtorch for CUDA 12;"));
        assert!(obstacle_of(true, Some((11, 8)), Some((12, 8))).unwrap().remedy.contains("525 series"));
    }

    #[test]
    fn an_older_driver_of_the_same_major_release_is_not_to_blame() {
        assert!(problem(true, Some((12, 4)), Some((12, 8))).contains("shows no GPU"));
        assert!(problem(true, Some((13, 0)), Some((12, 8))).contains("shows no GPU"));
    }

    #[test]
    fn a_container_without_the_driver_and_a_libtorch_without_cuda_are_told_apart() {
        assert!(problem(true, None, Some((13, 0))).contains("libcuda.so.1"));
        assert!(problem(true, Some((13, 0)), None).contains("built without CUDA"));
    }

    #[test]
    fn the_versions_of_this_machine_can_be_asked_for() {
        let (driver, build) = torch::cuda_versions();
        assert!(build.is_none_or(|version| version.0 >= 12) && driver.is_none_or(|version| version.0 >= 11));
    }
}
