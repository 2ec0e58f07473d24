//! From what was typed to the settings of those who act: the only module that knows both.

use std::path::PathBuf;

use tch::{Device, Kind};

use crate::api::Limits;
use crate::cli::{self, DeviceName, DtypeName, EngineArgs, ServeArgs};
use crate::device;
use crate::error::{Error, Result};
use crate::net::{Bucket, DownloadSettings, Downloader, Guard, GuardSettings, Secret, Uploader};
use crate::pipeline::{ControlNetSource, Settings, VaeTiling};
use crate::torch::AttentionBackend;
use crate::{server, worker};

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
        controlnets: arguments.controlnet.iter().map(controlnet).collect(),
        preload_controlnets: arguments.preload_controlnets,
        controlnet_memory: arguments.controlnet_memory.0,
        memory_limit: arguments.memory_limit.map(|size| size.0),
    })
}

pub fn model(arguments: &EngineArgs) -> Result<PathBuf> {
    arguments.model_or_default().map(PathBuf::from).ok_or_else(|| {
        Error::setup("model_not_found", format!("no model was named, and {} is not here", cli::DEFAULT_MODEL))
            .remedy("run `make setup` in the project's folder, or give --model")
    })
}

fn controlnet(source: &cli::NamedDir) -> ControlNetSource {
    ControlNetSource { name: source.name.clone(), dir: source.dir.clone() }
}

/// What a request may ask for.
pub fn limits(arguments: &EngineArgs) -> Limits {
    let EngineArgs { max_pixels, max_num_images, max_controls, .. } = *arguments;
    Limits { max_pixels, max_num_images, max_controls, ..Limits::default() }
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

/// An environment variable; an empty one counts as unset.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// What the environment says of RunPod; `None` outside its platform.
pub fn worker_settings() -> Option<worker::Settings> {
    worker::Settings::from_variables(variable)
}

/// Guards the addresses that clients name.
pub fn guard() -> Guard {
    Guard::new(GuardSettings::from_variables(variable))
}

/// Fetches what clients name.
pub fn downloader() -> Downloader {
    Downloader::new(guard(), DownloadSettings::from_variables(variable))
}

/// Puts pictures into the job's bucket or this worker's.
pub fn uploader() -> Result<Uploader> {
    Ok(Uploader::new(guard(), Bucket::from_variables(variable)?))
}

pub fn serve_settings(options: &ServeArgs) -> Result<server::Settings> {
    let defaults = server::Settings::default();
    Ok(server::Settings {
        worker_id: variable("RUNPOD_POD_ID").unwrap_or(defaults.worker_id),
        api_key: options.api_key.clone().map(Secret::new),
        allow_origins: options.cors_origin.clone(),
        concurrency: options.concurrency,
        max_queue: options.max_queue,
        ..defaults
    })
}

/// Host and port of the local API. Realtime mode is the same API on all interfaces.
pub fn serve_address(options: &ServeArgs) -> (String, u16) {
    if let Some(port) = realtime_port() {
        return ("0.0.0.0".into(), port);
    }
    let host = if options.host == "localhost" { "127.0.0.1" } else { &options.host };
    (host.to_owned(), options.port)
}

/// `RUNPOD_REALTIME_PORT`, where it asks for realtime mode.
pub fn realtime_port() -> Option<u16> {
    variable("RUNPOD_REALTIME_PORT")?.parse().ok().filter(|port| *port != 0)
}

/// Where a load balancer asks for health, if not on the API's own port.
pub fn health_port(api: u16) -> Option<u16> {
    variable("PORT_HEALTH")?.parse().ok().filter(|port| *port != api)
}
