//! From pixels to a file's bytes, and from there to text for JSON. The pixels of a file do not depend on whether it
//! carries metadata.

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;

use super::metadata::Metadata;
use crate::api::OutputFormat;
use crate::error::{Error, ErrorClass, Result};

/// One image file. `quality`, 0 to 100, acts on JPEG and WebP; PNG is lossless.
///
/// # Errors
///
/// `encoding_failed`: a fault of ours, since a valid request has no image that these formats cannot hold.
pub fn encode(image: &RgbImage, format: OutputFormat, quality: u8, metadata: Option<&Metadata>) -> Result<Vec<u8>> {
    let encoded = match format {
        OutputFormat::Png => encode_png(image, metadata),
        OutputFormat::Jpeg => encode_jpeg(image, quality, metadata),
        OutputFormat::Webp => encode_webp(image, quality, metadata),
    };
    encoded.map_err(|error| {
        let (width, height) = image.dimensions();
        let message = format!("the image of {width} x {height} could not be written as {}", format.name());
        Error::new(ErrorClass::Internal, "encoding_failed", message)
            .remedy("ask for another `output_format`")
            .source(error)
    })
}

/// The crate's fast setting: milliseconds for a megapixel where the default takes hundreds, and for a picture with
/// natural noise the file is about 1 % larger.
fn encode_png(image: &RgbImage, metadata: Option<&Metadata>) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(image.len() + 4096);
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    if let Some(metadata) = metadata {
        metadata.add_to_png(&mut encoder)?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image)?;
    writer.finish()?;
    Ok(bytes)
}

fn encode_jpeg(image: &RgbImage, quality: u8, metadata: Option<&Metadata>) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(image.len() / 4);
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, quality).encode_image(image)?;
    match metadata {
        Some(metadata) => metadata.add_to_jpeg(bytes),
        None => Ok(bytes),
    }
}

fn encode_webp(image: &RgbImage, quality: u8, metadata: Option<&Metadata>) -> anyhow::Result<Vec<u8>> {
    let encoder = webp::Encoder::from_rgb(image, image.width(), image.height());
    let bytes = encoder
        .encode_simple(false, f32::from(quality))
        .map_err(|error| anyhow::anyhow!("{error:?}"))
        .context("libwebp refused the image")?
        .to_vec();
    match metadata {
        Some(metadata) => metadata.add_to_webp(bytes),
        None => Ok(bytes),
    }
}

pub fn to_base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// `data:image/png;base64,...`
pub fn to_data_uri(format: OutputFormat, bytes: &[u8]) -> String {
    let mut uri = format!("data:image/{};base64,", format.name());
    STANDARD.encode_string(bytes, &mut uri);
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> RgbImage {
        RgbImage::from_fn(128, 72, |x, y| image::Rgb([(x * y) as u8, (x * 7 % 251) as u8, (y * 13 % 241) as u8]))
    }

    #[test]
    fn every_format_keeps_the_size_and_roughly_the_colours() {
        let mean = |image: &RgbImage| image.iter().map(|v| f64::from(*v)).sum::<f64>() / image.len() as f64;
        for format in [OutputFormat::Png, OutputFormat::Jpeg, OutputFormat::Webp] {
            let bytes = encode(&image(), format, 95, None).unwrap();
            let decoded = image::load_from_memory(&bytes).unwrap().into_rgb8();
            assert_eq!(decoded.dimensions(), (128, 72));
            assert!((mean(&decoded) - mean(&image())).abs() < 2.0, "{format:?}");
            assert_eq!(decoded == image(), format == OutputFormat::Png, "{format:?}");
        }
    }

    #[test]
    fn quality_acts_on_the_lossy_formats_alone() {
        let size = |format, quality| encode(&image(), format, quality, None).unwrap().len();
        for format in [OutputFormat::Jpeg, OutputFormat::Webp] {
            assert!(size(format, 0) < size(format, 50) && size(format, 50) < size(format, 100), "{format:?}");
        }
        assert_eq!(size(OutputFormat::Png, 0), size(OutputFormat::Png, 100));
    }

    #[test]
    fn a_data_uri_names_the_media_type_and_holds_the_bytes() {
        assert_eq!(to_data_uri(OutputFormat::Webp, b"\xff\x00a"), "data:image/webp;base64,/wBh");
        assert_eq!(to_base64(b"ab"), "YWI=");
    }
}
