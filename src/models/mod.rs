//! Graphs and the models they run: what is where, what fits, and one typed wrapper for each graph.

mod compiled;
mod controlnet;
mod graph_set;
mod model_dir;
mod replay;
mod stock;
mod text_encoder;
mod unet;
mod vae;

pub use controlnet::{ControlNet, ControlNetConfig, UnionInputs};
pub use graph_set::GraphSet;
pub use model_dir::ModelDir;
pub use replay::keep_captured_calls;
pub use text_encoder::{TextEncoder, TextEncoderOutput};
pub use unet::{Fused, Residuals, UNet, UNetInputs};
pub use vae::{LatentDistribution, Vae, VaeEncoder};

use tch::Kind;

/// A dtype as configuration files, manifests and the command line spell it.
pub fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        Kind::Float => "float32",
        Kind::Int64 => "int64",
        _ => "another dtype",
    }
}
