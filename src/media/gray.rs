//! From colour to grey.

use image::{GrayImage, Rgb, RgbImage};

/// Pillow's `image.convert("L")`: ITU-R 601 luma.
pub fn to_grayscale(image: &RgbImage) -> GrayImage {
    let mut result = GrayImage::new(image.width(), image.height());
    for (out, Rgb([red, green, blue])) in result.iter_mut().zip(image.pixels()) {
        let luma = u32::from(*red) * 19_595 + u32::from(*green) * 38_470 + u32::from(*blue) * 7_471;
        *out = ((luma + 0x8000) >> 16) as u8;
    }
    result
}

#[cfg(test)]
mod tests {
    use super::super::test_pictures::{assert_checksum, cases, picture};
    use super::*;

    #[test]
    fn luma_is_pillow_s() {
        for case in cases("gray") {
            assert_checksum(&to_grayscale(&picture(&case["from"])), &case);
        }
    }
}
