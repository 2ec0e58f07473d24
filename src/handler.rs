//! The one way to run a job: from the request as JSON to encoded pictures. The command line, the local API and the
//! RunPod worker all call this.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use image::RgbImage;
use serde_json::{Value, json};
use tch::Tensor;

use crate::api::{
    Capabilities, GenerateParams, GenerateResponse, ImageDetails, Limits, LoraReport, OutputFormat, ResponseFormat,
    SchedulerKind, Timings, parse, validate,
};
use crate::context::JobContext;
use crate::engine::Engine;
use crate::error::{Error, ErrorClass, Result};
use crate::inputs::{Pictures, wait};
use crate::job::{Job, PictureFile, Reply, Runner, Running};
use crate::lora::Wanted;
use crate::media::{self, Metadata};
use crate::net::{AdapterFiles, Downloader};
use crate::pipeline::InputImages;

/// Where the files come from that a request names.
pub struct Adapters {
    pub loras: AdapterFiles,
    pub textual_inversions: AdapterFiles,
}

/// Runs jobs on an engine.
pub struct Handler {
    engine: Engine,
    limits: Limits,
    downloader: Downloader,
    adapters: Adapters,
    /// What the first reply tells of the start.
    start: Mutex<Timings>,
}

impl Handler {
    /// What is accepted are the configured limits, with the loaded model's own defaults.
    pub fn new(engine: Engine, configured: Limits, downloader: Downloader, adapters: Adapters) -> Self {
        let facts = engine.facts();
        let limits = Limits {
            default_height: facts.default_height,
            default_width: facts.default_width,
            default_scheduler: facts.default_scheduler,
            models: vec![facts.name.clone()],
            needs_image: facts.needs_image,
            needs_mask: facts.needs_mask,
            preset: facts.preset,
            has_embedded_guidance: facts.has_embedded_guidance,
            refiners: facts.refiners.clone(),
            controlnets: facts.controlnets.clone(),
            ..configured
        };
        Handler { engine, limits, downloader, adapters, start: Mutex::default() }
    }

    /// For requests of whoever started the program: they may name any file of this machine.
    pub fn with_any_path(mut self) -> Self {
        self.adapters.loras.allow_any_path();
        self.adapters.textual_inversions.allow_any_path();
        self
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What requests may ask for. Looks for LoRAs on the disk.
    pub fn capabilities(&self) -> Capabilities {
        Capabilities::new(&self.limits, self.adapters.loras.names())
    }

    /// How long the model's parts took to load.
    pub fn load_times(&self) -> &Timings {
        &self.engine.facts().load_times
    }

    /// The next reply tells how long the start took.
    pub fn report_start(&self, phases: Timings) {
        *self.start.lock().expect("nobody panics with it") = phases;
    }

    /// A request of one step for the default size.
    pub fn warm_up(&self) -> Value {
        self.warm_up_at(self.limits.default_width, self.limits.default_height)
    }

    /// The same for another size.
    pub fn warm_up_at(&self, width: u32, height: u32) -> Value {
        let mut request =
            json!({ "prompt": "warm-up", "num_inference_steps": 1, "seed": 0, "width": width, "height": height });
        if self.limits.needs_image || self.limits.needs_mask {
            let white = RgbImage::from_pixel(width, height, image::Rgb([255; 3]));
            let png = media::encode(&white, OutputFormat::Png, 100, None).expect("a white picture can be encoded");
            let white = media::to_base64(&png);
            request["image"] = json!(white);
            request["strength"] = json!(1);
            if self.limits.needs_mask {
                request["mask_image"] = json!(white);
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
        self.fetch_adapters(&mut params, &mut inputs, &context, &mut timings)?;
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
            loras: generation.loras,
        };
        let encoding = Instant::now();
        output.encode()?;
        output.timings.add("encode_image", encoding.elapsed());
        output.timings.add("total", started.elapsed());
        output.timings.extend(std::mem::take(&mut *self.start.lock().expect("nobody panics with it")));
        Ok((output, generation.latents))
    }

    /// The files of the request's LoRAs and textual inversions; the record learns their checksums.
    fn fetch_adapters(
        &self,
        params: &mut GenerateParams,
        inputs: &mut InputImages,
        context: &JobContext,
        timings: &mut Timings,
    ) -> Result<()> {
        let started = Instant::now();
        for (index, lora) in params.loras.iter_mut().enumerate() {
            let field = lora.source.field(&format!("loras[{index}]"));
            let work = self.adapters.loras.fetch(&lora.source, lora.sha256.as_deref(), &field);
            let found = wait(work, context)?;
            lora.sha256 = Some(found.stored.sha256.clone());
            let (sha256, file) = (found.stored.sha256, found.stored.file);
            inputs.loras.push(Wanted { name: found.name, field, scale: lora.scale, sha256, file });
        }
        for (index, one) in params.textual_inversions.iter_mut().enumerate() {
            let field = one.source.field(&format!("textual_inversions[{index}]"));
            let work = self.adapters.textual_inversions.fetch(&one.source, one.sha256.as_deref(), &field);
            let found = wait(work, context)?;
            one.sha256 = Some(found.stored.sha256);
            inputs.textual_inversions.push(found.stored.file);
        }
        if !(inputs.loras.is_empty() && inputs.textual_inversions.is_empty()) {
            timings.add("adapter_fetch", started.elapsed());
        }
        Ok(())
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
    loras: Vec<LoraReport>,
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
        let (timings, warnings) = (self.timings.clone(), self.warnings.clone());
        let response = GenerateResponse::new(images, details, self.params.seed, timings, warnings);
        GenerateResponse { loras: self.loras.clone(), ..response }
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
