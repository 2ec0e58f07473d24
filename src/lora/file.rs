//! One LoRA file: read, checked against the model whole, before anything is changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use tch::{Kind, Tensor};

use super::build;
use super::change::Change;
use super::keys::{Part, is_unsupported, split};
use super::names::{NameTable, Target};
use crate::error::{Error, ErrorClass, Result};
use crate::torch::Mapping;
use crate::weights::MappedFile;

/// Far above what any file's header takes, and parsed in a second.
const MAX_HEADER: u64 = 32 << 20;
/// Keys that an error names.
const SHOWN: usize = 3;

/// A file that fits the model.
pub(super) struct LoraFile {
    pub(super) changes: BTreeMap<Target, Change>,
    /// Keys that act.
    pub(super) matched: usize,
    /// Keys that name nothing in this model.
    pub(super) unmatched: Vec<String>,
    pub(super) bytes: u64,
}

/// What the file is compared with.
pub(super) struct Model<'a> {
    pub(super) table: &'a NameTable,
    /// `unet`, `text_encoder`, ...
    pub(super) components: &'a [&'a str],
    pub(super) shape: &'a dyn Fn(&Target) -> Vec<i64>,
}

/// The tensors that a file has for one weight.
pub(super) type Parts = BTreeMap<Part, Tensor>;

pub(super) fn damaged(message: impl Into<String>) -> Error {
    Error::new(ErrorClass::InvalidInput, "lora_damaged", message).remedy("download the LoRA again, or leave it out")
}

pub(super) fn unsupported(message: impl Into<String>) -> Error {
    Error::new(ErrorClass::InvalidInput, "lora_unsupported", message)
        .remedy("use a .safetensors file of LoRA, LoCon, DoRA, LoHa or LoKr")
}

pub(super) fn mismatch(message: impl Into<String>) -> Error {
    Error::new(ErrorClass::InvalidInput, "lora_mismatch", message)
        .remedy("use a LoRA that was made for Stable Diffusion XL")
}

impl LoraFile {
    /// Reads the whole file into memory, so that one that changes later changes nothing here.
    ///
    /// # Errors
    /// `lora_unsupported` (a pickle, another algorithm), `lora_damaged` (cut short, parts missing or contradicting each
    /// other, values that are not finite), `lora_mismatch` (shapes or names of another model).
    pub(super) fn read(file: &File, model: &Model) -> Result<LoraFile> {
        let length = file.metadata().map_err(|e| damaged("the LoRA cannot be read").source(e))?.len();
        check_start(file, length)?;
        let mapping = Mapping::read(file, length as usize).map_err(|e| damaged("the LoRA cannot be read").source(e))?;
        let file = MappedFile::new(Path::new("the LoRA"), mapping)
            .map_err(|e| damaged("not a whole safetensors file").source(anyhow::anyhow!(e.message)))?;
        let (weights, matched, unmatched) = sort_keys(&file, model)?;
        if weights.is_empty() {
            return Err(nothing_matches(&unmatched));
        }
        let notes = Notes::of(&file);
        let mut changes = BTreeMap::new();
        for (target, parts) in weights {
            let module = target.parameter.trim_end_matches(".weight");
            let (alpha, rank_root) = notes.of_module(model.components[target.component], module);
            let change = build::change(module, parts, &(model.shape)(&target), alpha, rank_root)?;
            changes.insert(target, change);
        }
        Ok(LoraFile { changes, matched, unmatched, bytes: length })
    }
}

/// Tells what is no safetensors file before any of it is read.
fn check_start(file: &File, length: u64) -> Result<()> {
    let mut start = [0; 9];
    if length < 9 || file.read_exact_at(&mut start, 0).is_err() {
        return Err(damaged(format!("{length} bytes are no safetensors file")));
    }
    let header = u64::from_le_bytes(start[..8].try_into().expect("eight bytes"));
    if start[8] != b'{' && (start.starts_with(b"PK") || (start[0] == 0x80 && start[1] <= 5)) {
        return Err(unsupported("this is a pickle or an archive, which can run code; only safetensors files are read"));
    }
    if start[8] != b'{' || header > length - 8 {
        return Err(damaged("not a whole safetensors file"));
    }
    if header > MAX_HEADER {
        return Err(damaged(format!("its header has {header} bytes, more than {MAX_HEADER}")));
    }
    Ok(())
}

