//! The request as it arrives. [`parse`] settles names and JSON types, so that every alias ends as one canonical field;
//! whether the values make sense is [`validate`](super::validate())'s business. All fields of the contract are read here,
//! those of later features too, so that they are refused by name and not as unknown.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::schema::{self, FLAT, REQUEST, SPECIAL, conflicting, given, read_value};
use super::wording::{describe, invalid_type, shorten};
use crate::error::{Error, Result};

/// A request under canonical names; a field that was absent or `null` is `None`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateRequest {
    pub prompt: Option<String>,
    pub prompt_2: Option<String>,
    pub negative_prompt: Option<String>,
    pub negative_prompt_2: Option<String>,
    pub width: Option<i64>,
    pub height: Option<i64>,
    pub num_inference_steps: Option<i64>,
    pub guidance_scale: Option<f64>,
    pub guidance_start: Option<f64>,
    pub guidance_end: Option<f64>,
    pub guidance_rescale: Option<f64>,
    pub seed: Option<i64>,
    pub eta: Option<f64>,
    pub num_images: Option<i64>,
    pub scheduler: Option<String>,
    pub sigma_schedule: Option<String>,
    pub timesteps: Option<Vec<i64>>,
    pub sigmas: Option<Vec<f64>>,
    pub image: Option<String>,
    pub mask_image: Option<String>,
    pub mask_blur: Option<f64>,
    pub padding_mask_crop: Option<i64>,
    pub model: Option<String>,
    pub preset: Option<String>,
    pub prompt_weighting: Option<String>,
    pub textual_inversions: Vec<TextualInversionRequest>,
    pub hires: Option<HiresRequest>,
    pub aesthetic_score: Option<f64>,
    pub negative_aesthetic_score: Option<f64>,
    pub scale_mode: Option<String>,
    pub strength: Option<f64>,
    pub controlnets: Vec<ControlNetRequest>,
    pub loras: Vec<LoraRequest>,
    pub clip_skip: Option<i64>,
    /// `[height, width]`, as all sizes; the crops are `[top, left]`.
    pub original_size: Option<[i64; 2]>,
    pub crops_coords_top_left: Option<[i64; 2]>,
    pub target_size: Option<[i64; 2]>,
    pub negative_original_size: Option<[i64; 2]>,
    pub negative_crops_coords_top_left: Option<[i64; 2]>,
    pub negative_target_size: Option<[i64; 2]>,
    pub denoising_start: Option<f64>,
    pub denoising_end: Option<f64>,
    pub refiner: Option<RefinerRequest>,
    pub output_format: Option<String>,
    pub output_quality: Option<i64>,
    pub embed_metadata: Option<bool>,
    pub stream: Option<bool>,
    pub preview_every: Option<i64>,
    pub response_format: Option<String>,
}

/// One control: a map and how it acts.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ControlNetRequest {
    pub image: Option<String>,
    pub mode: Option<NumberOrName>,
    pub model: Option<String>,
    pub scale: Option<f64>,
    pub start: Option<f64>,
    pub end: Option<f64>,
    pub guess_mode: Option<bool>,
    pub preprocess: Option<PreprocessRequest>,
}

/// A control mode: the union net's number, or a name for it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(untagged)]
pub enum NumberOrName {
    Number(i64),
    Name(String),
}

