//! The request, valid: what the pipeline gets. Defaults are filled in, numbers lie in their ranges, names are enums; a
//! field is optional only where absence means something (the model's own, or diffusers' own rule).

use serde_json::{Value, json};

use super::control::{ControlParams, ScaleMode, fingerprint};
use super::lora::{FileSource, LoraParams};
use super::preset::Preset;
use super::scheduler_kind::SchedulerKind;
use super::sigma_schedule::SigmaSchedule;
use super::stages::{HiresParams, RefinerBegin, RefinerParams};

/// One valid request for one or several images that differ in their seed.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateParams {
    /// Without the tags that `prompt_weighting` takes out, as are all four texts.
    pub prompt: String,
    /// Text for the second encoder; `prompt` if absent.
    pub prompt_2: Option<String>,
    /// Absent and empty differ: absent may become zeros (`force_zeros_for_empty_prompt`), empty is encoded as a text.
    pub negative_prompt: Option<String>,
    pub negative_prompt_2: Option<String>,
    pub prompt_weighting: PromptWeighting,
    pub textual_inversions: Vec<TextualInversionParams>,
    /// Pixels, a multiple of 8.
    pub height: u32,
    /// Pixels, a multiple of 8.
    pub width: u32,
    pub num_inference_steps: usize,
    /// Weight of the prompt against the negative prompt; 1 or less turns guidance off and halves the UNet's batch.
    pub guidance_scale: f64,
    /// The part of the run in which guidance acts; outside it the UNet's batch is half.
    pub guidance_start: f64,
    pub guidance_end: f64,
    pub guidance_rescale: f64,
    pub eta: f64,
    /// The first image's; the n-th image has `seed + n`. Together they stay below 2^63.
    pub seed: u64,
    pub num_images: u32,
    /// `None` is the model's own.
    pub scheduler: Option<SchedulerKind>,
    /// `None` is the scheduler's own.
    pub sigma_schedule: Option<SigmaSchedule>,
    /// The timesteps to run, falling; there are `num_inference_steps` of them.
    pub timesteps: Option<Vec<i64>>,
    /// The noise levels to run through, falling; one more than `num_inference_steps`, the last is where the run ends.
    pub sigmas: Option<Vec<f64>>,
    /// What the model was distilled by; the fields above are already as it wants them.
    pub preset: Option<Preset>,
    /// Layers to skip at the end of the text encoders, as diffusers counts them.
    pub clip_skip: Option<u32>,
    /// `[height, width]`, as all sizes here; the crops are `[top, left]`. `None` is diffusers' default.
    pub original_size: Option<[u32; 2]>,
    pub crops_coords_top_left: Option<[u32; 2]>,
    pub target_size: Option<[u32; 2]>,
    pub negative_original_size: Option<[u32; 2]>,
    pub negative_crops_coords_top_left: Option<[u32; 2]>,
    pub negative_target_size: Option<[u32; 2]>,
    /// The picture to start from; without one it is text to image.
    pub init: Option<InitParams>,
    pub controls: Vec<ControlParams>,
    pub scale_mode: ScaleMode,
    pub loras: Vec<LoraParams>,
    /// Part of the run after which the base model stops, for a refiner or for another request to go on.
    pub denoising_end: Option<f64>,
    pub hires: Option<HiresParams>,
    pub refiner: Option<RefinerParams>,
    /// What a refiner is told of the picture's quality, and of the negative prompt's.
    pub aesthetic_score: f64,
    pub negative_aesthetic_score: f64,
    pub output_format: OutputFormat,
    /// 0 to 100; PNG has none.
    pub output_quality: u8,
    pub embed_metadata: bool,
    pub response_format: ResponseFormat,
    /// Steps from one preview to the next; 0 makes none.
    pub preview_every: usize,
}

pub(super) const AESTHETIC_SCORE: f64 = 6.0;
pub(super) const NEGATIVE_AESTHETIC_SCORE: f64 = 2.5;

/// How the texts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PromptWeighting {
    /// As they stand, cut at 77 tokens.
    Off,
    /// AUTOMATIC1111's brackets and `BREAK`, at any length.
    A1111,
    /// compel's operators, at any length.
    Compel,
}

impl PromptWeighting {
    pub const NAMES: [&'static str; 3] = ["off", "a1111", "compel"];

    pub(super) fn from_name(name: &str) -> Option<Self> {
        [PromptWeighting::Off, PromptWeighting::A1111, PromptWeighting::Compel].into_iter().find(|w| w.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            PromptWeighting::Off => "off",
            PromptWeighting::A1111 => "a1111",
            PromptWeighting::Compel => "compel",
        }
    }
}

/// A word for the text encoders that a file brings.
#[derive(Debug, Clone, PartialEq)]
pub struct TextualInversionParams {
    /// Of the safetensors file.
    pub source: FileSource,
    /// SHA-256 of the file: what the request expects it to be, and after the file was fetched what it is.
    pub sha256: Option<String>,
    /// How the texts name it.
    pub token: String,
}

impl TextualInversionParams {
    fn to_json(&self) -> Value {
        let mut entry = self.source.to_json(self.sha256.as_deref());
        entry["token"] = self.token.as_str().into();
        entry
    }
}

/// Image to image, or inpainting where there is a mask.
#[derive(Debug, Clone, PartialEq)]
pub struct InitParams {
    /// SHA-256 of the picture's file, for the record.
    pub image: String,
    /// How much of the picture is made anew; the share of the steps that are run.
    pub strength: f64,
    /// Begin at this part of the run instead, and take the picture to hold the noise that belongs there.
    pub denoising_start: Option<f64>,
    pub mask: Option<MaskParams>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct MaskParams {
    /// SHA-256 of the mask's file, for the record.
    pub image: String,
    /// Radius of a Gaussian blur of the mask, in its pixels; 0 leaves it as it is.
    pub blur: f64,
    /// Work only on the masked part and this many pixels around it, and paste the result into the picture.
    pub padding_crop: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OutputFormat {
    Png,
    Jpeg,
    Webp,
}

/// How an image travels in the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResponseFormat {
    DataUri,
    B64Json,
    Url,
}

impl OutputFormat {
    pub const NAMES: [&'static str; 3] = ["png", "jpeg", "webp"];

    pub fn from_name(name: &str) -> Option<Self> {
        [OutputFormat::Png, OutputFormat::Jpeg, OutputFormat::Webp].into_iter().find(|format| format.name() == name)
    }

    /// The name in requests and replies; also the file extension and the second half of the media type.
    pub fn name(self) -> &'static str {
        match self {
            OutputFormat::Png => "png",
            OutputFormat::Jpeg => "jpeg",
            OutputFormat::Webp => "webp",
        }
    }
}

impl GenerateParams {
    /// Height and width of the pictures that come out.
    pub fn final_size(&self) -> (u32, u32) {
        self.hires.as_ref().map_or((self.height, self.width), |hires| (hires.height, hires.width))
    }

