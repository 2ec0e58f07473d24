//! The recipe: Stable Diffusion XL from a valid request to pixels, step by step as diffusers does it.

mod attention;
mod batch;
mod control;
mod controlnets;
mod decode;
mod denoise;
mod hires;
mod image_processor;
mod latents;
mod memory;
mod offload;
mod parts;
mod passes;
mod preview;
mod prompt;
mod rescue;
mod tokenizer;

use std::cell::{Cell, OnceCell};
use std::fs::File;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use image::{GrayImage, RgbImage};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::api::{ControlNetFacts, GenerateParams, HiresParams, LoraReport, Preset, SchedulerKind, Timings};
use crate::context::JobContext;
use crate::error::{Error, Result};
use crate::fault::catch;
use crate::lora;
use crate::models::{Fused, GraphSet, ModelDir, Vae, VaeEncoder, keep_captured_calls};
use crate::schedulers::{NoiseSource, SchedulerConfig};
use crate::weights::InUse;
use control::Controls;
use controlnets::ControlNets;
use denoise::{Denoising, StepCount};
use latents::{InitImage, Inpaint, Start, from_image, from_latents, from_noise};
pub use offload::Offload;
use parts::{ModelParts, Refiners, read_ahead, wake, weights};
use passes::Pass;
use preview::PreviewMap;
pub use prompt::MAX_TEXTUAL_INVERSION_BYTES;
use prompt::{Conditions, PromptEncoder, SizeCondition};
use rescue::{Economy, Measure, OFFLOADS, with_less};
pub use tokenizer::{ClipTokenizer, TokenIds};

/// What is fixed when a model is loaded.
#[derive(Debug, Clone)]
pub struct Settings {
    pub model: PathBuf,
    /// The folder of a model that a checkpoint in one file is like; `None` for the published SDXL.
    pub model_config: Option<PathBuf>,
    /// In place of the model's own.
    pub vae: Option<PathBuf>,
    pub graphs: PathBuf,
    /// Use graphs that were compiled ahead of time, where they fit.
    pub aot: bool,
    pub fused: Fused,
    pub device: Device,
    /// Other engines on the same device, with which its memory is shared.
    pub neighbours: usize,
    pub kind: Kind,
    /// `None` follows diffusers: `kind`, but float32 for a float16 model whose VAE says `force_upcast`.
    pub vae_kind: Option<Kind>,
    /// Weight files to prefer, such as `fp16`.
    pub variant: Option<String>,
    pub vae_tiling: VaeTiling,
    /// What leaves the device when it is idle. A job for which memory runs out may raise it.
    pub offload: Offload,
    /// In the order in which they are preferred.
    pub controlnets: Vec<ModelSource>,
    /// Load them at start, as far as they fit, rather than when a job asks for one.
    pub preload_controlnets: bool,
    /// Most bytes of ControlNet weights that are kept loaded.
    pub controlnet_memory: u64,
    /// Most calls that are kept as CUDA graphs.
    pub cuda_graphs: usize,
    /// Encode the next job's prompt while the device works on this one's last step.
    pub encode_ahead: bool,
    /// Find out which attention kernels are the fastest.
    pub choose_attention: bool,
    /// The first is the default. Loaded when a job asks for one.
    pub refiners: Vec<ModelSource>,
    pub loras: lora::Settings,
    /// Most bytes a request may need; `None` is what the machine or container has free.
    pub memory_limit: Option<u64>,
}

impl Settings {
    fn open_model(&self) -> Result<ModelDir> {
        let model = ModelDir::open(&self.model, self.model_config.as_deref())?;
        Ok(match &self.vae {
            Some(vae) => model.with_component("vae", vae),
            None => model,
        })
    }

    fn open_graphs(&self) -> Result<GraphSet> {
        let graphs = GraphSet::open(&self.graphs)?;
        Ok(if self.aot { graphs } else { graphs.without_packages() })
    }
}

/// A ControlNet or a refiner as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSource {
    pub name: String,
    pub dir: PathBuf,
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
#[derive(Debug, Clone, PartialEq)]
pub struct ModelFacts {
    pub name: String,
    pub default_height: u32,
    pub default_width: u32,
    pub default_scheduler: SchedulerKind,
    /// The model is a refiner.
    pub needs_image: bool,
    /// The UNet is one for inpainting.
    pub needs_mask: bool,
    /// What the configuration says the model was distilled by.
    pub preset: Option<Preset>,
    /// The UNet takes the guidance scale as an input.
    pub has_embedded_guidance: bool,
    pub refiners: Vec<String>,
    pub controlnets: Vec<ControlNetFacts>,
    /// How long the parts took to load, side by side: `load_unet_graphs`, `load_unet_weights`, ...
    pub load_times: Timings,
}

