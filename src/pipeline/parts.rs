//! What turns a prompt into predictions: text encoders and UNet. The base model has its own, and so has a refiner.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::denoise::Guidance;
use super::prompt::{PromptCache, TextStage};
use super::tokenizer::ClipTokenizer;
use super::{ModelSource, Settings};
use crate::api::{GenerateParams, Preset, Timings};
use crate::error::{Error, Result};
use crate::lora::Loras;
use crate::models::{GraphSet, ModelDir, TextEncoder, UNet};
use crate::schedulers::SchedulerConfig;
use crate::weights::{self, Checkpoint, Weights};

pub(super) struct ModelParts {
    pub(super) text_stages: Vec<TextStage>,
    pub(super) prompt_cache: RefCell<PromptCache>,
    pub(super) force_zeros_for_empty_prompt: bool,
    pub(super) requires_aesthetics_score: bool,
    pub(super) unet: UNet,
    /// Of UNet and text encoders.
    pub(super) weights: RefCell<Loras>,
    pub(super) unet_config: Value,
    pub(super) scheduler_config: SchedulerConfig,
}

impl ModelParts {
    /// Loads the parts side by side: reading a graph takes as long as binding its weights, and none needs another.
    /// Also says how long they took.
    pub(super) fn load(
        settings: &Settings,
        model: &ModelDir,
        graphs: &GraphSet,
        with_control: bool,
    ) -> Result<(Self, Timings)> {
        let started = Instant::now();
        let unet_config = model.config("unet")?;
        let target = (settings.kind, settings.device);
        let encoders = [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")];
        let encoders = encoders.into_iter().filter(|(component, _)| model.has(component));
        let (loaded, unet) = std::thread::scope(|scope| {
            let load = |encoder| scope.spawn(move || load_text_stage(settings, model, graphs, encoder));
            let text_stages: Vec<_> = encoders.map(load).collect();
            let _no_grad = tch::no_grad_guard();
            let unet = weights(settings, model, "unet", settings.kind)
                .and_then(|weights| {
                    UNet::load(graphs, &unet_config, weights, model.path(), target, with_control, settings.fused)
                })
                .map(|unet| (unet, started.elapsed()));
            let join = |thread: std::thread::ScopedJoinHandle<_>| thread.join().expect("loading does not panic");
            (text_stages.into_iter().map(join).collect::<Result<Vec<_>>>(), unet)
        });
        let ((unet, unet_weights), unet_time) = unet?;
        let mut times = Timings::default();
        times.add("load_unet_graphs", unet_time.saturating_sub(unet_weights.bind_time()));
        times.add("load_unet_weights", unet_weights.bind_time());
        let mut components = vec![("unet", unet_weights)];
        let mut text_stages = Vec::new();
        for (component, stage, weights, time) in loaded? {
            times.add(if component == "text_encoder" { "load_text_encoder" } else { "load_text_encoder_2" }, time);
            components.push((component, weights));
            text_stages.push(stage);
        }

        let projection_dim = text_stages.last().map_or(0, |stage| stage.encoder.projection_dim());
        let requires_aesthetics_score = model.requires_aesthetics_score();
        let time_ids = if requires_aesthetics_score { 5 } else { 6 };
        let expected = unet.addition_time_embed_dim * time_ids + projection_dim;
        if unet.add_embedding_in_features != expected {
            let (has, path) = (unet.add_embedding_in_features, model.path().display());
            let message =
                format!("{path}: the UNet's added embedding takes {has} values, the text encoder gives {expected}");
            return Err(Error::setup("model_invalid", message));
        }
        let parts = ModelParts {
            text_stages,
            prompt_cache: RefCell::default(),
            force_zeros_for_empty_prompt: model.force_zeros_for_empty_prompt(),
            requires_aesthetics_score,
            unet,
            weights: RefCell::new(Loras::new(components, settings.loras)),
            unet_config,
            scheduler_config: model.scheduler_config()?,
        };
        Ok((parts, times))
    }
}

impl ModelParts {
    /// What the configuration says this model was distilled by. The published Turbo model has its scheduler to itself,
    /// and a UNet that takes its guidance is one of LCM's; others say nothing.
    pub(super) fn preset(&self) -> Option<Preset> {
        let class = self.scheduler_config.class_name.as_deref();
        match class {
            _ if self.unet.time_cond_proj_dim.is_some() => Some(Preset::Lcm),
            Some("LCMScheduler") => Some(Preset::Lcm),
            Some("EulerAncestralDiscreteScheduler") if self.scheduler_config.is_trailing() => Some(Preset::Turbo),
            Some("TCDScheduler") => Some(Preset::Hyper),
            _ => None,
        }
    }

