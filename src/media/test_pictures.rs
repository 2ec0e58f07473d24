//! Pictures for the tests, the same as in `tests/fixtures/pictures.py`, and what Pillow, diffusers and OpenCV made of them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{GrayImage, Luma, Rgb, RgbImage};
use serde_json::Value;

/// The cases of one operation.
pub(super) fn cases(op: &str) -> Vec<Value> {
    let all: Vec<Value> = serde_json::from_str(include_str!("../../tests/fixtures/pictures.json")).unwrap();
    let cases: Vec<Value> = all.into_iter().filter(|case| case["op"] == op).collect();
    assert!(!cases.is_empty(), "{op}");
    cases
}

pub(super) fn integers<const N: usize>(value: &Value) -> [i64; N] {
    let items: Vec<i64> = value.as_array().unwrap().iter().map(|item| item.as_i64().unwrap()).collect();
    items.try_into().unwrap()
}

pub(super) fn size(value: &Value) -> (u32, u32) {
    let [width, height] = integers(value);
    (width as u32, height as u32)
}

pub(super) fn bytes(value: &Value) -> Vec<u8> {
    STANDARD.decode(value.as_str().unwrap()).unwrap()
}

/// Ramps that start anew, a disc, and noise over all of it.
pub(super) fn picture(size_value: &Value) -> RgbImage {
    let (width, height) = size(size_value);
    let disc = (width.min(height).pow(2) / 2).into();
    RgbImage::from_fn(width, height, |x, y| {
        let (from_x, from_y) = (i64::from(2 * x) - i64::from(width), i64::from(2 * y) - i64::from(height));
        let inside = from_x.pow(2) + from_y.pow(2) < disc;
        Rgb([0, 1, 2].map(|channel| {
            let ramp = (x * (channel + 2) + y * (5 - channel)) % 256;
            let level = if inside { 255 - ramp / 2 } else { ramp };
            (level * 7 / 8 + noise(x, y, channel)) as u8
        }))
    })
}

/// 0 to 31
fn noise(x: u32, y: u32, channel: u32) -> u32 {
    let hash = x.wrapping_mul(73_856_093) ^ y.wrapping_mul(19_349_663) ^ channel.wrapping_mul(83_492_791);
    let hash = (hash ^ hash >> 13).wrapping_mul(0x5bd1_e995);
    (hash ^ hash >> 15) & 31
}

/// `value` in the rectangle `[left, top, right, bottom]`, 0 elsewhere.
pub(super) fn mask(size_value: &Value, rectangle: &Value, value: u8) -> GrayImage {
    let (width, height) = size(size_value);
    let [left, top, right, bottom] = integers(rectangle);
    GrayImage::from_fn(width, height, |x, y| {
        let inside = (left..right).contains(&x.into()) && (top..bottom).contains(&y.into());
        Luma([if inside { value } else { 0 }])
    })
}

#[track_caller]
pub(super) fn assert_checksum(pixels: &[u8], case: &Value) {
    assert_eq!(crc32(pixels), case["crc"].as_u64().unwrap() as u32, "{case}");
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}
