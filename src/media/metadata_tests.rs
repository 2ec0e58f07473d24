//! Parameters into a picture and out again, and pictures that are not whole.

use image::RgbImage;
use png::text_metadata::EncodableTextChunk;
use serde_json::json;

use super::super::encode;
use super::*;
use crate::api::{Limits, OutputFormat, parse, validate};

const FORMATS: [OutputFormat; 3] = [OutputFormat::Png, OutputFormat::Jpeg, OutputFormat::Webp];

fn params(fields: Value) -> GenerateParams {
    let mut input = json!({"prompt": "a cat", "seed": 1});
    input.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    validate(parse(&input).unwrap().0, &Limits::default(), None).unwrap()
}

fn picture(format: OutputFormat, params: &GenerateParams) -> Vec<u8> {
    let image = RgbImage::from_fn(72, 64, |x, y| image::Rgb([x as u8 * 3, y as u8 * 3, 99]));
    encode(&image, format, 90, Some(&Metadata::new(params, SchedulerKind::EulerDiscrete, "base"))).unwrap()
}

#[test]
fn our_request_comes_back_from_every_format() {
    let texts = [
        "plain",
        "Größe, naïve",
        "日本語 🦀👩‍👩‍👧 \u{10ffff}",
        "quotes \" ' \\ and\nnew\r\nlines\ttabs",
        "nul \u{0} and \u{1b} and \u{7f}",
        "Steps: 3, Seed: 4\nNegative prompt: x",
        "sdxl-worker: {}",
        &"long ".repeat(3_999),
        &"🦀".repeat(20_000), // a quarter of a megabyte, far above a JPEG segment
    ];
    for text in texts {
        let params = params(json!({"prompt": text, "negative_prompt": text, "guidance_scale": 7.1}));
        let request = effective_request(&params, SchedulerKind::EulerDiscrete, "base");
        for format in FORMATS {
            let bytes = picture(format, &params);
            assert_eq!(read_parameters(&bytes).unwrap(), request, "{format:?}");
            let decoded = image::load_from_memory(&bytes).unwrap();
            assert_eq!((decoded.width(), decoded.height()), (72, 64));
        }
    }
}

#[test]
fn metadata_does_not_change_the_pixels() {
    let image = RgbImage::from_fn(72, 64, |x, y| image::Rgb([(x * y) as u8, x as u8, y as u8]));
    let metadata = Metadata::new(&params(json!({})), SchedulerKind::EulerDiscrete, "base");
    for format in FORMATS {
        let with = encode(&image, format, 90, Some(&metadata)).unwrap();
        let without = encode(&image, format, 90, None).unwrap();
        assert!(with.len() > without.len());
        assert_eq!(image::load_from_memory(&with).unwrap(), image::load_from_memory(&without).unwrap());
        let extensions = image::guess_format(&with).unwrap().extensions_str();
        assert!(extensions.contains(&format.name()));
    }
    let png = encode(&image, OutputFormat::Png, 90, Some(&metadata)).unwrap();
    assert_eq!(image::load_from_memory(&png).unwrap().into_rgb8(), image);
}

#[test]
fn the_text_is_the_one_a1111_writes() {
    let params = params(json!({
        "prompt": "a cat,\non a mat", "negative_prompt": "dog", "sigma_schedule": "karras", "width": 832, "height": 1216,
    }));
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        a1111_text(&params, SchedulerKind::EulerDiscrete, "base"),
        format!(
            "a cat,\non a mat\nNegative prompt: dog\nSteps: 30, Sampler: Euler, Schedule type: Karras, CFG scale: 5, \
             Seed: 1, Size: 832x1216, Model: base, Version: sdxl-worker {version}"
        )
    );
    let text = a1111_text(&self::params(json!({"guidance_scale": 7.5})), SchedulerKind::Ddim, "a: \"b\", c");
    assert_eq!(
        text,
        format!(
            "a cat\nSteps: 30, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 1024x1024, Model: \"a: \\\"b\\\", c\", \
             Version: sdxl-worker {version}"
        )
    );
}

