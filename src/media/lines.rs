//! Line drawings from photos by a blurred copy of the picture, as `controlnet_aux` and A1111 draw them without a net. The
//! blur is OpenCV's on floats, so results agree with theirs but for rounding.

use image::{GrayImage, RgbImage};

use super::gray::to_grayscale;

/// Sobel gradients below this stay dark even in a picture that has no larger ones; a step of a tenth of the range, blurred
/// with a deviation of 2, has about this.
const FAINT_GRADIENT: f32 = 40.0;

/// `scribble_xdog`: white where the picture is darker than its surroundings in all channels. What is darker by more than
/// half the range stays white, where the originals double a byte and get holes.
pub(super) fn scribble(image: &RgbImage, threshold: u32) -> GrayImage {
    let values = floats(image);
    let fine = gaussian(&values, row_length(image), 3, 0.5);
    let coarse = gaussian(&values, row_length(image), 3, 5.0);
    let pixels = smallest_difference(&coarse, &fine).map(|difference| {
        let inverse = (255.0 - difference) as u8;
        if 2 * u32::from(255 - inverse) > threshold { 255 } else { 0 }
    });
    gray(image, pixels)
}

/// `lineart_standard`: how much darker than its surroundings a pixel is, in the channel where that is least, scaled so that
/// a typical line is mid-grey.
pub(super) fn lineart(image: &RgbImage, sigma: f64, intensity_threshold: f32) -> GrayImage {
    let values = floats(image);
    let blurred = gaussian(&values, row_length(image), 3, sigma);
    let intensities: Vec<f32> =
        smallest_difference(&blurred, &values).map(|difference| difference.clamp(0.0, 255.0)).collect();
    let lines = intensities.iter().copied().filter(|intensity| *intensity > intensity_threshold).collect();
    let typical = median(lines).unwrap_or(0.0).max(16.0);
    gray(image, intensities.into_iter().map(|intensity| (intensity / typical * 127.0) as u8))
}

/// Broad soft edges on black, much as HED draws them: the gradient of the blurred grey picture, where the strongest
/// hundredth of all pixels is white.
pub(super) fn soft_edge(image: &RgbImage, sigma: f64) -> GrayImage {
    let width = image.width() as usize;
    let values: Vec<f32> = to_grayscale(image).iter().map(|value| f32::from(*value)).collect();
    let blurred = gaussian(&values, width, 1, sigma);
    let rows: Vec<&[f32]> = blurred.chunks_exact(width).collect();
    let mut gradients = Vec::with_capacity(values.len());
    for y in 0..rows.len() {
        let [above, here, below] = [rows[y.saturating_sub(1)], rows[y], rows[(y + 1).min(rows.len() - 1)]];
        gradients.extend((0..width).map(|x| {
            let (left, right) = (x.saturating_sub(1), (x + 1).min(width - 1));
            let column = |x: usize| above[x] + 2.0 * here[x] + below[x];
            let row = |row: &[f32]| row[left] + 2.0 * row[x] + row[right];
            (column(right) - column(left)).hypot(row(below) - row(above))
        }));
    }
    let mut sorted = gradients.clone();
    let (_, strong, _) = sorted.select_nth_unstable_by((gradients.len() - 1) * 99 / 100, f32::total_cmp);
    let scale = 255.0 / strong.max(FAINT_GRADIENT);
    gray(image, gradients.into_iter().map(|gradient| (gradient * scale).round() as u8))
}

/// The median as numpy's: of an even count the mean of the two in the middle.
fn median(mut values: Vec<f32>) -> Option<f32> {
    if values.is_empty() {
        return None;
    }
    let middle = values.len() / 2;
    let even = values.len().is_multiple_of(2);
    let (lower, upper, _) = values.select_nth_unstable_by(middle, f32::total_cmp);
    let below = lower.iter().copied().max_by(f32::total_cmp);
    Some(below.filter(|_| even).map_or(*upper, |below| (below + *upper) / 2.0))
}

fn floats(image: &RgbImage) -> Vec<f32> {
    image.iter().map(|value| f32::from(*value)).collect()
}

fn row_length(image: &RgbImage) -> usize {
    3 * image.width() as usize
}

/// For each pixel the smallest of its channels' differences.
fn smallest_difference(a: &[f32], b: &[f32]) -> impl Iterator<Item = f32> {
    let pixels = a.as_chunks::<3>().0.iter().zip(b.as_chunks::<3>().0);
    pixels.map(|(a, b)| (a[0] - b[0]).min(a[1] - b[1]).min(a[2] - b[2]))
}

fn gray(like: &RgbImage, pixels: impl Iterator<Item = u8>) -> GrayImage {
    GrayImage::from_vec(like.width(), like.height(), pixels.collect()).expect("one value for each pixel")
}

/// OpenCV's `GaussianBlur(values, (0, 0), sigma)` for 32-bit floats: `values` are rows of `length`, with the channels of a
/// pixel side by side; beyond the border the picture is mirrored at its outermost pixels.
fn gaussian(values: &[f32], length: usize, channels: usize, sigma: f64) -> Vec<f32> {
    let kernel = kernel(sigma);
    let radius = kernel.len() / 2;
    let (width, height) = (length / channels, values.len() / length);

    let mut across = vec![0.0; values.len()];
    let mut padded = vec![0.0; (width + 2 * radius) * channels];
    for (row, out) in values.chunks_exact(length).zip(across.chunks_exact_mut(length)) {
        for (index, pixel) in padded.chunks_exact_mut(channels).enumerate() {
            pixel.copy_from_slice(&row[mirrored(index, radius, width) * channels..][..channels]);
        }
        for (tap, weight) in kernel.iter().enumerate() {
            add(out, &padded[tap * channels..], *weight);
        }
    }
    let mut result = vec![0.0; values.len()];
    for (y, out) in result.chunks_exact_mut(length).enumerate() {
        for (tap, weight) in kernel.iter().enumerate() {
            add(out, &across[mirrored(y + tap, radius, height) * length..], *weight);
        }
    }
    result
}

/// `sums += values * weight`
fn add(sums: &mut [f32], values: &[f32], weight: f32) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value * weight;
    }
}

/// Reaches four standard deviations to both sides.
fn kernel(sigma: f64) -> Vec<f32> {
    let size = (sigma * 8.0 + 1.0).round_ties_even() as i32 | 1;
    let weights: Vec<f64> =
        (0..size).map(|index| (-0.5 * (f64::from(index - size / 2) / sigma).powi(2)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| (weight / sum) as f32).collect()
}

/// Which of `length` places stands at `index - radius`, if the places are mirrored at both ends as often as needed.
fn mirrored(index: usize, radius: usize, length: usize) -> usize {
    let period = 2 * (length - 1);
    if period == 0 {
        return 0;
    }
    let place = (index as isize - radius as isize).rem_euclid(period as isize) as usize;
    place.min(period - place)
}
