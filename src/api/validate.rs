//! From the request as it arrived to one the pipeline can trust. A pure function of request and limits: no file, no
//! clock, no network; only a random seed comes from outside. The first problem in the contract's order is reported.

use std::hash::{BuildHasher, Hasher, RandomState};

use super::control::{ControlNetFacts, ScaleMode, controls};
use super::lora::{FileSource, loras, sha256};
use super::lora_tags::{LoraTag, take_lora_tags};
use super::params::{
    AESTHETIC_SCORE, GenerateParams, InitParams, MaskParams, NEGATIVE_AESTHETIC_SCORE, OutputFormat, PromptWeighting,
    ResponseFormat, TextualInversionParams,
};
use super::preset::Preset;
use super::request::{GenerateRequest, LoraRequest, TextualInversionRequest};
use super::schedule::{Schedule, ScheduleRequest};
use super::scheduler_kind::SchedulerKind;
use super::stages::{HiresParams, RefinerParams};
use super::wording::{in_range, invalid_value, shorten};
use crate::error::{Error, ErrorClass, Result};

/// What this worker accepts, and what it fills in. Set once at start.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Size of a request that names none: the model's own.
    pub default_height: u32,
    pub default_width: u32,
    /// Largest height times width. A larger one is refused before anything is allocated.
    pub max_pixels: u64,
    pub max_num_images: u32,
    pub max_num_inference_steps: u32,
    /// The model's own scheduler, which decides what options a request without `scheduler` may use.
    pub default_scheduler: SchedulerKind,
    /// For each of the four texts. Far above what an encoder reads, and small enough to be tokenised in no time.
    pub max_prompt_chars: usize,
    /// Names a request may give as `model`; the default model's among them.
    pub models: Vec<String>,
    /// The model is a refiner, and makes nothing without a picture.
    pub needs_image: bool,
    /// The model is one for inpainting, and makes nothing without a picture and a mask.
    pub needs_mask: bool,
    /// What the model's configuration says it was distilled by.
    pub preset: Option<Preset>,
    /// The UNet takes the guidance scale as an input.
    pub has_embedded_guidance: bool,
    /// Names of refiners; the first is the default.
    pub refiners: Vec<String>,
    /// In the order of their configuration; the first is the default.
    pub controlnets: Vec<ControlNetFacts>,
    pub max_controls: usize,
    pub max_loras: usize,
}

/// What is known of a request's pictures once they are here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PictureFacts {
    /// Height and width in pixels of `image`, else of the first control's picture.
    pub size: (u32, u32),
    /// SHA-256 of the files.
    pub image: String,
    pub mask_image: String,
    pub controls: Vec<String>,
}

impl Default for Limits {
    /// SDXL's size, up to four megapixels and eight images.
    fn default() -> Self {
        Limits {
            default_height: 1024,
            default_width: 1024,
            max_pixels: 2048 * 2048,
            max_num_images: 8,
            max_num_inference_steps: 200,
            default_scheduler: SchedulerKind::EulerDiscrete,
            max_prompt_chars: 20_000,
            models: Vec::new(),
            needs_image: false,
            needs_mask: false,
            preset: None,
            has_embedded_guidance: false,
            refiners: Vec::new(),
            controlnets: Vec::new(),
            max_controls: 8,
            max_loras: 16,
        }
    }
}

impl Limits {
    pub(super) fn default_steps(&self, preset: Option<Preset>) -> i64 {
        preset.map_or(30, Preset::num_inference_steps).min(i64::from(self.max_num_inference_steps))
    }

    pub(super) fn default_guidance_scale(&self, preset: Option<Preset>) -> f64 {
        preset.map_or(5.0, |preset| preset.guidance_scale(self.has_embedded_guidance))
    }
}

/// diffusers' defaults: each of its pipelines has its own.
pub(super) fn default_strength(has_mask: bool, has_controls: bool) -> f64 {
    match (has_mask, has_controls) {
        (true, _) => 0.9999,
        (false, true) => 0.8,
        (false, false) => 0.3,
    }
}

