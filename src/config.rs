//! From what was typed to the settings of those who act: the only module that knows both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tch::{Device, Kind};

use crate::api::Limits;
use crate::cli::{self, DeviceName, DtypeName, EngineArgs, ServeArgs};
use crate::device;
use crate::error::{Error, Result};
use crate::handler::Adapters;
use crate::hub::{self, Hub, Variant, Wanted, What};
use crate::lora;
use crate::models::Fused;
use crate::net::{
    AdapterCache, AdapterFiles, AdapterSettings, Bucket, DownloadSettings, Downloader, Guard, GuardSettings, Secret,
    Uploader,
};
use crate::pipeline::{MAX_TEXTUAL_INVERSION_BYTES, ModelSource, Offload, Settings, VaeTiling};
use crate::torch::AttentionBackend;
use crate::{server, worker};

/// Where to compute; the best device where none is named.
pub fn devices(arguments: &EngineArgs) -> Result<Vec<Device>> {
    let device = |name: &DeviceName| match *name {
        DeviceName::Cuda(index) => device::check(Device::Cuda(index)),
        DeviceName::Mps => device::check(Device::Mps),
        DeviceName::Cpu => Ok(Device::Cpu),
    };
    match arguments.device.as_slice() {
        [] => Ok(vec![device::best()]),
        names => names.iter().map(device).collect(),
    }
}

/// Jobs that can run at the same time.
fn concurrency(arguments: &EngineArgs) -> usize {
    arguments.device.len().max(1) * usize::from(arguments.max_batch)
}

/// Sets libtorch's process-wide switches, and translates the options: the settings of an engine on each of `devices`.
pub fn settings(arguments: &EngineArgs, devices: &[Device]) -> Result<Vec<Settings>> {
    if arguments.threads.is_some() || devices.len() > 1 {
        let threads = arguments.threads.map_or_else(tch::get_num_threads, i32::from);
        tch::set_num_threads((threads / devices.len() as i32).max(1));
    }
    crate::torch::set_attention_backend(match arguments.attention {
        cli::Attention::Auto | cli::Attention::Fastest => AttentionBackend::Auto,
        cli::Attention::Flash => AttentionBackend::Flash,
        cli::Attention::Efficient => AttentionBackend::Efficient,
        cli::Attention::Cudnn => AttentionBackend::Cudnn,
        cli::Attention::Math => AttentionBackend::Math,
    })?;
    tch::Cuda::cudnn_set_benchmark(arguments.cudnn_benchmark);
    let model = model(arguments)?;
    let settings = Settings {
        controlnets: controlnets(arguments, &model),
        model,
        model_config: arguments.model_config.clone(),
        vae: arguments.vae.as_ref().map(PathBuf::from),
        graphs: graphs(arguments)?,
        aot: arguments.aot == cli::Aot::Auto,
        fused: match arguments.fused {
            cli::Switch::Auto => Fused::Auto,
            cli::Switch::On => Fused::On,
            cli::Switch::Off => Fused::Off,
        },
        device: Device::Cpu,
        neighbours: 0,
        kind: arguments.dtype.map_or_else(|| device::default_dtype(devices), kind),
        vae_kind: arguments.vae_dtype.map(kind),
        variant: arguments.variant.clone(),
        vae_tiling: match arguments.vae_tiling {
            cli::VaeTiling::Auto => VaeTiling::Above(arguments.vae_tiling_pixels),
            cli::VaeTiling::On => VaeTiling::Always,
            cli::VaeTiling::Off => VaeTiling::Never,
        },
        offload: match arguments.offload {
            cli::Offload::None => Offload::None,
            cli::Offload::TextEncoders => Offload::TextEncoders,
            cli::Offload::All => Offload::All,
        },
        preload_controlnets: arguments.preload_controlnets,
        controlnet_memory: arguments.controlnet_memory.0,
        cuda_graphs: arguments.cuda_graphs,
        encode_ahead: false,
        choose_attention: arguments.attention == cli::Attention::Fastest,
        refiners: arguments.refiner.iter().map(source).collect(),
        loras: lora::Settings {
            backup: match arguments.lora_backup {
                cli::LoraBackup::File => lora::Backup::File,
                cli::LoraBackup::Copy => lora::Backup::Copy,
            },
            memory: arguments.lora_memory.0,
        },
        memory_limit: arguments.memory_limit.map(|size| size.0),
    };
    let neighbours = |device: Device| devices.iter().filter(|other| **other == device).count() - 1;
    let on = |&device: &Device| Settings {
        device,
        neighbours: neighbours(device),
        encode_ahead: match arguments.encode_ahead {
            cli::Switch::Auto => device.is_cuda(),
            given => given == cli::Switch::On,
        },
        ..settings.clone()
    };
    Ok(devices.iter().map(on).collect())
}

pub fn model(arguments: &EngineArgs) -> Result<PathBuf> {
    arguments.model_or_default().map(PathBuf::from).ok_or_else(|| {
        Error::setup("model_not_found", format!("no model was named, and {} is not here", cli::DEFAULT_MODEL))
            .remedy("run `make setup` in the project's folder, or give --model")
    })
}

/// Finds models on this machine and on the Hub.
pub fn hub(arguments: &EngineArgs) -> Hub {
    Hub::new(hub::Settings::from_variables(variable, &arguments.network_volume), &downloader())
}

