use std::cell::RefCell;
use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::GraphSet;
use super::compiled::CompiledModule;
use super::model_dir::read_json;
use super::replay::ReplayedModule;
use super::stock;
use super::unet::{INPUTS, Residuals, UNetInputs};
use crate::error::{Error, Result};
use crate::torch::Module;
use crate::weights::{Checkpoint, InUse, Weights, in_use};

/// `ControlNetModel` or `ControlNetUnionModel`. Scales are left to the caller.
pub struct ControlNet {
    /// From control map to condition.
    embed: Module,
    module: ReplayedModule,
    kind: Kind,
    device: Device,
    /// Of a union net: how many control types it has.
    num_control_type: Option<i64>,
    /// The residuals are means over the picture; such a net always runs in guess mode, and unscaled by depth.
    pub global_pool_conditions: bool,
    weights: RefCell<Weights>,
}

/// What a union net is told of its controls.
pub struct UnionInputs<'a> {
    /// One control type for each condition.
    pub task_ids: &'a [i64],
    /// One for each condition: how much it goes in.
    pub scales: &'a [f64],
}

/// `config.json` of a ControlNet, and what a request must know of it.
pub struct ControlNetConfig {
    config: Value,
    pub num_control_type: Option<u32>,
}

impl ControlNetConfig {
    /// A union net is known by its class, but the published ones call themselves `ControlNetModel`: then by the key
    /// `num_control_type`, or by its table of task embeddings.
    ///
    /// # Errors
    /// `controlnet_not_found`, `unsupported_model`, and those of [`Checkpoint::open`].
    pub fn open(dir: &Path) -> Result<Self> {
        let remedy = "give --controlnet NAME=DIR a ControlNet in the diffusers layout (config.json and safetensors), or a .safetensors file";
        if dir.is_file() {
            let weights = Checkpoint::open("controlnet", dir, &[None])?;
            let config: Value = serde_json::from_str(stock::controlnet(&weights)).expect("ours is JSON");
            let num_control_type = config.get("num_control_type").and_then(Value::as_u64).map(|types| types as u32);
            return Ok(ControlNetConfig { config, num_control_type });
        }
        if !dir.is_dir() {
            let message = format!("there is no ControlNet folder {}", dir.display());
            return Err(Error::setup("controlnet_not_found", message).remedy(remedy));
        }
        let config = read_json(&dir.join("config.json"))?;
        let class = config.get("_class_name").and_then(Value::as_str).unwrap_or("no class");
        let num_control_type = match (class, config.get("num_control_type").and_then(Value::as_u64)) {
            ("ControlNetModel" | "ControlNetUnionModel", Some(types)) => Some(types as u32),
            ("ControlNetUnionModel", None) => Some(6),
            ("ControlNetModel", None) => {
                let weights = Checkpoint::open("controlnet", dir, &[None, Some("fp16")])?;
                weights.shape("task_embedding").and_then(|shape| shape.first()).map(|&types| types as u32)
            }
            _ => {
                let message = format!("{} is a model of {class}, no ControlNet", dir.display());
                return Err(Error::setup("unsupported_model", message).remedy(remedy));
            }
        };
        Ok(ControlNetConfig { config, num_control_type })
    }
}

impl ControlNet {
    pub fn load(
        graphs: &GraphSet,
        config: &ControlNetConfig,
        mut weights: Weights,
        dir: &Path,
        (kind, device): (Kind, Device),
    ) -> Result<Self> {
        let ControlNetConfig { config, num_control_type } = config;
        let union = if num_control_type.is_some() { "_union" } else { "" };
        let embed_entry = graphs.find(&format!("controlnet{union}_embed"), kind, config, dir)?;
        embed_entry.expect_inputs(&["image"])?;
        let entry = graphs.find(&format!("controlnet{union}"), kind, config, dir)?;
        entry.expect_first_inputs(&INPUTS)?;
        let (embed, module) = (graphs.load(embed_entry, device)?, graphs.load(entry, device)?);
        let known = |name: &str| embed_entry.has_parameter(name) || entry.has_parameter(name);
        weights.bind(&embed, known)?;
        weights.bind(&module, known)?;
        Ok(ControlNet {
            embed,
            module: ReplayedModule::new(CompiledModule::plain(module)),
            kind,
            device,
            num_control_type: num_control_type.map(i64::from),
            global_pool_conditions: config.get("global_pool_conditions").and_then(Value::as_bool).unwrap_or(false),
            weights: RefCell::new(weights),
        })
    }

    /// Of the weights.
    pub fn bytes(&self) -> u64 {
        self.weights.borrow().bytes()
    }

    pub(crate) fn weights(&self) -> &RefCell<Weights> {
        &self.weights
    }

    /// What is computed while the result lives finds the weights on the device.
    pub(crate) fn in_use(&self) -> Result<InUse<'_>> {
        in_use(&self.weights)
    }

    /// The condition of one control map, `[1, 3, height, width]` in 0 to 1: `[1, channels, h, w]`.
    pub fn embed(&self, image: &Tensor) -> Result<Tensor> {
        let image = image.to_device(self.device).to_kind(self.kind);
        Ok(self.embed.forward(&[&image])?.pop().expect("an embedding has an output"))
    }

    /// `conditions` are those of [`embed`](Self::embed): one, or on a union net one for each of the controls.
    pub fn forward(&self, inputs: &UNetInputs, conditions: &[&Tensor], union: &UnionInputs) -> Result<Residuals> {
        let batch = inputs.rows();
        let whole_batch: Vec<Tensor> = conditions.iter().map(|c| c.expand([batch, -1, -1, -1], false)).collect();
        let mut all = inputs.list().to_vec();
        let Some(types) = self.num_control_type else {
            all.push(&whole_batch[0]);
            return Ok(Residuals(self.module.forward(&all)?));
        };
        let conditions = Tensor::stack(&whole_batch, 0);
        let task_ids = Tensor::from_slice(union.task_ids);
        let control_type = Tensor::zeros([types], (Kind::Float, Device::Cpu)).index_fill(0, &task_ids, 1.0);
        let control_type = control_type.to_kind(self.kind).to_device(self.device).expand([batch, -1], false);
        let scales: Vec<f32> = union.scales.iter().map(|&scale| scale as f32).collect();
        let (task_ids, scales) = (task_ids.to_device(self.device), Tensor::from_slice(&scales).to_device(self.device));
        all.extend([&conditions, &task_ids, &control_type, &scales]);
        Ok(Residuals(self.module.forward(&all)?))
    }
}