/// Pixels per latent: what sizes are multiples of.
pub(super) const SIZE_STEP: u32 = 8;
pub(super) const MIN_SIDE: u32 = 64;
/// The longest side a WebP file can have (16383), in steps of 8.
pub(super) const MAX_SIDE: u32 = 16_376;
pub(super) const MAX_GUIDANCE_SCALE: f64 = 50.0;
/// Sizes and crops that only condition the model; SDXL was trained on far smaller ones.
const MAX_CONDITIONING_SIZE: i64 = 65_536;
/// The smaller text encoder has 12 layers, of which the last is never used.
const MAX_CLIP_SKIP: i64 = 11;

const MAX_TEXTUAL_INVERSIONS: usize = 16;
const MAX_TOKEN_CHARS: usize = 64;

/// Checks every field against its range and fills in the defaults. To find what is wrong before anything is downloaded it
/// runs once without `pictures`, whose size then is not known.
///
/// # Errors
///
/// `missing_field`, `empty_prompt`, `out_of_range`, `not_a_multiple`, `invalid_value`, `unknown_mode`,
/// `unknown_scheduler`, `unsupported_option` (the scheduler has no such option), `unsupported_feature` (this version has
/// not), all [`ErrorClass::InvalidInput`]; `too_large`, [`ErrorClass::TooLarge`]; `unknown_model`,
/// `controlnet_not_available`, [`ErrorClass::NotFound`].
pub fn validate(request: GenerateRequest, limits: &Limits, pictures: Option<&PictureFacts>) -> Result<GenerateParams> {
    let text = |field, text| text_within(field, text, limits.max_prompt_chars);
    let mut prompt = required_prompt(text("prompt", request.prompt)?)?;
    let mut prompt_2 = text("prompt_2", request.prompt_2)?;
    let mut negative_prompt = text("negative_prompt", request.negative_prompt)?;
    let mut negative_prompt_2 = text("negative_prompt_2", request.negative_prompt_2)?;

    let picture = if request.image.is_some() { "image" } else { "controlnets[0].image" };
    let picture_size = pictures.map(|pictures| (picture, pictures.size));
    let (height, width) = size(request.height, request.width, picture_size, limits)?;

    let asked_preset = request.preset.map(|name| Preset::from_name(&name)).transpose()?;
    let preset = asked_preset.unwrap_or(limits.preset);
    let max_steps = i64::from(limits.max_num_inference_steps);
    let default_steps = limits.default_steps(preset);
    let num_inference_steps =
        in_range("num_inference_steps", request.num_inference_steps.unwrap_or(default_steps), 1..=max_steps)? as usize;
    let default_scale = limits.default_guidance_scale(preset);
    let guidance_scale =
        in_range("guidance_scale", request.guidance_scale.unwrap_or(default_scale), 0.0..=MAX_GUIDANCE_SCALE)?;
    let guidance_start = in_range("guidance_start", request.guidance_start.unwrap_or(0.0), 0.0..=1.0)?;
    let guidance_end = in_range("guidance_end", request.guidance_end.unwrap_or(1.0), guidance_start..=1.0)?;
    let guidance_rescale = in_range("guidance_rescale", request.guidance_rescale.unwrap_or(0.0), 0.0..=1.0)?;

    let seed = request.seed.unwrap_or(-1);
    in_range("seed", seed, -1..=i64::MAX)?;
    let eta = in_range("eta", request.eta.unwrap_or(0.0), 0.0..=1.0)?;
    let max_images = i64::from(limits.max_num_images);
    let num_images = in_range("num_images", request.num_images.unwrap_or(1), 1..=max_images)?;
    let seed = if seed == -1 { random_seed() } else { in_range("seed", seed, 0..=i64::MAX - (num_images - 1))? as u64 };

    // the preset that the model's configuration asks for has its scheduler there too
    let own = asked_preset.flatten().filter(|_| request.scheduler.is_none());
    let schedule = ScheduleRequest {
        scheduler: request.scheduler.or(own.map(|preset| preset.scheduler(num_inference_steps).name().to_owned())),
        sigma_schedule: request.sigma_schedule,
        timesteps: request.timesteps.or(own.and_then(|preset| preset.timesteps(num_inference_steps))),
        sigmas: request.sigmas,
        eta,
    };
    let Schedule { scheduler, sigma_schedule, timesteps, sigmas } =
        schedule.check(limits.default_scheduler, limits.max_num_inference_steps)?;
    let listed = timesteps.as_ref().map(Vec::len).or(sigmas.as_ref().map(|sigmas| sigmas.len() - 1));
    let num_inference_steps = listed.unwrap_or(num_inference_steps);

    let init = InitRequest {
        has_image: request.image.is_some(),
        has_mask: request.mask_image.is_some(),
        has_controls: !request.controlnets.is_empty(),
        has_refiner: request.refiner.is_some(),
        strength: request.strength,
        denoising_start: fraction("denoising_start", request.denoising_start)?,
        mask_blur: request.mask_blur,
        padding_mask_crop: request.padding_mask_crop,
    };
    let init = init.check(num_inference_steps, limits, pictures)?;
    known_model(request.model, limits)?;
    let prompt_weighting =
        request.prompt_weighting.map_or(Ok(PromptWeighting::Off), |name| prompt_weighting_from(&name))?;
    let mut lora_tags = Vec::new();
    if prompt_weighting != PromptWeighting::Off {
        lora_tags = take_tags(&mut prompt);
        lora_tags.extend(prompt_2.iter_mut().flat_map(take_tags));
        // tags of the negative texts go too, and ask for nothing
        [&mut negative_prompt, &mut negative_prompt_2].into_iter().flatten().for_each(|text| drop(take_tags(text)));
    }
    let textual_inversions = textual_inversions(request.textual_inversions)?;
    let hires = request
        .hires
        .map(|hires| HiresParams::new(hires, (height, width), num_inference_steps, init.is_some(), limits))
        .transpose()?;
    let has_score = limits.needs_image || request.refiner.is_some();
    let score = |field, score: Option<f64>, default| aesthetic_score(field, score, default, has_score);
    let aesthetic_score = score("aesthetic_score", request.aesthetic_score, AESTHETIC_SCORE)?;
    let negative_aesthetic_score =
        score("negative_aesthetic_score", request.negative_aesthetic_score, NEGATIVE_AESTHETIC_SCORE)?;
    let scale_mode = request.scale_mode.map_or(Ok(ScaleMode::Diffusers), |name| ScaleMode::from_name(&name))?;
    let controls = controls(request.controlnets, limits, pictures.map(|pictures| pictures.controls.as_slice()))?;
    let tagged = lora_tags.into_iter().map(|LoraTag { name, scale }| LoraRequest {
        name: Some(name),
        scale: Some(scale),
        ..LoraRequest::default()
    });
    let loras = loras(request.loras.into_iter().chain(tagged).collect(), limits.max_loras)?;

    let clip_skip = request.clip_skip.map(|layers| in_range("clip_skip", layers, 0..=MAX_CLIP_SKIP)).transpose()?;
    let original_size = pair("original_size", request.original_size)?;
    let crops_coords_top_left = pair("crops_coords_top_left", request.crops_coords_top_left)?;
    let target_size = pair("target_size", request.target_size)?;
    let negative_original_size = pair("negative_original_size", request.negative_original_size)?;
    let negative_crops_coords_top_left =
        pair("negative_crops_coords_top_left", request.negative_crops_coords_top_left)?;
    let negative_target_size = pair("negative_target_size", request.negative_target_size)?;

    let denoising_start = fraction("denoising_start", request.denoising_start)?;
    let denoising_end = fraction("denoising_end", request.denoising_end)?;
    if let (Some(start), Some(end), None) = (denoising_start, denoising_end, &request.refiner)
        && start >= end
    {
        let message = format!("`denoising_start` must be below `denoising_end`, got {start} and {end}");
        return Err(Error::invalid("out_of_range", "denoising_start", message).remedy("swap them, or leave one out"));
    }
    let refiner = request.refiner.map(|refiner| {
        if limits.needs_mask {
            let message = "a refiner cannot go on with what a model for inpainting has begun";
            return Err(Error::invalid("unsupported_option", "refiner", message).remedy("leave `refiner` out"));
        }
        let strength = request.strength.filter(|_| init.is_none());
        RefinerParams::new(refiner, num_inference_steps, denoising_start.or(denoising_end), strength, limits)
    });
    let refiner = refiner.transpose()?;
    let output_format = request.output_format.map_or(Ok(OutputFormat::Png), |name| output_format_from(&name))?;
    let output_quality = in_range("output_quality", request.output_quality.unwrap_or(95), 0..=100)? as u8;
    let preview_every = in_range("preview_every", request.preview_every.unwrap_or(0), 0..=max_steps)? as usize;
    let response_format =
        request.response_format.map_or(Ok(ResponseFormat::DataUri), |name| response_format_from(&name))?;

    Ok(GenerateParams {
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
        num_images: num_images as u32,
        scheduler,
        sigma_schedule,
        timesteps,
        sigmas,
        preset,
        clip_skip: clip_skip.map(|layers| layers as u32),
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
        embed_metadata: request.embed_metadata.unwrap_or(true),
        response_format,
        preview_every,
    })
}

