//! The generation parameters inside a picture, twice: as the text that A1111 writes and other tools read, and as our own
//! request, which makes the picture again.
//!
//! | file | A1111's text | our request |
//! | --- | --- | --- |
//! | PNG | text chunk `parameters` | text chunk `sdxl-worker` |
//! | JPEG, WebP | EXIF `UserComment`, UTF-16 as A1111 writes it | EXIF `ImageDescription`, after `sdxl-worker: ` |
//!
//! A JPEG segment ends at 64 KiB. Parameters that are longer leave A1111's text out and go into comment segments.

use std::io::Cursor;

use anyhow::Context;
use exif::{Field, In, Tag, Value as ExifValue};
use img_parts::jpeg::{Jpeg, JpegSegment, markers};
use img_parts::webp::WebP;
use img_parts::{Bytes, ImageEXIF};
use serde_json::Value;

use crate::api::{ControlParams, GenerateParams, SchedulerKind, effective_request};
use crate::error::{Error, Result};

/// PNG's key for A1111's text.
const PARAMETERS_KEY: &str = "parameters";
/// PNG's key for our request.
const REQUEST_KEY: &str = "sdxl-worker";
/// What precedes our request where there are no keys.
const REQUEST_PREFIX: &str = "sdxl-worker: ";
/// A JPEG segment less its length and the EXIF marker.
const MAX_JPEG_EXIF: usize = 65_535 - 2 - 6;

/// What is written into one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    parameters: String,
    /// JSON in ASCII, since EXIF and PNG's plain text know no Unicode.
    request: String,
}

impl Metadata {
    /// For one picture: `params.seed` is its own seed (see [`GenerateParams::for_image`]). `scheduler` and `model` are
    /// those that acted.
    pub fn new(params: &GenerateParams, scheduler: SchedulerKind, model: &str) -> Self {
        Metadata {
            parameters: a1111_text(params, scheduler, model),
            request: to_ascii(&effective_request(params, scheduler, model).to_string()),
        }
    }

    pub(super) fn add_to_png<W: std::io::Write>(&self, encoder: &mut png::Encoder<W>) -> anyhow::Result<()> {
        for (key, text) in [(PARAMETERS_KEY, &self.parameters), (REQUEST_KEY, &self.request)] {
            // Plain text is Latin-1; as in Pillow, only what needs Unicode takes the other kind of chunk.
            if text.chars().all(|c| u32::from(c) < 256) {
                encoder.add_text_chunk(key.into(), text.clone())?;
            } else {
                encoder.add_itxt_chunk(key.into(), text.clone())?;
            }
        }
        Ok(())
    }

    pub(super) fn add_to_jpeg(&self, bytes: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        let mut jpeg = Jpeg::from_bytes(bytes.into()).context("our own JPEG cannot be read")?;
        let exif = self.exif()?;
        if exif.len() <= MAX_JPEG_EXIF {
            jpeg.set_exif(Some(exif.into()));
        } else {
            let per_segment = 65_000 - REQUEST_PREFIX.len();
            // After the JFIF header, which must be first.
            for (index, part) in self.request.as_bytes().chunks(per_segment).enumerate() {
                let contents = [REQUEST_PREFIX.as_bytes(), part].concat();
                let segment = JpegSegment::new_with_contents(markers::COM, contents.into());
                jpeg.segments_mut().insert(1 + index, segment);
            }
        }
        Ok(jpeg.encoder().bytes().to_vec())
    }

    pub(super) fn add_to_webp(&self, bytes: Vec<u8>) -> anyhow::Result<Vec<u8>> {
        let mut webp = WebP::from_bytes(bytes.into()).context("our own WebP cannot be read")?;
        webp.set_exif(Some(self.exif()?.into()));
        Ok(webp.encoder().bytes().to_vec())
    }

    /// An EXIF block, big-endian as piexif's, with which A1111 writes.
    fn exif(&self) -> anyhow::Result<Vec<u8>> {
        let description = format!("{REQUEST_PREFIX}{}", self.request).into_bytes();
        let mut comment = b"UNICODE\0".to_vec();
        comment.extend(self.parameters.encode_utf16().flat_map(u16::to_be_bytes));
        let field = |tag, value| Field { tag, ifd_num: In::PRIMARY, value };
        let description = field(Tag::ImageDescription, ExifValue::Ascii(vec![description]));
        let comment = field(Tag::UserComment, ExifValue::Undefined(comment, 0));
        let mut writer = exif::experimental::Writer::new();
        writer.push_field(&description);
        writer.push_field(&comment);
        let mut block = Cursor::new(Vec::new());
        writer.write(&mut block, false)?;
        Ok(block.into_inner())
    }
}

/// Our request from a PNG, JPEG or WebP file that this worker made.
///
/// # Errors
///
/// `no_parameters` if the picture has none of ours, `damaged_picture` if it cannot be read so far,
/// `unknown_picture_format` if it is none of the three.
pub fn read_parameters(bytes: &[u8]) -> Result<Value> {
    let found = match bytes {
        [0x89, b'P', b'N', b'G', ..] => from_png(bytes).map_err(damaged)?,
        [0xff, 0xd8, ..] => from_jpeg(bytes).map_err(damaged)?,
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => from_webp(bytes).map_err(damaged)?,
        _ => {
            let message = "the file is no PNG, JPEG or WebP picture";
            return Err(picture_error("unknown_picture_format", message, "give a picture that this worker made"));
        }
    };
    let Some(request) = found else {
        let message = "the picture holds no parameters of this worker";
        let remedy = "give a picture as this worker wrote it: made with `embed_metadata`, not saved again by a tool";
        return Err(picture_error("no_parameters", message, remedy));
    };
    serde_json::from_str(&request).map_err(|error| damaged(error.into()))
}

