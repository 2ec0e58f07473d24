//! From the names that LoRA files give to modules to the parameters of this model. The table is made of the model's own
//! parameter names, so it fits any configuration.

use std::collections::HashMap;

/// A parameter of a component: `unet` and `mid_block.resnets.0.conv1.weight`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Target {
    /// Index into the components that the table was made of.
    pub(super) component: usize,
    pub(super) parameter: String,
}

pub(super) struct NameTable(HashMap<String, Target>);

impl NameTable {
    /// `components`: `unet`, `text_encoder`, `text_encoder_2`, each with the names of its weights (matrices and kernels).
    pub(super) fn new<'a>(components: impl IntoIterator<Item = (&'a str, Vec<&'a str>)>) -> Self {
        let mut table = HashMap::new();
        for (component, (name, parameters)) in components.into_iter().enumerate() {
            let modules: Vec<&str> = parameters.iter().filter_map(|name| name.strip_suffix(".weight")).collect();
            let blocks = Blocks::of(&modules);
            for module in modules {
                let target = Target { component, parameter: format!("{module}.weight") };
                for alias in aliases(name, module, &blocks) {
                    table.entry(alias).or_insert_with(|| target.clone());
                }
            }
        }
        NameTable(table)
    }

    /// The parameter that a file means by `module`, the part of a key in front of `.lora_down.weight` and the like.
    pub(super) fn find(&self, module: &str) -> Option<&Target> {
        self.0.get(module).or_else(|| self.0.get(&canonical(module)))
    }
}

/// The spelling without what wrappers and old attention processors put in: `base_model.model.`, `.processor`, `to_q` for
/// a text encoder's `q_proj`.
fn canonical(module: &str) -> String {
    let mut module = module.trim_start_matches("base_model.model.").replace(".processor.", ".");
    if module.contains(".self_attn.") {
        let projections = [
            (".to_q", ".q_proj"),
            (".to_k", ".k_proj"),
            (".to_v", ".v_proj"),
            (".to_out.0", ".out_proj"),
            (".to_out", ".out_proj"),
        ];
        if let Some((old, new)) = projections.iter().find(|(old, _)| module.ends_with(old)) {
            module.truncate(module.len() - old.len());
            module.push_str(new);
        }
    } else if module.ends_with(".to_out") {
        module.push_str(".0");
    }
    module
}

/// Every name under which files of some format know the module.
fn aliases(component: &str, module: &str, blocks: &Blocks) -> Vec<String> {
    let underscored = module.replace('.', "_");
    if component == "unet" {
        let mut names = vec![format!("unet.{module}"), module.to_owned(), format!("lora_unet_{underscored}")];
        if let Some(sgm) = blocks.sgm_name(module) {
            names.push(format!("lora_unet_{}", sgm.replace('.', "_")));
            names.push(format!("diffusion_model.{sgm}"));
            names.push(format!("model.diffusion_model.{sgm}"));
        }
        return names;
    }
    let mut names = vec![format!("{component}.{module}")];
    // transformers 5 writes the text model's parts without this prefix
    names.extend(module.strip_prefix("text_model.").map(|short| format!("{component}.{short}")));
    let prefixes: &[&str] = if component == "text_encoder" { &["lora_te1_", "lora_te_"] } else { &["lora_te2_"] };
    names.extend(prefixes.iter().map(|prefix| format!("{prefix}{underscored}")));
    if component == "text_encoder" {
        // files of the first diffusers versions hold one text encoder and do not name it
        names.push(module.to_owned());
    }
    names
}

/// How many layers each block of the UNet has: what the numbers in SGM's names count.
#[derive(Default)]
struct Blocks {
    /// ResNets of each down block, and whether a downsampler follows.
    down: Vec<(usize, bool)>,
    /// ResNets of each up block, and whether it has attentions.
    up: Vec<(usize, bool)>,
}

impl Blocks {
    fn of(modules: &[&str]) -> Blocks {
        let mut blocks = Blocks::default();
        for module in modules {
            let parts: Vec<&str> = module.split('.').collect();
            let [side @ ("down_blocks" | "up_blocks"), block, kind, layer, ..] = parts.as_slice() else { continue };
            let (Ok(block), Ok(layer)) = (block.parse::<usize>(), layer.parse::<usize>()) else { continue };
            let list = if *side == "down_blocks" { &mut blocks.down } else { &mut blocks.up };
            if block >= 64 {
                continue; // no UNet has that many
            }
            list.resize(list.len().max(block + 1), (0, false));
            match *kind {
                "resnets" => list[block].0 = list[block].0.max(layer + 1),
                "downsamplers" => list[block].1 = true,
                "attentions" if *side == "up_blocks" => list[block].1 = true,
                _ => {}
            }
        }
        blocks
    }