/// The places in the options where a model may be named by its place on the Hub, and what is wanted there.
pub fn wanted(arguments: &mut EngineArgs) -> Vec<(Wanted, Place<'_>)> {
    let variants: Vec<Variant> = match (&arguments.variant, arguments.dtype) {
        (Some(variant), _) => vec![Some(variant.clone()), None],
        (None, Some(DtypeName::Float32)) => vec![None, Some("fp16".into())],
        // half the bytes
        (None, _) => vec![Some("fp16".into()), None],
    };
    let wanted = |name: String, what, option| Wanted { name, what, option, variants: variants.clone() };
    let mut places = Vec::new();
    if let Some(model) = &mut arguments.model {
        places.push((wanted(model.clone(), What::Pipeline, "--model (MODEL_ID)"), Place::Text(model)));
    }
    if let Some(vae) = &mut arguments.vae {
        places.push((wanted(vae.clone(), What::Vae, "--vae (VAE_ID)"), Place::Text(vae)));
    }
    let dirs = [
        (&mut arguments.controlnet, What::ControlNet, "--controlnet (CONTROLNETS)"),
        (&mut arguments.refiner, What::Pipeline, "--refiner (REFINER_ID)"),
    ];
    for (dirs, what, option) in dirs {
        for named in dirs {
            let name = named.dir.to_string_lossy().into_owned();
            places.push((wanted(name, what, option), Place::Dir(&mut named.dir)));
        }
    }
    places
}

/// Where an option holds the name of a model.
pub enum Place<'a> {
    Text(&'a mut String),
    Dir(&'a mut PathBuf),
}

impl Place<'_> {
    /// Puts the folder into the name's place.
    pub fn set(self, path: &Path) {
        match self {
            Place::Text(text) => *text = path.to_string_lossy().into_owned(),
            Place::Dir(dir) => *dir = path.to_owned(),
        }
    }
}

fn source(source: &cli::NamedDir) -> ModelSource {
    ModelSource { name: source.name.clone(), dir: source.dir.clone() }
}

/// The ControlNets that were named; without any those that lie in the model's folder, by name.
fn controlnets(arguments: &EngineArgs, model: &Path) -> Vec<ModelSource> {
    if !arguments.controlnet.is_empty() {
        return arguments.controlnet.iter().map(source).collect();
    }
    let entries = std::fs::read_dir(model.join("controlnets")).into_iter().flatten().flatten();
    let named = |entry: std::fs::DirEntry| Some((entry.file_name().into_string().ok()?, entry.path()));
    let own: BTreeMap<String, PathBuf> = entries.filter_map(named).filter(|(_, dir)| dir.is_dir()).collect();
    own.into_iter().map(|(name, dir)| ModelSource { name, dir }).collect()
}

/// The folders of LoRAs that were named; without any the one in the model's folder.
fn lora_dirs(arguments: &EngineArgs) -> Vec<PathBuf> {
    let own = || Some(Path::new(&arguments.model_or_default()?).join("loras")).filter(|dir| dir.is_dir());
    match arguments.lora_dir.as_slice() {
        [] => own().into_iter().collect(),
        named => named.to_vec(),
    }
}

/// What a request may ask for.
pub fn limits(arguments: &EngineArgs) -> Limits {
    let EngineArgs { max_pixels, max_num_images, max_controls, max_loras, .. } = *arguments;
    Limits { max_pixels, max_num_images, max_controls, max_loras, ..Limits::default() }
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
pub fn worker_settings(arguments: &EngineArgs) -> Option<worker::Settings> {
    let concurrency = || Some(concurrency(arguments).to_string());
    worker::Settings::from_variables(|name| match name {
        "CONCURRENCY" => variable(name).or_else(concurrency),
        _ => variable(name),
    })
}

/// Guards the addresses that clients name.
pub fn guard() -> Guard {
    Guard::new(GuardSettings::from_variables(variable))
}

/// Fetches what clients name.
pub fn downloader() -> Downloader {
    Downloader::new(guard(), DownloadSettings::from_variables(variable))
}

/// Finds the LoRAs and textual inversions that requests name.
pub fn adapters(arguments: &EngineArgs) -> Adapters {
    let cache = Arc::new(adapter_cache(arguments));
    let loras = AdapterSettings::loras(lora_dirs(arguments), arguments.max_lora_bytes.0);
    let textual_inversions =
        AdapterSettings::textual_inversions(arguments.embedding_dir.clone(), MAX_TEXTUAL_INVERSION_BYTES);
    Adapters {
        loras: AdapterFiles::new(loras, downloader(), cache.clone()),
        textual_inversions: AdapterFiles::new(textual_inversions, downloader(), cache),
    }
}

/// Downloaded adapters, on the volume where there is one.
fn adapter_cache(arguments: &EngineArgs) -> AdapterCache {
    let home = || {
        let cache = variable("XDG_CACHE_HOME").map(PathBuf::from);
        cache.or_else(|| Some(Path::new(&variable("HOME")?).join(".cache"))).unwrap_or_else(std::env::temp_dir)
    };
    let volume = &arguments.network_volume;
    let default = || if volume.is_dir() { volume.clone() } else { home() }.join("sdxl-worker/adapters");
    AdapterCache::new(arguments.adapter_cache.clone().unwrap_or_else(default), arguments.lora_cache.0)
}

/// Puts pictures into the job's bucket or this worker's.
pub fn uploader() -> Result<Uploader> {
    Ok(Uploader::new(guard(), Bucket::from_variables(variable)?))
}

pub fn serve_settings(arguments: &EngineArgs, options: &ServeArgs) -> Result<server::Settings> {
    let defaults = server::Settings::default();
    Ok(server::Settings {
        worker_id: variable("RUNPOD_POD_ID").unwrap_or(defaults.worker_id),
        api_key: options.api_key.clone().map(Secret::new),
        allow_origins: options.cors_origin.clone(),
        concurrency: options.concurrency.unwrap_or_else(|| concurrency(arguments)),
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
