//! The reply. Every key is always there, in this order, so that a caller need not ask which are.

use std::time::Duration;

use serde::{Serialize, Serializer};

use super::lora::LoraReport;
use super::params::OutputFormat;

/// What a finished job answers.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct GenerateResponse {
    /// Data URIs, bare base64 or links, as `response_format` asked.
    pub images: Vec<String>,
    /// The first image, for clients of other workers.
    pub image_url: String,
    /// The first image's seed.
    pub seed: u64,
    /// One for each image.
    pub seeds: Vec<u64>,
    /// One for each image.
    pub image_details: Vec<ImageDetails>,
    #[schemars(with = "std::collections::BTreeMap<String, f64>")]
    pub timings: Timings,
    /// Aliases that were read, and other things a caller may want to change.
    pub warnings: Vec<String>,
    /// What became of each LoRA that was asked for.
    pub loras: Vec<LoraReport>,
    /// This worker's.
    pub version: String,
}

/// One image file. `bytes` is the file's size before base64.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct ImageDetails {
    pub width: u32,
    pub height: u32,
    #[serde(serialize_with = "format_name")]
    #[schemars(with = "String")]
    pub format: OutputFormat,
    pub bytes: usize,
}

fn format_name<S: Serializer>(format: &OutputFormat, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(format.name())
}

/// Milliseconds by phase, in the order in which the phases ran.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Timings(Vec<(&'static str, f64)>);

impl Timings {
    /// Adds to a phase; a phase that runs once per image is one sum.
    pub fn add(&mut self, phase: &'static str, duration: Duration) {
        let milliseconds = duration.as_secs_f64() * 1000.0;
        match self.0.iter_mut().find(|(name, _)| *name == phase) {
            Some((_, sum)) => *sum += milliseconds,
            None => self.0.push((phase, milliseconds)),
        }
    }

    /// Adds the phases that ran after these.
    pub fn extend(&mut self, later: Timings) {
        self.0.extend(later.0);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        self.0.iter().copied()
    }
}

impl Serialize for Timings {
    /// A map, rounded to microseconds.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer
            .collect_map(self.iter().map(|(phase, milliseconds)| (phase, (milliseconds * 1000.0).round() / 1000.0)))
    }
}

impl GenerateResponse {
    /// The reply for images of the seeds `seed`, `seed + 1`, ...
    pub fn new(
        images: Vec<String>,
        image_details: Vec<ImageDetails>,
        seed: u64,
        timings: Timings,
        warnings: Vec<String>,
    ) -> Self {
        GenerateResponse {
            image_url: images.first().cloned().unwrap_or_default(),
            seed,
            seeds: (seed..).take(images.len()).collect(),
            images,
            image_details,
            timings,
            warnings,
            loras: Vec::new(),
            version: env!("CARGO_PKG_VERSION").into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reply_has_every_key_in_the_contract_s_order() {
        let mut timings = Timings::default();
        timings.add("encode_prompt", Duration::from_micros(1500));
        timings.add("denoise", Duration::from_secs(2));
        timings.add("decode", Duration::from_micros(500));
        timings.add("decode", Duration::from_micros(250));
        let details = ImageDetails { width: 64, height: 128, format: OutputFormat::Jpeg, bytes: 3 };
        let images = vec!["data:image/jpeg;base64,AAAA".to_owned(), "data:image/jpeg;base64,BBBB".to_owned()];
        let reply = GenerateResponse::new(images, vec![details.clone(), details], 7, timings, vec!["w".into()]);
        let expected = concat!(
            r#"{"images":["data:image/jpeg;base64,AAAA","data:image/jpeg;base64,BBBB"],"#,
            r#""image_url":"data:image/jpeg;base64,AAAA","seed":7,"seeds":[7,8],"image_details":["#,
            r#"{"width":64,"height":128,"format":"jpeg","bytes":3},{"width":64,"height":128,"format":"jpeg","bytes":3}],"#,
            r#""timings":{"encode_prompt":1.5,"denoise":2000.0,"decode":0.75},"warnings":["w"],"loras":[],"version":"#,
        );
        let json = serde_json::to_string(&reply).unwrap();
        assert_eq!(json, format!("{expected}\"{}\"}}", env!("CARGO_PKG_VERSION")));
    }
}