fn required_prompt(prompt: Option<String>) -> Result<String> {
    let remedy = "describe the image in `prompt`";
    let prompt = prompt.ok_or_else(|| {
        Error::invalid("missing_field", "prompt", "`prompt` is required and is absent").remedy(remedy)
    })?;
    if prompt.trim().is_empty() {
        return Err(Error::invalid("empty_prompt", "prompt", "`prompt` must not be empty").remedy(remedy));
    }
    Ok(prompt)
}

fn text_within(field: &'static str, text: Option<String>, max: usize) -> Result<Option<String>> {
    // Bytes are never fewer than characters, so a short text is not counted.
    match text.as_ref().filter(|text| text.len() > max).map(|text| text.chars().count()) {
        Some(chars) if chars > max => {
            let message = format!("`{field}` must have at most {max} characters, got {chars}");
            Err(too_large(field, message).remedy(format!("shorten `{field}`")))
        }
        _ => Ok(text),
    }
}

/// A part of the run; its ends ask for nothing.
fn fraction(field: &str, part: Option<f64>) -> Result<Option<f64>> {
    let part = part.map(|part| in_range(field, part, 0.0..=1.0)).transpose()?;
    Ok(part.filter(|part| *part > 0.0 && *part < 1.0))
}

fn aesthetic_score(field: &str, score: Option<f64>, default: f64, acts: bool) -> Result<f64> {
    let score = in_range(field, score.unwrap_or(default), 0.0..=10.0)?;
    if score != default && !acts {
        let message = format!("`{field}` acts on a refiner, and none is asked for");
        return Err(Error::invalid("unsupported_option", field, message)
            .remedy(format!("leave `{field}` out, or ask for a `refiner`")));
    }
    Ok(score)
}

