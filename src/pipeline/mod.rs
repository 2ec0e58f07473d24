//! The recipe: Stable Diffusion XL from a valid request to pixels, step by step as diffusers does it.

mod control;
mod controlnets;
mod denoise;
mod image_processor;
mod latents;
mod memory;
mod preview;
mod prompt;
mod tokenizer;

use std::path::PathBuf;
use std::time::Instant;

use image::{GrayImage, RgbImage};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::api::{ControlNetFacts, GenerateParams, OutputFormat, SchedulerKind, SigmaSchedule, Timings};
use crate::context::{JobContext, Progress};
use crate::error::{Error, ErrorClass, Result};
use crate::media;
use crate::models::{GraphSet, ModelDir, TextEncoder, UNet, Vae, VaeEncoder};
use crate::schedulers::{self, NoiseSource, Scheduler, SchedulerConfig, StepOptions};
use crate::weights::Checkpoint;
use control::Controls;
pub use controlnets::ControlNetSource;
use controlnets::ControlNets;
use denoise::{Guidance, Lead, Previews, denoise, is_finite};
use latents::{InitImage, Start, from_image, from_noise};
use preview::PreviewMap;
use prompt::{PromptEncoder, TextStage};
pub use tokenizer::{ClipTokenizer, TokenIds};

/// What is fixed when a model is loaded.
#[derive(Debug, Clone)]
pub struct Settings {
    pub model: PathBuf,
    pub graphs: PathBuf,
    pub device: Device,
    pub kind: Kind,
    /// `None` follows diffusers: `kind`, but float32 for a float16 model whose VAE says `force_upcast`.
    pub vae_kind: Option<Kind>,
    /// Weight files to prefer, such as `fp16`.
    pub variant: Option<String>,
    pub vae_tiling: VaeTiling,
    /// In the order in which they are preferred.
    pub controlnets: Vec<ControlNetSource>,
    /// Load them at start, as far as they fit, rather than when a job asks for one.
    pub preload_controlnets: bool,
    /// Most bytes of ControlNet weights that are kept loaded.
    pub controlnet_memory: u64,
    /// Most bytes a request may need; `None` is what the machine or container has free.
    pub memory_limit: Option<u64>,
}

/// When pictures are decoded tile by tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VaeTiling {
    /// Above this many pixels.
    Above(u64),
    Always,
    Never,
}

/// What a caller needs to know of a loaded model before it can judge a request.
#[derive(Debug, Clone)]
pub struct ModelFacts {
    pub name: String,
    pub default_height: u32,
    pub default_width: u32,
    pub default_scheduler: SchedulerKind,
    /// The UNet is one for inpainting.
    pub needs_mask: bool,
    pub controlnets: Vec<ControlNetFacts>,
}

/// The pictures that a job came with, at the size of the picture to be made.
#[derive(Debug, Clone, Default)]
pub struct InputImages {
    pub image: Option<RgbImage>,
    /// From half grey up it is repainted.
    pub mask: Option<GrayImage>,
    /// Control maps, one for each of the request's controls.
    pub controls: Vec<RgbImage>,
}

/// What one job made.
pub struct Generation {
    pub images: Vec<RgbImage>,
    /// float32 `[num_images, 4, h, w]` on the CPU, before the VAE: diffusers' `output_type="latent"`.
    pub latents: Tensor,
    pub scheduler: SchedulerKind,
    pub timings: Timings,
    pub warnings: Vec<String>,
}

/// What the engine's thread runs.
pub trait Pipeline {
    fn facts(&self) -> ModelFacts;
    fn generate(&mut self, params: &GenerateParams, inputs: &InputImages, context: &JobContext) -> Result<Generation>;
}

pub struct StableDiffusionXlPipeline {
    settings: Settings,
    facts: ModelFacts,
    text_stages: Vec<TextStage>,
    force_zeros_for_empty_prompt: bool,
    unet: UNet,
    unet_config: Value,
    vae: Vae,
    vae_config: Value,
    /// Loaded when a 16-bit decode overflows.
    vae_float32: Option<Vae>,
    /// Loaded when a job first starts from a picture.
    vae_encoder: Option<VaeEncoder>,
    controlnets: ControlNets,
    scheduler_config: SchedulerConfig,
    /// Fitted when the first preview is asked for.
    preview_map: Option<PreviewMap>,
}

