//! Between pixels and tensors; diffusers' `VaeImageProcessor`.

use image::RgbImage;
use tch::{Device, Kind, Tensor};

/// Bytes with the channels of each pixel together, to float32 `[1, channels, height, width]` in 0 to 1.
pub(super) fn preprocess(bytes: &[u8], width: u32, height: u32, channels: i64) -> Tensor {
    let pixels = Tensor::from_slice(bytes).view([1, i64::from(height), i64::from(width), channels]);
    pixels.permute([0, 3, 1, 2]).to_kind(Kind::Float).contiguous() / 255.0
}

/// A control map, float32 `[1, 3, height, width]` in 0 to 1.
pub(super) fn control_map(image: &RgbImage) -> Tensor {
    preprocess(image.as_raw(), image.width(), image.height(), 3)
}

/// A picture as the VAE encodes it, float32 `[1, 3, height, width]` in -1 to 1.
pub(super) fn normalized(image: &RgbImage) -> Tensor {
    control_map(image) * 2.0 - 1.0
}

/// `[1, 3, height, width]` in -1 to 1, as the VAE decodes it, to pixels.
pub(super) fn postprocess(image: &Tensor) -> RgbImage {
    let image = image.squeeze_dim(0).to_device(Device::Cpu).to_kind(Kind::Float);
    let pixels = ((image * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round().to_kind(Kind::Uint8);
    let pixels = pixels.permute([1, 2, 0]).contiguous();
    let (height, width) = (pixels.size()[0] as u32, pixels.size()[1] as u32);
    let bytes = Vec::<u8>::try_from(pixels.view(-1)).expect("a vector of bytes");
    RgbImage::from_raw(width, height, bytes).expect("three bytes for each pixel")
}
