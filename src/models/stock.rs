//! The configuration of the published SDXL models, for checkpoints in one file, which come without any.

use std::path::Path;

use crate::error::Result;
use crate::weights::Checkpoint;

/// One of the architectures that a checkpoint in one file may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stock {
    Base,
    /// Its UNet is shown a mask and a masked picture.
    Inpaint,
    Refiner,
}

/// What a file says of its model beyond the tensors: names of markers that some trainers leave in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Marks {
    pub(super) v_prediction: bool,
    pub(super) zero_terminal_snr: bool,
}

macro_rules! archs {
    ($($file:literal),*) => { [$(($file, include_str!(concat!("../../torchscript/archs/", $file)))),*] };
}

const FILES: [(&str, &str); 16] = archs![
    "sdxl/model_index.json",
    "sdxl/scheduler/scheduler_config.json",
    "sdxl/text_encoder/config.json",
    "sdxl/text_encoder_2/config.json",
    "sdxl/unet/config.json",
    "sdxl/vae/config.json",
    "sdxl_refiner/model_index.json",
    "sdxl_refiner/scheduler/scheduler_config.json",
    "sdxl_refiner/text_encoder_2/config.json",
    "sdxl_refiner/unet/config.json",
    "unet_inpaint/config.json",
    "controlnet/config.json",
    "controlnet_mid/config.json",
    "controlnet_small/config.json",
    "controlnet_union/config.json",
    "controlnet_union_promax/config.json"
];

impl Stock {
    /// From the UNet's first and its size embedding's layer: what it is shown, and what it is told.
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`].
    pub(super) fn of(file: &Path) -> Result<(Stock, Marks)> {
        let unet = Checkpoint::open("unet", file, &[None])?;
        let inputs = |name: &str| unet.shape(name).and_then(|shape| shape.get(1)).copied();
        let stock = match (inputs("conv_in.weight"), inputs("add_embedding.linear_1.weight")) {
            (Some(9), _) => Stock::Inpaint,
            (_, Some(2560)) => Stock::Refiner,
            _ => Stock::Base,
        };
        let marks = Marks { v_prediction: unet.has_mark("v_pred"), zero_terminal_snr: unet.has_mark("ztsnr") };
        Ok((stock, marks))
    }

    /// A file of the configuration, by its name in the diffusers layout.
    pub(super) fn text(self, name: &str) -> Option<&'static str> {
        let path = match (self, name) {
            (Stock::Inpaint, "unet/config.json") => "unet_inpaint/config.json".to_owned(),
            (Stock::Refiner, "vae/config.json") => "sdxl/vae/config.json".to_owned(),
            (Stock::Refiner, _) => format!("sdxl_refiner/{name}"),
            _ => format!("sdxl/{name}"),
        };
        file(&path)
    }
}

/// The configuration of the published ControlNet that these weights are of.
pub(super) fn controlnet(weights: &Checkpoint) -> &'static str {
    let attends = |level: usize| weights.shape(&format!("down_blocks.{level}.attentions.0.norm.weight")).is_some();
    let types = weights.shape("task_embedding").and_then(|shape| shape.first()).copied();
    let arch = match types {
        Some(8..) => "controlnet_union_promax",
        Some(_) => "controlnet_union",
        None if attends(1) => "controlnet",
        None if attends(2) => "controlnet_mid",
        None => "controlnet_small",
    };
    file(&format!("{arch}/config.json")).expect("it is in the list")
}

fn file(path: &str) -> Option<&'static str> {
    FILES.iter().find(|(file, _)| *file == path).map(|(_, text)| *text)
}
