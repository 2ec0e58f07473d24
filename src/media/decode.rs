//! Picture files from clients into pixels. What a file claims is believed only as far as its size in pixels, which is
//! checked before anything of that size is allocated.

use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::error::LimitErrorKind;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, ImageResult, Limits, RgbImage};

use crate::error::{Error, ErrorClass, Result};

/// The picture in a PNG, JPEG or WebP file, turned upright as its EXIF says; of an animation the first. `field` is its
/// path in the request.
///
/// # Errors
///
/// `image_format` if it is none of the three, `image_too_large` above `max_pixels`, `image_damaged`.
pub fn decode(bytes: &[u8], max_pixels: u64, field: &str) -> Result<DynamicImage> {
    let format = image::guess_format(bytes).ok();
    let Some(format @ (ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP)) = format else {
        let message = "the picture is no PNG, JPEG or WebP file";
        return Err(Error::invalid("image_format", field, message).remedy("send a PNG, JPEG or WebP file"));
    };
    // The decoders return errors; should one panic after all, it is still the file that is to blame.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode_as(bytes, format, max_pixels)));
    match decoded {
        Ok(Ok(Ok(image))) => Ok(image),
        Ok(Ok(Err(TooLarge { width, height }))) => {
            let message = format!("the picture has {width} x {height} pixels, more than {max_pixels}");
            Err(Error::new(ErrorClass::TooLarge, "image_too_large", message)
                .field(field)
                .remedy("make the picture smaller"))
        }
        Ok(Err(ImageError::Limits(error))) if matches!(error.kind(), LimitErrorKind::InsufficientMemory) => {
            let message = "the picture needs more memory than one of its size should";
            Err(Error::new(ErrorClass::TooLarge, "image_too_large", message)
                .field(field)
                .remedy("make the picture smaller")
                .source(error))
        }
        Ok(Err(error)) => Err(damaged(field).source(error)),
        Err(_) => Err(damaged(field)),
    }
}

struct TooLarge {
    width: u32,
    height: u32,
}

fn decode_as(bytes: &[u8], format: ImageFormat, max_pixels: u64) -> ImageResult<Result<DynamicImage, TooLarge>> {
    let mut limits = Limits::no_limits();
    // Sixteen bits in four channels, twice over, and room for what stands beside the pixels.
    limits.max_alloc = Some(max_pixels.saturating_mul(16).saturating_add(16 << 20));
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits.clone());
    let mut decoder = reader.into_decoder()?;
    let claimed = [decoder.dimensions()].into_iter();
    let hidden = (format == ImageFormat::WebP).then(|| lossy_webp_frames(bytes)).into_iter().flatten();
    if let Some((width, height)) = claimed.chain(hidden).find(|(w, h)| u64::from(*w) * u64::from(*h) > max_pixels) {
        return Ok(Err(TooLarge { width, height }));
    }
    limits.reserve(decoder.total_bytes())?;
    decoder.set_limits(limits)?;
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    image.apply_orientation(orientation);
    Ok(Ok(image))
}

/// Three channels of eight bits, as diffusers' `load_image` has them: alpha is dropped and not blended, grey is repeated,
/// of sixteen bits the upper eight count. Pillow does the last for colour alone; grey of sixteen bits it cuts off at 255,
/// which leaves a white picture, and is not followed here.
pub fn to_rgb(image: DynamicImage) -> RgbImage {
    let sixteen_bits = usize::from(image.color().bytes_per_pixel()) > usize::from(image.color().channel_count());
    if !sixteen_bits {
        return image.into_rgb8();
    }
    let image = image.into_rgb16();
    let (width, height) = image.dimensions();
    let upper_bytes = image.into_raw().into_iter().map(|value| (value >> 8) as u8).collect();
    RgbImage::from_raw(width, height, upper_bytes).expect("as many values as before")
}

/// The sizes of all lossy frames in a WebP file. Its decoder allocates and decodes such a frame before it notices that the
/// file as a whole claimed to be smaller. Found by their bytes, wherever they are: name, length, three bytes, start code.
fn lossy_webp_frames(bytes: &[u8]) -> impl Iterator<Item = (u32, u32)> {
    let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
    bytes.windows(18).filter_map(move |window| match window {
        [b'V', b'P', b'8', b' ', _, _, _, _, _, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1] => {
            Some((side(*w0, *w1), side(*h0, *h1)))
        }
        _ => None,
    })
}

fn damaged(field: &str) -> Error {
    Error::invalid("image_damaged", field, "the picture is damaged").remedy("send an undamaged copy")
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
