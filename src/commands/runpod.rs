use std::sync::Arc;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::{ColdStart, block_on, load_runner};
use crate::cli::EngineArgs;
use crate::config;
use crate::error::Result;
use crate::torch;
use crate::worker::{self, GpuChecks, Hooks, Settings, Upload};

/// Works for RunPod until the platform ends it. Does not return: a thread may hang on a lost device.
pub fn runpod(arguments: &EngineArgs, settings: Settings) -> Result<()> {
    let start = ColdStart::begin();
    let uploader = config::uploader()?;
    let upload: Upload = Arc::new(move |job_id, s3_config, files| {
        let uploader = uploader.clone();
        Box::pin(async move { uploader.upload_pictures(&job_id, s3_config.as_ref(), files).await })
    });
    let load = load_runner(arguments.clone(), start);
    let exit = block_on(async move {
        let signals = worker::signals().map_err(anyhow::Error::from)?;
        // libtorch looks for devices in the load, so that the heartbeat does not wait for it
        let hooks = Hooks { upload: Some(upload), gpu_checks: gpu_checks(), ..Hooks::default() };
        Ok(worker::run(settings, load, signals, hooks).await)
    })?;
    torch::exit(exit.code())
}

/// The checks of an accelerator, where there is one.
fn gpu_checks() -> Option<GpuChecks> {
    let devices = tch::Cuda::device_count();
    if devices < 1 {
        return None;
    }
    let on = |device: usize| (Kind::Float, Device::Cuda(device));
    Some(GpuChecks {
        allocation: Box::new(move || {
            for device in 0..devices as usize {
                let _allocated = Tensor::f_zeros([1024], on(device))?;
            }
            Ok(())
        }),
        cuda_version: Box::new(|| torch::cuda_versions().0),
        initialisation: Box::new(move || {
            torch::device_memory(Device::Cuda(0))?;
            Ok(())
        }),
        benchmark: Box::new(move || {
            let square = Tensor::f_ones([1024, 1024], on(0))?;
            square.f_matmul(&square)?.f_sum(Kind::Float)?.double_value(&[]);
            let started = Instant::now();
            square.f_matmul(&square)?.f_sum(Kind::Float)?.double_value(&[]);
            Ok(started.elapsed())
        }),
    })
}
