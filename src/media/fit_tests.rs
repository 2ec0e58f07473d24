//! Against diffusers' bytes.

use super::super::test_pictures::{assert_checksum, cases, picture, size};
use super::*;

#[test]
fn cropping_and_filling_are_diffusers() {
    for (op, fit) in [("crop_mode", resize_and_crop as fn(&RgbImage, u32, u32) -> RgbImage), ("fill", resize_and_fill)]
    {
        for case in cases(op) {
            let (width, height) = size(&case["to"]);
            assert_checksum(&fit(&picture(&case["from"]), width, height), &case);
        }
    }
}

/// diffusers fails here: the resized picture would have a height of less than one pixel.
#[test]
fn a_line_becomes_a_picture() {
    let line = RgbImage::from_pixel(500, 1, image::Rgb([7, 8, 9]));
    for image in [resize_and_fill(&line, 64, 40), resize_and_fill(&imageops::rotate90(&line), 40, 64)] {
        assert!(image.pixels().all(|pixel| pixel.0 == [7, 8, 9]));
    }
    assert_eq!(resize_and_crop(&line, 64, 40).dimensions(), (64, 40));
}