/// Checks that a strength leaves a step to run.
pub(super) fn steps_remain(field: &str, strength: f64, steps: usize) -> Result<()> {
    in_range(field, strength, 0.0..=1.0)?;
    if (steps as f64 * strength) < 1.0 {
        let message = format!("a strength of {strength} leaves none of {steps} steps to run");
        return Err(Error::invalid("out_of_range", field, message)
            .remedy(format!("give `{field}` at least {}, or more steps", 1.0 / steps as f64)));
    }
    Ok(())
}

pub(super) fn too_large(field: &str, message: String) -> Error {
    Error::new(ErrorClass::TooLarge, "too_large", message).field(field)
}

/// The fields that say what happens to a start picture.
struct InitRequest {
    has_image: bool,
    has_mask: bool,
    has_controls: bool,
    has_refiner: bool,
    strength: Option<f64>,
    denoising_start: Option<f64>,
    mask_blur: Option<f64>,
    padding_mask_crop: Option<i64>,
}

/// As far as a blur of a mask makes sense; more is a slow way to a grey one.
const MAX_MASK_BLUR: f64 = 256.0;
const MAX_PADDING: i64 = 16_384;

impl InitRequest {
    fn check(self, steps: usize, limits: &Limits, pictures: Option<&PictureFacts>) -> Result<Option<InitParams>> {
        let needs = |needed: &str, field: &str| {
            let message = format!("`{field}` acts on `{needed}`, which is absent");
            Err(Error::invalid("missing_field", needed, message)
                .remedy(format!("give `{needed}`, or leave `{field}` out")))
        };
        if limits.needs_mask && !(self.has_image && self.has_mask) {
            let field = if self.has_image { "mask_image" } else { "image" };
            return Err(Error::invalid("missing_field", field, "this model only repaints pictures")
                .remedy("give `image` and `mask_image`, or use a text-to-image model"));
        }
        if limits.needs_image && !self.has_image {
            return Err(Error::invalid("missing_field", "image", "this model only refines pictures")
                .remedy("give `image`, or use a text-to-image model"));
        }
        if !self.has_image {
            // a refiner has a use for both
            return match (self.has_mask, self.has_refiner, self.strength, self.denoising_start) {
                (true, ..) => needs("image", "mask_image"),
                (_, false, Some(_), _) => needs("image", "strength"),
                (_, false, _, Some(_)) => needs("image", "denoising_start"),
                _ => self.without_mask().map(|()| None),
            };
        }
        let default = default_strength(self.has_mask, self.has_controls);
        let strength = in_range("strength", self.strength.unwrap_or(default), 0.0..=1.0)?;
        let denoising_start = self.denoising_start.filter(|_| !self.has_refiner);
        if denoising_start.is_none() {
            steps_remain("strength", strength, steps)?;
        }
        let mask = if self.has_mask {
            let padding = self.padding_mask_crop.map(|pixels| in_range("padding_mask_crop", pixels, 0..=MAX_PADDING));
            Some(MaskParams {
                image: pictures.map(|pictures| pictures.mask_image.clone()).unwrap_or_default(),
                blur: in_range("mask_blur", self.mask_blur.unwrap_or(0.0), 0.0..=MAX_MASK_BLUR)?,
                padding_crop: padding.transpose()?.map(|pixels| pixels as u32),
            })
        } else {
            self.without_mask()?;
            None
        };
        let image = pictures.map(|pictures| pictures.image.clone()).unwrap_or_default();
        Ok(Some(InitParams { image, strength, denoising_start, mask }))
    }

