//! Pictures as bytes and pixels: files in and out, the generation parameters inside them, and what diffusers does with
//! pixels before and after the model, to the bit of Pillow's. No tensors, no network.

mod blur;
mod canny;
mod codec;
mod decode;
mod fit;
mod gray;
mod inpaint;
mod lines;
mod metadata;
mod preprocess;
mod resample;

#[cfg(test)]
mod test_pictures;

pub use blur::gaussian_blur;
pub use codec::{encode, to_base64, to_data_uri};
pub use decode::{decode, to_rgb};
pub use fit::resize_and_fill;
pub use gray::to_grayscale;
pub use inpaint::{apply_overlay, crop, crop_region};
pub use metadata::{Metadata, read_parameters};
pub use preprocess::preprocess;
pub use resample::resize;

/// Of one picture that a client sends, before it is brought to the size asked for.
pub const MAX_INPUT_PIXELS: u64 = 64 << 20;
