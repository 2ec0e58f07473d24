//! Pillow's `GaussianBlur`, byte for byte: three box blurs in each direction, whose ends count by a fraction, rounded to
//! eight bits after each. `BoxBlur.c` in Pillow is the source.

use image::{ImageBuffer, Pixel, imageops};

const PASSES: usize = 3;

/// Pillow's `image.filter(GaussianBlur(radius))`; `radius` is the standard deviation in pixels.
pub fn gaussian_blur<P>(image: &ImageBuffer<P, Vec<u8>>, radius: f32) -> ImageBuffer<P, Vec<u8>>
where
    P: Pixel<Subpixel = u8> + 'static,
{
    let radius = box_radius(radius);
    if radius == 0.0 {
        return image.clone();
    }
    let mut result = image.clone();
    blur_rows(&mut result, radius);
    let mut turned = imageops::rotate90(&result);
    blur_rows(&mut turned, radius);
    imageops::rotate270(&turned)
}

/// The radius of the box whose repeated blur has this standard deviation (Gwosdek and others, "Theoretical foundations of
/// Gaussian convolution by extended box filtering", equations 7, 11 and 14). The mix of precisions is Pillow's.
fn box_radius(sigma: f32) -> f32 {
    let variance = sigma * sigma / PASSES as f32;
    let length = (12.0 * f64::from(variance) + 1.0).sqrt() as f32;
    let whole = ((f64::from(length) - 1.0) / 2.0).floor() as f32;
    let fraction = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
        / (6.0 * (variance - (whole + 1.0) * (whole + 1.0)));
    whole + fraction
}

fn blur_rows<P>(image: &mut ImageBuffer<P, Vec<u8>>, radius: f32)
where
    P: Pixel<Subpixel = u8>,
{
    let channels = usize::from(P::CHANNEL_COUNT);
    let width = image.width() as usize;
    let mut line = vec![0; width];
    for row in image.chunks_exact_mut(channels * width) {
        for channel in 0..channels {
            for _ in 0..PASSES {
                for (value, pixel) in line.iter_mut().zip(row.chunks_exact(channels)) {
                    *value = pixel[channel];
                }
                let blurred = blur_line(&line, radius);
                for (pixel, value) in row.chunks_exact_mut(channels).zip(blurred) {
                    pixel[channel] = value;
                }
            }
        }
    }
}

/// Each value's mean over `radius` to both sides, with the end values repeated beyond the ends.
fn blur_line(line: &[u8], radius: f32) -> impl Iterator<Item = u8> {
    // Weights with 24 bits after the point: of a whole pixel, and of the two at the ends.
    let whole = radius as usize;
    let weight = (16_777_216.0 / (radius * 2.0 + 1.0)) as u32;
    let end_weight = ((1 << 24) - (whole as u32 * 2 + 1) * weight) / 2;

    let last = line.len() - 1;
    let at = move |index: usize| u32::from(line[index.min(last)]);
    // The sum around the place before the first.
    let mut sum = at(0) * (whole as u32 + 1) + (0..whole).map(at).sum::<u32>();
    (0..=last).map(move |x| {
        let left = at(x.saturating_sub(whole + 1));
        sum = sum + at(x + whole) - left;
        let weighted = sum * weight + (left + at(x + whole + 1)) * end_weight;
        ((weighted + (1 << 23)) >> 24) as u8
    })
}

#[cfg(test)]
#[path = "blur_tests.rs"]
mod tests;