    /// The module's name in Stability's own code, which kohya's scripts use for SDXL.
    fn sgm_name(&self, module: &str) -> Option<String> {
        let whole = match module {
            "conv_in" => "input_blocks.0.0",
            "conv_norm_out" => "out.0",
            "conv_out" => "out.2",
            "time_embedding.linear_1" => "time_embed.0",
            "time_embedding.linear_2" => "time_embed.2",
            "add_embedding.linear_1" => "label_emb.0.0",
            "add_embedding.linear_2" => "label_emb.0.2",
            _ => "",
        };
        if !whole.is_empty() {
            return Some(whole.to_owned());
        }
        if let Some(rest) = module.strip_prefix("mid_block.") {
            let (kind, rest) = rest.split_once('.')?;
            let (layer, rest) = rest.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            return match kind {
                "resnets" => Some(format!("middle_block.{}.{}", 2 * layer, in_resnet(rest))),
                "attentions" => Some(format!("middle_block.{}.{rest}", 2 * layer + 1)),
                _ => None,
            };
        }
        let mut parts = module.splitn(5, '.');
        let (side, block, kind, layer, rest) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let (block, layer): (usize, usize) = (block.parse().ok()?, layer.parse().ok()?);
        if side == "down_blocks" {
            let before: usize = self.down.get(..block)?.iter().map(|(layers, down)| layers + usize::from(*down)).sum();
            let first = 1 + before;
            return match kind {
                "resnets" => Some(format!("input_blocks.{}.0.{}", first + layer, in_resnet(rest))),
                "attentions" => Some(format!("input_blocks.{}.1.{rest}", first + layer)),
                "downsamplers" => Some(format!("input_blocks.{}.0.op", first + self.down[block].0)),
                _ => None,
            };
        }
        let first: usize = self.up.get(..block)?.iter().map(|(layers, _)| layers).sum();
        let (layers, has_attentions) = *self.up.get(block)?;
        match kind {
            "resnets" => Some(format!("output_blocks.{}.0.{}", first + layer, in_resnet(rest))),
            "attentions" => Some(format!("output_blocks.{}.1.{rest}", first + layer)),
            "upsamplers" => {
                Some(format!("output_blocks.{}.{}.conv", first + layers - 1, 1 + usize::from(has_attentions)))
            }
            _ => None,
        }
    }
}

/// A ResNet's parts.
fn in_resnet(part: &str) -> &str {
    match part {
        "norm1" => "in_layers.0",
        "conv1" => "in_layers.2",
        "time_emb_proj" => "emb_layers.1",
        "norm2" => "out_layers.0",
        "conv2" => "out_layers.3",
        "conv_shortcut" => "skip_connection",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SDXL's block structure, a few modules of each kind.
    fn table() -> NameTable {
        let mut unet =
            vec!["conv_in.weight".to_owned(), "conv_out.weight".into(), "add_embedding.linear_1.weight".into()];
        for block in 0..3 {
            for layer in 0..2 {
                unet.push(format!("down_blocks.{block}.resnets.{layer}.conv1.weight"));
                if block > 0 {
                    unet.push(format!(
                        "down_blocks.{block}.attentions.{layer}.transformer_blocks.0.attn1.to_out.0.weight"
                    ));
                }
            }
            for layer in 0..3 {
                unet.push(format!("up_blocks.{block}.resnets.{layer}.conv_shortcut.weight"));
                if block < 2 {
                    unet.push(format!("up_blocks.{block}.attentions.{layer}.proj_in.weight"));
                }
            }
            if block < 2 {
                unet.push(format!("down_blocks.{block}.downsamplers.0.conv.weight"));
                unet.push(format!("up_blocks.{block}.upsamplers.0.conv.weight"));
            }
        }
        unet.push("mid_block.attentions.0.proj_out.weight".into());
        unet.push("mid_block.resnets.1.time_emb_proj.weight".into());
        let text = ["text_model.encoder.layers.3.self_attn.out_proj.weight"];
        let unet = unet.iter().map(String::as_str).collect();
        NameTable::new([("unet", unet), ("text_encoder", text.to_vec()), ("text_encoder_2", text.to_vec())])
    }

    #[test]
    fn names_of_every_format_lead_to_the_parameter() {
        let table = table();
        let out = "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0";
        let text = "text_model.encoder.layers.3.self_attn.out_proj";
        for (name, component, module) in [
            ("unet.down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0", 0, out),
            ("base_model.model.down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0", 0, out),
            ("unet.down_blocks.1.attentions.1.transformer_blocks.0.attn1.processor.to_out", 0, out),
            ("down_blocks.1.attentions.1.transformer_blocks.0.attn1.processor.to_out", 0, out),
            ("lora_unet_down_blocks_1_attentions_1_transformer_blocks_0_attn1_to_out_0", 0, out),
            ("lora_unet_input_blocks_5_1_transformer_blocks_0_attn1_to_out_0", 0, out),
            ("lora_unet_input_blocks_0_0", 0, "conv_in"),
            ("lora_unet_out_2", 0, "conv_out"),
            ("lora_unet_label_emb_0_0", 0, "add_embedding.linear_1"),
            ("lora_unet_input_blocks_3_0_op", 0, "down_blocks.0.downsamplers.0.conv"),
            ("lora_unet_input_blocks_8_0_in_layers_2", 0, "down_blocks.2.resnets.1.conv1"),
            ("lora_unet_middle_block_1_proj_out", 0, "mid_block.attentions.0.proj_out"),
            ("lora_unet_middle_block_2_emb_layers_1", 0, "mid_block.resnets.1.time_emb_proj"),
            ("lora_unet_output_blocks_4_1_proj_in", 0, "up_blocks.1.attentions.1.proj_in"),
            ("lora_unet_output_blocks_2_2_conv", 0, "up_blocks.0.upsamplers.0.conv"),
            ("lora_unet_output_blocks_8_0_skip_connection", 0, "up_blocks.2.resnets.2.conv_shortcut"),
            ("lora_te1_text_model_encoder_layers_3_self_attn_out_proj", 1, text),
            ("lora_te2_text_model_encoder_layers_3_self_attn_out_proj", 2, text),
            ("text_encoder.text_model.encoder.layers.3.self_attn.out_proj", 1, text),
            ("text_encoder_2.encoder.layers.3.self_attn.out_proj", 2, text),
            ("text_encoder.text_model.encoder.layers.3.self_attn.to_out", 1, text),
        ] {
            let target = Target { component, parameter: format!("{module}.weight") };
            assert_eq!(table.find(name), Some(&target), "{name}");
        }
        assert_eq!(table.find("lora_unet_input_blocks_1_1_proj_in"), None);
        assert_eq!(table.find("unet.down_blocks.9.resnets.0.conv1"), None);
    }
}
