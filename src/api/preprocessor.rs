//! How a request says what its photo is to become: a name, and parameters of that name.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// A way from a photo to a control map, with all its parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Preprocessor {
    /// Edges by the size of the gradient, 0 to 2040.
    Canny { low_threshold: u32, high_threshold: u32 },
    /// Rough lines; a lower threshold draws more of them.
    Scribble { threshold: u32 },
    /// Fine lines; the deviation in pixels of the blur they are compared with, and what counts as a line when the typical
    /// strength is measured.
    Lineart { gaussian_sigma: f64, intensity_threshold: f64 },
    /// Broad soft edges; the deviation in pixels of the blur before the gradient.
    SoftEdge { gaussian_sigma: f64 },
    /// The picture with less detail.
    Tile { down_sampling_rate: f64 },
    /// A drawing in dark lines as one in light lines.
    Invert,
}

const NAMES: [&str; 6] = ["canny", "scribble", "lineart", "softedge", "tile", "invert"];

/// What other tools make with a neural net.
const UNAVAILABLE: [&str; 26] = [
    "depth",
    "depth_anything",
    "depth_leres",
    "depth_midas",
    "depth_zoe",
    "leres",
    "midas",
    "zoe",
    "normal",
    "normal_bae",
    "normalbae",
    "normal_map",
    "normal_midas",
    "openpose",
    "openpose_face",
    "openpose_full",
    "openpose_hand",
    "pose",
    "dw_openpose",
    "dw_pose",
    "dwpose",
    "seg",
    "segment",
    "segmentation",
    "sam",
    "oneformer",
];

impl Preprocessor {
    /// Each of them, with the defaults of its parameters.
    pub(super) fn all() -> [Preprocessor; NAMES.len()] {
        NAMES.map(|name| Preprocessor::from_request(name, &Map::new(), "").expect("every name is known"))
    }

    /// Reads `name` and `params`; `field` is the path of the object that holds them. A parameter that is absent or `null`
    /// has its default.
    ///
    /// # Errors
    ///
    /// `preprocessor_unavailable` for maps that need a net, `invalid_value`, `unknown_field`, `out_of_range`.
    pub fn from_request(name: &str, params: &Map<String, Value>, field: &str) -> Result<Preprocessor> {
        let params = Params { given: params, path: format!("{field}.params") };
        let preprocessor = match name.trim().to_lowercase().replace(['-', ' '], "_").as_str() {
            "canny" => {
                params.refuse_others(&["low_threshold", "high_threshold"])?;
                Preprocessor::Canny {
                    low_threshold: params.integer("low_threshold", 100, 0..=2040)?,
                    high_threshold: params.integer("high_threshold", 200, 0..=2040)?,
                }
            }
            "scribble" | "scribble_xdog" => {
                params.refuse_others(&["threshold"])?;
                Preprocessor::Scribble { threshold: params.integer("threshold", 32, 0..=255)? }
            }
            "lineart" | "lineart_standard" => {
                params.refuse_others(&["gaussian_sigma", "intensity_threshold"])?;
                Preprocessor::Lineart {
                    gaussian_sigma: params.number("gaussian_sigma", 6.0, 0.5..=50.0)?,
                    intensity_threshold: params.number("intensity_threshold", 8.0, 0.0..=255.0)?,
                }
            }
            "softedge" | "soft_edge" => {
                params.refuse_others(&["gaussian_sigma"])?;
                Preprocessor::SoftEdge { gaussian_sigma: params.number("gaussian_sigma", 2.0, 0.5..=50.0)? }
            }
            "tile" | "tile_resample" => {
                params.refuse_others(&["down_sampling_rate"])?;
                Preprocessor::Tile { down_sampling_rate: params.number("down_sampling_rate", 1.0, 1.0..=8.0)? }
            }
            "invert" => {
                params.refuse_others(&[])?;
                Preprocessor::Invert
            }
            name if UNAVAILABLE.contains(&name) => {
                let message = format!(
                    "the preprocessor {name} needs a neural net that this worker does not have; depth, normal, pose and \
                     segmentation take ready-made maps"
                );
                return Err(Error::invalid("preprocessor_unavailable", format!("{field}.name"), message)
                    .remedy("send the map itself as the control's `image`, without `preprocess`"));
            }
            _ => {
                let known = NAMES.join(", ");
                let message = format!("`{field}.name` must be one of {known}, got {:?}", shorten(name));
                return Err(Error::invalid("invalid_value", format!("{field}.name"), message)
                    .remedy(format!("choose one of {known}")));
            }
        };
        Ok(preprocessor)
    }

