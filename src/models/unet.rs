use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::GraphSet;
use super::model_dir::integer;
use crate::error::{Error, Result};
use crate::torch::Module;
use crate::weights::{Checkpoint, Weights};

/// `UNet2DConditionModel` with SDXL's added conditions.
pub struct UNet {
    module: Module,
    pub in_channels: i64,
    /// Latent height and width that the model was trained for.
    pub sample_size: i64,
    pub addition_time_embed_dim: i64,
    pub add_embedding_in_features: i64,
}

/// One call. All in the graph's dtype and on its device, but `timestep`.
pub struct UNetInputs<'a> {
    /// `[batch, in_channels, h, w]`
    pub sample: &'a Tensor,
    /// float32 `[batch]`
    pub timestep: &'a Tensor,
    /// `[batch, tokens, cross_attention_dim]`
    pub encoder_hidden_states: &'a Tensor,
    /// `[batch, projection_dim]`
    pub text_embeds: &'a Tensor,
    /// `[batch, 6]`
    pub time_ids: &'a Tensor,
}

impl UNet {
    pub fn load(
        graphs: &GraphSet,
        config: &Value,
        checkpoint: Checkpoint,
        model: &Path,
        (kind, device): (Kind, Device),
    ) -> Result<Self> {
        let in_channels = integer(config, "in_channels", 4);
        if in_channels != 4 || !config.get("time_cond_proj_dim").is_none_or(Value::is_null) {
            let message = "this UNet is not a plain text-to-image one (in_channels 4, no time_cond_proj_dim)";
            return Err(Error::setup("unsupported_model", message).remedy("use an SDXL base or fine-tuned model"));
        }
        let entry = graphs.find("unet", kind, config, model)?;
        entry.expect_inputs(&["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"])?;
        let module = graphs.load(entry, device)?;
        Weights::new(checkpoint, device, kind).bind(&module, |name| entry.has_parameter(name))?;
        Ok(UNet {
            module,
            in_channels,
            sample_size: integer(config, "sample_size", 128),
            addition_time_embed_dim: integer(config, "addition_time_embed_dim", 256),
            add_embedding_in_features: integer(config, "projection_class_embeddings_input_dim", 2816),
        })
    }

    /// The predicted noise (or velocity), shaped like the sample.
    pub fn forward(&self, inputs: &UNetInputs) -> Result<Tensor> {
        let mut outputs = self.module.forward(&[
            inputs.sample,
            inputs.timestep,
            inputs.encoder_hidden_states,
            inputs.text_embeds,
            inputs.time_ids,
        ])?;
        Ok(outputs.pop().expect("a UNet has an output"))
    }
}
