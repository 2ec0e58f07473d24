//! Against OpenCV and Pillow; what neither has, by what it should look like.

use image::Rgb;
use serde_json::json;

use super::super::test_pictures::{assert_checksum, bytes, cases, picture};
use super::*;

fn map(case: &serde_json::Value) -> RgbImage {
    let params = case["params"].as_object().unwrap();
    let preprocessor = Preprocessor::from_request(case["op"].as_str().unwrap(), params, "preprocess").unwrap();
    preprocess(&picture(&case["from"]), &preprocessor)
}

#[test]
fn canny_is_opencv_s_and_tile_and_invert_are_pillow_s() {
    for case in ["canny", "tile", "invert"].into_iter().flat_map(cases) {
        assert_checksum(&map(&case), &case);
    }
}

/// Sums of floats in another order.
#[test]
fn lines_are_opencv_s_but_for_rounding() {
    for (op, allowed) in [("scribble", 0), ("lineart", 1)] {
        for case in cases(op) {
            let expected = bytes(&case["gray"]);
            let map = map(&case);
            assert!(map.pixels().all(|pixel| pixel.0 == [pixel.0[0]; 3]));
            let far = map.pixels().zip(&expected).filter(|(pixel, gray)| pixel.0[0].abs_diff(**gray) > allowed).count();
            assert!(map.pixels().len() == expected.len() && far <= expected.len() / 1000, "{far}: {case}");
        }
    }
}

#[test]
fn soft_edges_are_bright_at_a_step_and_fade() {
    let step = RgbImage::from_fn(64, 20, |x, _| if x < 32 { Rgb([40, 60, 80]) } else { Rgb([200, 180, 190]) });
    let map = preprocess(&step, &Preprocessor::SoftEdge { gaussian_sigma: 2.0 });
    let row: Vec<u8> = (0..64).map(|x| map.get_pixel(x, 10).0[0]).collect();
    assert_eq!((row[0], row[31], row[32], row[63]), (0, 255, 255, 0));
    assert!(row[25..32].is_sorted() && row[28] > 50 && row[28] < 250, "{row:?}");
}

#[test]
fn a_flat_picture_has_no_lines() {
    for (width, height) in [(1, 1), (1, 9), (40, 30)] {
        let flat = RgbImage::from_pixel(width, height, Rgb([90, 120, 30]));
        for name in ["canny", "scribble", "lineart", "softedge"] {
            let preprocessor = Preprocessor::from_request(name, &serde_json::Map::new(), "preprocess").unwrap();
            assert_eq!(preprocess(&flat, &preprocessor), RgbImage::new(width, height), "{name}");
        }
    }
}

/// Noise of a few levels is no edge, however little else there is.
#[test]
fn faint_noise_stays_dark() {
    let noise = RgbImage::from_fn(64, 64, |x, y| Rgb([100 + ((x * 31 + y * 17) % 5) as u8; 3]));
    let map = preprocess(&noise, &Preprocessor::SoftEdge { gaussian_sigma: 2.0 });
    assert!(map.iter().all(|value| *value < 64));
}

#[test]
fn a_tile_of_rate_one_is_the_picture() {
    let image = picture(&json!([37, 23]));
    assert_eq!(preprocess(&image, &Preprocessor::Tile { down_sampling_rate: 1.0 }), image);
}