/// The tensors by the weight they change; how many there are; the keys that name nothing here.
fn sort_keys(file: &MappedFile, model: &Model) -> Result<(BTreeMap<Target, Parts>, usize, Vec<String>)> {
    let mut names: Vec<&str> = file.names().collect();
    names.sort_unstable();
    let mut weights: BTreeMap<Target, (Parts, Vec<String>)> = BTreeMap::new();
    let mut unmatched = Vec::new();
    for name in names {
        let found = split(name).and_then(|(module, part)| Some((model.table.find(module)?.clone(), part)));
        let Some((target, part)) = found else {
            unmatched.push(name.to_owned());
            continue;
        };
        let tensor = file.tensor(name).map_err(|e| damaged(format!("{name} cannot be read")).source(e))?;
        check_values(name, &tensor)?;
        let (parts, keys) = weights.entry(target).or_default();
        if parts.insert(part, tensor).is_some() {
            return Err(damaged(format!("{name} is there twice, under two names")));
        }
        keys.push(name.to_owned());
    }
    // an alpha alone changes nothing
    let mut matched = 0;
    weights.retain(|_, (parts, keys)| {
        let acts = parts.keys().any(|part| !matches!(part, Part::Alpha | Part::Magnitude | Part::DoraScale));
        if acts {
            matched += keys.len();
        } else {
            unmatched.append(keys);
        }
        acts
    });
    unmatched.sort_unstable();
    Ok((weights.into_iter().map(|(target, (parts, _))| (target, parts)).collect(), matched, unmatched))
}

fn check_values(name: &str, tensor: &Tensor) -> Result<()> {
    if !tensor.is_floating_point() && tensor.numel() > 1 {
        return Err(damaged(format!("{name} holds whole numbers")));
    }
    // a sum in float64 is finite if and only if every value is
    if !tensor.to_kind(Kind::Float).sum(Kind::Double).double_value(&[]).is_finite() {
        return Err(damaged(format!("{name} holds values that are not finite")));
    }
    Ok(())
}

fn nothing_matches(keys: &[String]) -> Error {
    let shown = keys.iter().take(SHOWN).map(|key| key.chars().take(120).collect()).collect::<Vec<String>>().join(", ");
    if keys.iter().any(|key| is_unsupported(key)) {
        return unsupported(format!("an algorithm that is not supported; its keys are {shown}, ..."));
    }
    let count = keys.len();
    mismatch(match count {
        0 => "the file holds no tensors".into(),
        _ => format!("none of its {count} keys names a part of this model: {shown}, ..."),
    })
}

/// What newer diffusers scripts write into the header instead of `.alpha` keys: peft's configuration.
struct Notes(Value);

impl Notes {
    fn of(file: &MappedFile) -> Notes {
        let text = file.notes().get("lora_adapter_metadata");
        Notes(text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default())
    }

    /// The alpha of a module, and whether it is divided by the root of the rank (rsLoRA).
    fn of_module(&self, component: &str, module: &str) -> (Option<f64>, bool) {
        let value = |key: &str| self.0.get(format!("{component}.{key}"));
        let own = value("alpha_pattern").and_then(Value::as_object).and_then(|patterns| {
            let fits = |pattern: &str| module == pattern || module.ends_with(&format!(".{pattern}"));
            patterns.iter().find(|(pattern, _)| fits(pattern)).and_then(|(_, alpha)| alpha.as_f64())
        });
        let alpha = own.or_else(|| value("lora_alpha").and_then(Value::as_f64));
        (alpha, value("use_rslora").and_then(Value::as_bool).unwrap_or(false))
    }
}
