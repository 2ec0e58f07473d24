//! A component's weights: one file or several shards, found by the Hub's naming, under the graphs' parameter names.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::safetensors::MappedFile;
use crate::error::{Error, Result};

pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<MappedFile>,
    /// Parameter name to (file, name in the file).
    tensors: HashMap<String, (usize, String)>,
}

/// `*.safetensors.index.json`: which shard holds which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights of `component` (`unet`, `vae`, ...) in `dir`, or in one file: that of the component alone, or a whole
    /// checkpoint in the original layout.
    ///
    /// `variants` are tried in order (`None` is the plain name); the first that is there wins.
    pub fn open(component: &str, dir: &Path, variants: &[Option<&str>]) -> Result<Self> {
        let paths = find_files(dir, variants)?;
        let files =
            paths.iter().map(|path| Ok(MappedFile::open(path)?.of_component(component))).collect::<Result<Vec<_>>>()?;
        let mut tensors = HashMap::new();
        for (index, file) in files.iter().enumerate() {
            for name in file.names().filter(|name| !is_derived(name)) {
                let duplicate = tensors.insert(parameter_name(component, name), (index, name.to_owned()));
                if duplicate.is_some() {
                    let message = format!("{} has {name} twice", dir.display());
                    return Err(Error::setup("weights_damaged", message).remedy("download the files again"));
                }
            }
        }
        Ok(Checkpoint { dir: dir.to_owned(), files, tensors })
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether a file in the original layout has an empty tensor of this name beside its parts, by which trainers say
    /// what is special.
    pub fn has_mark(&self, name: &str) -> bool {
        self.files.iter().any(|file| file.marks().contains(name))
    }

    /// Of the tensor with this parameter name.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        let (file, stored) = self.tensors.get(name)?;
        self.files[*file].shape(stored)
    }

    /// Where it is: file, and byte in it.
    pub(super) fn position(&self, name: &str) -> (usize, usize) {
        let (file, stored) = &self.tensors[name];
        (*file, self.files[*file].position(stored))
    }

    /// As the file has it.
    pub(super) fn kind(&self, name: &str) -> Option<Kind> {
        let (file, stored) = self.tensors.get(name)?;
        self.files[*file].kind(stored)
    }

    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        let (file, stored) = &self.tensors[name];
        self.files[*file].tensor(stored)
    }

    /// Whether the memory of a tensor that was read under this name is the file's mapping.
    pub(super) fn holds(&self, name: &str, tensor: &Tensor) -> bool {
        self.tensors.get(name).is_some_and(|(file, _)| self.files[*file].holds(tensor))
    }

    /// Makes such a tensor what it was.
    pub(super) fn restore(&self, name: &str, tensor: &Tensor) -> Result<()> {
        let (file, stored) = &self.tensors[name];
        self.files[*file].restore(stored, tensor)
    }

    pub(super) fn describe(&self) -> String {
        self.dir.display().to_string()
    }
}

/// Has the system read the weights of these components into the page cache, one after the other at the disk's own rate,
/// while graphs are loaded and pages are used. Each is a folder with its variants, as for [`Checkpoint::open`].
pub fn read_ahead(components: Vec<(PathBuf, Vec<Option<String>>)>) {
    #[cfg(target_os = "linux")]
    let read = move || {
        for (dir, variants) in components {
            let variants: Vec<Option<&str>> = variants.iter().map(Option::as_deref).collect();
            // whoever opens it says what is wrong with it
            for file in find_files(&dir, &variants).into_iter().flatten().filter_map(|path| File::open(path).ok()) {
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed).ok();
            }
        }
    };
    #[cfg(target_os = "linux")]
    std::thread::Builder::new().name("read-ahead".into()).spawn(read).ok();
    #[cfg(not(target_os = "linux"))]
    drop(components);
}

/// The file that holds the weights, or the index that names their shards: of the first variant that is there.
///
/// # Errors
/// The names that were looked for.
pub fn weight_files(variants: &[Option<&str>], exists: impl Fn(&str) -> bool) -> Result<String, Vec<String>> {
    let mut tried = Vec::new();
    for variant in variants {
        for stem in ["diffusion_pytorch_model", "model"] {
            let variant_dot = variant.map(|v| format!(".{v}")).unwrap_or_default();
            let single = format!("{stem}{variant_dot}.safetensors");
            if exists(&single) {
                return Ok(single);
            }
            tried.push(single);
            // two ways of naming an index with a variant have been written
            for index in [
                format!("{stem}.safetensors.index{variant_dot}.json"),
                format!("{stem}{variant_dot}.safetensors.index.json"),
            ] {
                if exists(&index) {
                    return Ok(index);
                }
            }
        }
    }
    Err(tried)
}

fn find_files(dir: &Path, variants: &[Option<&str>]) -> Result<Vec<PathBuf>> {
    if dir.is_file() {
        return Ok(vec![dir.to_owned()]);
    }
    match weight_files(variants, |name| dir.join(name).is_file()) {
        Ok(index) if index.ends_with(".json") => shards(dir, &dir.join(index)),
        Ok(single) => Ok(vec![dir.join(single)]),
        Err(tried) => {
            let message = format!("{} holds no weights; looked for {}", dir.display(), tried.join(", "));
            Err(Error::setup("weights_missing", message)
                .remedy("check --model and --variant; only safetensors files are read"))
        }
    }
}

fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let damaged = |message: String| {
        Error::setup("weights_damaged", format!("{}: {message}", index.display())).remedy("download the files again")
    };
    let text = std::fs::read_to_string(index).map_err(|e| damaged("cannot be read".into()).source(e))?;
    let index: Index = serde_json::from_str(&text).map_err(|e| damaged("not an index".into()).source(e))?;
    let names: BTreeSet<&String> = index.weight_map.values().collect();
    let paths: Vec<PathBuf> = names.into_iter().map(|name| dir.join(name)).collect();
    match paths.iter().find(|path| !path.is_file()) {
        Some(gone) => Err(damaged(format!("the shard {} is not there", gone.display()))),
        None => Ok(paths),
    }
}

/// Tables that old checkpoints carry and every model computes for itself.
fn is_derived(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
}

/// The graph's name for a stored tensor. Hub checkpoints of the text encoders carry `text_model.`, which transformers 5
/// no longer writes; old VAE checkpoints use the first names of the attention's parts.
fn parameter_name(component: &str, stored: &str) -> String {
    if component.starts_with("text_encoder") {
        let whole = stored.starts_with("text_model.") || stored.starts_with("text_projection.");
        return if whole { stored.to_owned() } else { format!("text_model.{stored}") };
    }
    if component == "vae" && stored.contains(".attentions.") {
        let renames =
            [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
        if let Some((old, new)) = renames.iter().find(|(old, _)| stored.contains(old)) {
            return stored.replace(old, new);
        }
    }
    stored.to_owned()
}