    /// Without a mask there is nothing that its options could act on.
    fn without_mask(&self) -> Result<()> {
        let blur = ("mask_blur", self.mask_blur.is_some_and(|pixels| pixels != 0.0));
        match [blur, ("padding_mask_crop", self.padding_mask_crop.is_some())].iter().find(|(_, given)| *given) {
            Some((field, _)) => {
                let message = format!("`{field}` acts on `mask_image`, which is absent");
                Err(Error::invalid("missing_field", "mask_image", message)
                    .remedy(format!("give `mask_image`, or leave `{field}` out")))
            }
            None => Ok(()),
        }
    }
}

/// Height and width in pixels. What is not given is that of the picture, named by its field, else the model's own.
fn size(
    height: Option<i64>,
    width: Option<i64>,
    picture: Option<(&str, (u32, u32))>,
    limits: &Limits,
) -> Result<(u32, u32)> {
    let mut default = (limits.default_height, limits.default_width);
    if let Some((field, (high, wide))) = picture.filter(|_| height.is_none() || width.is_none()) {
        default = (high / SIZE_STEP * SIZE_STEP, wide / SIZE_STEP * SIZE_STEP);
        let fits = |side: u32| (MIN_SIDE..=MAX_SIDE).contains(&side);
        let remedy = "give `width` and `height`, or a picture of another size";
        if !(fits(default.0) && fits(default.1)) {
            let message = format!("the picture is {wide} x {high}; sides are from {MIN_SIDE} to {MAX_SIDE} pixels");
            return Err(Error::invalid("out_of_range", field, message).remedy(remedy));
        }
        if height.is_none() && width.is_none() && u64::from(default.0) * u64::from(default.1) > limits.max_pixels {
            let message = format!("the picture is {wide} x {high}, more than {} pixels", limits.max_pixels);
            return Err(too_large(field, message).remedy(remedy));
        }
    }
    let width = side("width", width, default.1)?;
    let height = side("height", height, default.0)?;
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.max_pixels {
        let max = limits.max_pixels;
        let message = format!("`width` x `height` must be at most {max} pixels, got {width} x {height} = {pixels}");
        let longest = (max as f64).sqrt() as u64 / u64::from(SIZE_STEP) * u64::from(SIZE_STEP);
        return Err(
            too_large("width", message).remedy(format!("the largest square is {longest} x {longest}; ask for less"))
        );
    }
    Ok((height, width))
}

