//! A picture into a size of another shape without distortion, as the resize modes of diffusers' `VaeImageProcessor`.

use image::{RgbImage, imageops};

use super::resample::{Filter, resize, resize_area};

/// diffusers' `resize_mode="crop"`: the picture covers the size and loses what stands out.
pub(super) fn resize_and_crop(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let follow_width = ratio(width, height) > ratio(image.width(), image.height());
    let resized = resize_to_side(image, width, height, follow_width);
    centered(&resized, width, height)
}

/// diffusers' `resize_mode="fill"`: the whole picture in the middle, its outermost lines drawn out to the border.
pub fn resize_and_fill(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let (wanted, given) = (ratio(width, height), ratio(image.width(), image.height()));
    let resized = resize_to_side(image, width, height, wanted < given);
    let mut result = centered(&resized, width, height);

    let (inner_width, inner_height) = resized.dimensions();
    let bars_height = height / 2 - inner_height / 2;
    let bars_width = width / 2 - inner_width / 2;
    if wanted < given && bars_height > 0 {
        let bar = |y| resize_area(&resized, width, bars_height, [0, y, width, y], Filter::Bicubic);
        imageops::replace(&mut result, &bar(0), 0, 0);
        imageops::replace(&mut result, &bar(inner_height), 0, i64::from(bars_height + inner_height));
    } else if wanted > given && bars_width > 0 {
        let bar = |x| resize_area(&resized, bars_width, height, [x, 0, x, height], Filter::Bicubic);
        imageops::replace(&mut result, &bar(0), 0, 0);
        imageops::replace(&mut result, &bar(inner_width), i64::from(bars_width + inner_width), 0);
    }
    result
}

fn ratio(width: u32, height: u32) -> f64 {
    f64::from(width) / f64::from(height)
}

/// Takes one side from the size and the other, rounded down, from the picture's shape. It is at least 1, where diffusers
/// fails.
fn resize_to_side(image: &RgbImage, width: u32, height: u32, follow_width: bool) -> RgbImage {
    let scaled = |side: u32, numerator: u32, denominator: u32| {
        let side = u64::from(side) * u64::from(numerator) / u64::from(denominator);
        side.max(1) as u32
    };
    if follow_width {
        resize(image, width, scaled(image.height(), width, image.width()))
    } else {
        resize(image, scaled(image.width(), height, image.height()), height)
    }
}

/// On black, with what stands out cut off.
fn centered(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    let offset = |outer: u32, inner: u32| i64::from(outer / 2) - i64::from(inner / 2);
    let mut result = RgbImage::new(width, height);
    imageops::replace(&mut result, image, offset(width, image.width()), offset(height, image.height()));
    result
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
