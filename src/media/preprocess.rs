//! From a photo to the control map that a ControlNet was trained on.

use image::{DynamicImage, GrayImage, RgbImage, imageops};

use super::canny::canny;
use super::gray::to_grayscale;
use super::lines;
use super::resample::{Filter, resize, resize_area};
use crate::api::Preprocessor;

/// The control map, of the picture's size.
pub fn preprocess(image: &RgbImage, preprocessor: &Preprocessor) -> RgbImage {
    match *preprocessor {
        Preprocessor::Canny { low_threshold, high_threshold } => rgb(canny(image, low_threshold, high_threshold)),
        Preprocessor::Scribble { threshold } => rgb(lines::scribble(image, threshold)),
        Preprocessor::Lineart { gaussian_sigma, intensity_threshold } => {
            rgb(lines::lineart(image, gaussian_sigma, intensity_threshold as f32))
        }
        Preprocessor::SoftEdge { gaussian_sigma } => rgb(lines::soft_edge(image, gaussian_sigma)),
        Preprocessor::Tile { down_sampling_rate } => tile(image, down_sampling_rate),
        Preprocessor::Invert => {
            let mut gray = to_grayscale(image);
            imageops::invert(&mut gray);
            rgb(gray)
        }
    }
}

/// The picture without the detail that is smaller than `rate` pixels. In Pillow: a resize with `BOX`, and one back with
/// `LANCZOS`.
fn tile(image: &RgbImage, rate: f64) -> RgbImage {
    let (width, height) = image.dimensions();
    let shrunk = |side: u32| ((f64::from(side) / rate) as u32).max(1);
    let small = resize_area(image, shrunk(width), shrunk(height), [0, 0, width, height], Filter::Box);
    resize(&small, width, height)
}

fn rgb(gray: GrayImage) -> RgbImage {
    DynamicImage::from(gray).into_rgb8()
}

#[cfg(test)]
#[path = "preprocess_tests.rs"]
mod tests;
