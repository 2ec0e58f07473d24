//! The one way to run a job: from the request as JSON to encoded pictures. The command line, the local API and the
//! RunPod worker all call this.

use std::sync::Arc;
use std::time::Instant;

use image::RgbImage;
use serde_json::{Value, json};
use tch::Tensor;

use crate::api::{
    GenerateParams, GenerateResponse, ImageDetails, Limits, OutputFormat, ResponseFormat, SchedulerKind, Timings,
    parse, validate,
};
use crate::context::JobContext;
use crate::engine::Engine;
use crate::error::{Error, ErrorClass, Result};
use crate::inputs::Pictures;
use crate::job::{Job, PictureFile, Reply, Runner, Running};
use crate::media::{self, Metadata};
use crate::net::Downloader;
use crate::pipeline::InputImages;

/// Runs jobs on an engine.
pub struct Handler {
    engine: Engine,
    limits: Limits,
    downloader: Downloader,
}

impl Handler {
    /// What is accepted are the configured limits, with the loaded model's own defaults.
    pub fn new(engine: Engine, configured: Limits, downloader: Downloader) -> Self {
        let facts = engine.facts();
        let limits = Limits {
            default_height: facts.default_height,
            default_width: facts.default_width,
            default_scheduler: facts.default_scheduler,
            models: vec![facts.name.clone()],
            needs_mask: facts.needs_mask,
            controlnets: facts.controlnets.clone(),
            ..configured
        };
        Handler { engine, limits, downloader }
    }

    /// A request of one step for the default size.
    pub fn warm_up(&self) -> Value {
        let mut request = json!({ "prompt": "warm-up", "num_inference_steps": 1, "seed": 0 });
        if self.limits.needs_mask {
            let (width, height) = (self.limits.default_width, self.limits.default_height);
            let white = RgbImage::from_pixel(width, height, image::Rgb([255; 3]));
            let png = media::encode(&white, OutputFormat::Png, 100, None).expect("a white picture can be encoded");
            let white = media::to_base64(&png);
            for (field, value) in [("image", json!(white)), ("mask_image", json!(white)), ("strength", json!(1))] {
                request[field] = value;
            }
        }
        request
    }

    /// Runs the job whose `input` this is, and waits for it. Also gives the latents, float32
    /// `[num_images, 4, h, w]`, before the VAE.
    pub fn generate(&self, input: &Value, context: JobContext) -> Result<(JobOutput, Tensor)> {
        let started = Instant::now();
        let (request, mut warnings) = parse(input)?;
        // what is wrong with the request is told before anything is fetched for it
        let mut params = validate(request.clone(), &self.limits, None)?;
        let mut timings = Timings::default();
        let (mut inputs, mut overlay) = (InputImages::default(), None);
        if let Some(pictures) = Pictures::fetch(&request, &self.downloader, &context)? {
            timings.add("download", started.elapsed());
            let preparing = Instant::now();
            params = validate(request, &self.limits, Some(&pictures.facts()))?;
            (inputs, overlay) = pictures.prepare(&params)?;
            timings.add("prepare_images", preparing.elapsed());
        }
        let generation = self.engine.generate(params.clone(), inputs, context)?;
        timings.extend(generation.timings);
        warnings.extend(generation.warnings);
        let images = generation.images;
        let images = match overlay {
            Some(overlay) => images.iter().map(|part| overlay.paste(part)).collect(),
            None => images,
        };
        let mut output = JobOutput {
            images: Arc::new(images),
            pictures: Vec::new(),
            scheduler: generation.scheduler,
            model: self.engine.facts().name.clone(),
            params,
            timings,
            warnings,
        };
        let encoding = Instant::now();
        output.encode()?;
        output.timings.add("encode_image", encoding.elapsed());
        output.timings.add("total", started.elapsed());
        Ok((output, generation.latents))
    }
}

impl Runner for Arc<Handler> {
    fn run(&self, job: Job, context: JobContext) -> Running {
        let handler = self.clone();
        // The engine's own thread computes; this one waits for it, and encodes the pictures.
        let work = tokio::task::spawn_blocking(move || handler.generate(&job.input, context));
        Box::pin(async move {
            let (output, _) = work.await.map_err(|e| {
                Error::new(ErrorClass::Internal, "internal", "the job failed for a reason of ours").source(e)
            })??;
            Ok(Box::new(output) as Box<dyn Reply>)
        })
    }
}

/// A finished job.
#[derive(Clone)]
pub struct JobOutput {
    /// Kept, so that they can be encoded smaller.
    images: Arc<Vec<RgbImage>>,
    pictures: Vec<Picture>,
    scheduler: SchedulerKind,
    model: String,
    params: GenerateParams,
    timings: Timings,
    warnings: Vec<String>,
}

/// One encoded picture.
#[derive(Clone)]
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

impl JobOutput {
    pub fn pictures(&self) -> &[Picture] {
        &self.pictures
    }

    pub fn timings(&self) -> &Timings {
        &self.timings
    }

    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Encodes every image as `params` say, its own parameters inside.
    fn encode(&mut self) -> Result<()> {
        self.pictures.clear();
        for (index, image) in (0..).zip(self.images.iter()) {
            let own = self.params.for_image(index);
            let GenerateParams { output_format: format, output_quality, embed_metadata, seed, .. } = own;
            let metadata = embed_metadata.then(|| Metadata::new(&own, self.scheduler, &self.model));
            let bytes = media::encode(image, format, output_quality, metadata.as_ref())?;
            let details = ImageDetails { width: image.width(), height: image.height(), format, bytes: bytes.len() };
            self.pictures.push(Picture { seed, bytes, details });
        }
        Ok(())
    }

    /// The reply with these pictures, as data, base64 or links.
    fn response(&self, images: Vec<String>) -> GenerateResponse {
        let details = self.pictures.iter().map(|picture| picture.details.clone()).collect();
        GenerateResponse::new(images, details, self.params.seed, self.timings.clone(), self.warnings.clone())
    }
}

impl Reply for JobOutput {
    fn to_json(&self) -> Value {
        let images = self.pictures.iter().map(|picture| match self.params.response_format {
            ResponseFormat::B64Json => media::to_base64(&picture.bytes),
            ResponseFormat::DataUri | ResponseFormat::Url => media::to_data_uri(picture.format(), &picture.bytes),
        });
        let mut response = self.response(images.collect());
        if self.wants_links() {
            response
                .warnings
                .push("no bucket took the pictures, so they are in the reply (see BUCKET_ENDPOINT_URL)".into());
        }
        serde_json::to_value(response).expect("a reply is JSON")
    }

    fn wants_links(&self) -> bool {
        self.params.response_format == ResponseFormat::Url
    }

    fn pictures(&self) -> Vec<PictureFile> {
        let file = |picture: &Picture| PictureFile { bytes: picture.bytes.clone(), extension: picture.format().name() };
        self.pictures.iter().map(file).collect()
    }

    fn with_links(&self, links: &[String]) -> Value {
        serde_json::to_value(self.response(links.to_vec())).expect("a reply is JSON")
    }

    fn smaller(&self) -> Option<Box<dyn Reply>> {
        let format = match self.params.output_format {
            OutputFormat::Png => OutputFormat::Webp,
            OutputFormat::Webp => OutputFormat::Jpeg,
            OutputFormat::Jpeg => return None,
        };
        let mut smaller = self.clone();
        let (from, to) = (self.params.output_format.name(), format.name());
        smaller.warnings.push(format!("too large for the reply as {from}; encoded as {to}"));
        smaller.params.output_format = format;
        smaller.encode().ok()?;
        Some(Box::new(smaller))
    }
}
