use std::cell::OnceCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::GraphSet;
use super::model_dir::integer;
use crate::error::Result;
use crate::torch::Module;
use crate::weights::{Weights, unbind};

/// `text_encoder` (CLIP) or `text_encoder_2` (OpenCLIP with projection).
pub struct TextEncoder {
    module: Module,
    /// The same encoder with an attention mask as a further input, on the same tensors; loaded when it is first needed.
    masked: OnceCell<Module>,
    origin: Origin,
    token_embedding: Tensor,
    /// One element, which stands for the weights of the masked graph while it does not run.
    stub: Tensor,
    projection_dim: i64,
    /// Tokens of a text, padding included.
    pub max_position_embeddings: i64,
    /// Ids are below this.
    pub vocab_size: i64,
}

/// Where the encoder's graphs come from.
struct Origin {
    component: String,
    graphs: PathBuf,
    config: Value,
    model: PathBuf,
    kind: Kind,
    device: Device,
}

/// What an encoder makes of token ids `[batch, 77]`.
pub struct TextEncoderOutput {
    /// Embedding output, then each layer's: `[batch, 77, hidden_size]` each.
    pub hidden_states: Vec<Tensor>,
    /// Of the token `<|endoftext|>`; projected in `text_encoder_2`: `[batch, projection_dim]`.
    pub pooled: Tensor,
}

const TOKEN_EMBEDDING: &str = "text_model.embeddings.token_embedding.weight";

impl TextEncoder {
    /// Also gives the bound weights.
    pub fn load(
        component: &str,
        graphs: &GraphSet,
        config: &Value,
        mut weights: Weights,
        model: &Path,
        (kind, device): (Kind, Device),
    ) -> Result<(Self, Weights)> {
        let entry = graphs.find(component, kind, config, model)?;
        entry.expect_inputs(&["input_ids"])?;
        let module = graphs.load(entry, device)?;
        weights.bind(&module, |name| entry.has_parameter(name))?;
        let mut parameters = module.named_parameters()?.into_iter();
        let token_embedding = parameters.find(|(name, _)| name == TOKEN_EMBEDDING).map(|(_, tensor)| tensor);
        let encoder = TextEncoder {
            module,
            masked: OnceCell::new(),
            origin: Origin {
                component: component.into(),
                graphs: graphs.dir().into(),
                config: config.clone(),
                model: model.into(),
                kind,
                device,
            },
            token_embedding: token_embedding.expect("every text encoder embeds tokens"),
            stub: Tensor::zeros([1], (kind, device)),
            projection_dim: integer(config, "projection_dim", 512),
            max_position_embeddings: integer(config, "max_position_embeddings", 77),
            vocab_size: integer(config, "vocab_size", 49_408),
        };
        Ok((encoder, weights))
    }

    /// `input_ids`: int64 `[batch, 77]`, on the encoder's device.
    pub fn forward(&self, input_ids: &Tensor) -> Result<TextEncoderOutput> {
        Ok(output(self.module.forward(&[input_ids])?))
    }

    /// `attention_mask`: `[batch, 1, 77, 77]` in the encoder's dtype, added to the scores of attention: 0, and minus
    /// infinity for what is hidden, the later tokens among it.
    ///
    /// # Errors
    /// `no_matching_graph`, for graphs of an export that made none with a mask.
    pub fn forward_masked(&self, input_ids: &Tensor, attention_mask: &Tensor) -> Result<TextEncoderOutput> {
        let module = match self.masked.get() {
            Some(module) => module,
            None => {
                let module = self.origin.load_masked()?;
                self.masked.get_or_init(|| module)
            }
        };
        // each time: whoever changes a parameter need not know of this second graph
        let own: HashMap<String, Tensor> = self.module.named_parameters()?.into_iter().collect();
        let mut parameters = module.named_parameters()?;
        for (name, parameter) in &mut parameters {
            let tensor = own.get(name).with_context(|| format!("the masked graph alone has {name}"))?;
            parameter.f_set_data(tensor).map_err(anyhow::Error::from)?;
        }
        let outputs = module.forward(&[input_ids, attention_mask]);
        // this graph must not hold weights that leave the device
        for (_, parameter) in &mut parameters {
            unbind(parameter, &self.stub)?;
        }
        Ok(output(outputs?))
    }

    /// The graph's own table of token embeddings, `[vocab_size, hidden_size]`: what is written to it is computed with.
    pub fn token_embedding(&self) -> &Tensor {
        &self.token_embedding
    }

    pub fn projection_dim(&self) -> i64 {
        self.projection_dim
    }
}

impl Origin {
    fn load_masked(&self) -> Result<Module> {
        let graphs = GraphSet::open(&self.graphs)?;
        let component = format!("{}_masked", self.component);
        let entry = graphs.find(&component, self.kind, &self.config, &self.model)?;
        entry.expect_inputs(&["input_ids", "attention_mask"])?;
        graphs.load(entry, self.device)
    }
}

fn output(mut hidden_states: Vec<Tensor>) -> TextEncoderOutput {
    let pooled = hidden_states.pop().expect("a text encoder has outputs");
    TextEncoderOutput { hidden_states, pooled }
}