/// How a photo becomes a control map.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PreprocessRequest {
    pub name: Option<String>,
    pub params: Option<Map<String, Value>>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LoraRequest {
    pub path: Option<String>,
    pub url: Option<String>,
    pub name: Option<String>,
    pub scale: Option<f64>,
    pub sha256: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TextualInversionRequest {
    pub path: Option<String>,
    pub url: Option<String>,
    pub name: Option<String>,
    pub token: Option<String>,
    pub sha256: Option<String>,
}

/// A second pass at a larger size.
#[derive(Debug, Clone, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HiresRequest {
    pub scale: Option<f64>,
    pub strength: Option<f64>,
    pub upscaler: Option<String>,
    pub steps: Option<i64>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RefinerRequest {
    pub model: Option<String>,
    pub num_inference_steps: Option<i64>,
}

/// Reads a job's `input`. The second value has a warning for each alias.
///
/// # Errors
///
/// `unknown_field`, `conflicting_fields`, `invalid_type`, each with the field's path as the caller wrote it;
/// `out_of_range` for an integer beyond 64 bits.
pub fn parse(input: &Value) -> Result<(GenerateRequest, Vec<String>)> {
    let Value::Object(object) = input else {
        return Err(invalid_type("input", "an object", input));
    };
    let flat = FLAT.iter().map(|flat| flat.name);
    schema::refuse_unknown(object, "", schema::names(REQUEST).chain(flat).chain(SPECIAL.iter().copied()))?;

    let mut warnings = Vec::new();
    let mut read = schema::read_object(object, REQUEST, "", &mut warnings)?;
    read_size(object, &mut read, &mut warnings)?;
    read_init_images(object, &mut read, &mut warnings)?;
    if let Some(hires) = read_hires(object, &read, &mut warnings)? {
        read.insert("hires".into(), hires.into());
    }
    if let Some(control) = read_flat(object, &read, "controlnets", &mut warnings)? {
        read.insert("controlnets".into(), Value::Array(vec![control.into()]));
    }
    if let Some(refiner) = read_flat(object, &read, "refiner", &mut warnings)? {
        read.insert("refiner".into(), refiner.into());
    }
    let request = serde_json::from_value(Value::Object(read)).map_err(|error| {
        Error::invalid("invalid_type", "input", "the request does not have the fields of the contract").source(error)
    })?;
    Ok((request, warnings))
}

/// The flat fields of `container` as one object; `None` if the caller gave none of them.
fn read_flat(
    object: &Map<String, Value>,
    read: &Map<String, Value>,
    container: &str,
    warnings: &mut Vec<String>,
) -> Result<Option<Map<String, Value>>> {
    let mut fields = Map::new();
    for flat in FLAT.iter().filter(|flat| flat.container == container) {
        let Some(value) = given(object, flat.name) else {
            continue;
        };
        if read.contains_key(container) {
            return Err(conflicting(container, flat.name));
        }
        let is_list = REQUEST.iter().any(|f| f.name == container && matches!(f.kind, schema::Kind::Objects(_)));
        let index = if is_list { "[0]" } else { "" };
        fields.insert(flat.inner.into(), read_value(value, flat.kind(), flat.name, warnings)?);
        warnings.push(format!("`{}` was read as `{container}{index}.{}`", flat.name, flat.inner));
    }
    Ok((!fields.is_empty()).then_some(fields))
}

/// OpenAI's `size`, such as "1024x768": width first.
fn read_size(object: &Map<String, Value>, read: &mut Map<String, Value>, warnings: &mut Vec<String>) -> Result<()> {
    let Some(value) = given(object, "size") else {
        return Ok(());
    };
    let Value::String(size) = value else {
        return Err(invalid_type("size", "a string such as \"1024x768\"", value));
    };
    if let Some(side) = ["width", "height"].into_iter().find(|side| read.contains_key(*side)) {
        return Err(conflicting(side, "size"));
    }
    let sides = size.split_once(['x', 'X']).and_then(|(width, height)| {
        let side = |text: &str| text.trim().parse::<u32>().ok();
        Some((side(width)?, side(height)?))
    });
    let Some((width, height)) = sides else {
        let message = format!("`size` must be width x height in pixels, got {:?}", shorten(size, 40));
        return Err(Error::invalid("invalid_value", "size", message).remedy("write it like \"1024x768\""));
    };
    read.insert("width".into(), width.into());
    read.insert("height".into(), height.into());
    warnings.push("`size` was read as `width` and `height`".into());
    Ok(())
}

/// A1111's list of start images, of which there may be one.
fn read_init_images(
    object: &Map<String, Value>,
    read: &mut Map<String, Value>,
    warnings: &mut Vec<String>,
) -> Result<()> {
    let Some(value) = given(object, "init_images") else {
        return Ok(());
    };
    match value.as_array().map(Vec::as_slice) {
        Some([]) => Ok(()),
        Some([_]) if read.contains_key("image") => Err(conflicting("image", "init_images")),
        Some([Value::String(image)]) => {
            read.insert("image".into(), Value::String(image.clone()));
            warnings.push("`init_images[0]` was read as `image`".into());
            Ok(())
        }
        Some([other]) => Err(invalid_type("init_images[0]", "a string", other)),
        Some(_) => {
            let message = format!("`init_images` must hold one image, got {}", describe(value));
            Err(Error::invalid("invalid_value", "init_images", message).remedy("send a request for each image"))
        }
        None => Err(invalid_type("init_images", "a list of one string", value)),
    }
}

/// A1111's `hr_` fields, which act only beside `enable_hr: true`, as there.
fn read_hires(
    object: &Map<String, Value>,
    read: &Map<String, Value>,
    warnings: &mut Vec<String>,
) -> Result<Option<Map<String, Value>>> {
    let enabled = match given(object, "enable_hr") {
        None => None,
        Some(Value::Bool(enabled)) => Some(*enabled),
        Some(other) => return Err(invalid_type("enable_hr", "a boolean", other)),
    };
    if enabled == Some(true) && read.contains_key("hires") {
        return Err(conflicting("hires", "enable_hr"));
    }
    let known = warnings.len();
    let fields = read_flat(object, read, "hires", warnings)?;
    if enabled == Some(true) {
        warnings.insert(known, "`enable_hr` was read as `hires`".into());
        return Ok(Some(fields.unwrap_or_default()));
    }
    warnings.truncate(known);
    if fields.is_some() {
        warnings.push("`hr_...` fields do nothing without `enable_hr: true`".into());
    }
    Ok(None)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
