//! Canny's edge detector as `cv2.Canny(image, low, high)`, pixel for pixel: aperture 3, gradients measured as |dx| + |dy|,
//! of a pixel's channels the one with the largest gradient.

use image::{GrayImage, RgbImage};

/// A gradient lies in one of four directions; these bound them: tan(22.5°) with 15 bits after the point.
const TAN_22_5: i32 = 13_573;
const TAN_BITS: u32 = 15;

const NO_EDGE: u8 = 0;
/// An edge if it touches one.
const MAYBE: u8 = 1;
const EDGE: u8 = 255;

/// White edges on black. A ridge above `high` starts an edge, which goes on along ridges above `low`.
pub(super) fn canny(image: &RgbImage, low: u32, high: u32) -> GrayImage {
    let (low, high) = (low.min(high) as i32, low.max(high) as i32);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let gradients = gradients(image);
    // One pixel larger on each side, so that each pixel has eight neighbours.
    let stride = width + 2;
    let mut magnitudes = vec![0; stride * (height + 2)];
    for (row, out) in gradients.chunks_exact(width).zip(magnitudes.chunks_exact_mut(stride).skip(1)) {
        for ([dx, dy], out) in row.iter().zip(&mut out[1..]) {
            *out = i32::from(dx.abs()) + i32::from(dy.abs());
        }
    }

    let mut states = vec![NO_EDGE; magnitudes.len()];
    let mut edges = Vec::new();
    for (y, row) in gradients.chunks_exact(width).enumerate() {
        for (x, gradient) in row.iter().enumerate() {
            let place = (y + 1) * stride + x + 1;
            let magnitude = magnitudes[place];
            if magnitude > low && is_ridge(&magnitudes, place, stride, *gradient) {
                states[place] = if magnitude > high { EDGE } else { MAYBE };
                if magnitude > high {
                    edges.push(place);
                }
            }
        }
    }
    while let Some(place) = edges.pop() {
        let rows = [place - stride, place, place + stride];
        for neighbour in rows.into_iter().flat_map(|middle| middle - 1..=middle + 1) {
            if states[neighbour] == MAYBE {
                states[neighbour] = EDGE;
                edges.push(neighbour);
            }
        }
    }

    let inner = states.chunks_exact(stride).skip(1).take(height).flat_map(|row| &row[1..=width]);
    let pixels = inner.map(|state| if *state == EDGE { 255 } else { 0 }).collect();
    GrayImage::from_vec(image.width(), image.height(), pixels).expect("one state for each pixel")
}

/// Whether no neighbour across the edge has a larger gradient. Of two equal ones OpenCV keeps the left or upper.
fn is_ridge(magnitudes: &[i32], place: usize, stride: usize, [dx, dy]: [i16; 2]) -> bool {
    let magnitude = magnitudes[place];
    let x = i32::from(dx.abs());
    let y = i32::from(dy.abs()) << TAN_BITS;
    let flat = x * TAN_22_5;
    if y < flat {
        magnitude > magnitudes[place - 1] && magnitude >= magnitudes[place + 1]
    } else if y > flat + (x << (TAN_BITS + 1)) {
        magnitude > magnitudes[place - stride] && magnitude >= magnitudes[place + stride]
    } else {
        let step = if (dx < 0) == (dy < 0) { stride + 1 } else { stride - 1 };
        magnitude > magnitudes[place - step] && magnitude > magnitudes[place + step]
    }
}

/// `[dx, dy]` of each pixel by Sobel's 3 x 3 operator, in the channel where |dx| + |dy| is largest; of equal ones the
/// first. The border pixels are repeated beyond the border.
fn gradients(image: &RgbImage) -> Vec<[i16; 2]> {
    let length = 3 * image.width() as usize;
    let rows: Vec<&[u8]> = image.chunks_exact(length).collect();
    let mut result = Vec::with_capacity(image.len() / 3);
    // The vertical halves of the operator, with a pixel more at either end.
    let mut smooth = vec![0; length + 6];
    let mut change = vec![0; length + 6];
    for y in 0..rows.len() {
        let [above, here, below] = [rows[y.saturating_sub(1)], rows[y], rows[(y + 1).min(rows.len() - 1)]];
        for (x, ((above, here), below)) in above.iter().zip(here).zip(below).enumerate() {
            let [above, here, below] = [above, here, below].map(|value| i16::from(*value));
            smooth[x + 3] = above + 2 * here + below;
            change[x + 3] = below - above;
        }
        for half in [&mut smooth, &mut change] {
            half.copy_within(3..6, 0);
            half.copy_within(length..length + 3, length + 3);
        }
        let gradient = |x: usize| [smooth[x + 6] - smooth[x], change[x] + 2 * change[x + 3] + change[x + 6]];
        let size = |[dx, dy]: [i16; 2]| dx.abs() + dy.abs();
        result.extend((0..length).step_by(3).map(|x| {
            let [red, green, blue] = [gradient(x), gradient(x + 1), gradient(x + 2)];
            let largest = if size(green) > size(red) { green } else { red };
            if size(blue) > size(largest) { blue } else { largest }
        }));
    }
    result
}