    /// `{"name": ..., "params": {...}}`, from which [`Preprocessor::from_request`] reads the same again.
    pub fn to_json(&self) -> Value {
        let params = match *self {
            Preprocessor::Canny { low_threshold, high_threshold } => {
                json!({"low_threshold": low_threshold, "high_threshold": high_threshold})
            }
            Preprocessor::Scribble { threshold } => json!({"threshold": threshold}),
            Preprocessor::Lineart { gaussian_sigma, intensity_threshold } => {
                json!({"gaussian_sigma": gaussian_sigma, "intensity_threshold": intensity_threshold})
            }
            Preprocessor::SoftEdge { gaussian_sigma } => json!({"gaussian_sigma": gaussian_sigma}),
            Preprocessor::Tile { down_sampling_rate } => json!({"down_sampling_rate": down_sampling_rate}),
            Preprocessor::Invert => json!({}),
        };
        json!({"name": self.name(), "params": params})
    }

    pub fn name(&self) -> &'static str {
        match self {
            Preprocessor::Canny { .. } => "canny",
            Preprocessor::Scribble { .. } => "scribble",
            Preprocessor::Lineart { .. } => "lineart",
            Preprocessor::SoftEdge { .. } => "softedge",
            Preprocessor::Tile { .. } => "tile",
            Preprocessor::Invert => "invert",
        }
    }
}

struct Params<'a> {
    given: &'a Map<String, Value>,
    path: String,
}

impl Params<'_> {
    fn refuse_others(&self, known: &[&str]) -> Result<()> {
        let Some(name) = self.given.keys().find(|name| !known.contains(&name.as_str())) else {
            return Ok(());
        };
        let path = self.path_of(&shorten(name));
        let remedy = match known {
            [] => "leave it out; this preprocessor has no parameters".into(),
            known => format!("its parameters are {}", known.join(", ")),
        };
        let message = format!("`{path}` is not a parameter of this preprocessor");
        Err(Error::invalid("unknown_field", path, message).remedy(remedy))
    }

    fn integer(&self, name: &str, default: u32, range: RangeInclusive<u32>) -> Result<u32> {
        let read = |value: &Value| value.as_f64().filter(|value| value.fract() == 0.0);
        let range = f64::from(*range.start())..=f64::from(*range.end());
        Ok(self.read(name, "an integer", f64::from(default), range, read)? as u32)
    }

    fn number(&self, name: &str, default: f64, range: RangeInclusive<f64>) -> Result<f64> {
        self.read(name, "a number", default, range, Value::as_f64)
    }

    fn read(
        &self,
        name: &str,
        expected: &str,
        default: f64,
        range: RangeInclusive<f64>,
        read: impl Fn(&Value) -> Option<f64>,
    ) -> Result<f64> {
        let Some(value) = self.given.get(name).filter(|value| !value.is_null()) else {
            return Ok(default);
        };
        let (low, high) = (range.start(), range.end());
        let bounds = format!("{expected} from {low} to {high}");
        match read(value) {
            Some(number) if range.contains(&number) => Ok(number),
            Some(number) => Err(self.error("out_of_range", name, &bounds, &number)),
            None => Err(self.error("invalid_type", name, &bounds, &shorten(&value.to_string()))),
        }
    }

    fn error(&self, code: &'static str, name: &str, expected: &str, given: &dyn Display) -> Error {
        let path = self.path_of(name);
        let message = format!("`{path}` must be {expected}, got {given}");
        Error::invalid(code, path, message).remedy(format!("send {expected}, or leave it out"))
    }

    fn path_of(&self, name: &str) -> String {
        format!("{}.{name}", self.path)
    }
}

/// What a caller sent may be megabytes.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
#[path = "preprocessor_tests.rs"]
mod tests;
