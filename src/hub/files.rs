//! Which files of a repository make up a model: from the Hub's list of them, or from what a folder holds.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::Error;
use crate::weights::weight_files;

/// Parts of a pipeline that have weights.
const MODELS: [&str; 4] = ["text_encoder", "text_encoder_2", "unet", "vae"];
/// Parts that are configuration and vocabulary.
const OTHERS: [&str; 3] = ["tokenizer", "tokenizer_2", "scheduler"];

/// What kind of repository it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// `model_index.json`, and a folder for each part.
    Pipeline,
    /// `config.json` and weights.
    ControlNet,
    /// `config.json` and weights.
    Vae,
}

impl What {
    /// The code for one that is not there.
    pub(super) fn not_found(self) -> &'static str {
        if self == What::ControlNet { "controlnet_not_found" } else { "model_not_found" }
    }

    pub(super) fn folder(self) -> &'static str {
        match self {
            What::Pipeline => "model folder",
            What::ControlNet => "ControlNet folder",
            What::Vae => "VAE folder",
        }
    }
}

/// The word in the names of weight files, such as `fp16`; `None` for those without one.
pub type Variant = Option<String>;

/// In the order in which they are preferred.
pub(super) struct Variants<'a>(pub(super) &'a [Variant]);

/// What keeps a model from being put together.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// The file that makes a repository a model of its kind.
    Configuration(&'static str),
    /// The part, and whether it has weights in another format than safetensors.
    Weights(String, bool),
    Folder(String),
}

impl Missing {
    pub(super) fn into_error(self, name: &str, what: What) -> Error {
        match self {
            Missing::Configuration(file) => {
                let message = format!("{name} has no {file}, so it is no {} in the diffusers layout", what.folder());
                Error::setup("unsupported_model", message)
                    .remedy("name a repository in the diffusers layout, or a folder of one in it: org/name/folder")
            }
            Missing::Weights(part, true) => {
                Error::setup("weights_missing", format!("{name} has the weights of {part} as a pickle only"))
                    .remedy("name a repository or revision with safetensors files")
            }
            Missing::Weights(part, false) => {
                Error::setup("weights_missing", format!("{name} has no weights of {part} in a variant that will do"))
                    .remedy("check --variant")
            }
            Missing::Folder(part) => Error::setup(
                "unsupported_model",
                format!("{name} has no folder {part}, which its model_index.json names"),
            )
            .remedy("name a whole model"),
        }
    }
}

/// A repository's files at one revision, as the Hub describes them.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    /// The commit.
    pub(super) sha: String,
    siblings: Vec<Listed>,
}

/// A file. Large ones have `lfs`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Listed {
    #[serde(rename = "rfilename")]
    pub(super) name: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, Deserialize)]
struct Lfs {
    sha256: String,
    size: Option<u64>,
}

/// How the content of a file is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Checksum {
    Sha256(String),
    /// Git's, of a small file.
    GitBlob(String),
    /// A mirror's list says nothing.
    Unknown,
}

impl Listed {
    pub(super) fn size(&self) -> Option<u64> {
        self.lfs.as_ref().and_then(|lfs| lfs.size).or(self.size)
    }

    pub(super) fn checksum(&self) -> Checksum {
        match (&self.lfs, &self.blob_id) {
            (Some(lfs), _) => Checksum::Sha256(lfs.sha256.clone()),
            (None, Some(id)) => Checksum::GitBlob(id.clone()),
            (None, None) => Checksum::Unknown,
        }
    }
}

impl Listing {
    /// The files below a folder, without its name.
    pub(super) fn names_below(&self, folder: &str) -> BTreeSet<String> {
        self.siblings.iter().filter_map(|file| file.name.strip_prefix(folder)).map(str::to_owned).collect()
    }

    pub(super) fn file(&self, name: &str) -> Listed {
        self.siblings.iter().find(|file| file.name == name).expect("chosen from this list").clone()
    }
}

/// The files of a model among `names`: one format of each part's weights, in the first variant that is there.
pub(super) fn choose(
    names: &BTreeSet<String>,
    what: What,
    index: Option<&[u8]>,
    variants: Variants,
) -> Result<Vec<String>, Missing> {
    let marker = if what == What::Pipeline { "model_index.json" } else { "config.json" };
    if !names.contains(marker) {
        return Err(Missing::Configuration(marker));
    }
    let mut chosen = vec![marker.to_owned()];
    if what != What::Pipeline {
        chosen.extend(weights(names, "", variants.0)?);
        return Ok(chosen);
    }
    let index: Value = index.and_then(|text| serde_json::from_slice(text).ok()).unwrap_or_default();
    let is_named = |part: &&str| matches!(index.get(*part), Some(Value::Array(of)) if !of.iter().any(Value::is_null));
    for part in MODELS.into_iter().filter(is_named) {
        let config = format!("{part}/config.json");
        if !names.contains(&config) {
            return Err(Missing::Folder(part.into()));
        }
        chosen.push(config);
        chosen.extend(weights(names, part, variants.0)?);
    }
    for part in OTHERS.into_iter().filter(is_named) {
        let folder = format!("{part}/");
        let texts = names
            .iter()
            .filter(|name| name.starts_with(&folder) && (name.ends_with(".json") || name.ends_with(".txt")));
        let before = chosen.len();
        chosen.extend(texts.cloned());
        if chosen.len() == before {
            return Err(Missing::Folder(part.into()));
        }
    }
    Ok(chosen)
}

