use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::GraphSet;
use super::compiled::CompiledModule;
use super::model_dir::integer;
use super::replay::ReplayedModule;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// Whether the UNet runs graphs of fewer and larger operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fused {
    /// On CUDA, where they are in the set.
    Auto,
    On,
    Off,
}

/// `UNet2DConditionModel` with SDXL's added conditions.
pub struct UNet {
    module: ReplayedModule,
    /// The same UNet with a ControlNet's residuals as further inputs, on the same tensors.
    control: Option<ReplayedModule>,
    pub is_fused: bool,
    /// Of the latents, and for inpainting of the mask and the masked picture's latents too.
    pub in_channels: i64,
    /// Latent height and width that the model was trained for.
    pub sample_size: i64,
    pub addition_time_embed_dim: i64,
    pub add_embedding_in_features: i64,
    /// Width of the guidance scale's embedding, where the UNet was distilled to take one.
    pub time_cond_proj_dim: Option<i64>,
}

/// One call. All in the graph's dtype and on its device, but `timestep`.
pub struct UNetInputs {
    /// `[batch, in_channels, h, w]`
    pub sample: Tensor,
    /// float32 `[batch]`
    pub timestep: Tensor,
    /// `[batch, tokens, cross_attention_dim]`
    pub encoder_hidden_states: Tensor,
    /// `[batch, projection_dim]`
    pub text_embeds: Tensor,
    /// `[batch, 6]`; a refiner's `[batch, 5]`
    pub time_ids: Tensor,
    /// `[batch, time_cond_proj_dim]`, where the UNet takes one
    pub timestep_cond: Option<Tensor>,
}

/// What a ControlNet adds to the UNet: one tensor for each skip connection, then one for the middle block.
pub struct Residuals(pub Vec<Tensor>);

pub(super) const INPUTS: [&str; 5] = ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"];

impl UNetInputs {
    pub(super) fn list(&self) -> [&Tensor; 5] {
        [&self.sample, &self.timestep, &self.encoder_hidden_states, &self.text_embeds, &self.time_ids]
    }

    /// Rows of the batch.
    pub fn rows(&self) -> i64 {
        self.sample.size()[0]
    }

    /// What `part` makes of each tensor, such as some of its rows.
    pub fn map(&self, part: impl Fn(&Tensor) -> Tensor) -> UNetInputs {
        UNetInputs {
            sample: part(&self.sample),
            timestep: part(&self.timestep),
            encoder_hidden_states: part(&self.encoder_hidden_states),
            text_embeds: part(&self.text_embeds),
            time_ids: part(&self.time_ids),
            timestep_cond: self.timestep_cond.as_ref().map(part),
        }
    }

    /// Whether both can be rows of one call of the same UNet.
    pub fn fits(&self, other: &UNetInputs) -> bool {
        let shapes = |inputs: &UNetInputs| {
            [&inputs.sample, &inputs.encoder_hidden_states].map(|tensor| tensor.size()[1..].to_vec())
        };
        shapes(self) == shapes(other)
    }

    /// One call for all of `calls`, which [fit](Self::fits) each other; the rows of each stay together, in order.
    pub fn cat(calls: &[&UNetInputs]) -> UNetInputs {
        let all = |part: fn(&UNetInputs) -> Option<&Tensor>| {
            let parts: Vec<&Tensor> = calls.iter().filter_map(|call| part(call)).collect();
            (!parts.is_empty()).then(|| Tensor::cat(&parts, 0))
        };
        let every = |part: fn(&UNetInputs) -> Option<&Tensor>| all(part).expect("there are calls");
        UNetInputs {
            sample: every(|call| Some(&call.sample)),
            timestep: every(|call| Some(&call.timestep)),
            encoder_hidden_states: every(|call| Some(&call.encoder_hidden_states)),
            text_embeds: every(|call| Some(&call.text_embeds)),
            time_ids: every(|call| Some(&call.time_ids)),
            timestep_cond: all(|call| call.timestep_cond.as_ref()),
        }
    }
}

impl UNet {
    /// `with_control` also loads the graph that takes residuals. Also gives the bound weights.
    pub fn load(
        graphs: &GraphSet,
        config: &Value,
        mut weights: Weights,
        model: &Path,
        (kind, device): (Kind, Device),
        with_control: bool,
        fused: Fused,
    ) -> Result<(Self, Weights)> {
        let in_channels = integer(config, "in_channels", 4);
        if ![4, 9].contains(&in_channels) {
            let message = "this UNet is no text-to-image or inpainting one (in_channels 4 or 9)";
            return Err(Error::setup("unsupported_model", message).remedy("use an SDXL base or fine-tuned model"));
        }
        let time_cond_proj_dim = config.get("time_cond_proj_dim").and_then(Value::as_i64);
        let mut inputs = INPUTS.to_vec();
        inputs.extend(time_cond_proj_dim.map(|_| "timestep_cond"));
        let wants_fused = fused == Fused::On || fused == Fused::Auto && device.is_cuda();
        // they share their weights, so both are of one flavour
        let names = match wants_fused {
            true => ["unet_fused", "unet_control_fused"],
            false => ["unet", "unet_control"],
        };
        let find = |[plain, control]: [&str; 2]| -> Result<_> {
            let control = with_control.then(|| graphs.find(control, kind, config, model)).transpose()?;
            Ok((graphs.find(plain, kind, config, model)?, control))
        };
        let (entry, control_entry) = match find(names) {
            Err(missing) if wants_fused && fused == Fused::Auto => {
                tracing::info!(
                    reason = missing.message,
                    "no fused graphs of the UNet; the plain ones take their place"
                );
                find(["unet", "unet_control"])?
            }
            found => found?,
        };
        weights.fuse(entry.fused());
        entry.expect_inputs(&inputs)?;
        let module = graphs.load(entry, device)?;
        weights.bind(&module, |name| entry.has_parameter(name))?;
        let module = CompiledModule::load(graphs, "unet", config, module, &mut weights, (kind, device));
        let control = if let Some(entry) = control_entry {
            entry.expect_first_inputs(&inputs)?;
            let module = graphs.load(entry, device)?;
            weights.bind(&module, |name| entry.has_parameter(name))?;
            Some(ReplayedModule::new(CompiledModule::plain(module)))
        } else {
            None
        };
        let unet = UNet {
            module: ReplayedModule::new(module),
            control,
            is_fused: !entry.fused().is_empty(),
            in_channels,
            sample_size: integer(config, "sample_size", 128),
            addition_time_embed_dim: integer(config, "addition_time_embed_dim", 256),
            add_embedding_in_features: integer(config, "projection_class_embeddings_input_dim", 2816),
            time_cond_proj_dim,
        };
        Ok((unet, weights))
    }

    /// The predicted noise (or velocity), `[batch, 4, h, w]`.
    pub fn forward(&self, inputs: &UNetInputs, residuals: Option<&Residuals>) -> Result<Tensor> {
        let inputs = inputs.list().into_iter().chain(&inputs.timestep_cond);
        let mut outputs = match (residuals, &self.control) {
            (None, _) => self.module.forward(&inputs.collect::<Vec<_>>())?,
            (Some(Residuals(residuals)), Some(control)) => {
                control.forward(&inputs.chain(residuals).collect::<Vec<_>>())?
            }
            (Some(_), None) => unreachable!("a ControlNet's UNet is loaded with its control graph"),
        };
        Ok(outputs.pop().expect("a UNet has an output"))
    }
}
