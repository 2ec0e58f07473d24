//! Whole pictures, turned ones, and files that lie.

use std::time::{Duration, Instant};

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, ImageBuffer, Rgb, RgbImage, RgbaImage};

use super::super::test_pictures::{bytes, cases};
use super::*;

const FORMATS: [ImageFormat; 3] = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];

fn picture() -> DynamicImage {
    RgbImage::from_fn(40, 24, |x, y| Rgb([x as u8 * 6, y as u8 * 10, 99])).into()
}

fn file(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn code(bytes: &[u8], max_pixels: u64) -> &'static str {
    let error = decode(bytes, max_pixels, "image").unwrap_err();
    assert_eq!(error.field.as_deref(), Some("image"));
    error.code
}

/// A PNG chunk with its checksum.
fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let mut crc = u32::MAX;
    for byte in kind.iter().chain(data) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    [&(data.len() as u32).to_be_bytes()[..], kind, data, &(!crc).to_be_bytes()].concat()
}

/// A chunk of a WebP file, of even length.
fn riff(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    [&kind[..], &(data.len() as u32).to_le_bytes(), data].concat()
}

fn webp(chunks: &[u8]) -> Vec<u8> {
    [&b"RIFF"[..], &(chunks.len() as u32 + 4).to_le_bytes(), b"WEBP", chunks].concat()
}

fn png(width: u32, height: u32, depth: u8, color: u8, rest: &[Vec<u8>]) -> Vec<u8> {
    let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, color, 0, 0, 0]].concat();
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &header), rest.concat()].concat()
}

#[test]
fn all_three_formats_are_decoded() {
    for format in FORMATS {
        let image = decode(&file(&picture(), format), 960, "image").unwrap();
        assert_eq!((image.width(), image.height()), (40, 24));
        if format != ImageFormat::Jpeg {
            assert_eq!(image, picture(), "{format:?}");
        }
    }
    for image in [
        DynamicImage::from(GrayImage::new(5, 7)),
        RgbaImage::new(5, 7).into(),
        ImageBuffer::<Rgb<u16>, _>::new(5, 7).into(),
        ImageBuffer::<image::LumaA<u16>, _>::new(5, 7).into(),
    ] {
        assert_eq!(decode(&file(&image, ImageFormat::Png), 35, "image").unwrap(), image);
    }
}