impl StableDiffusionXlPipeline {
    pub fn load(settings: Settings) -> Result<Self> {
        let model = ModelDir::open(&settings.model)?;
        let graphs = GraphSet::open(&settings.graphs)?;
        let scheduler_config = model.scheduler_config()?;
        let (unet_config, vae_config) = (model.config("unet")?, model.config("vae")?);
        let (kind, device) = (settings.kind, settings.device);
        let target = (kind, device);
        let mut controlnets =
            ControlNets::open(&settings.controlnets, settings.graphs.clone(), target, settings.controlnet_memory)?;
        let with_control = !settings.controlnets.is_empty();
        let vae_kind = settings.vae_kind.unwrap_or(if kind == Kind::Half && force_upcast(&vae_config) {
            Kind::Float
        } else {
            kind
        });

        // Reading a graph takes as long as binding its weights, and the parts do not depend on each other.
        let load_text = |suffix: &str| load_text_stage(&settings, &model, &graphs, suffix);
        let (text, text_2, unet, vae) = std::thread::scope(|scope| {
            let text = scope.spawn(|| load_text(""));
            let text_2 = scope.spawn(|| load_text("_2"));
            let vae = scope.spawn(|| load_vae(&settings, &model, &graphs, &vae_config, vae_kind));
            let _no_grad = tch::no_grad_guard();
            let unet = checkpoint(&settings, &model, "unet", kind)
                .and_then(|weights| UNet::load(&graphs, &unet_config, weights, model.path(), target, with_control));
            let join = "loading a model part does not panic";
            (text.join().expect(join), text_2.join().expect(join), unet, vae.join().expect(join))
        });
        let (text_stages, unet, vae) = (vec![text?, text_2?], unet?, vae?);

        let projection_dim = text_stages[1].encoder.projection_dim();
        let expected = unet.addition_time_embed_dim * 6 + projection_dim;
        if unet.add_embedding_in_features != expected {
            let (has, path) = (unet.add_embedding_in_features, model.path().display());
            let message =
                format!("{path}: the UNet's added embedding takes {has} values, the text encoder gives {expected}");
            return Err(Error::setup("model_invalid", message));
        }
        if settings.preload_controlnets {
            controlnets.preload()?;
        }
        let default_size = (unet.sample_size * vae.scale_factor) as u32;
        let facts = ModelFacts {
            name: model.name(),
            default_height: default_size,
            default_width: default_size,
            default_scheduler: default_scheduler(&scheduler_config)?,
            needs_mask: unet.in_channels == vae.latent_channels * 2 + 1,
            controlnets: controlnets.facts(),
        };
        Ok(StableDiffusionXlPipeline {
            force_zeros_for_empty_prompt: model.force_zeros_for_empty_prompt(),
            facts,
            text_stages,
            unet,
            unet_config,
            vae,
            vae_config,
            vae_float32: None,
            vae_encoder: None,
            controlnets,
            scheduler_config,
            preview_map: None,
            settings,
        })
    }

    fn decode(&mut self, latents: &Tensor, params: &GenerateParams, warnings: &mut Vec<String>) -> Result<RgbImage> {
        let tiled = self.decodes_in_tiles(params);
        let run = |vae: &Vae| {
            if tiled { vae.tiled_decode(latents) } else { vae.decode(latents) }
        };
        let mut image = run(&self.vae)?;
        if !is_finite(&image) && self.vae.kind() != Kind::Float {
            if self.vae_float32.is_none() {
                let (model, graphs) = (ModelDir::open(&self.settings.model)?, GraphSet::open(&self.settings.graphs)?);
                self.vae_float32 = Some(load_vae(&self.settings, &model, &graphs, &self.vae_config, Kind::Float)?);
            }
            warnings.push("the VAE overflowed in 16 bits; the picture was decoded again in float32".into());
            image = run(self.vae_float32.as_ref().expect("just loaded"))?;
        }
        if !is_finite(&image) {
            let message = "the decoded picture is not finite: the VAE's weights are damaged";
            let remedy = "download the VAE again, or try --vae-dtype float32";
            return Err(Error::new(ErrorClass::Internal, "non_finite_image", message).remedy(remedy));
        }
        Ok(image_processor::postprocess(&image))
    }