fn side(field: &str, pixels: Option<i64>, default: u32) -> Result<u32> {
    let Some(pixels) = pixels else { return Ok(default) };
    let pixels = in_range(field, pixels, i64::from(MIN_SIDE)..=i64::from(MAX_SIDE))? as u32;
    if !pixels.is_multiple_of(SIZE_STEP) {
        let below = pixels / SIZE_STEP * SIZE_STEP;
        let message = format!("`{field}` must be a multiple of {SIZE_STEP}, got {pixels}");
        return Err(Error::invalid("not_a_multiple", field, message)
            .remedy(format!("the nearest ones are {below} and {}", below + SIZE_STEP)));
    }
    Ok(pixels)
}

fn pair(field: &str, pair: Option<[i64; 2]>) -> Result<Option<[u32; 2]>> {
    let Some([first, second]) = pair else { return Ok(None) };
    let item = |index: usize, value| in_range(&format!("{field}[{index}]"), value, 0..=MAX_CONDITIONING_SIZE);
    Ok(Some([item(0, first)? as u32, item(1, second)? as u32]))
}

fn known_model(model: Option<String>, limits: &Limits) -> Result<()> {
    let Some(model) = model.filter(|model| !limits.models.contains(model)) else {
        return Ok(());
    };
    let message = format!("this worker has no model {:?}", shorten(&model, 80));
    let error = Error::new(ErrorClass::NotFound, "unknown_model", message).field("model");
    if limits.models.is_empty() {
        return Err(error);
    }
    Err(error.remedy(format!("choose one of {}, or leave `model` out", limits.models.join(", "))))
}

fn prompt_weighting_from(name: &str) -> Result<PromptWeighting> {
    PromptWeighting::from_name(name).ok_or_else(|| invalid_value("prompt_weighting", &PromptWeighting::NAMES, name))
}

fn take_tags(text: &mut String) -> Vec<LoraTag> {
    let (rest, tags) = take_lora_tags(text);
    *text = rest;
    tags
}

/// What they are called and where they are; the files are read when the texts are encoded.
fn textual_inversions(requests: Vec<TextualInversionRequest>) -> Result<Vec<TextualInversionParams>> {
    if requests.len() > MAX_TEXTUAL_INVERSIONS {
        let message =
            format!("`textual_inversions` must have at most {MAX_TEXTUAL_INVERSIONS} entries, got {}", requests.len());
        return Err(too_large("textual_inversions", message).remedy("leave out those that no text names"));
    }
    let mut read: Vec<TextualInversionParams> = Vec::new();
    for (index, request) in requests.into_iter().enumerate() {
        let entry = format!("textual_inversions[{index}]");
        let at = |field: &str| format!("{entry}.{field}");
        let source = FileSource::choose(request.name, request.path, request.url, &entry)?;
        let sha256 = sha256(request.sha256, &entry)?;
        let token = request.token.ok_or_else(|| {
            Error::invalid("missing_field", at("token"), "a textual inversion has a `token`")
                .remedy("give the word that the prompt names it by")
        })?;
        let remedy = "give a word without white space that no other has, such as <my-style>";
        let wrong = |message: String| Err(Error::invalid("invalid_value", at("token"), message).remedy(remedy));
        if token.is_empty() || token.chars().count() > MAX_TOKEN_CHARS || token.contains(char::is_whitespace) {
            return wrong(format!("{:?} is no word for a prompt", shorten(&token, MAX_TOKEN_CHARS)));
        }
        if read.iter().any(|other| other.token.to_lowercase() == token.to_lowercase()) {
            return wrong(format!("two textual inversions are called {token:?}"));
        }
        read.push(TextualInversionParams { source, sha256, token });
    }
    Ok(read)
}

fn output_format_from(name: &str) -> Result<OutputFormat> {
    OutputFormat::from_name(name).ok_or_else(|| invalid_value("output_format", &OutputFormat::NAMES, name))
}

fn response_format_from(name: &str) -> Result<ResponseFormat> {
    match name {
        "data_uri" => Ok(ResponseFormat::DataUri),
        "b64_json" => Ok(ResponseFormat::B64Json),
        "url" => Ok(ResponseFormat::Url),
        _ => Err(invalid_value("response_format", &["data_uri", "b64_json", "url"], name)),
    }
}

/// Below 2^32, so that it fits every tool. The standard library's hash keys are its only source of randomness.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish() & 0xffff_ffff
}

#[cfg(test)]
#[path = "validate_tests.rs"]
mod tests;