/// The files that a job came with; pictures at the size of the picture to be made.
#[derive(Debug, Clone, Default)]
pub struct InputImages {
    pub image: Option<RgbImage>,
    /// From half grey up it is repainted.
    pub mask: Option<GrayImage>,
    /// Control maps, one for each of the request's controls.
    pub controls: Vec<RgbImage>,
    /// The same at the size of the second pass, where there is one.
    pub hires_controls: Vec<RgbImage>,
    /// One for each of the request's LoRAs.
    pub loras: Vec<lora::Wanted>,
    /// One for each of the request's textual inversions.
    pub textual_inversions: Vec<Arc<File>>,
}

/// One job: a valid request, the files that it came with, and who hears of it.
pub struct Task {
    pub params: GenerateParams,
    pub inputs: InputImages,
    pub context: JobContext,
}

/// What one job made.
pub struct Generation {
    pub images: Vec<RgbImage>,
    /// float32 `[num_images, 4, h, w]` on the CPU, before the VAE: diffusers' `output_type="latent"`.
    pub latents: Tensor,
    pub scheduler: SchedulerKind,
    pub timings: Timings,
    pub warnings: Vec<String>,
    pub loras: Vec<LoraReport>,
}

/// What the engine's thread runs.
pub trait Pipeline {
    /// A job that is denoised beside others.
    type Running<'a>
    where
        Self: 'a;

    fn facts(&self) -> ModelFacts;

    /// How it can learn of the job that comes next.
    fn foresee(&mut self, _upcoming: Upcoming) {}

    /// Runs one job, from beginning to end.
    fn generate(&mut self, task: &Arc<Task>) -> Result<Generation>;