    /// Loads what this job needs beyond text to image.
    fn require(&mut self, params: &GenerateParams) -> Result<()> {
        if params.init.is_some() && self.vae_encoder.is_none() {
            let (model, graphs) = (ModelDir::open(&self.settings.model)?, GraphSet::open(&self.settings.graphs)?);
            // diffusers encodes in float32 wherever `force_upcast` says so, also where it decodes in bfloat16
            let upcast = if force_upcast(&self.vae_config) { Kind::Float } else { self.settings.kind };
            let kind = self.settings.vae_kind.unwrap_or(upcast);
            let weights = checkpoint(&self.settings, &model, "vae", kind)?;
            let target = (kind, self.settings.device);
            self.vae_encoder = Some(VaeEncoder::load(&graphs, &self.vae_config, weights, model.path(), target)?);
        }
        let nets: Vec<&str> = params.controls.iter().map(|control| control.model.as_str()).collect();
        self.controlnets.require(&nets)
    }

    /// The first latents.
    fn start(
        &self,
        params: &GenerateParams,
        inputs: &InputImages,
        scheduler: &dyn Scheduler,
        noise: &mut NoiseSource,
    ) -> Result<Start> {
        let target = (self.settings.kind, self.settings.device);
        let side = |pixels: u32| i64::from(pixels) / self.vae.scale_factor;
        let shape = [self.vae.latent_channels, side(params.height), side(params.width)];
        let (Some(init), Some(image)) = (&params.init, &inputs.image) else {
            return from_noise(shape, target, scheduler, noise);
        };
        let init = InitImage {
            params: init,
            image: image_processor::normalized(image),
            mask: inputs.mask.as_ref(),
            encoder: self.vae_encoder.as_ref().expect("required before"),
            encode_by_tiles: self.decodes_in_tiles(params),
        };
        from_image(&init, shape, target, self.facts.needs_mask, scheduler, noise)
    }

    fn decodes_in_tiles(&self, params: &GenerateParams) -> bool {
        match self.settings.vae_tiling {
            VaeTiling::Always => true,
            VaeTiling::Never => false,
            VaeTiling::Above(pixels) => u64::from(params.height) * u64::from(params.width) > pixels,
        }
    }
}

impl Pipeline for StableDiffusionXlPipeline {
    fn facts(&self) -> ModelFacts {
        self.facts.clone()
    }

    fn generate(&mut self, params: &GenerateParams, inputs: &InputImages, context: &JobContext) -> Result<Generation> {
        let _no_grad = tch::no_grad_guard();
        let (kind, device) = (self.settings.kind, self.settings.device);
        let mut timings = Timings::default();
        let mut warnings = Vec::new();
        let guidance = Guidance { scale: params.guidance_scale, rescale: params.guidance_rescale };
        self.check_memory(params, &guidance)?;
        self.require(params)?;

        // 1. encode the prompts
        let started = Instant::now();
        let encoder = PromptEncoder {
            stages: &self.text_stages,
            force_zeros_for_empty_prompt: self.force_zeros_for_empty_prompt,
            kind,
            device,
        };
        let conditions = encoder.encode(params, guidance.is_on(), &mut warnings)?;
        timings.add("encode_prompt", started.elapsed());

        // 2. set up the schedule, and the first latents
        let started = Instant::now();
        let scheduler_kind = params.scheduler.unwrap_or(self.facts.default_scheduler);
        let config = match params.sigma_schedule {
            Some(SigmaSchedule::Karras) => self.scheduler_config.clone().with_karras_sigmas(),
            None => self.scheduler_config.clone(),
        };
        let options = StepOptions { num_inference_steps: params.num_inference_steps, eta: params.eta };
        let mut scheduler = schedulers::build(scheduler_kind, &config, options)?;
        let mut noise = NoiseSource::new(params.seed, params.num_images as usize)?;
        let start = self.start(params, inputs, scheduler.as_ref(), &mut noise)?;
        let maps: Vec<Tensor> = inputs.controls.iter().map(image_processor::control_map).collect();
        let net = |name: &str| self.controlnets.get(name);
        let controls = Controls::new(&params.controls, params.scale_mode, &maps, net)?;
        if params.preview_every > 0 && self.preview_map.is_none() {
            self.preview_map = Some(PreviewMap::fit(&self.vae, self.vae.latent_channels, kind, device)?);
        }
        timings.add("prepare", started.elapsed());

        // 3. denoise
        let started = Instant::now();
        let show = |latents: &Tensor| {
            let map = self.preview_map.as_ref().expect("fitted above");
            preview_data_uri(&map.picture(latents))
        };
        let previews = (params.preview_every > 0).then_some(Previews { every: params.preview_every, show: &show });
        let lead = Lead { conditions: &conditions, guidance: &guidance, controls: &controls, previews };
        let latents = denoise(&self.unet, &lead, scheduler.as_mut(), &mut noise, start, context)?;
        timings.add("denoise", started.elapsed());
        controls.report(&mut timings);

        // 4. decode, one image after the other: the decoder's activations are the largest of the run
        let started = Instant::now();
        context.report(Progress::Decoding);
        let mut images = Vec::new();
        for i in 0..params.num_images as i64 {
            context.check_cancelled()?;
            images.push(self.decode(&latents.narrow(0, i, 1), params, &mut warnings)?);
        }
        timings.add("decode", started.elapsed());
        warnings.dedup();

        let latents = latents.to_device(Device::Cpu).to_kind(Kind::Float);
        Ok(Generation { images, latents, scheduler: scheduler_kind, timings, warnings })
    }
}