#[test]
fn the_text_lies_where_a1111_reads_it() {
    for prompt in ["a cat", "日本語 🦀"] {
        let params = params(json!({"prompt": prompt}));
        let text = a1111_text(&params, SchedulerKind::EulerDiscrete, "base");

        let png = png::Decoder::new(Cursor::new(picture(OutputFormat::Png, &params))).read_info().unwrap();
        let plain = png.info().uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == "parameters");
        let unicode = png.info().utf8_text.iter().find(|chunk| chunk.keyword == "parameters");
        assert_eq!(plain.map(|c| c.text.clone()).or(unicode.map(|c| c.get_text().unwrap())).unwrap(), text);
        assert_eq!(plain.is_some(), prompt.is_ascii());

        for format in [OutputFormat::Jpeg, OutputFormat::Webp] {
            let mut file = Cursor::new(picture(format, &params));
            let exif = exif::Reader::new().read_from_container(&mut file).unwrap();
            let ExifValue::Undefined(comment, _) = &exif.get_field(Tag::UserComment, In::PRIMARY).unwrap().value else {
                panic!("UserComment has the type undefined")
            };
            let units: Vec<u16> = comment[8..].chunks(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
            assert_eq!((&comment[..8], String::from_utf16(&units).unwrap()), (&b"UNICODE\0"[..], text.clone()));
        }
    }
}

#[test]
fn a_picture_without_our_parameters_says_so() {
    let image = RgbImage::new(64, 64);
    for format in FORMATS {
        let bytes = encode(&image, format, 90, None).unwrap();
        assert_eq!(read_parameters(&bytes).unwrap_err().code, "no_parameters", "{format:?}");
    }
    // Somebody else's EXIF.
    let mut jpeg = Jpeg::from_bytes(encode(&image, OutputFormat::Jpeg, 90, None).unwrap().into()).unwrap();
    let description =
        Field { tag: Tag::ImageDescription, ifd_num: In::PRIMARY, value: ExifValue::Ascii(vec![b"a dog".to_vec()]) };
    let mut writer = exif::experimental::Writer::new();
    writer.push_field(&description);
    let mut block = Cursor::new(Vec::new());
    writer.write(&mut block, true).unwrap();
    jpeg.set_exif(Some(block.into_inner().into()));
    assert_eq!(read_parameters(&jpeg.encoder().bytes()).unwrap_err().code, "no_parameters");
}

#[test]
fn text_behind_the_pixels_is_found() {
    let mut bytes = encode(&RgbImage::new(64, 64), OutputFormat::Png, 0, None).unwrap();
    let end = bytes.len() - 12; // the IEND chunk
    let mut chunk = Vec::new();
    png::text_metadata::ITXtChunk::new(REQUEST_KEY, "{\"seed\":1}").encode(&mut chunk).unwrap();
    bytes.splice(end..end, chunk);
    assert_eq!(read_parameters(&bytes).unwrap(), json!({"seed": 1}));
}

#[test]
fn what_is_no_picture_says_so() {
    for bytes in [&b""[..], b"\xff", b"RIFF", b"GIF89a", b"{\"prompt\": \"x\"}", b"RIFF\0\0\0\0WAVE"] {
        assert_eq!(read_parameters(bytes).unwrap_err().code, "unknown_picture_format");
    }
}

#[test]
fn a_damaged_picture_is_an_error_or_still_readable() {
    let params = params(json!({"prompt": "日本語"}));
    let request = effective_request(&params, SchedulerKind::EulerDiscrete, "base");
    for format in FORMATS {
        let whole = picture(format, &params);
        let mut damaged = 0;
        for length in 12..whole.len() {
            match read_parameters(&whole[..length]) {
                Ok(read) => assert_eq!(read, request, "{format:?} cut to {length}"),
                Err(error) => {
                    assert!(["damaged_picture", "no_parameters"].contains(&error.code), "{error}");
                    assert!(error.remedy.is_some());
                    damaged += usize::from(error.code == "damaged_picture");
                }
            }
        }
        assert!(damaged > 50, "{format:?}: {damaged}");
        // One byte changed anywhere: an error or some JSON, never a panic.
        for position in 0..whole.len() {
            let mut changed = whole.clone();
            changed[position] ^= 0x5a;
            let _ = read_parameters(&changed);
        }
    }
    let cut = &picture(OutputFormat::Webp, &params)[..200];
    assert_eq!(read_parameters(cut).unwrap_err().code, "damaged_picture");
}
