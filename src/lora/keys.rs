//! A key of a LoRA file: which module it speaks of, and which part of that module's change it is.

/// What a tensor is in the change of one weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Part {
    Down,
    Up,
    /// The core of LoCon's Tucker form.
    Mid,
    Alpha,
    /// DoRA as peft writes it.
    Magnitude,
    /// DoRA as LyCORIS and kohya's scripts write it.
    DoraScale,
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    HadaT1,
    HadaT2,
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
}

use Part::*;

/// Longer ones first where one ends like another.
const SUFFIXES: [(&str, Part); 25] = [
    (".lora_linear_layer.down.weight", Down),
    (".lora_linear_layer.up.weight", Up),
    ("_lora.down.weight", Down),
    ("_lora.up.weight", Up),
    (".lora.down.weight", Down),
    (".lora.up.weight", Up),
    (".lora_down.weight", Down),
    (".lora_up.weight", Up),
    (".lora_mid.weight", Mid),
    (".alpha", Alpha),
    (".lora_magnitude_vector", Magnitude),
    (".lora_magnitude_vector.weight", Magnitude),
    (".dora_scale", DoraScale),
    (".hada_w1_a", HadaW1A),
    (".hada_w1_b", HadaW1B),
    (".hada_w2_a", HadaW2A),
    (".hada_w2_b", HadaW2B),
    (".hada_t1", HadaT1),
    (".hada_t2", HadaT2),
    (".lokr_w1", LokrW1),
    (".lokr_w1_a", LokrW1A),
    (".lokr_w1_b", LokrW1B),
    (".lokr_w2", LokrW2),
    (".lokr_w2_a", LokrW2A),
    (".lokr_w2_b", LokrW2B),
];

/// Parts of algorithms that are known by name and not applied.
const UNSUPPORTED: [&str; 11] = [
    ".diff",
    ".diff_b",
    ".oft_blocks",
    ".oft_diag",
    ".on_input",
    ".w_norm",
    ".b_norm",
    ".a1.weight",
    ".b1.weight",
    ".lora_embedding_A",
    ".lokr_t1",
];

/// The module and the part that `key` names.
pub(super) fn split(key: &str) -> Option<(&str, Part)> {
    if let Some(module) = key.strip_suffix(".lokr_t2") {
        return Some((module, LokrT2));
    }
    if let Some(found) = SUFFIXES.iter().find_map(|(suffix, part)| Some((key.strip_suffix(suffix)?, *part))) {
        return Some(found);
    }
    // peft, with or without the adapter's name: `.lora_A.weight`, `.lora_A.default.weight`
    [(".lora_A.", Down), (".lora_B.", Up), (".lora_magnitude_vector.", Magnitude)].into_iter().find_map(
        |(mark, part)| {
            let (module, rest) = key.rsplit_once(mark)?;
            let adapter = rest.strip_suffix("weight")?.strip_suffix('.');
            (rest == "weight" || adapter.is_some_and(|name| !name.contains('.'))).then_some((module, part))
        },
    )
}

/// Whether the key belongs to an algorithm that this version does not apply.
pub(super) fn is_unsupported(key: &str) -> bool {
    UNSUPPORTED.iter().any(|suffix| key.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_every_format_are_split() {
        for (key, module, part) in [
            ("unet.a.attn1.processor.to_q_lora.down.weight", "unet.a.attn1.processor.to_q", Down),
            ("unet.a.to_k.lora.up.weight", "unet.a.to_k", Up),
            ("text_encoder.a.q_proj.lora_linear_layer.up.weight", "text_encoder.a.q_proj", Up),
            ("unet.a.to_v.lora_A.weight", "unet.a.to_v", Down),
            ("unet.a.to_v.lora_B.default_0.weight", "unet.a.to_v", Up),
            ("unet.a.to_v.lora_magnitude_vector", "unet.a.to_v", Magnitude),
            ("unet.a.to_v.lora_magnitude_vector.weight", "unet.a.to_v", Magnitude),
            ("unet.a.to_v.lora_magnitude_vector.default.weight", "unet.a.to_v", Magnitude),
            ("lora_unet_a.lora_mid.weight", "lora_unet_a", Mid),
            ("lora_unet_a.alpha", "lora_unet_a", Alpha),
            ("lora_unet_a.dora_scale", "lora_unet_a", DoraScale),
            ("lora_unet_a.hada_t2", "lora_unet_a", HadaT2),
            ("lora_unet_a.lokr_w2_b", "lora_unet_a", LokrW2B),
            ("lora_unet_a.lokr_t2", "lora_unet_a", LokrT2),
        ] {
            assert_eq!(split(key), Some((module, part)), "{key}");
        }
        for key in ["lora_unet_a.lora_down.bias", "a.lora_B.bias", "a.lora_A.x.y.weight", "emb_params", ""] {
            assert_eq!(split(key), None, "{key}");
        }
    }
}
