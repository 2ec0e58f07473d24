//! Against Pillow's bytes.

use super::super::test_pictures::{assert_checksum, cases, integers, picture, size};
use super::*;

#[test]
fn resizing_is_pillow_s() {
    for case in cases("resize") {
        let (width, height) = size(&case["to"]);
        assert_checksum(&resize(&picture(&case["from"]), width, height), &case);
    }
}

#[test]
fn areas_and_other_filters_are_pillow_s() {
    for case in cases("resize_area") {
        let (width, height) = size(&case["to"]);
        let area = integers(&case["area"]).map(|side: i64| side as u32);
        let filter = match case["filter"].as_str().unwrap() {
            "BOX" => Filter::Box,
            "BICUBIC" => Filter::Bicubic,
            _ => Filter::Lanczos,
        };
        assert_checksum(&resize_area(&picture(&case["from"]), width, height, area, filter), &case);
    }
}

#[test]
fn a_picture_of_the_right_size_is_left_alone() {
    let image = picture(&serde_json::json!([33, 21]));
    assert_eq!(resize(&image, 33, 21), image);
}
