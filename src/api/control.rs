//! The `controlnets` of a request: which net, which mode, how much and when.

use serde_json::{Value, json};

use super::preprocessor::Preprocessor;
use super::request::{ControlNetRequest, NumberOrName, PreprocessRequest};
use super::validate::Limits;
use super::wording::{in_range, invalid_value, nearest, shorten};
use crate::error::{Error, ErrorClass, Result};

/// A ControlNet that this worker has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlNetFacts {
    pub name: String,
    /// How many control types a union net has; `None` for a net of one type.
    pub num_control_type: Option<u32>,
}

/// One valid entry of `controlnets`.
#[derive(Debug, Clone, PartialEq)]
pub struct ControlParams {
    /// The net's name on this worker.
    pub model: String,
    /// The control type on a union net; elsewhere `None`.
    pub mode: Option<u32>,
    /// diffusers' `controlnet_conditioning_scale`.
    pub scale: f64,
    /// diffusers' `control_guidance_start` and `_end`: the part of the run in which the control acts.
    pub start: f64,
    pub end: f64,
    pub guess_mode: bool,
    /// How the picture becomes a control map; `None` if it is one.
    pub preprocess: Option<Preprocessor>,
    /// SHA-256 of the picture's file, for the record.
    pub image: String,
}

/// What `scale` means on a union net.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ScaleMode {
    /// As in diffusers: of one control it scales the residuals, of several the net's inputs.
    Diffusers,
    /// The same for one control and several: it scales the residuals, and a control of scale 0 is as if it were not there.
    Residual,
}

impl ScaleMode {
    pub fn name(self) -> &'static str {
        match self {
            ScaleMode::Diffusers => "diffusers",
            ScaleMode::Residual => "residual",
        }
    }

    pub(super) fn from_name(name: &str) -> Result<Self> {
        [ScaleMode::Diffusers, ScaleMode::Residual]
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| invalid_value("scale_mode", &["diffusers", "residual"], name))
    }
}

/// The control types of the union nets, in the order of their numbers: the canonical name first.
const MODES: [&[&str]; 8] = [
    &["openpose", "pose"],
    &["depth"],
    &["hed", "pidi", "scribble", "ted", "softedge", "soft_edge"],
    &["canny", "lineart", "anime_lineart", "mlsd"],
    &["normal", "normalbae", "normal_map"],
    &["segment", "seg", "segmentation"],
    &["tile"],
    &["repaint", "inpaint"],
];

/// The names of a union net's control types, by number.
pub(super) fn mode_names(num_control_type: u32) -> impl Iterator<Item = &'static [&'static str]> {
    MODES.into_iter().take(num_control_type as usize)
}

/// Strong enough to break any picture; a typing error is larger.
const MAX_SCALE: f64 = 10.0;

/// Checks the entries one by one, then what they must agree on. `images` are the pictures' checksums once they are known.
///
/// # Errors
/// `missing_field`, `invalid_value`, `unknown_mode`, `out_of_range`, `controlnet_not_available`, each with the field's path.
pub(super) fn controls(
    requests: Vec<ControlNetRequest>,
    limits: &Limits,
    images: Option<&[String]>,
) -> Result<Vec<ControlParams>> {
    if requests.len() > limits.max_controls {
        let message =
            format!("`controlnets` must have at most {} entries, got {}", limits.max_controls, requests.len());
        return Err(Error::new(ErrorClass::TooLarge, "too_large", message)
            .field("controlnets")
            .remedy("leave controls out, or raise --max-controls"));
    }
    let mut controls: Vec<ControlParams> = Vec::new();
    for (index, request) in requests.into_iter().enumerate() {
        let path = format!("controlnets[{index}]");
        let image = images.map(|images| images[index].clone()).unwrap_or_default();
        let control = control(request, &path, limits, image)?;
        let same_call = |other: &&ControlParams| other.model == control.model && control.mode.is_some();
        if controls.iter().find(same_call).is_some_and(|other| other.guess_mode != control.guess_mode) {
            let message = format!("the controls of the union net {} must agree on `guess_mode`", control.model);
            return Err(Error::invalid("invalid_value", format!("{path}.guess_mode"), message)
                .remedy("they form one call; give all of them the same value"));
        }
        controls.push(control);
    }
    Ok(controls)
}

fn control(request: ControlNetRequest, path: &str, limits: &Limits, image: String) -> Result<ControlParams> {
    let at = |field: &str| format!("{path}.{field}");
    if request.image.is_none() {
        return Err(Error::invalid("missing_field", at("image"), "a control needs an `image`")
            .remedy("give its control map as a URL, a data URI or base64"));
    }
    let net = net(request.model.as_deref(), request.mode.is_some(), &at("model"), limits)?;
    let mode = mode(request.mode, net, &at("mode"))?;
    let scale = in_range(&at("scale"), request.scale.unwrap_or(1.0), 0.0..=MAX_SCALE)?;
    let start = in_range(&at("start"), request.start.unwrap_or(0.0), 0.0..=1.0)?;
    let end = in_range(&at("end"), request.end.unwrap_or(1.0), 0.0..=1.0)?;
    if start >= end {
        let message = format!("the control must end after it starts, got start {start} and end {end}");
        return Err(Error::invalid("out_of_range", at("end"), message).remedy("make `end` larger than `start`"));
    }
    let preprocess = request.preprocess.map(|request| preprocessor(request, &at("preprocess"))).transpose()?;
    Ok(ControlParams {
        model: net.name.clone(),
        mode,
        scale,
        start,
        end,
        guess_mode: request.guess_mode.unwrap_or(false),
        preprocess,
        image,
    })
}

