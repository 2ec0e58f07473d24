//! What a worker offers to whoever writes a request: names to choose from, limits, and what is filled in.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::control::mode_names;
use super::params::{OutputFormat, PromptWeighting};
use super::preprocessor::Preprocessor;
use super::preset::Preset;
use super::scheduler_kind::SchedulerKind;
use super::validate::{Limits, MAX_GUIDANCE_SCALE, MAX_SIDE, MIN_SIDE, SIZE_STEP, default_strength};

/// Names and numbers as a request has them. What is called like a field of the request is that field's default.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Capabilities {
    /// The program's.
    pub version: String,
    pub model: String,
    /// The model makes nothing without a picture.
    pub needs_image: bool,
    /// Nor without a mask.
    pub needs_mask: bool,
    pub width: u32,
    pub height: u32,
    /// Sides are multiples of it.
    pub size_step: u32,
    pub min_side: u32,
    pub max_side: u32,
    /// Most pixels, width times height.
    pub max_pixels: u64,
    pub num_inference_steps: i64,
    pub max_num_inference_steps: u32,
    pub guidance_scale: f64,
    pub max_guidance_scale: f64,
    pub max_num_images: u32,
    pub strength: Strengths,
    pub scheduler: String,
    pub schedulers: Vec<SchedulerChoice>,
    pub preset: Option<String>,
    pub presets: Vec<String>,
    pub prompt_weightings: Vec<String>,
    pub output_formats: Vec<String>,
    pub controlnets: Vec<ControlNetChoice>,
    pub max_controls: usize,
    pub preprocessors: Vec<PreprocessorChoice>,
    /// Those in the worker's folders; others can be fetched.
    pub loras: Vec<String>,
    pub max_loras: usize,
    pub refiners: Vec<String>,
}

/// The default of `strength`.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct Strengths {
    pub image: f64,
    pub image_with_control: f64,
    pub mask: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct SchedulerChoice {
    pub name: String,
    /// As AUTOMATIC1111 calls it.
    pub label: String,
    pub sigma_schedules: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ControlNetChoice {
    pub name: String,
    /// Of a union net, in the order of their numbers; `null` for a net of one type, which needs no mode.
    pub modes: Option<Vec<ModeChoice>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct ModeChoice {
    pub name: String,
    pub other_names: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct PreprocessorChoice {
    pub name: String,
    /// Its parameters with their defaults.
    pub params: Map<String, Value>,
}

impl Capabilities {
    /// `loras` are the names in the worker's folders.
    pub fn new(limits: &Limits, loras: Vec<String>) -> Self {
        let preset = limits.preset;
        Capabilities {
            version: env!("CARGO_PKG_VERSION").into(),
            model: limits.models.first().cloned().unwrap_or_default(),
            needs_image: limits.needs_image,
            needs_mask: limits.needs_mask,
            width: limits.default_width,
            height: limits.default_height,
            size_step: SIZE_STEP,
            min_side: MIN_SIDE,
            max_side: MAX_SIDE,
            max_pixels: limits.max_pixels,
            num_inference_steps: limits.default_steps(preset),
            max_num_inference_steps: limits.max_num_inference_steps,
            guidance_scale: limits.default_guidance_scale(preset),
            max_guidance_scale: MAX_GUIDANCE_SCALE,
            max_num_images: limits.max_num_images,
            strength: Strengths {
                image: default_strength(false, false),
                image_with_control: default_strength(false, true),
                mask: default_strength(true, false),
            },
            scheduler: limits.default_scheduler.name().into(),
            schedulers: SchedulerKind::all().map(scheduler).collect(),
            preset: preset.map(|preset| preset.name().into()),
            presets: names(Preset::ALL.map(Preset::name)),
            prompt_weightings: names(PromptWeighting::NAMES),
            output_formats: names(OutputFormat::NAMES),
            controlnets: limits
                .controlnets
                .iter()
                .map(|net| ControlNetChoice { name: net.name.clone(), modes: net.num_control_type.map(modes) })
                .collect(),
            max_controls: limits.max_controls,
            preprocessors: Preprocessor::all().iter().map(preprocessor).collect(),
            loras,
            max_loras: limits.max_loras,
            refiners: limits.refiners.clone(),
        }
    }
}

fn names(names: impl IntoIterator<Item = &'static str>) -> Vec<String> {
    names.into_iter().map(str::to_owned).collect()
}

fn scheduler(kind: SchedulerKind) -> SchedulerChoice {
    SchedulerChoice {
        name: kind.name().into(),
        label: kind.label().into(),
        sigma_schedules: names(kind.sigma_schedules().iter().map(|schedule| schedule.name())),
    }
}

fn modes(count: u32) -> Vec<ModeChoice> {
    let mode = |names: &[&'static str]| ModeChoice {
        name: names[0].into(),
        other_names: names[1..].iter().map(|name| (*name).into()).collect(),
    };
    mode_names(count).map(mode).collect()
}

fn preprocessor(preprocessor: &Preprocessor) -> PreprocessorChoice {
    let json = preprocessor.to_json();
    let params = json["params"].as_object().cloned().unwrap_or_default();
    PreprocessorChoice { name: preprocessor.name().into(), params }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ControlNetFacts, parse, validate};

    #[test]
    fn what_is_offered_is_accepted() {
        let net = |name: &str, num_control_type| ControlNetFacts { name: name.into(), num_control_type };
        let limits = Limits {
            models: vec!["demo".into()],
            controlnets: vec![net("canny", None), net("union", Some(6)), net("promax", Some(8))],
            ..Limits::default()
        };
        let offered = Capabilities::new(&limits, vec!["ink".into()]);
        let accept = |fields: Value| {
            let mut input =
                serde_json::json!({ "prompt": "a fox", "model": offered.model, "loras": [{ "name": "ink" }] });
            input.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            validate(parse(&input).unwrap().0, &limits, None).unwrap_or_else(|error| panic!("{input}: {error}"))
        };
        let filled_in = accept(serde_json::json!({}));
        assert_eq!((offered.width, offered.height), (filled_in.width, filled_in.height));
        assert_eq!(offered.num_inference_steps, filled_in.num_inference_steps as i64);
        assert_eq!(offered.guidance_scale, filled_in.guidance_scale);
        for scheduler in &offered.schedulers {
            for curve in &scheduler.sigma_schedules {
                accept(serde_json::json!({ "scheduler": scheduler.name, "sigma_schedule": curve }));
            }
        }
        for net in &offered.controlnets {
            for mode in net.modes.iter().flatten() {
                for name in std::iter::once(&mode.name).chain(&mode.other_names) {
                    accept(serde_json::json!({ "controlnets": [{ "image": "x", "model": net.name, "mode": name }] }));
                }
            }
        }
        for preprocess in &offered.preprocessors {
            accept(
                serde_json::json!({ "controlnets": [{ "image": "x", "model": "canny", "preprocess": preprocess }] }),
            );
        }
        for preset in &offered.presets {
            accept(serde_json::json!({ "preset": preset }));
        }
        let modes: Vec<_> = offered.controlnets.iter().map(|net| net.modes.as_ref().map(Vec::len)).collect();
        assert_eq!(modes, [None, Some(6), Some(8)]);
        assert_eq!(offered.preprocessors.len(), 6);
    }
}
