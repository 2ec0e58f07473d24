//! Checkpoints in one file, in the layout of SDXL's original code, as Civitai and ComfyUI keep them. Each parameter is found
//! where it lies: renamed, or a part of a larger one, never copied into a second file.

use std::collections::HashMap;

use super::safetensors::Entry;

/// What a whole checkpoint's names begin with.
const UNET: &str = "model.diffusion_model.";
const VAE: &str = "first_stage_model.";
const CONTROLNET: &str = "control_model.";
/// The text encoders of the base model, and the refiner's one.
const CLIP: &str = "conditioner.embedders.0.transformer.";
const OPEN_CLIP: &str = "conditioner.embedders.1.model.";
const REFINER_OPEN_CLIP: &str = "conditioner.embedders.0.model.";

/// Whether these names are the original code's, and not diffusers'.
pub(super) fn is_original<'a>(mut names: impl Iterator<Item = &'a str>) -> bool {
    names.any(|name| {
        let starts = [UNET, VAE, CONTROLNET, "input_hint_block.", "encoder.down.", "decoder.up."];
        starts.iter().any(|start| name.starts_with(start))
    })
}

/// The tensors of one component (`unet`, `vae`, `text_encoder`, `text_encoder_2`, `controlnet`) under diffusers' names.
pub(super) fn component(component: &str, entries: HashMap<String, Entry>) -> HashMap<String, Entry> {
    let is_refiner = entries.keys().any(|name| name.starts_with(REFINER_OPEN_CLIP));
    let prefixes: &[&str] = match component {
        "unet" => &[UNET],
        // also in files of their own
        "vae" => &[VAE, ""],
        "controlnet" => &[CONTROLNET, ""],
        "text_encoder" => &[CLIP],
        _ if is_refiner => &[REFINER_OPEN_CLIP],
        _ => &[OPEN_CLIP],
    };
    let prefix = prefixes.iter().find(|prefix| entries.keys().any(|name| name.starts_with(**prefix)));
    let Some(prefix) = prefix else { return HashMap::new() };
    let own = entries.into_iter().filter_map(|(name, entry)| Some((name.strip_prefix(prefix)?.to_owned(), entry)));
    let own: HashMap<String, Entry> = own.collect();
    let shape = Shape::of(own.keys().map(String::as_str));
    let mut found = HashMap::new();
    for (name, entry) in own {
        match component {
            "unet" => drop(found.insert(shape.unet(&name), entry)),
            "controlnet" => drop(found.insert(shape.controlnet(&name), entry)),
            "vae" => {
                let renamed = shape.vae(&name);
                // the attention's projections are 1x1 convolutions there
                let entry =
                    if renamed.contains(".attentions.") && entry.rank() == 4 { entry.flattened() } else { entry };
                found.insert(renamed, entry);
            }
            "text_encoder" => drop(found.insert(name, entry)),
            _ => open_clip(&name, entry, &mut found),
        }
    }
    found
}

/// How many blocks there are, as far as names depend on it.
struct Shape {
    /// Residual blocks of a level on the UNet's way down.
    layers: usize,
    /// Levels of the VAE's decoder.
    levels: usize,
}

impl Shape {
    fn of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Self {
        // the first block that halves the size ends the first level
        let half = names.clone().filter_map(|name| {
            let (block, rest) = split_number(name.strip_prefix("input_blocks.")?)?;
            (rest == "0.op.weight").then_some(block)
        });
        let levels = names.filter_map(|name| Some(split_number(name.strip_prefix("decoder.up.")?)?.0 + 1));
        Shape { layers: half.min().map_or(2, |block| block - 1), levels: levels.max().unwrap_or(4) }
    }

    fn unet(&self, name: &str) -> String {
        for (original, ours) in [
            ("time_embed.0.", "time_embedding.linear_1."),
            ("time_embed.2.", "time_embedding.linear_2."),
            ("label_emb.0.0.", "add_embedding.linear_1."),
            ("label_emb.0.2.", "add_embedding.linear_2."),
            ("input_blocks.0.0.", "conv_in."),
            ("middle_block.0.", "mid_block.resnets.0."),
            ("middle_block.1.", "mid_block.attentions.0."),
            ("middle_block.2.", "mid_block.resnets.1."),
            ("out.0.", "conv_norm_out."),
            ("out.2.", "conv_out."),
        ] {
            if let Some(rest) = name.strip_prefix(original) {
                return format!("{ours}{}", in_resnet(rest));
            }
        }
        let blocks = self.layers + 1;
        if let Some((block, rest)) = name.strip_prefix("input_blocks.").and_then(split_number) {
            let (level, layer) = ((block - 1) / blocks, (block - 1) % blocks);
            return match split_number(rest) {
                Some((0, rest)) if rest.starts_with("op.") => {
                    format!("down_blocks.{level}.downsamplers.0.conv.{}", &rest["op.".len()..])
                }
                Some((0, rest)) => format!("down_blocks.{level}.resnets.{layer}.{}", in_resnet(rest)),
                Some((_, rest)) => format!("down_blocks.{level}.attentions.{layer}.{rest}"),
                None => name.to_owned(),
            };
        }
        if let Some((block, rest)) = name.strip_prefix("output_blocks.").and_then(split_number) {
            let (level, layer) = (block / blocks, block % blocks);
            return match split_number(rest) {
                Some((0, rest)) => format!("up_blocks.{level}.resnets.{layer}.{}", in_resnet(rest)),
                // comes last, after an attention if there is one
                Some((_, rest)) if rest.starts_with("conv.") => format!("up_blocks.{level}.upsamplers.0.{rest}"),
                Some((_, rest)) => format!("up_blocks.{level}.attentions.{layer}.{rest}"),
                None => name.to_owned(),
            };
        }
        name.to_owned()
    }