/// Whether the VAE overflows in float16.
fn force_upcast(vae_config: &Value) -> bool {
    vae_config.get("force_upcast").and_then(Value::as_bool).unwrap_or(true)
}

/// A JPEG: a preview is small and soon gone.
fn preview_data_uri(picture: &RgbImage) -> String {
    let bytes = media::encode(picture, OutputFormat::Jpeg, 80, None);
    bytes.map(|bytes| media::to_data_uri(OutputFormat::Jpeg, &bytes)).unwrap_or_default()
}

/// The scheduler that the model names.
fn default_scheduler(config: &SchedulerConfig) -> Result<SchedulerKind> {
    let name = config.class_name.as_deref().unwrap_or("EulerDiscreteScheduler");
    SchedulerKind::from_name(name, "scheduler").map_err(|e| {
        Error::setup("unsupported_model", format!("the model's own scheduler is {name}"))
            .source(anyhow::anyhow!(e.message))
            .remedy("set `_class_name` in its scheduler_config.json to one of the supported schedulers")
    })
}

/// A component's weights, in the files that suit `kind`: half the bytes are read where a 16-bit copy is there.
fn checkpoint(settings: &Settings, model: &ModelDir, component: &str, kind: Kind) -> Result<Checkpoint> {
    let variants = match settings.variant.as_deref() {
        Some(variant) => [Some(variant), None],
        None if kind == Kind::Float => [None, Some("fp16")],
        None => [Some("fp16"), None],
    };
    Checkpoint::open(component, &model.component(component), &variants)
}

fn load_text_stage(settings: &Settings, model: &ModelDir, graphs: &GraphSet, suffix: &str) -> Result<TextStage> {
    let _no_grad = tch::no_grad_guard();
    let component = format!("text_encoder{suffix}");
    let weights = checkpoint(settings, model, &component, settings.kind)?;
    let target = (settings.kind, settings.device);
    let config = model.config(&component)?;
    let folder = model.component(&format!("tokenizer{suffix}"));
    let tokenizer = ClipTokenizer::load(&folder)?;
    let encoder = TextEncoder::load(&component, graphs, &config, weights, model.path(), target)?;
    let (length, ids) = (tokenizer.max_length() as i64, tokenizer.vocab_size() as i64);
    if length != encoder.max_position_embeddings || ids > encoder.vocab_size {
        let (path, takes, known) = (folder.display(), encoder.max_position_embeddings, encoder.vocab_size);
        let message = format!(
            "{path} gives {length} tokens with ids below {ids}, {component} takes {takes} with ids below {known}"
        );
        return Err(Error::setup("model_invalid", message).remedy("use the tokenizer that belongs to the text encoder"));
    }
    Ok(TextStage { tokenizer, encoder })
}

fn load_vae(settings: &Settings, model: &ModelDir, graphs: &GraphSet, config: &Value, kind: Kind) -> Result<Vae> {
    let _no_grad = tch::no_grad_guard();
    let weights = checkpoint(settings, model, "vae", kind)?;
    Vae::load(graphs, config, weights, model.path(), (kind, settings.device))
}
