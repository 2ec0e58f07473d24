//! What inpainting does with pixels outside the model, as in diffusers: which part of the picture is worked on, and how
//! it is put back.

use image::{GrayImage, Luma, RgbImage, imageops};

use super::fit::resize_and_crop;

/// diffusers' `get_crop_region`: the masked part with `pad` pixels around, widened to the shape of `width` x `height` as
/// far as the mask reaches. `[left, top, right, bottom]`; `None` if nothing is masked, where diffusers goes on with
/// nonsense.
pub fn crop_region(mask: &GrayImage, width: u32, height: u32, pad: u32) -> Option<[i64; 4]> {
    let masked = mask.enumerate_pixels().filter(|(_, _, Luma([value]))| *value != 0);
    let [left, top, right, bottom] = masked.fold(None, |bounds: Option<[u32; 4]>, (x, y, _)| {
        let [left, top, right, bottom] = bounds.unwrap_or([x, y, x, y]);
        Some([left.min(x), top.min(y), right.max(x), bottom.max(y)])
    })?;
    let (full_width, full_height) = (i64::from(mask.width()), i64::from(mask.height()));
    let pad = i64::from(pad);
    let (left, right) = ((i64::from(left) - pad).max(0), (i64::from(right) + 1 + pad).min(full_width));
    let (top, bottom) = ((i64::from(top) - pad).max(0), (i64::from(bottom) + 1 + pad).min(full_height));

    let wanted = f64::from(width) / f64::from(height);
    let (region_width, region_height) = (right - left, bottom - top);
    if region_width as f64 / region_height as f64 > wanted {
        let missing = (region_width as f64 / wanted - region_height as f64) as i64;
        let (top, bottom) = widen(top, bottom, missing, full_height);
        Some([left, top, right, bottom])
    } else {
        let missing = (region_height as f64 * wanted - region_width as f64) as i64;
        let (left, right) = widen(left, right, missing, full_width);
        Some([left, top, right, bottom])
    }
}

/// Adds `missing` to both ends, moved so that neither lies outside 0 to `limit`, and cut where that is not enough.
fn widen(start: i64, end: i64, missing: i64, limit: i64) -> (i64, i64) {
    let (mut start, mut end) = (start - missing / 2, end + missing - missing / 2);
    let above = (end - limit).max(0);
    (start, end) = (start - above, end - above);
    let below = (-start).max(0);
    (start + below, (end + below).min(limit))
}

/// Pillow's `image.crop(region)` for `[left, top, right, bottom]`: black outside the picture.
pub fn crop(image: &RgbImage, region: [i64; 4]) -> RgbImage {
    let [left, top, right, bottom] = region;
    let mut result = RgbImage::new((right - left) as u32, (bottom - top) as u32);
    imageops::replace(&mut result, image, -left, -top);
    result
}

/// diffusers' `apply_overlay` with `crop_coords`: `image` scaled into `region` of the original, and around it the original
/// where `mask` is black. `mask` has the original's size.
pub fn apply_overlay(mask: &GrayImage, original: &RgbImage, image: &RgbImage, region: [i64; 4]) -> RgbImage {
    let [left, top, right, bottom] = region;
    let inner = resize_and_crop(image, (right - left) as u32, (bottom - top) as u32);
    let mut result = RgbImage::new(original.width(), original.height());
    imageops::replace(&mut result, &inner, left, top);
    for ((below, above), Luma([masked])) in result.pixels_mut().zip(original.pixels()).zip(mask.pixels()) {
        let alpha = 255 - u32::from(*masked);
        for (below, above) in below.0.iter_mut().zip(above.0) {
            *below = composite(*below, above, alpha);
        }
    }
    result
}

/// `above` with this alpha over `below`, by way of Pillow's `RGBa`: multiplied by alpha, divided by it again, and blended
/// with seven more bits.
fn composite(below: u8, above: u8, alpha: u32) -> u8 {
    if alpha == 0 {
        return below;
    }
    let premultiplied = divided_by_255(u32::from(above) * alpha + 128);
    let straight = (255 * premultiplied / alpha).min(255);
    let sum = (straight * alpha + u32::from(below) * (255 - alpha)) << 7;
    (divided_by_255(sum + (128 << 7)) >> 7) as u8
}

/// Pillow's division, exact enough where half of 255 has been added before.
fn divided_by_255(value: u32) -> u32 {
    ((value >> 8) + value) >> 8
}

#[cfg(test)]
#[path = "inpaint_tests.rs"]
mod tests;