    /// A UNet that takes the guidance scale as an input needs no second half of the batch.
    pub(super) fn guidance(&self, params: &GenerateParams) -> Guidance {
        Guidance {
            scale: if self.unet.time_cond_proj_dim.is_some() { 1.0 } else { params.guidance_scale },
            rescale: params.guidance_rescale,
            start: params.guidance_start,
            end: params.guidance_end,
        }
    }
}

/// The refiners that a worker has. The one used last is kept loaded.
pub(super) struct Refiners {
    sources: Vec<ModelSource>,
    loaded: Option<(String, ModelParts)>,
}

impl Refiners {
    /// A folder that is missing or holds something else is told now.
    pub(super) fn open(sources: &[ModelSource]) -> Result<Self> {
        for source in sources {
            let path = ModelDir::open(&source.dir, None)?;
            if !path.requires_aesthetics_score() {
                let message = format!("{} is no refiner (no requires_aesthetics_score)", source.dir.display());
                return Err(Error::setup("unsupported_model", message).remedy("give --refiner an SDXL refiner"));
            }
        }
        Ok(Refiners { sources: sources.to_vec(), loaded: None })
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.sources.iter().map(|source| source.name.clone()).collect()
    }

    /// Sees to it that the refiner of that name is loaded.
    pub(super) fn require(&mut self, name: &str, settings: &Settings) -> Result<()> {
        if self.loaded.as_ref().is_some_and(|(loaded, _)| loaded == name) {
            return Ok(());
        }
        let source = self
            .sources
            .iter()
            .find(|source| source.name == name)
            .ok_or_else(|| Error::setup("refiner_not_available", format!("this worker has no refiner {name}")))?;
        self.loaded = None; // makes room
        let started = std::time::Instant::now();
        let (model, graphs) = (ModelDir::open(&source.dir, None)?, settings.open_graphs()?);
        let (parts, _) = ModelParts::load(settings, &model, &graphs, false)?;
        let seconds = format!("{:.2}", started.elapsed().as_secs_f64());
        tracing::info!(name, seconds, "refiner loaded");
        self.loaded = Some((name.to_owned(), parts));
        Ok(())
    }

    pub(super) fn loaded(&self) -> Option<&ModelParts> {
        self.loaded.as_ref().map(|(_, parts)| parts)
    }

    /// The one that was [required](Self::require).
    pub(super) fn get(&self) -> &ModelParts {
        self.loaded().expect("required before")
    }
}

/// A component's weights, in the files that suit `kind`.
pub(super) fn weights(settings: &Settings, model: &ModelDir, component: &str, kind: Kind) -> Result<Weights> {
    let checkpoint = Checkpoint::open(component, &model.component(component), &variants(settings, kind))?;
    let mut weights = Weights::new(checkpoint, settings.device, kind);
    weights.set_offload(settings.offload.takes(component));
    Ok(weights)
}

/// Half the bytes are read where a 16-bit copy is there.
fn variants(settings: &Settings, kind: Kind) -> [Option<&str>; 2] {
    match settings.variant.as_deref() {
        Some(variant) => [Some(variant), None],
        None if kind == Kind::Float => [None, Some("fp16")],
        None => [Some("fp16"), None],
    }
}

/// In the order in which a job needs them.
pub(super) fn read_ahead(settings: &Settings, model: &ModelDir) {
    let variants = variants(settings, settings.kind).map(|variant| variant.map(str::to_owned)).to_vec();
    let components = ["text_encoder", "text_encoder_2", "unet", "vae"].into_iter();
    weights::read_ahead(components.map(|component| (model.component(component), variants.clone())).collect());
}

/// Makes a component's first call while others still load: on CUDA it is a slow one, since it brings libraries and kernels
/// to the device.
pub(super) fn wake<T>(device: Device, call: impl FnOnce() -> Result<T>) {
    if device.is_cuda() {
        tch::jit::set_graph_executor_optimize(false); // of this thread
        if let Err(error) = call() {
            tracing::debug!(%error, "a first call failed"); // and will again where it counts
        }
    }
}

fn load_text_stage(
    settings: &Settings,
    model: &ModelDir,
    graphs: &GraphSet,
    (component, tokenizer): (&'static str, &str),
) -> Result<(&'static str, TextStage, Weights, Duration)> {
    let started = Instant::now();
    let _no_grad = tch::no_grad_guard();
    let weights = weights(settings, model, component, settings.kind)?;
    let target = (settings.kind, settings.device);
    let config = model.config(component)?;
    let folder = model.tokenizer(tokenizer);
    let tokenizer = match &folder {
        Some(folder) => ClipTokenizer::load(folder)?,
        None => ClipTokenizer::clip(tokenizer)?,
    };
    let (encoder, weights) = TextEncoder::load(component, graphs, &config, weights, model.path(), target)?;
    let (length, ids) = (tokenizer.max_length() as i64, tokenizer.vocab_size() as i64);
    if length != encoder.max_position_embeddings || ids > encoder.vocab_size {
        let path = folder.unwrap_or_default();
        let (path, takes, known) = (path.display(), encoder.max_position_embeddings, encoder.vocab_size);
        let message = format!(
            "{path} gives {length} tokens with ids below {ids}, {component} takes {takes} with ids below {known}"
        );
        return Err(Error::setup("model_invalid", message).remedy("use the tokenizer that belongs to the text encoder"));
    }
    let elapsed = started.elapsed();
    if weights.stay() {
        let ids = Tensor::from_slice(&tokenizer.frame(&[]).ids).unsqueeze(0);
        wake(settings.device, || encoder.forward(&ids.to_device(settings.device)));
    }
    Ok((component, TextStage { tokenizer, encoder }, weights, elapsed))
}