#[test]
fn a_picture_is_turned_as_its_exif_says() {
    for exif in 1..=8_u8 {
        // A TIFF header and one entry: Orientation, one short.
        let block =
            [b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".as_slice(), &[exif, 0, 0, 0, 0, 0, 0, 0]].concat();
        let segment = [&b"Exif\0\0"[..], &block].concat();
        let mut jpeg = file(&picture(), ImageFormat::Jpeg);
        let marker = [&[0xff, 0xe1][..], &(segment.len() as u16 + 2).to_be_bytes(), &segment].concat();
        jpeg.splice(2..2, marker);
        let plain = file(&picture(), ImageFormat::Png);
        let end_of_header = 8 + 25;
        let mut png = plain.clone();
        png.splice(end_of_header..end_of_header, chunk(b"eXIf", &block));

        let orientation = Orientation::from_exif(exif).unwrap();
        for (turned, plain) in [(jpeg, file(&picture(), ImageFormat::Jpeg)), (png, plain)] {
            let mut expected = image::load_from_memory(&plain).unwrap();
            expected.apply_orientation(orientation);
            assert_eq!(decode(&turned, 960, "image").unwrap(), expected, "{exif}");
        }
    }
}

#[test]
fn the_cap_on_pixels_is_exact() {
    for format in FORMATS {
        let bytes = file(&picture(), format);
        assert!(decode(&bytes, 960, "image").is_ok(), "{format:?}");
        for max_pixels in [959, 1, 0] {
            assert_eq!(code(&bytes, max_pixels), "image_too_large", "{format:?} {max_pixels}");
        }
    }
}

#[test]
fn a_header_of_100_megapixels_is_refused_before_decoding() {
    let empty = [chunk(b"IDAT", &[]), chunk(b"IEND", &[])];
    for (width, height) in [(10_000, 10_000), (1, 100_000_000), (u32::MAX >> 1, u32::MAX >> 1)] {
        for (depth, color) in [(8, 2), (16, 6), (1, 0), (8, 0)] {
            let start = Instant::now();
            assert_eq!(
                code(&png(width, height, depth, color, &empty), 16_000_000),
                "image_too_large",
                "{width} x {height}"
            );
            assert!(start.elapsed() < Duration::from_secs(1));
        }
    }
    let mut jpeg = file(&picture(), ImageFormat::Jpeg);
    let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    jpeg[frame + 5..frame + 9].fill(0xff);
    assert_eq!(code(&jpeg, 16_000_000), "image_too_large");
    // WebP's largest: 16383 x 16383, lossless, lossy, and in the extended format.
    let lossless = riff(b"VP8L", b"\x2f\xfe\xbf\xff\x0f\0\0\0");
    let lossy = riff(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f");
    let extended = riff(b"VP8X", b"\0\0\0\0\xfe\x3f\0\xfe\x3f\0");
    for chunks in [lossless.clone(), lossy, [extended, lossless].concat()] {
        assert_eq!(code(&webp(&chunks), 16_000_000), "image_too_large");
    }
}

/// The decoder looks at the frame's own size too late.
#[test]
fn a_large_frame_in_a_small_webp_is_refused_before_decoding() {
    let frame = riff(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f");
    let still = riff(b"VP8X", b"\0\0\0\0\x27\0\0\x17\0\0");
    let animated = riff(b"VP8X", b"\x02\0\0\0\x27\0\0\x17\0\0");
    let first = [&b"\0\0\0\0\0\0\x27\0\0\x17\0\0\x64\0\0\0"[..], &frame].concat();
    let animation = [animated, riff(b"ANIM", b"\0\0\0\0\0\0"), riff(b"ANMF", &first)].concat();
    for chunks in [[still, frame].concat(), animation] {
        assert_eq!(code(&webp(&chunks), 16_000_000), "image_too_large");
    }
}

#[test]
fn bombs_do_not_go_off() {
    let mut zeros = Vec::new();
    let mut encoder = png::Encoder::new(&mut zeros, 20_000, 20_000);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::One);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&vec![0; 20_000 * 2_500]).unwrap();
    writer.finish().unwrap();
    assert!(zeros.len() < 100_000, "{}", zeros.len());
    assert_eq!(code(&zeros, 16_000_000), "image_too_large");

    // Small pictures whose text or colour profile unpacks to a hundred megabytes.
    let packed = packed_zeros(100_000_000);
    for (kind, head) in [(b"zTXt", &b"key\0\0"[..]), (b"iCCP", b"name\0\0"), (b"iTXt", b"key\0\x01\0\0\0")] {
        let bomb = chunk(kind, &[head, &packed].concat());
        let mut bytes = file(&picture(), ImageFormat::Png);
        bytes.splice(33..33, bomb);
        let start = Instant::now();
        let decoded = decode(&bytes, 960, "image");
        assert!(start.elapsed() < Duration::from_secs(5));
        if let Err(error) = decoded {
            assert!(["image_damaged", "image_too_large"].contains(&error.code), "{error}");
        }
    }
}

/// So many zeros, packed by way of a PNG: its IDAT is a zlib stream.
fn packed_zeros(bytes: u32) -> Vec<u8> {
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, bytes / 10_000, 10_000);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&vec![0; bytes as usize]).unwrap();
    writer.finish().unwrap();
    let mut packed = Vec::new();
    let mut rest = &file[8..];
    while let [a, b, c, d, kind @ ..] = rest {
        let length = u32::from_be_bytes([*a, *b, *c, *d]) as usize;
        if kind.starts_with(b"IDAT") {
            packed.extend_from_slice(&kind[4..4 + length]);
        }
        rest = &kind[4 + length + 4..];
    }
    packed
}

#[test]
fn what_is_no_picture_says_so() {
    let mut gif = b"GIF89a".to_vec();
    gif.resize(100, 0);
    for bytes in [&b""[..], b"\xff", b"<html>", b"RIFF\0\0\0\0WAVE", b"BM", b"II*\0", &gif, b"<svg xmlns=''/>"] {
        assert_eq!(code(bytes, 960), "image_format", "{bytes:?}");
    }
}

#[test]
fn a_damaged_picture_is_an_error_or_a_picture_of_its_size() {
    for format in FORMATS {
        let whole = file(&picture(), format);
        let mut damaged = 0;
        for length in 12..whole.len() {
            match decode(&whole[..length], 960, "image") {
                Ok(image) => assert_eq!((image.width(), image.height()), (40, 24), "{format:?} cut to {length}"),
                Err(error) => {
                    assert_eq!(error.code, "image_damaged", "{format:?} cut to {length}: {error}");
                    damaged += 1;
                }
            }
        }
        assert!(damaged > whole.len() / 3, "{format:?}: {damaged} of {}", whole.len());
        assert_eq!(code(&whole[..whole.len() / 3], 960), "image_damaged");
    }
}

