//! Resizing as Pillow 13 does it, byte for byte: diffusers resizes every picture, mask and control map with it.
//!
//! One pass for each direction, with eight bits between the two. A pass is a sum of pixels under weights in fixed point,
//! and which direction goes first shows in the last bit. `Resample.c` in Pillow is the source of all of it.

use std::f64::consts::PI;

use image::{RgbImage, imageops};

/// Fraction bits of a weight: a sum of eight-bit values under weights that add up to 1 fits an `i32`, overshoot included.
const PRECISION_BITS: u32 = 22;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Filter {
    Box,
    /// Pillow's default.
    Bicubic,
    /// diffusers' default.
    Lanczos,
}

impl Filter {
    /// Half the width of the filter, in pixels of the larger scale.
    fn support(self) -> f64 {
        match self {
            Filter::Box => 0.5,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Filter::Box if x > -0.5 && x <= 0.5 => 1.0,
            Filter::Bicubic => bicubic(x.abs()),
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Box | Filter::Lanczos => 0.0,
        }
    }
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}

/// The pixels of the input that make one pixel of the output.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// Pillow's `image.resize((width, height), LANCZOS)`. The sides are 1 or more.
pub fn resize(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    resize_area(image, width, height, [0, 0, image.width(), image.height()], Filter::Lanczos)
}

/// Pillow's `image.resize((width, height), filter, area)`, where `area` is `[left, top, right, bottom]` within the image.
/// An area without width or height is a line between two pixels, and the result repeats what lies there.
pub(super) fn resize_area(image: &RgbImage, width: u32, height: u32, area: [u32; 4], filter: Filter) -> RgbImage {
    let [left, top, right, bottom] = area;
    if (right - left, bottom - top) == (width, height) {
        return imageops::crop_imm(image, left, top, width, height).to_image();
    }
    let (from_width, from_height) = image.dimensions();
    let columns =
        ((from_width, left, right) != (width, 0, width)).then(|| windows(from_width, left, right, width, filter));
    let rows =
        ((from_height, top, bottom) != (height, 0, height)).then(|| windows(from_height, top, bottom, height, filter));

    // Down first where the height shrinks by more than twice what the width does; new in Pillow 13.
    let lost_rows = i64::from(from_height) - i64::from(height);
    let lost_columns = i64::from(from_width) - i64::from(width);
    match (columns, rows) {
        (Some(columns), Some(rows)) if lost_rows > 0 && lost_rows > 2 * lost_columns => {
            across(&down(image, &rows), &columns)
        }
        (Some(columns), Some(rows)) => down(&across(image, &columns), &rows),
        (Some(columns), None) => across(image, &columns),
        (None, Some(rows)) => down(image, &rows),
        (None, None) => image.clone(),
    }
}

/// One window for each of the `to` pixels along a side of `from` pixels, of which those between `start` and `end` count.
fn windows(from: u32, start: u32, end: u32, to: u32, filter: Filter) -> Vec<Window> {
    let scale = f64::from(end - start) / f64::from(to);
    let filter_scale = scale.max(1.0);
    let inverse = 1.0 / filter_scale;
    let support = filter.support() * filter_scale;
    let window = |index: u32| {
        let center = f64::from(start) + (f64::from(index) + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as u32;
        let last = ((center + support + 0.5) as u32).min(from);
        let weights: Vec<f64> = (first..last).map(|x| filter.weight((f64::from(x) - center + 0.5) * inverse)).collect();
        let sum: f64 = weights.iter().sum();
        let weights = weights.iter().map(|weight| fixed_point(if sum == 0.0 { *weight } else { weight / sum }));
        Window { first: first as usize, weights: weights.collect() }
    };
    (0..to).map(window).collect()
}

/// Rounds halves away from zero.
fn fixed_point(weight: f64) -> i32 {
    (weight * f64::from(1 << PRECISION_BITS) + 0.5_f64.copysign(weight)) as i32
}

fn to_byte(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// The horizontal pass.
fn across(image: &RgbImage, columns: &[Window]) -> RgbImage {
    let mut result = RgbImage::new(columns.len() as u32, image.height());
    for (row, out) in rows(image).zip(result.chunks_exact_mut(3 * columns.len())) {
        for (window, out) in columns.iter().zip(out.as_chunks_mut::<3>().0) {
            let mut sums = [1 << (PRECISION_BITS - 1); 3];
            for (pixel, weight) in row.as_chunks::<3>().0[window.first..].iter().zip(&window.weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += i32::from(*value) * weight;
                }
            }
            *out = sums.map(to_byte);
        }
    }
    result
}

/// The vertical pass.
fn down(image: &RgbImage, rows: &[Window]) -> RgbImage {
    let length = 3 * image.width() as usize;
    let mut result = RgbImage::new(image.width(), rows.len() as u32);
    let mut sums = vec![0; length];
    for (window, out) in rows.iter().zip(result.chunks_exact_mut(length)) {
        sums.fill(1 << (PRECISION_BITS - 1));
        for (row, weight) in image.chunks_exact(length).skip(window.first).zip(&window.weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += i32::from(*value) * weight;
            }
        }
        for (out, sum) in out.iter_mut().zip(&sums) {
            *out = to_byte(*sum);
        }
    }
    result
}

fn rows(image: &RgbImage) -> impl Iterator<Item = &[u8]> {
    image.chunks_exact(3 * image.width() as usize)
}

#[cfg(test)]
#[path = "resample_tests.rs"]
mod tests;