    /// Whether a job may be denoised beside these; where there are none, whether it may ever be beside others.
    fn can_join(&self, task: &Task, group: &[Self::Running<'_>]) -> bool;

    /// Runs such a job up to its first step.
    fn begin(&self, task: &Arc<Task>) -> Result<Self::Running<'_>>;

    /// One step of each, with as few calls of the UNet as possible.
    fn step(&self, group: &mut [Self::Running<'_>]) -> Stepped;

    /// What is left to do after the last step.
    fn finish(&self, running: Self::Running<'_>) -> Result<Generation>;
}

/// Tells the job that waits longest.
pub type Upcoming = Box<dyn Fn() -> Option<Arc<Task>>>;

/// A step of several jobs.
pub struct Stepped {
    /// For each job whether that was its last step. A failure is that job's alone, except for a device that is lost.
    pub outcomes: Vec<Result<bool>>,
    /// The UNet's calls, each as the number of images in it.
    pub calls: Vec<usize>,
}

pub struct StableDiffusionXlPipeline {
    settings: Settings,
    facts: ModelFacts,
    base: ModelParts,
    refiners: Refiners,
    vae: Vae,
    vae_config: Value,
    /// Loaded when a 16-bit decode overflows.
    vae_float32: OnceCell<Vae>,
    /// Loaded when a job first starts from a picture.
    vae_encoder: Option<VaeEncoder>,
    controlnets: ControlNets,
    upcoming: Upcoming,
    /// What is in force now.
    offload: Cell<Offload>,
    /// Fitted when the first preview is asked for.
    preview_map: OnceCell<PreviewMap>,
}

impl StableDiffusionXlPipeline {
    /// A model that does not fit as a whole is loaded so that parts of it leave the device.
    pub fn load(mut settings: Settings) -> Result<Self> {
        let take = |settings: &mut Settings, measure| match measure {
            Measure::Offload(offload) if settings.offload < offload => {
                tracing::warn!(?offload, "memory ran out while the model was loaded: trying again with less of it");
                settings.offload = offload;
                true
            }
            _ => false,
        };
        with_less(&mut settings, &OFFLOADS, take, |settings| Self::load_once(settings.clone()))
    }

    fn load_once(settings: Settings) -> Result<Self> {
        keep_captured_calls(settings.cuda_graphs);
        let model = settings.open_model()?;
        let graphs = settings.open_graphs()?;
        let vae_config = model.config("vae")?;
        let (kind, device) = (settings.kind, settings.device);
        let mut controlnets = ControlNets::open(
            &settings.controlnets,
            settings.graphs.clone(),
            (kind, device),
            settings.controlnet_memory,
        )?;
        controlnets.set_offload(settings.offload.takes("controlnet"));
        let refiners = Refiners::open(&settings.refiners)?;
        let with_control = !settings.controlnets.is_empty();
        let vae_kind = settings.vae_kind.unwrap_or(if kind == Kind::Half && force_upcast(&vae_config) {
            Kind::Float
        } else {
            kind
        });
        read_ahead(&settings, &model);
        let started = Instant::now();
        let (base, vae) = std::thread::scope(|scope| {
            let vae = scope.spawn(|| {
                let vae = load_vae(&settings, &model, &graphs, &vae_config, vae_kind);
                vae.map(|vae| (vae, started.elapsed()))
            });
            let base = ModelParts::load(&settings, &model, &graphs, with_control);
            (base, vae.join().expect("loading does not panic"))
        });
        let ((base, mut load_times), (vae, vae_time)) = (base?, vae?);
        load_times.add("load_vae", vae_time);
        if settings.preload_controlnets {
            controlnets.preload()?;
        }
        if settings.choose_attention {
            attention::choose_fastest(&base.unet_config, (kind, device))?;
        }
        let default_size = (base.unet.sample_size * vae.scale_factor) as u32;
        let facts = ModelFacts {
            name: model.name(),
            default_height: default_size,
            default_width: default_size,
            default_scheduler: default_scheduler(&base.scheduler_config)?,
            needs_image: base.requires_aesthetics_score,
            needs_mask: base.unet.in_channels == vae.latent_channels * 2 + 1,
            preset: base.preset(),
            has_embedded_guidance: base.unet.time_cond_proj_dim.is_some(),
            refiners: refiners.names(),
            controlnets: controlnets.facts(),
            load_times,
        };
        Ok(StableDiffusionXlPipeline {
            facts,
            base,
            refiners,
            vae,
            vae_config,
            vae_float32: OnceCell::new(),
            vae_encoder: None,
            controlnets,
            upcoming: Box::new(|| None),
            offload: Cell::new(settings.offload),
            preview_map: OnceCell::new(),
            settings,
        })
    }

    /// Whether the UNet runs its fused graphs.
    pub fn is_fused(&self) -> bool {
        self.base.unet.is_fused
    }

    /// Loads what this job needs beyond text to image.
    fn require(&mut self, params: &GenerateParams) -> Result<()> {
        let settings = self.settings_now();
        if let Some(refiner) = &params.refiner {
            self.refiners.require(&refiner.model, &settings)?;
        }
        let encodes = params.init.is_some() || params.hires.as_ref().is_some_and(|hires| hires.upscaler.needs_pixels());
        if encodes && self.vae_encoder.is_none() {
            let (model, graphs) = (self.settings.open_model()?, self.settings.open_graphs()?);
            // diffusers encodes in float32 wherever `force_upcast` says so, also where it decodes in bfloat16
            let upcast = if force_upcast(&self.vae_config) { Kind::Float } else { self.settings.kind };
            let kind = self.settings.vae_kind.unwrap_or(upcast);
            let weights = weights(&settings, &model, "vae", kind)?;
            let target = (kind, self.settings.device);
            self.vae_encoder = Some(VaeEncoder::load(&graphs, &self.vae_config, weights, model.path(), target)?);
        }
        let nets: Vec<&str> = params.controls.iter().map(|control| control.model.as_str()).collect();
        self.controlnets.set_offload(settings.offload.takes("controlnet"));
        self.controlnets.require(&nets)
    }

    fn preview_map(&self) -> Result<&PreviewMap> {
        if let Some(map) = self.preview_map.get() {
            return Ok(map);
        }
        let _vae = self.vae.in_use()?;
        let (kind, device) = (self.settings.kind, self.settings.device);
        let map = PreviewMap::fit(&self.vae, self.vae.latent_channels, kind, device)?;
        Ok(self.preview_map.get_or_init(|| map))
    }

    /// The first latents.
    fn start(&self, run: &mut Run, pass: &Pass) -> Result<Start> {
        let Run { task, economy, noise, .. } = run;
        let Task { params, inputs, .. } = &**task;
        let target = (self.settings.kind, self.settings.device);
        let shape = self.latent_shape((params.height, params.width));
        let (Some(_), Some(image)) = (&params.init, &inputs.image) else {
            return from_noise(shape, target, pass.scheduler.as_ref(), noise);
        };
        let encoder = self.vae_encoder.as_ref().expect("required before");
        let _encoder = self.bring(economy, || encoder.in_use())?;
        let size = (params.height, params.width);
        let init = InitImage {
            images: vec![image_processor::normalized(image)],
            mask: inputs.mask.as_ref(),
            encoder,
            encode: &|image| self.with_tiles(economy, size, |tiled| encoder.encode(image, tiled)),
        };
        from_image(&init, shape, target, self.facts.needs_mask, pass, noise)
    }

    fn latent_shape(&self, (height, width): (u32, u32)) -> [i64; 3] {
        let side = |pixels: u32| i64::from(pixels) / self.vae.scale_factor;
        [self.vae.latent_channels, side(height), side(width)]
    }

    /// Sees to it that the job's LoRAs, and no others, are in the base model's weights.
    fn apply_loras(&self, run: &mut Run) -> Result<()> {
        let apply = || self.base.weights.borrow_mut().apply(&run.task.inputs.loras, &run.task.context);
        let (loras, spent) = self.with_offload(&run.economy, apply)?;
        for (phase, time) in [("lora_load", spent.load), ("lora_restore", spent.restore), ("lora_fuse", spent.fuse)] {
            if !time.is_zero() {
                run.timings.add(phase, time);
            }
        }
        for lora in loras.iter().filter(|lora| lora.unmatched_count > 0) {
            let (name, count) = (&lora.name, lora.unmatched_count);
            run.warnings
                .push(format!("{name}: {count} keys name nothing in this model, such as {}", lora.unmatched[0]));
        }
        run.weights_id = self.base.weights.borrow().weights_id();
        run.loras = loras;
        Ok(())
    }

    /// What the UNet of `parts` is told in a pass over pictures of this size.
    fn encode(&self, run: &mut Run, parts: &ModelParts, size: &SizeCondition) -> Result<Conditions> {
        let (started, uploaded) = (Instant::now(), run.economy.upload.get());
        let (conditions, warnings) = self.with_offload(&run.economy, || {
            let bring = || self.bring(&run.economy, || parts.text_encoders_in_use(&run.task.context));
            self.encode_task(&run.task, parts, &run.weights_id, size, &bring)
        })?;
        run.warnings.extend(warnings);
        run.warnings.dedup();
        let uploading = run.economy.upload.get() - uploaded;
        run.timings.add("encode_prompt", started.elapsed() - uploading);
        Ok(conditions)
    }

    /// Also gives notes for the caller.
    fn encode_task<'a>(
        &self,
        Task { params, inputs, context }: &Task,
        parts: &ModelParts,
        weights_id: &str,
        size: &SizeCondition,
        bring: &dyn Fn() -> Result<InUse<'a>>,
    ) -> Result<(Conditions, Vec<String>)> {
        let mut encoder = PromptEncoder {
            stages: &parts.text_stages,
            cache: &mut parts.prompt_cache.borrow_mut(),
            weights_id,
            files: &inputs.textual_inversions,
            context,
            bring: &|| bring(),
            in_use: None,
            force_zeros_for_empty_prompt: parts.force_zeros_for_empty_prompt,
            requires_aesthetics_score: parts.requires_aesthetics_score,
            kind: self.settings.kind,
            device: self.settings.device,
        };
        let mut warnings = Vec::new();
        let conditions = encoder.encode(params, size, parts.guidance(params).is_on(), &mut warnings)?;
        Ok((conditions, warnings))
    }

    /// Brings the next job's prompt into the cache while the device still works on what this job asked of it. A failure is
    /// that job's, which will meet it again.
    fn encode_ahead(&self, run: &Run) {
        if !self.settings.encode_ahead || self.offload.get() != Offload::None {
            return;
        }
        let Some(next) = (self.upcoming)().filter(|next| batch::loras(next) == batch::loras(&run.task)) else { return };
        let size = SizeCondition { size: [next.params.height, next.params.width], from_picture: false };
        let bring = || self.base.text_encoders_in_use(&next.context);
        if let Err(error) = catch(|| self.encode_task(&next, &self.base, &run.weights_id, &size, &bring)) {
            tracing::debug!(code = error.code, "the next prompt cannot be encoded");
        }
    }

    /// What the ControlNets make of their maps. The nets are on the device as long as the second part lives.
    fn controls<'a>(
        &'a self,
        task: &'a Task,
        economy: &Economy,
        maps: &[RgbImage],
    ) -> Result<(Controls<'a>, Vec<InUse<'a>>)> {
        let params = &task.params;
        let nets = params.controls.iter().map(|control| self.controlnets.get(&control.model));
        let nets = nets.map(|net| self.bring(economy, || net.in_use())).collect::<Result<Vec<_>>>()?;
        let maps: Vec<Tensor> = maps.iter().map(image_processor::control_map).collect();
        let net = |name: &str| self.controlnets.get(name);
        let new = || Controls::new(&params.controls, params.scale_mode, &maps, net);
        Ok((self.with_offload(economy, new)?, nets))
    }

    /// A second pass over the enlarged latents of the first.
    fn hires(&self, run: &mut Run, hires: &HiresParams, pass: Pass, latents: &Tensor) -> Result<Tensor> {
        let task = run.task.clone();
        let start = self.enlarge(run, hires, &pass, latents)?;
        let size = SizeCondition { size: [hires.height, hires.width], from_picture: true };
        let conditions = self.encode(run, &self.base, &size)?;
        let _unet = self.bring(&run.economy, || self.base.unet_in_use(&task.context))?;
        let started = Instant::now();
        let (controls, _nets) = self.controls(&task, &run.economy, &task.inputs.hires_controls)?;
        let denoising = self.denoising(run, &self.base, pass, conditions, start);
        let latents = self.denoise(run, &self.base, &controls, denoising)?;
        run.timings.add("hires", started.elapsed());
        Ok(latents)
    }

    /// The refiner's steps, from the base model's latents on. What inpainting keeps is kept by it too.
    fn refine(&self, run: &mut Run, pass: Pass, latents: Tensor, inpaint: Option<Rc<Inpaint>>) -> Result<Tensor> {
        let refiner = self.refiners.get();
        let (height, width) = run.task.params.final_size();
        let size = SizeCondition { size: [height, width], from_picture: true };
        let conditions = self.encode(run, refiner, &size)?;
        let _unet = self.bring(&run.economy, || refiner.unet_in_use(&run.task.context))?;
        let started = Instant::now();
        let start = Start { inpaint, ..from_latents(latents, &pass, &mut run.noise)? };
        let denoising = self.denoising(run, refiner, pass, conditions, start);
        let latents = self.denoise(run, refiner, &Controls::none(), denoising)?;
        run.timings.add("refine", started.elapsed());
        Ok(latents)
    }
}

impl Pipeline for StableDiffusionXlPipeline {
    type Running<'a> = batch::Running<'a>;

    fn facts(&self) -> ModelFacts {
        self.facts.clone()
    }

    fn foresee(&mut self, upcoming: Upcoming) {
        self.upcoming = upcoming;
    }

    fn generate(&mut self, task: &Arc<Task>) -> Result<Generation> {
        let _no_grad = tch::no_grad_guard();
        let params = &task.params;
        let economy = Economy::new(params.num_images);
        self.plan_memory(params, &economy)?;
        let take = |pipeline: &mut Self, measure| pipeline.take(&economy, measure);
        with_less(self, &OFFLOADS, take, |pipeline| pipeline.require(params))?;
        self.run(task, economy)
    }

    fn can_join(&self, task: &Task, group: &[batch::Running<'_>]) -> bool {
        self.may_join(task, group)
    }

    fn begin(&self, task: &Arc<Task>) -> Result<batch::Running<'_>> {
        let _no_grad = tch::no_grad_guard();
        self.begin_beside_others(task)
    }

    fn step(&self, group: &mut [batch::Running<'_>]) -> Stepped {
        let _no_grad = tch::no_grad_guard();
        self.step_together(group)
    }

    fn finish(&self, running: batch::Running<'_>) -> Result<Generation> {
        let _no_grad = tch::no_grad_guard();
        self.finish_beside_others(running)
    }
}

impl StableDiffusionXlPipeline {
    fn run(&self, task: &Arc<Task>, economy: Economy) -> Result<Generation> {
        let (base, [hires, refiner]) = self.passes(&task.params)?;
        let later: usize = [&hires, &refiner].into_iter().flatten().map(|pass| pass.steps.len()).sum();
        let mut run = Run::new(task, economy, base.steps.len() + later)?;

        // 1. and 2. encode the prompts; the first latents, and what the ControlNets make of their maps
        let denoising = self.prepare(&mut run, base)?;
        let inpaint = denoising.inpaint.clone();
        let started = Instant::now();
        let (controls, nets) = self.controls(task, &run.economy, &task.inputs.controls)?;
        run.timings.add("prepare", started.elapsed());

        // 3. denoise
        let unet = self.bring(&run.economy, || self.base.unet_in_use(&task.context))?;
        let started = Instant::now();
        let mut latents = self.denoise(&mut run, &self.base, &controls, denoising)?;
        run.timings.add("denoise", started.elapsed());
        drop((unet, nets));

        // 4. once more at a larger size; then the refiner
        if let (Some(hires), Some(pass)) = (&task.params.hires, hires) {
            latents = self.hires(&mut run, hires, pass, &latents)?;
        }
        if let Some(pass) = refiner {
            latents = self.refine(&mut run, pass, latents, inpaint)?;
        }

        // 5. decode
        self.conclude(run, &latents)
    }

    /// The first pass, before its first step.
    fn prepare(&self, run: &mut Run, pass: Pass) -> Result<Denoising> {
        let task = run.task.clone();
        let params = &task.params;
        if params.preview_every > 0 {
            self.with_offload(&run.economy, || self.preview_map().map(drop))?;
        }
        self.apply_loras(run)?;

        // 1. encode the prompts
        let size = SizeCondition { size: [params.height, params.width], from_picture: params.init.is_some() };
        let conditions = self.encode(run, &self.base, &size)?;

        // 2. the first latents
        let started = Instant::now();
        let start = self.start(run, &pass)?;
        run.timings.add("prepare", started.elapsed());
        Ok(self.denoising(run, &self.base, pass, conditions, start))
    }

    /// Decodes the last latents, and tells what the job made.
    fn conclude(&self, mut run: Run, latents: &Tensor) -> Result<Generation> {
        let images = self.decode_all(&mut run, latents)?;
        let Run { task, mut timings, mut warnings, economy, loras, .. } = run;
        if !economy.upload.get().is_zero() {
            timings.add("upload", economy.upload.get());
        }
        warnings.extend(economy.warnings());
        warnings.dedup();
        let latents = latents.to_device(Device::Cpu).to_kind(Kind::Float);
        let scheduler = task.params.scheduler.unwrap_or(self.facts.default_scheduler);
        Ok(Generation { images, latents, scheduler, timings, warnings, loras })
    }
}

/// A job on its way.
struct Run {
    task: Arc<Task>,
    noise: NoiseSource,
    count: StepCount,
    timings: Timings,
    warnings: Vec<String>,
    economy: Economy,
    loras: Vec<LoraReport>,
    /// Names what LoRAs made of the base model's weights.
    weights_id: String,
}

impl Run {
    fn new(task: &Arc<Task>, economy: Economy, steps: usize) -> Result<Self> {
        Ok(Run {
            noise: NoiseSource::new(task.params.seed, task.params.num_images as usize)?,
            count: StepCount { done: 0, steps, started: Instant::now() },
            timings: Timings::default(),
            warnings: Vec::new(),
            economy,
            loras: Vec::new(),
            weights_id: String::new(),
            task: task.clone(),
        })
    }
}

/// Whether the VAE overflows in float16.
fn force_upcast(vae_config: &Value) -> bool {
    vae_config.get("force_upcast").and_then(Value::as_bool).unwrap_or(true)
}

/// The scheduler that the model names.
fn default_scheduler(config: &SchedulerConfig) -> Result<SchedulerKind> {
    config.kind().ok_or_else(|| {
        let name = config.class_name.as_deref().unwrap_or_default();
        Error::setup("unsupported_model", format!("the model's own scheduler is {name}"))
            .remedy("set `_class_name` in its scheduler_config.json to a class of docs/schedulers.md, such as EulerDiscreteScheduler (euler)")
    })
}

fn load_vae(settings: &Settings, model: &ModelDir, graphs: &GraphSet, config: &Value, kind: Kind) -> Result<Vae> {
    let _no_grad = tch::no_grad_guard();
    let weights = weights(settings, model, "vae", kind)?;
    let target = (kind, settings.device);
    let stays = weights.stay();
    let vae = Vae::load(graphs, config, weights, model.path(), target)?;
    if stays {
        wake(settings.device, || vae.decode(&Tensor::zeros([1, vae.latent_channels, 8, 8], target)));
    }
    Ok(vae)
}
