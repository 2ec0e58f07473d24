//! The one way to run a job: from the request as JSON to encoded pictures. The command line, the local API and the
//! RunPod worker all call this.

use std::time::Instant;

use serde_json::Value;
use tch::Tensor;

use crate::api::{
    GenerateParams, GenerateResponse, ImageDetails, Limits, OutputFormat, ResponseFormat, Timings, parse, validate,
};
use crate::context::JobContext;
use crate::engine::Engine;
use crate::error::Result;
use crate::media::{self, Metadata};

/// A finished job.
pub struct JobOutput {
    pub pictures: Vec<Picture>,
    /// float32 `[num_images, 4, h, w]`, before the VAE.
    pub latents: Tensor,
    timings: Timings,
    warnings: Vec<String>,
    seed: u64,
    response_format: ResponseFormat,
}

/// One encoded picture.
pub struct Picture {
    pub seed: u64,
    pub bytes: Vec<u8>,
    details: ImageDetails,
}

impl Picture {
    pub fn format(&self) -> OutputFormat {
        self.details.format
    }
}

/// Runs the job whose `input` this is.
pub fn run(engine: &Engine, input: &Value, limits: &Limits, context: JobContext) -> Result<JobOutput> {
    let started = Instant::now();
    let (request, mut warnings) = parse(input)?;
    let params = validate(request, limits)?;
    let generation = engine.generate(params.clone(), context)?;
    warnings.extend(generation.warnings);
    let mut timings = generation.timings;

    let encoding = Instant::now();
    let mut pictures = Vec::new();
    for (index, image) in (0..).zip(&generation.images) {
        let own = params.for_image(index);
        let GenerateParams { output_format: format, output_quality, embed_metadata, seed, .. } = own;
        let metadata = embed_metadata.then(|| Metadata::new(&own, generation.scheduler, &engine.facts().name));
        let bytes = media::encode(image, format, output_quality, metadata.as_ref())?;
        let details = ImageDetails { width: image.width(), height: image.height(), format, bytes: bytes.len() };
        pictures.push(Picture { seed, bytes, details });
    }
    timings.add("encode_image", encoding.elapsed());
    timings.add("total", started.elapsed());
    let (seed, response_format) = (params.seed, params.response_format);
    Ok(JobOutput { pictures, latents: generation.latents, timings, warnings, seed, response_format })
}

/// What this worker accepts: the configured limits, with the loaded model's own defaults.
pub fn limits(engine: &Engine, max_pixels: u64, max_num_images: u32) -> Limits {
    let facts = engine.facts();
    Limits {
        default_height: facts.default_height,
        default_width: facts.default_width,
        default_scheduler: facts.default_scheduler,
        models: vec![facts.name.clone()],
        max_pixels,
        max_num_images,
        ..Limits::default()
    }
}

impl JobOutput {
    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The reply, with the pictures inside.
    pub fn into_response(self) -> GenerateResponse {
        let images = self.pictures.iter().map(|picture| match self.response_format {
            ResponseFormat::B64Json => media::to_base64(&picture.bytes),
            ResponseFormat::DataUri | ResponseFormat::Url => media::to_data_uri(picture.format(), &picture.bytes),
        });
        let images = images.collect();
        let details = self.pictures.into_iter().map(|picture| picture.details).collect();
        GenerateResponse::new(images, details, self.seed, self.timings, self.warnings)
    }
}
