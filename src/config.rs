//! From what was typed to the settings of those who act: the only module that knows both.

use std::path::PathBuf;

use tch::{Device, Kind};

use crate::cli::{self, DeviceName, DtypeName, EngineArgs};
use crate::device;
use crate::error::{Error, Result};
use crate::pipeline::{Settings, VaeTiling};
use crate::torch::AttentionBackend;

/// Sets libtorch's process-wide switches, and translates the options.
pub fn settings(arguments: &EngineArgs) -> Result<Settings> {
    let device = match arguments.device {
        None => device::best(),
        Some(DeviceName::Cuda(index)) => device::check(Device::Cuda(index))?,
        Some(DeviceName::Mps) => device::check(Device::Mps)?,
        Some(DeviceName::Cpu) => Device::Cpu,
    };
    if let Some(threads) = arguments.threads {
        tch::set_num_threads(threads as i32);
    }
    crate::torch::set_attention_backend(match arguments.attention {
        cli::Attention::Auto => AttentionBackend::Auto,
        cli::Attention::Flash => AttentionBackend::Flash,
        cli::Attention::Efficient => AttentionBackend::Efficient,
        cli::Attention::Cudnn => AttentionBackend::Cudnn,
        cli::Attention::Math => AttentionBackend::Math,
    })?;
    Ok(Settings {
        model: model(arguments)?,
        graphs: graphs(arguments)?,
        device,
        kind: arguments.dtype.map_or(device::default_dtype(device), kind),
        vae_kind: arguments.vae_dtype.map(kind),
        variant: arguments.variant.clone(),
        vae_tiling: match arguments.vae_tiling {
            cli::VaeTiling::Auto => VaeTiling::Above(arguments.vae_tiling_pixels),
            cli::VaeTiling::On => VaeTiling::Always,
            cli::VaeTiling::Off => VaeTiling::Never,
        },
        memory_limit: arguments.memory_limit.map(|size| size.0),
    })
}

pub fn model(arguments: &EngineArgs) -> Result<PathBuf> {
    arguments.model_or_default().map(PathBuf::from).ok_or_else(|| {
        Error::setup("model_not_found", format!("no model was named, and {} is not here", cli::DEFAULT_MODEL))
            .remedy("run `make setup` in the project's folder, or give --model")
    })
}

fn graphs(arguments: &EngineArgs) -> Result<PathBuf> {
    arguments.graphs_or_default().ok_or_else(|| {
        Error::setup("graphs_not_found", format!("no graphs were named, and {} is not here", cli::DEFAULT_GRAPHS))
            .remedy("run `make setup` in the project's folder, or give --graphs")
    })
}

fn kind(name: DtypeName) -> Kind {
    match name {
        DtypeName::Float32 => Kind::Float,
        DtypeName::Float16 => Kind::Half,
        DtypeName::Bfloat16 => Kind::BFloat16,
    }
}
