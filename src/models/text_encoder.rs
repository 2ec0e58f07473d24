use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::GraphSet;
use super::model_dir::integer;
use crate::error::Result;
use crate::torch::Module;
use crate::weights::{Checkpoint, Weights};

/// `text_encoder` (CLIP) or `text_encoder_2` (OpenCLIP with projection).
pub struct TextEncoder {
    module: Module,
    projection_dim: i64,
    /// Tokens of a text, padding included.
    pub max_position_embeddings: i64,
    /// Ids are below this.
    pub vocab_size: i64,
}

/// What an encoder makes of token ids `[batch, 77]`.
pub struct TextEncoderOutput {
    /// Embedding output, then each layer's: `[batch, 77, hidden_size]` each.
    pub hidden_states: Vec<Tensor>,
    /// Of the token `<|endoftext|>`; projected in `text_encoder_2`: `[batch, projection_dim]`.
    pub pooled: Tensor,
}

impl TextEncoder {
    pub fn load(
        component: &str,
        graphs: &GraphSet,
        config: &Value,
        checkpoint: Checkpoint,
        model: &Path,
        (kind, device): (Kind, Device),
    ) -> Result<Self> {
        let entry = graphs.find(component, kind, config, model)?;
        entry.expect_inputs(&["input_ids"])?;
        let module = graphs.load(entry, device)?;
        Weights::new(checkpoint, device, kind).bind(&module, |name| entry.has_parameter(name))?;
        Ok(TextEncoder {
            module,
            projection_dim: integer(config, "projection_dim", 512),
            max_position_embeddings: integer(config, "max_position_embeddings", 77),
            vocab_size: integer(config, "vocab_size", 49_408),
        })
    }

    /// `input_ids`: int64 `[batch, 77]`, on the encoder's device.
    pub fn forward(&self, input_ids: &Tensor) -> Result<TextEncoderOutput> {
        let mut hidden_states = self.module.forward(&[input_ids])?;
        let pooled = hidden_states.pop().expect("a text encoder has outputs");
        Ok(TextEncoderOutput { hidden_states, pooled })
    }

    pub fn projection_dim(&self) -> i64 {
        self.projection_dim
    }
}