fn picture_error(code: &'static str, message: &str, remedy: &str) -> Error {
    Error::new(crate::error::ErrorClass::InvalidInput, code, message).remedy(remedy)
}

fn damaged(cause: anyhow::Error) -> Error {
    picture_error("damaged_picture", "the picture is damaged", "give an undamaged copy").source(cause)
}

fn from_png(bytes: &[u8]) -> anyhow::Result<Option<String>> {
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    if let Some(request) = png_text(reader.info())? {
        return Ok(Some(request));
    }
    // Some tools move text behind the pixels.
    reader.finish()?;
    png_text(reader.info())
}

fn png_text(info: &png::Info) -> anyhow::Result<Option<String>> {
    if let Some(chunk) = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == REQUEST_KEY) {
        return Ok(Some(chunk.text.clone()));
    }
    let unicode = info.utf8_text.iter().find(|chunk| chunk.keyword == REQUEST_KEY);
    Ok(unicode.map(|chunk| chunk.get_text()).transpose()?)
}

fn from_jpeg(bytes: &[u8]) -> anyhow::Result<Option<String>> {
    let jpeg = Jpeg::from_bytes(Bytes::copy_from_slice(bytes))?;
    if let Some(request) = jpeg.exif().map(from_exif).transpose()?.flatten() {
        return Ok(Some(request));
    }
    let parts: Vec<&[u8]> = jpeg
        .segments_by_marker(markers::COM)
        .filter_map(|segment| segment.contents().strip_prefix(REQUEST_PREFIX.as_bytes()))
        .collect();
    if parts.is_empty() { Ok(None) } else { Ok(Some(String::from_utf8(parts.concat())?)) }
}

fn from_webp(bytes: &[u8]) -> anyhow::Result<Option<String>> {
    let webp = WebP::from_bytes(Bytes::copy_from_slice(bytes))?;
    Ok(webp.exif().map(from_exif).transpose()?.flatten())
}

fn from_exif(block: Bytes) -> anyhow::Result<Option<String>> {
    let exif = exif::Reader::new().read_raw(block.to_vec())?;
    let Some(ExifValue::Ascii(texts)) = exif.get_field(Tag::ImageDescription, In::PRIMARY).map(|field| &field.value)
    else {
        return Ok(None);
    };
    let request = texts.iter().find_map(|text| text.strip_prefix(REQUEST_PREFIX.as_bytes()));
    Ok(request.map(|request| String::from_utf8(request.to_vec())).transpose()?)
}

/// The same JSON with `\uXXXX` for every other character; outside strings JSON is ASCII already.
fn to_ascii(json: &str) -> String {
    let mut ascii = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            ascii.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                ascii.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    ascii
}

/// The three lines that A1111 writes and many tools read.
fn a1111_text(params: &GenerateParams, scheduler: SchedulerKind, model: &str) -> String {
    let mut lines = vec![params.prompt.clone()];
    if let Some(negative_prompt) = params.negative_prompt.as_ref().filter(|text| !text.is_empty()) {
        lines.push(format!("Negative prompt: {negative_prompt}"));
    }
    let mut settings =
        vec![format!("Steps: {}", params.num_inference_steps), format!("Sampler: {}", scheduler.label())];
    if let Some(schedule) = params.sigma_schedule {
        settings.push(format!("Schedule type: {}", schedule.label()));
    }
    settings.push(format!("CFG scale: {}", params.guidance_scale));
    settings.push(format!("Seed: {}", params.seed));
    settings.push(format!("Size: {}x{}", params.width, params.height));
    settings.push(format!("Model: {}", quoted(model)));
    if let Some(init) = &params.init {
        settings.push(format!("Denoising strength: {}", init.strength));
        if let Some(mask) = init.mask.as_ref().filter(|mask| mask.blur > 0.0) {
            settings.push(format!("Mask blur: {}", mask.blur));
        }
    }
    for (index, control) in params.controls.iter().enumerate() {
        let module = control.preprocess.as_ref().map_or("none", |preprocessor| preprocessor.name());
        let ControlParams { model, scale, start, end, .. } = control;
        let mode = control.mode_name().map(|mode| format!(", Mode: {mode}")).unwrap_or_default();
        let text = format!(
            "Module: {module}, Model: {model}{mode}, Weight: {scale}, Guidance Start: {start}, Guidance End: {end}"
        );
        settings.push(format!("ControlNet {index}: {}", quoted(&text)));
    }
    settings.push(format!("Version: sdxl-worker {}", env!("CARGO_PKG_VERSION")));
    lines.push(settings.join(", "));
    // No text chunk can hold a NUL.
    lines.join("\n").replace('\0', "\u{fffd}")
}

/// A1111 quotes a value that would be taken for several.
fn quoted(text: &str) -> String {
    if text.contains([',', ':', '\n']) { Value::from(text).to_string() } else { text.to_owned() }
}

#[cfg(test)]
#[path = "metadata_tests.rs"]
mod tests;