    fn controlnet(&self, name: &str) -> String {
        if let Some((block, rest)) = name.strip_prefix("zero_convs.").and_then(split_number) {
            return format!("controlnet_down_blocks.{block}.{}", rest.trim_start_matches("0."));
        }
        if let Some(rest) = name.strip_prefix("middle_block_out.0.") {
            return format!("controlnet_mid_block.{rest}");
        }
        if let Some((layer, rest)) = name.strip_prefix("input_hint_block.").and_then(split_number) {
            // every other layer is an activation
            return match layer / 2 {
                0 => format!("controlnet_cond_embedding.conv_in.{rest}"),
                7 => format!("controlnet_cond_embedding.conv_out.{rest}"),
                block => format!("controlnet_cond_embedding.blocks.{}.{rest}", block - 1),
            };
        }
        self.unet(name)
    }

    fn vae(&self, name: &str) -> String {
        let Some((half, rest)) = name.split_once('.').filter(|(half, _)| matches!(*half, "encoder" | "decoder")) else {
            return name.to_owned();
        };
        let in_block = |rest: &str| rest.replace("nin_shortcut.", "conv_shortcut.");
        if let Some(rest) = rest.strip_prefix("mid.") {
            if let Some(rest) = rest.strip_prefix("attn_1.") {
                let names = [
                    ("norm.", "group_norm."),
                    ("q.", "to_q."),
                    ("k.", "to_k."),
                    ("v.", "to_v."),
                    ("proj_out.", "to_out.0."),
                ];
                let found = names.iter().find_map(|(old, new)| Some(format!("{new}{}", rest.strip_prefix(old)?)));
                return format!("{half}.mid_block.attentions.0.{}", found.as_deref().unwrap_or(rest));
            }
            let (block, rest) = rest.split_once('.').unwrap_or((rest, ""));
            let block = if block == "block_1" { 0 } else { 1 };
            return format!("{half}.mid_block.resnets.{block}.{}", in_block(rest));
        }
        let level = |way: &str| rest.strip_prefix(way).and_then(split_number);
        if let Some((level, rest)) = level("down.") {
            let rest = rest.replace("block.", "resnets.").replace("downsample.conv.", "downsamplers.0.conv.");
            return format!("{half}.down_blocks.{level}.{}", in_block(&rest));
        }
        if let Some((level, rest)) = level("up.") {
            let rest = rest.replace("block.", "resnets.").replace("upsample.conv.", "upsamplers.0.conv.");
            return format!("{half}.up_blocks.{}.{}", self.levels - 1 - level, in_block(&rest));
        }
        match rest.strip_prefix("norm_out.") {
            Some(rest) => format!("{half}.conv_norm_out.{rest}"),
            None => name.to_owned(),
        }
    }
}

/// `12.rest` to `(12, "rest")`.
fn split_number(text: &str) -> Option<(usize, &str)> {
    let (number, rest) = text.split_once('.')?;
    Some((number.parse().ok()?, rest))
}

fn in_resnet(rest: &str) -> String {
    let names = [
        ("in_layers.0.", "norm1."),
        ("in_layers.2.", "conv1."),
        ("emb_layers.1.", "time_emb_proj."),
        ("out_layers.0.", "norm2."),
        ("out_layers.3.", "conv2."),
        ("skip_connection.", "conv_shortcut."),
    ];
    let found = names.iter().find_map(|(old, new)| Some(format!("{new}{}", rest.strip_prefix(old)?)));
    found.unwrap_or_else(|| rest.to_owned())
}

/// OpenCLIP keeps query, key and value in one, and multiplies by the projection from the other side.
fn open_clip(name: &str, entry: Entry, found: &mut HashMap<String, Entry>) {
    let in_layer = name.strip_prefix("transformer.resblocks.").and_then(split_number);
    let Some((layer, rest)) = in_layer else {
        let renamed = match name {
            "logit_scale" => return, // of the training
            "text_projection" => return drop(found.insert("text_projection.weight".into(), entry.transposed())),
            "positional_embedding" => "text_model.embeddings.position_embedding.weight",
            "token_embedding.weight" => "text_model.embeddings.token_embedding.weight",
            "ln_final.weight" => "text_model.final_layer_norm.weight",
            "ln_final.bias" => "text_model.final_layer_norm.bias",
            other => other,
        };
        found.insert(renamed.to_owned(), entry);
        return;
    };
    let layer = format!("text_model.encoder.layers.{layer}");
    if let Some(kind) = rest.strip_prefix("attn.in_proj_") {
        for (share, part) in ["q", "k", "v"].into_iter().enumerate() {
            found.insert(format!("{layer}.self_attn.{part}_proj.{kind}"), entry.rows(share, 3));
        }
        return;
    }
    let names = [
        ("ln_1.", "layer_norm1."),
        ("ln_2.", "layer_norm2."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
        ("attn.out_proj.", "self_attn.out_proj."),
    ];
    let renamed = names.iter().find_map(|(old, new)| Some(format!("{new}{}", rest.strip_prefix(old)?)));
    found.insert(format!("{layer}.{}", renamed.as_deref().unwrap_or(rest)), entry);
}
