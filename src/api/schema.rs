//! The request's fields as data: canonical names, aliases and JSON types, in the order in which problems are reported.
//! The structs of `request` hold the same fields; a test sees to it that neither list has one that the other lacks.

use serde_json::{Map, Value};

use super::wording::{describe, invalid_type, nearest, shorten};
use crate::error::{Error, Result};

pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) aliases: &'static [&'static str],
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    Text,
    Integer,
    Number,
    Boolean,
    IntegerOrText,
    IntegerPair,
    Integers,
    Numbers,
    AnyObject,
    Object(&'static [Field]),
    Objects(&'static [Field]),
}

use Kind::*;

const fn field(name: &'static str, kind: Kind) -> Field {
    Field { name, aliases: &[], kind }
}

const fn aliased(name: &'static str, kind: Kind, aliases: &'static [&'static str]) -> Field {
    Field { name, aliases, kind }
}

pub(super) static REQUEST: &[Field] = &[
    field("prompt", Text),
    field("prompt_2", Text),
    field("negative_prompt", Text),
    field("negative_prompt_2", Text),
    field("width", Integer),
    field("height", Integer),
    aliased("num_inference_steps", Integer, &["steps"]),
    aliased("guidance_scale", Number, &["cfg_scale"]),
    field("guidance_start", Number),
    field("guidance_end", Number),
    field("guidance_rescale", Number),
    field("seed", Integer),
    field("eta", Number),
    aliased("num_images", Integer, &["num_images_per_prompt", "num_outputs", "n", "batch_size"]),
    aliased("scheduler", Text, &["sampler", "sampler_name"]),
    field("sigma_schedule", Text),
    field("timesteps", Integers),
    field("sigmas", Numbers),
    aliased("image", Text, &["image_url", "init_image"]),
    aliased("mask_image", Text, &["mask"]),
    field("mask_blur", Number),
    field("padding_mask_crop", Integer),
    field("model", Text),
    field("preset", Text),
    field("prompt_weighting", Text),
    field("textual_inversions", Objects(TEXTUAL_INVERSION)),
    field("hires", Object(HIRES)),
    field("aesthetic_score", Number),
    field("negative_aesthetic_score", Number),
    field("scale_mode", Text),
    aliased("strength", Number, &["prompt_strength", "denoising_strength"]),
    field("controlnets", Objects(CONTROLNET)),
    field("loras", Objects(LORA)),
    field("clip_skip", Integer),
    field("original_size", IntegerPair),
    field("crops_coords_top_left", IntegerPair),
    field("target_size", IntegerPair),
    field("negative_original_size", IntegerPair),
    field("negative_crops_coords_top_left", IntegerPair),
    field("negative_target_size", IntegerPair),
    field("denoising_start", Number),
    aliased("denoising_end", Number, &["high_noise_frac"]),
    field("refiner", Object(REFINER)),
    field("output_format", Text),
    aliased("output_quality", Integer, &["output_compression"]),
    field("embed_metadata", Boolean),
    aliased("stream", Boolean, &["stream_progress"]),
    field("preview_every", Integer),
    field("response_format", Text),
];

static CONTROLNET: &[Field] = &[
    field("image", Text),
    field("mode", IntegerOrText),
    field("model", Text),
    aliased("scale", Number, &["controlnet_conditioning_scale", "weight", "strength"]),
    aliased("start", Number, &["control_guidance_start"]),
    aliased("end", Number, &["control_guidance_end"]),
    field("guess_mode", Boolean),
    field("preprocess", Object(PREPROCESS)),
];

static PREPROCESS: &[Field] = &[field("name", Text), field("params", AnyObject)];

static LORA: &[Field] = &[
    field("path", Text),
    field("url", Text),
    field("name", Text),
    aliased("scale", Number, &["weight", "multiplier", "strength"]),
    field("sha256", Text),
];

static TEXTUAL_INVERSION: &[Field] =
    &[field("path", Text), field("url", Text), field("name", Text), field("token", Text), field("sha256", Text)];

static HIRES: &[Field] =
    &[field("scale", Number), field("strength", Number), field("upscaler", Text), field("steps", Integer)];

static REFINER: &[Field] = &[field("model", Text), field("num_inference_steps", Integer)];

/// A top-level field that stands for a field inside an object: `name` is `container.inner`.
pub(super) struct FlatField {
    pub(super) name: &'static str,
    pub(super) container: &'static str,
    pub(super) inner: &'static str,
}

const fn flat(name: &'static str, container: &'static str, inner: &'static str) -> FlatField {
    FlatField { name, container, inner }
}

pub(super) static FLAT: &[FlatField] = &[
    flat("control_image", "controlnets", "image"),
    flat("control_mode", "controlnets", "mode"),
    flat("controlnet_conditioning_scale", "controlnets", "scale"),
    flat("control_guidance_start", "controlnets", "start"),
    flat("control_guidance_end", "controlnets", "end"),
    flat("refiner_inference_steps", "refiner", "num_inference_steps"),
    flat("hr_scale", "hires", "scale"),
    flat("hr_strength", "hires", "strength"),
    flat("hr_upscaler", "hires", "upscaler"),
    flat("hr_second_pass_steps", "hires", "steps"),
];

/// Top-level fields with a form of their own.
pub(super) static SPECIAL: &[&str] = &["size", "init_images", "enable_hr"];

impl FlatField {
    /// The type of the field this one stands for.
    pub(super) fn kind(&self) -> &'static Kind {
        let container = &find(REQUEST, self.container).kind;
        match container {
            Object(fields) | Objects(fields) => &find(fields, self.inner).kind,
            _ => unreachable!("every flat field names an object"),
        }
    }
}

fn find(fields: &'static [Field], name: &str) -> &'static Field {
    fields.iter().find(|field| field.name == name).expect("every flat field names a field of the tables")
}

/// Every name a caller may use for one of `fields`.
pub(super) fn names(fields: &'static [Field]) -> impl Iterator<Item = &'static str> + Clone {
    fields.iter().flat_map(|field| std::iter::once(field.name).chain(field.aliases.iter().copied()))
}

/// The field under `name`; `null` equals absent.
pub(super) fn given<'a>(object: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    object.get(name).filter(|value| !value.is_null())
}

/// Refuses the first key that is no field, naming the one it looks like.
pub(super) fn refuse_unknown(
    object: &Map<String, Value>,
    path: &str,
    known: impl Iterator<Item = &'static str> + Clone,
) -> Result<()> {
    for key in object.keys() {
        if !known.clone().any(|name| name == key) {
            let path = join(path, &shorten(key, 80));
            let error = Error::invalid("unknown_field", &path, format!("`{path}` is not a field of the request"));
            return Err(match nearest(key, known) {
                Some(name) => error.remedy(format!("the nearest known field is `{name}`")),
                None => error,
            });
        }
    }
    Ok(())
}

pub(super) fn conflicting(first: &str, second: &str) -> Error {
    let message = format!("`{first}` and `{second}` mean the same field and are both given");
    Error::invalid("conflicting_fields", second, message).remedy(format!("leave out `{second}`"))
}

pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// Reads `object` as `fields`: canonical names only, types checked, integers as integers. Adds a warning per alias.
pub(super) fn read_object(
    object: &Map<String, Value>,
    fields: &'static [Field],
    path: &str,
    warnings: &mut Vec<String>,
) -> Result<Map<String, Value>> {
    let mut read = Map::new();
    for field in fields {
        let mut found = std::iter::once(&field.name).chain(field.aliases).filter(|name| given(object, name).is_some());
        let Some(name) = found.next() else { continue };
        if let Some(other) = found.next() {
            return Err(conflicting(&join(path, name), &join(path, other)));
        }
        if *name != field.name {
            warnings.push(format!("`{}` was read as `{}`", join(path, name), join(path, field.name)));
        }
        let value = read_value(&object[*name], &field.kind, &join(path, name), warnings)?;
        read.insert(field.name.to_owned(), value);
    }
    Ok(read)
}

/// Reads one value as `kind`.
pub(super) fn read_value(value: &Value, kind: &'static Kind, path: &str, warnings: &mut Vec<String>) -> Result<Value> {
    let wrong = |expected: &str| Err(invalid_type(path, expected, value));
    let item = |index: usize| format!("{path}[{index}]");
    match (kind, value) {
        (Text | IntegerOrText, Value::String(_)) => Ok(value.clone()),
        (Number, Value::Number(_)) => Ok(value.clone()),
        (Boolean, Value::Bool(_)) => Ok(value.clone()),
        (AnyObject, Value::Object(_)) => Ok(value.clone()),
        (Integer | IntegerOrText, Value::Number(number)) => read_integer(number, value, path),
        (IntegerPair, Value::Array(items)) if items.len() == 2 => read_items(items, &Integer, item, warnings),
        (Integers, Value::Array(items)) => read_items(items, &Integer, item, warnings),
        (Numbers, Value::Array(items)) => read_items(items, &Number, item, warnings),
        (Object(fields), Value::Object(object)) => {
            refuse_unknown(object, path, names(fields))?;
            Ok(Value::Object(read_object(object, fields, path, warnings)?))
        }
        (Objects(fields), Value::Array(items)) => {
            let mut read = Vec::new();
            for (index, value) in items.iter().enumerate() {
                let Value::Object(object) = value else {
                    return Err(invalid_type(&item(index), "an object", value));
                };
                refuse_unknown(object, &item(index), names(fields))?;
                read.push(Value::Object(read_object(object, fields, &item(index), warnings)?));
            }
            Ok(Value::Array(read))
        }
        (Text, _) => wrong("a string"),
        (Integer, _) => wrong("an integer"),
        (Number, _) => wrong("a number"),
        (Boolean, _) => wrong("a boolean"),
        (IntegerOrText, _) => wrong("an integer or a string"),
        (IntegerPair, _) => wrong("a list of two integers"),
        (Integers, _) => wrong("a list of integers"),
        (Numbers, _) => wrong("a list of numbers"),
        (AnyObject | Object(_), _) => wrong("an object"),
        (Objects(_), _) => wrong("a list of objects"),
    }
}

fn read_items(
    items: &[Value],
    kind: &'static Kind,
    path: impl Fn(usize) -> String,
    warnings: &mut Vec<String>,
) -> Result<Value> {
    items.iter().enumerate().map(|(index, item)| read_value(item, kind, &path(index), warnings)).collect()
}

/// 30.0 is the integer 30, since some clients know only one kind of number; 30.5 is none.
fn read_integer(number: &serde_json::Number, value: &Value, path: &str) -> Result<Value> {
    const LIMIT: f64 = 9_223_372_036_854_775_808.0; // 2^63
    if let Some(integer) = number.as_i64() {
        return Ok(integer.into());
    }
    match number.as_f64() {
        Some(float) if float.fract() != 0.0 => Err(invalid_type(path, "an integer", value)),
        Some(float) if float.abs() < LIMIT => Ok((float as i64).into()),
        _ => Err(Error::invalid("out_of_range", path, format!("`{path}` must be below 2^63, got {}", describe(value)))
            .remedy(format!("the largest accepted value is {}", i64::MAX))),
    }
}
