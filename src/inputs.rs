//! The pictures that a request names: fetched, decoded and brought to the size that the pipeline works at. No torch here,
//! so all of it happens beside the engine's thread.

use std::future::Future;
use std::time::Duration;

use image::{GrayImage, RgbImage};
use sha2::{Digest, Sha256};
use tokio::runtime::{Builder, Handle};
use tokio::time::sleep;

use crate::api::{ControlParams, FINGERPRINT, GenerateParams, GenerateRequest, PictureFacts};
use crate::context::JobContext;
use crate::error::{Error, Result};
use crate::media;
use crate::net::Downloader;
use crate::pipeline::InputImages;

/// Of one file; a photo of the size below has less.
const MAX_BYTES: u64 = 64 << 20;

/// A request's pictures as they came.
pub struct Pictures {
    image: Option<Picture>,
    mask_image: Option<Picture>,
    controls: Vec<Picture>,
}

struct Picture {
    pixels: RgbImage,
    sha256: String,
}

/// What is left to do when the pipeline's picture is there: with `padding_mask_crop` it is a part of a larger one.
pub struct Overlay {
    image: RgbImage,
    mask: GrayImage,
    crop: [i64; 4],
}

impl Pictures {
    /// Fetches every picture that the request names; `None` if it names none. Ends early when the job is cancelled.
    ///
    /// # Errors
    /// Those of [`Downloader::load`] and [`media::decode`]; `picture_needed` for one that is named by its checksum;
    /// `mask_size` for a mask that does not have the picture's size.
    pub fn fetch(request: &GenerateRequest, downloader: &Downloader, context: &JobContext) -> Result<Option<Pictures>> {
        let fetch = |source: Option<&String>, field: &str| {
            source.map(|source| Picture::fetch(source, field, downloader, context)).transpose()
        };
        let image = fetch(request.image.as_ref(), "image")?;
        let mask_image = fetch(request.mask_image.as_ref(), "mask_image")?;
        let mut controls = Vec::new();
        for (index, control) in request.controlnets.iter().enumerate() {
            controls.extend(fetch(control.image.as_ref(), &format!("controlnets[{index}].image"))?);
        }
        if image.is_none() && controls.is_empty() {
            return Ok(None);
        }
        if let (Some(image), Some(mask)) = (&image, &mask_image)
            && image.pixels.dimensions() != mask.pixels.dimensions()
        {
            let ((width, height), (mask_width, mask_height)) = (image.pixels.dimensions(), mask.pixels.dimensions());
            let message = format!("the mask is {mask_width} x {mask_height}, the picture {width} x {height}");
            return Err(Error::invalid("mask_size", "mask_image", message)
                .remedy("give a mask of the picture's size, white where it is to be repainted"));
        }
        Ok(Some(Pictures { image, mask_image, controls }))
    }

    pub fn facts(&self) -> PictureFacts {
        let first = self.image.as_ref().or(self.controls.first()).expect("there is one, or `fetch` gives none");
        let sha256 = |picture: &Picture| picture.sha256.clone();
        PictureFacts {
            size: (first.pixels.height(), first.pixels.width()),
            image: self.image.as_ref().map(sha256).unwrap_or_default(),
            mask_image: self.mask_image.as_ref().map(sha256).unwrap_or_default(),
            controls: self.controls.iter().map(sha256).collect(),
        }
    }

    /// Brings every picture to the request's size, as diffusers' image processors do: crop, Lanczos, and for the mask
    /// blur, grey and threshold. Photos become control maps last, so that thin lines stay whole.
    ///
    /// # Errors
    /// `empty_mask`, where the work is to be limited to what is masked.
    pub fn prepare(self, params: &GenerateParams) -> Result<(InputImages, Option<Overlay>)> {
        let Pictures { image, mask_image, controls } = self;
        let (width, height) = (params.width, params.height);
        let options = params.init.as_ref().and_then(|init| init.mask.as_ref());
        let mask = mask_image.zip(options).map(|(mask, options)| match options.blur {
            0.0 => mask.pixels,
            radius => media::gaussian_blur(&mask.pixels, radius as f32),
        });
        let mut crop = None;
        if let (Some(mask), Some(padding)) = (&mask, options.and_then(|options| options.padding_crop)) {
            crop = Some(media::crop_region(&media::to_grayscale(mask), width, height, padding).ok_or_else(|| {
                Error::invalid("empty_mask", "mask_image", "the mask is black: there is nothing to repaint")
                    .remedy("make white what is to be repainted, or leave `padding_mask_crop` out")
            })?);
        }
        let fit = |picture: &RgbImage| match crop {
            Some(crop) => media::resize_and_fill(&media::crop(picture, crop), width, height),
            None => media::resize(picture, width, height),
        };
        let maps = |fit: &dyn Fn(&RgbImage) -> RgbImage| {
            let map = |(picture, control): (&Picture, &ControlParams)| {
                let map = fit(&picture.pixels);
                match &control.preprocess {
                    Some(preprocessor) => media::preprocess(&map, preprocessor),
                    None => map,
                }
            };
            controls.iter().zip(&params.controls).map(map).collect()
        };
        let inputs = InputImages {
            image: image.as_ref().map(|image| fit(&image.pixels)),
            mask: mask.as_ref().map(|mask| media::to_grayscale(&fit(mask))),
            controls: maps(&fit),
            hires_controls: match &params.hires {
                Some(hires) => maps(&|picture| media::resize(picture, hires.width, hires.height)),
                None => Vec::new(),
            },
            ..InputImages::default()
        };
        let overlay = match (image, mask, crop) {
            (Some(image), Some(mask), Some(crop)) => {
                Some(Overlay { image: image.pixels, mask: media::to_grayscale(&mask), crop })
            }
            _ => None,
        };
        Ok((inputs, overlay))
    }
}

impl Picture {
    fn fetch(source: &str, field: &str, downloader: &Downloader, context: &JobContext) -> Result<Picture> {
        if source.starts_with(FINGERPRINT) {
            let message = "the picture is named by its checksum only";
            return Err(Error::invalid("picture_needed", field, message)
                .remedy("give the picture itself: a URL, a data URI or base64"));
        }
        let file = wait(downloader.load(source, field, MAX_BYTES), context)?;
        let decoded = media::decode(&file.bytes, media::MAX_INPUT_PIXELS, field)?;
        let sha256 = Sha256::digest(&file.bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Picture { pixels: media::to_rgb(decoded), sha256 })
    }
}

impl Overlay {
    /// Puts the part that was made into the picture it belongs to, where the mask lets it show.
    pub fn paste(&self, part: &RgbImage) -> RgbImage {
        media::apply_overlay(&self.mask, &self.image, part, self.crop)
    }
}

/// Waits for `work` on this thread, which may block; gives up when the job is cancelled.
pub(crate) fn wait<T>(work: impl Future<Output = Result<T>>, context: &JobContext) -> Result<T> {
    let cancelled = async {
        while !context.is_cancelled() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    let work = async {
        tokio::select! {
            result = work => result,
            () = cancelled => Err(context.check_cancelled().expect_err("it was cancelled")),
        }
    };
    match Handle::try_current() {
        Ok(runtime) => runtime.block_on(work),
        // on the command line nobody else needs one
        Err(_) => Builder::new_current_thread().enable_all().build().map_err(anyhow::Error::from)?.block_on(work),
    }
}