fn preprocessor(request: PreprocessRequest, field: &str) -> Result<Preprocessor> {
    let name = request.name.ok_or_else(|| {
        Error::invalid("missing_field", format!("{field}.name"), "a preprocessor has a `name`")
            .remedy("give its name, such as canny, or leave `preprocess` out")
    })?;
    Preprocessor::from_request(&name, &request.params.unwrap_or_default(), field)
}

/// The net of that name; without a name the first that was configured, of the union nets where a mode is given.
fn net<'a>(name: Option<&str>, has_mode: bool, field: &str, limits: &'a Limits) -> Result<&'a ControlNetFacts> {
    let nets = &limits.controlnets;
    let union = || nets.iter().find(|net| has_mode && net.num_control_type.is_some());
    let found = match name {
        Some(name) => nets.iter().find(|net| net.name == name),
        None => union().or(nets.first()),
    };
    found.ok_or_else(|| {
        let message = match name {
            Some(name) => format!("this worker has no ControlNet {:?}", shorten(name, 80)),
            None => "this worker has no ControlNet".into(),
        };
        let names: Vec<&str> = nets.iter().map(|net| net.name.as_str()).collect();
        let remedy = if names.is_empty() {
            "start the worker with --controlnet NAME=DIR (CONTROLNETS)".into()
        } else {
            format!("choose one of {}, or start the worker with --controlnet NAME=DIR", names.join(", "))
        };
        Error::new(ErrorClass::NotFound, "controlnet_not_available", message).field(field).remedy(remedy)
    })
}

/// The control type's number. A net of one type has none, so a mode given for it says nothing; it must still be one.
fn mode(mode: Option<NumberOrName>, net: &ControlNetFacts, field: &str) -> Result<Option<u32>> {
    let known = net.num_control_type.unwrap_or(MODES.len() as u32);
    let names = || {
        let names =
            MODES.iter().enumerate().take(known as usize).map(|(number, names)| format!("{number} {}", names[0]));
        names.collect::<Vec<_>>().join(", ")
    };
    let Some(mode) = mode else {
        return match net.num_control_type {
            None => Ok(None),
            Some(_) => {
                Err(Error::invalid("missing_field", field, format!("the union net {} needs a `mode`", net.name))
                    .remedy(format!("one of {}", names())))
            }
        };
    };
    let unknown = |given: String, near: Option<&str>| {
        let near = near.map(|name| format!("; did you mean {name}?")).unwrap_or_default();
        let message = format!("the ControlNet {} has no mode {given}", net.name);
        Error::invalid("unknown_mode", field, message).remedy(format!("one of {}{near}", names()))
    };
    let number = match &mode {
        NumberOrName::Number(number) => {
            u32::try_from(*number).ok().filter(|n| *n < known).ok_or_else(|| unknown(number.to_string(), None))?
        }
        NumberOrName::Name(name) => {
            let spelt = name.trim().to_lowercase().replace(['-', ' '], "_");
            // also a number in quotes
            let number = MODES.iter().position(|names| names.contains(&spelt.as_str())).or_else(|| spelt.parse().ok());
            let near = || nearest(&spelt, MODES.iter().flat_map(|names| names.iter().copied()));
            number.filter(|n| *n < known as usize).ok_or_else(|| unknown(format!("{:?}", shorten(name, 40)), near()))?
                as u32
        }
    };
    Ok(net.num_control_type.map(|_| number))
}

impl ControlParams {
    /// The canonical entry of a request. The picture is there by its checksum only.
    pub(super) fn to_json(&self) -> Value {
        let mut entry = json!({ "image": fingerprint(&self.image), "model": self.model });
        if let Some(mode) = self.mode {
            entry["mode"] = MODES[mode as usize][0].into();
        }
        let ControlParams { scale, start, end, guess_mode, .. } = self;
        for (key, value) in [("scale", json!(scale)), ("start", json!(start)), ("end", json!(end))] {
            entry[key] = value;
        }
        entry["guess_mode"] = json!(guess_mode);
        if let Some(preprocess) = &self.preprocess {
            entry["preprocess"] = preprocess.to_json();
        }
        entry
    }

    /// The control type's name, for a report.
    pub fn mode_name(&self) -> Option<&'static str> {
        self.mode.map(|mode| MODES[mode as usize][0])
    }
}

/// How a recorded request names a picture that it does not hold.
pub const FINGERPRINT: &str = "sha256:";

pub(super) fn fingerprint(sha256: &str) -> String {
    format!("{FINGERPRINT}{sha256}")
}