fn weights(names: &BTreeSet<String>, part: &str, variants: &[Variant]) -> Result<Vec<String>, Missing> {
    let label = if part.is_empty() { "the model" } else { part };
    let path = |file: &str| if part.is_empty() { file.to_owned() } else { format!("{part}/{file}") };
    let variants: Vec<Option<&str>> = variants.iter().map(Option::as_deref).collect();
    let exists = |file: &str| names.contains(&path(file));
    let Ok(file) = weight_files(&variants, exists) else {
        let pickles = names
            .iter()
            .any(|name| name.strip_prefix(&path("")).is_some_and(|file| !file.contains('/') && file.ends_with(".bin")));
        return Err(Missing::Weights(label.into(), pickles));
    };
    let mut files = vec![path(&file)];
    if file.ends_with(".json") {
        // the shards share the index' stem and variant
        let stem = file.split('.').next().unwrap_or_default();
        let variant = variants.iter().flatten().find(|variant| file.contains(&format!(".{variant}.")));
        let shards: Vec<String> =
            names.iter().filter(|name| is_shard(name, &path(stem), variant.copied())).cloned().collect();
        let count = shards.first().and_then(|name| name.split("-of-").nth(1)?.get(..5)?.parse().ok());
        if count != Some(shards.len()) {
            return Err(Missing::Weights(label.into(), false));
        }
        files.extend(shards);
    }
    Ok(files)
}

/// `stem[.variant]-00001-of-00002[.variant].safetensors`.
fn is_shard(name: &str, stem: &str, variant: Option<&str>) -> bool {
    let Some(rest) = name.strip_prefix(stem).and_then(|rest| rest.strip_suffix(".safetensors")) else { return false };
    let dotted = variant.map(|variant| format!(".{variant}")).unwrap_or_default();
    let numbers = rest.strip_prefix(dotted.as_str()).filter(|_| !dotted.is_empty());
    let numbers = numbers.or_else(|| rest.strip_suffix(dotted.as_str())).unwrap_or_default();
    let parts: Vec<&str> = numbers.split('-').collect();
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    matches!(parts[..], ["", first, "of", last] if is_number(first) && is_number(last))
}

/// Whether a folder holds all of a model.
pub(super) fn is_whole(folder: &Path, what: What, variants: &[Variant]) -> bool {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let path = entry.path();
        if path.is_file() {
            names.insert(name);
        } else {
            let inner = fs::read_dir(path).into_iter().flatten().flatten().filter(|entry| entry.path().is_file());
            names.extend(inner.filter_map(|entry| Some(format!("{name}/{}", entry.file_name().to_str()?))));
        }
    }
    let index = fs::read(folder.join("model_index.json")).ok();
    choose(&names, what, index.as_deref(), Variants(variants)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> BTreeSet<String> {
        list.iter().map(|name| (*name).to_owned()).collect()
    }

    const INDEX: &[u8] =
        br#"{"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": [null, null], "tokenizer": [null, null],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"], "feature_extractor": [null, null]}"#;
    const PIPELINE: [&str; 12] = [
        "README.md",
        "model_index.json",
        "sd_xl_base_1.0.safetensors",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "unet/openvino_model.bin",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.onnx",
    ];

    #[test]
    fn only_what_is_needed_is_chosen_and_the_first_variant_that_is_there() {
        let fp16 = [Some("fp16".to_owned()), None];
        let chosen = choose(&names(&PIPELINE), What::Pipeline, Some(INDEX), Variants(&fp16)).unwrap();
        let expected = [
            "model_index.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
            "scheduler/scheduler_config.json",
        ];
        assert_eq!(chosen, expected);
    }

    #[test]
    fn what_is_missing_is_named() {
        let choose = |list: &[&str], what| choose(&names(list), what, Some(INDEX), Variants(&[None]));
        assert_eq!(choose(&["a.safetensors"], What::Pipeline), Err(Missing::Configuration("model_index.json")));
        assert_eq!(choose(&["README.md"], What::Vae), Err(Missing::Configuration("config.json")));
        let without = |gone: &str| PIPELINE.into_iter().filter(|name| !name.starts_with(gone)).collect::<Vec<_>>();
        assert_eq!(choose(&without("vae/config"), What::Pipeline), Err(Missing::Folder("vae".into())));
        assert_eq!(choose(&without("scheduler"), What::Pipeline), Err(Missing::Folder("scheduler".into())));
        assert_eq!(choose(&without("vae/diff"), What::Pipeline), Err(Missing::Weights("vae".into(), false)));
        assert_eq!(
            choose(&["config.json", "diffusion_pytorch_model.bin"], What::ControlNet),
            Err(Missing::Weights("the model".into(), true))
        );
    }

    #[test]
    fn shards_come_all_or_not_at_all() {
        let list = [
            "config.json",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
            "diffusion_pytorch_model-00001-of-00001.safetensors",
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ];
        let fp16 = [Some("fp16".to_owned())];
        let chosen = choose(&names(&list), What::Vae, None, Variants(&fp16)).unwrap();
        assert_eq!(chosen[2..], list[1..3]);
        let gone = choose(&names(&[list[0], list[1], list[4]]), What::Vae, None, Variants(&fp16));
        assert_eq!(gone, Err(Missing::Weights("the model".into(), false)));
    }
}
