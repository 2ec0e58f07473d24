//! Against diffusers' numbers and bytes.

use serde_json::json;

use super::super::blur::gaussian_blur;
use super::super::test_pictures::{assert_checksum, cases, integers, mask, picture, size};
use super::*;

#[test]
fn regions_are_diffusers() {
    for case in cases("region") {
        let (width, height) = size(&case["to"]);
        let pad = case["pad"].as_u64().unwrap() as u32;
        let region = crop_region(&mask(&case["from"], &case["masked"], 1), width, height, pad);
        assert_eq!(region, Some(integers(&case["region"])), "{case}");
    }
}

#[test]
fn a_black_mask_has_no_region() {
    assert_eq!(crop_region(&GrayImage::new(40, 30), 64, 64, 8), None);
}

#[test]
fn cropping_beyond_the_border_is_pillow_s() {
    for case in cases("crop") {
        assert_checksum(&crop(&picture(&case["from"]), integers(&case["region"])), &case);
    }
}

#[test]
fn the_overlay_is_diffusers() {
    for case in cases("overlay") {
        let mask = mask(&case["from"], &case["masked"], case["value"].as_u64().unwrap() as u8);
        let mask = gaussian_blur(&mask, case["radius"].as_f64().unwrap() as f32);
        let result = apply_overlay(&mask, &picture(&case["from"]), &picture(&case["image"]), integers(&case["region"]));
        assert_checksum(&result, &case);
    }
}

#[test]
fn a_black_mask_keeps_the_original_and_a_white_one_nothing() {
    let (original, image) = (picture(&json!([40, 30])), picture(&json!([16, 16])));
    let region = [8, 4, 24, 20];
    assert_eq!(apply_overlay(&GrayImage::new(40, 30), &original, &image, region), original);
    let all = GrayImage::from_pixel(40, 30, Luma([255]));
    let overlaid = apply_overlay(&all, &original, &image, region);
    assert_eq!(crop(&overlaid, region), image);
    assert_eq!(overlaid.get_pixel(0, 0).0, [0, 0, 0]);
}