    /// The request for the image with this index alone.
    pub fn for_image(&self, index: u32) -> GenerateParams {
        GenerateParams { seed: self.seed + u64::from(index), num_images: 1, ..self.clone() }
    }
}

/// The canonical request that makes the same picture again on the same model: nothing is left to a default that may
/// change. For one of several images, call it with [`GenerateParams::for_image`].
///
/// `scheduler` and `model` are those that acted.
pub fn effective_request(params: &GenerateParams, scheduler: SchedulerKind, model: &str) -> Value {
    let GenerateParams {
        prompt,
        prompt_2,
        negative_prompt,
        negative_prompt_2,
        prompt_weighting,
        textual_inversions,
        height,
        width,
        num_inference_steps,
        guidance_scale,
        guidance_start,
        guidance_end,
        guidance_rescale,
        eta,
        seed,
        num_images,
        scheduler: _,
        sigma_schedule,
        timesteps,
        sigmas,
        preset,
        clip_skip,
        original_size,
        crops_coords_top_left,
        target_size,
        negative_original_size,
        negative_crops_coords_top_left,
        negative_target_size,
        init,
        controls,
        scale_mode,
        loras,
        denoising_end,
        hires,
        refiner,
        aesthetic_score,
        negative_aesthetic_score,
        output_format,
        output_quality,
        embed_metadata,
        preview_every: _,
        response_format: _, // how the picture travelled says nothing about the picture
    } = params;
    let mask = init.as_ref().and_then(|init| init.mask.as_ref());
    let begin = refiner.as_ref().map(|refiner| refiner.begin);
    let strength = match (init, begin) {
        (None, Some(RefinerBegin::Strength(strength))) => Some(strength),
        _ => init.as_ref().map(|init| init.strength),
    };
    let denoising_start = match begin {
        Some(RefinerBegin::At(start)) => Some(start),
        _ => init.as_ref().and_then(|init| init.denoising_start),
    };
    let has_score = (*aesthetic_score, *negative_aesthetic_score) != (AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE);
    let mut request = json!({
        "prompt": prompt,
        "prompt_2": prompt_2,
        "negative_prompt": negative_prompt,
        "negative_prompt_2": negative_prompt_2,
        "prompt_weighting": (*prompt_weighting != PromptWeighting::Off).then(|| prompt_weighting.name()),
        "textual_inversions": some_list(textual_inversions.iter().map(TextualInversionParams::to_json).collect()),
        "width": width,
        "height": height,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_start": guidance_start,
        "guidance_end": guidance_end,
        "guidance_rescale": guidance_rescale,
        "seed": seed,
        "eta": eta,
        "num_images": num_images,
        "scheduler": scheduler.name(),
        "sigma_schedule": sigma_schedule.map(SigmaSchedule::name),
        "timesteps": timesteps,
        "sigmas": sigmas,
        "model": model,
        // also where there is none: the model's configuration may ask for one
        "preset": preset.map_or("none", Preset::name),
        "clip_skip": clip_skip,
        "original_size": original_size,
        "crops_coords_top_left": crops_coords_top_left,
        "target_size": target_size,
        "negative_original_size": negative_original_size,
        "negative_crops_coords_top_left": negative_crops_coords_top_left,
        "negative_target_size": negative_target_size,
        "image": init.as_ref().map(|init| fingerprint(&init.image)),
        "strength": strength,
        "mask_image": mask.map(|mask| fingerprint(&mask.image)),
        "mask_blur": mask.map(|mask| mask.blur),
        "padding_mask_crop": mask.and_then(|mask| mask.padding_crop),
        "controlnets": some_list(controls.iter().map(ControlParams::to_json).collect()),
        "scale_mode": (!controls.is_empty()).then(|| scale_mode.name()),
        "loras": some_list(loras.iter().map(LoraParams::to_json).collect()),
        "denoising_start": denoising_start,
        "denoising_end": denoising_end,
        "hires": hires.as_ref().map(HiresParams::to_json),
        "refiner": refiner.as_ref().map(RefinerParams::to_json),
        "aesthetic_score": has_score.then_some(aesthetic_score),
        "negative_aesthetic_score": has_score.then_some(negative_aesthetic_score),
        "output_format": output_format.name(),
        "output_quality": output_quality,
        "embed_metadata": embed_metadata,
    });
    if let Value::Object(fields) = &mut request {
        fields.retain(|_, value| !value.is_null());
    }
    request
}

/// `None` for an empty list, which says nothing.
fn some_list(list: Vec<Value>) -> Option<Vec<Value>> {
    (!list.is_empty()).then_some(list)
}