#[test]
fn random_changes_and_random_bytes_do_not_panic() {
    let mut random = fastrand::Rng::with_seed(4);
    let allowed = ["image_damaged", "image_too_large", "image_format"];
    let check = |bytes: &[u8]| match decode(bytes, 100_000, "image") {
        Ok(image) => assert!(u64::from(image.width()) * u64::from(image.height()) <= 100_000),
        Err(error) => assert!(allowed.contains(&error.code), "{error}"),
    };
    for format in FORMATS {
        let whole = file(&picture(), format);
        for position in 0..whole.len().min(400) {
            let mut changed = whole.clone();
            changed[position] ^= 0x5a;
            check(&changed);
        }
        for _ in 0..2_000 {
            let mut changed = whole.clone();
            for _ in 0..random.usize(1..8) {
                let position = random.usize(..changed.len());
                changed[position] = random.u8(..);
            }
            changed.truncate(random.usize(8..=changed.len()));
            check(&changed);
        }
    }
    let heads: [&[u8]; 4] =
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBPVP8 ", b"RIFF\x40\0\0\0WEBPVP8L"];
    for _ in 0..5_000 {
        let mut bytes = heads[random.usize(..4)].to_vec();
        bytes.extend((0..random.usize(0..200)).map(|_| random.u8(..)));
        check(&bytes);
    }
}

/// A PNG of one row of these bytes, as they stand in the file.
fn png_row(color: png::ColorType, depth: png::BitDepth, width: u32, row: &[u8], trns: &[u8]) -> RgbImage {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, 1);
    encoder.set_color(color);
    encoder.set_depth(depth);
    if color == png::ColorType::Indexed {
        encoder.set_palette(&[1, 2, 3, 40, 50, 60, 200, 100, 0]);
    }
    if !trns.is_empty() {
        encoder.set_trns(trns);
    }
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(row).unwrap();
    writer.finish().unwrap();
    to_rgb(decode(&bytes, 100, "image").unwrap())
}

/// Pixels as Pillow's `convert("RGB")` gives them, but for grey of sixteen bits.
#[test]
fn every_kind_of_png_becomes_eight_bits_in_three_channels() {
    use png::BitDepth::{Eight, One, Sixteen, Two};
    use png::ColorType::{Grayscale, GrayscaleAlpha, Indexed, Rgb, Rgba};

    assert_eq!(png_row(Rgba, Eight, 2, &[9, 8, 7, 0, 1, 2, 3, 128], &[]).as_raw(), &[9, 8, 7, 1, 2, 3]);
    assert_eq!(png_row(GrayscaleAlpha, Eight, 2, &[9, 0, 77, 255], &[]).as_raw(), &[9, 9, 9, 77, 77, 77]);
    assert_eq!(png_row(Grayscale, One, 3, &[0b0100_0000], &[]).as_raw(), &[0, 0, 0, 255, 255, 255, 0, 0, 0]);
    assert_eq!(png_row(Grayscale, Two, 2, &[0b0110_0000], &[]).as_raw(), &[85, 85, 85, 170, 170, 170]);
    for trns in [&[][..], &[0, 128]] {
        assert_eq!(png_row(Indexed, Eight, 3, &[2, 0, 1], trns).as_raw(), &[200, 100, 0, 1, 2, 3, 40, 50, 60]);
    }
    assert_eq!(png_row(Rgb, Eight, 1, &[5, 6, 7], &[0, 5, 0, 6, 0, 7]).as_raw(), &[5, 6, 7]);

    let row = [0x12, 0xff, 0x00, 0x80, 0xff, 0xff, 0x00, 0x01];
    assert_eq!(png_row(Rgb, Sixteen, 1, &row[..6], &[]).as_raw(), &[0x12, 0x00, 0xff]);
    assert_eq!(png_row(Rgba, Sixteen, 1, &row, &[]).as_raw(), &[0x12, 0x00, 0xff]);
    assert_eq!(png_row(GrayscaleAlpha, Sixteen, 1, &row[..4], &[]).as_raw(), &[0x12; 3]);
    assert_eq!(png_row(Grayscale, Sixteen, 2, &row[..4], &[]).as_raw(), &[0x12, 0x12, 0x12, 0, 0, 0]);
}

/// Plain, as YCCK, and without Adobe's marker, which says whether the inks are inverted: Pillow takes them for inverted
/// in any case.
#[test]
fn a_jpeg_of_four_inks_has_pillow_s_colours() {
    for case in cases("cmyk") {
        let image = to_rgb(decode(&bytes(&case["file"]), 10_000, "image").unwrap());
        let expected = bytes(&case["rgb"]);
        assert_eq!(image.len(), expected.len());
        let worst = image.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= 2, "{worst}: {}", case["kind"]);
    }
}
