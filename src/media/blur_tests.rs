//! Against Pillow's bytes.

use super::super::gray::to_grayscale;
use super::super::test_pictures::{assert_checksum, cases, picture};
use super::*;

#[test]
fn the_blur_is_pillow_s() {
    for case in cases("blur") {
        let radius = case["radius"].as_f64().unwrap() as f32;
        assert_checksum(&gaussian_blur(&picture(&case["from"]), radius), &case);
    }
    for case in cases("blur_gray") {
        let radius = case["radius"].as_f64().unwrap() as f32;
        assert_checksum(&gaussian_blur(&to_grayscale(&picture(&case["from"])), radius), &case);
    }
}

#[test]
fn a_flat_picture_stays_flat() {
    let image = image::GrayImage::from_pixel(9, 5, image::Luma([200]));
    for radius in [0.1, 3.0, 1000.0] {
        assert_eq!(gaussian_blur(&image, radius), image, "{radius}");
    }
}
