//! A model in the diffusers layout: which component is in which folder, and its configuration.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::schedulers::SchedulerConfig;

/// A pipeline's folder with its `model_index.json`.
pub struct ModelDir {
    path: PathBuf,
    index: Value,
    /// A component from elsewhere.
    other: Option<(&'static str, PathBuf)>,
}

impl ModelDir {
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Err(Error::setup("model_not_found", format!("there is no model folder {}", path.display()))
                .remedy("give --model (or MODEL_ID) a folder in the diffusers layout"));
        }
        let index = read_json(&path.join("model_index.json"))?;
        let class = index.get("_class_name").and_then(Value::as_str).unwrap_or("no class");
        if !class.starts_with("StableDiffusionXL") {
            let message = format!("{} is a model of {class}", path.display());
            return Err(Error::setup("unsupported_model", message).remedy("give --model a Stable Diffusion XL model"));
        }
        Ok(ModelDir { path: path.to_owned(), index, other: None })
    }

    /// The same with a component from another folder.
    pub fn with_component(self, name: &'static str, folder: &Path) -> Self {
        ModelDir { other: Some((name, folder.to_owned())), ..self }
    }

    /// What a person calls the model: its repository in a cache of the Hub's, else its folder's name.
    pub fn name(&self) -> String {
        let mut folders = self.path.iter().rev().map(|name| name.to_string_lossy());
        let folder = folders.next();
        let repository = folders.find(|name| name.starts_with("models--"));
        match repository.filter(|_| self.path.parent().is_some_and(|parent| parent.ends_with("snapshots"))) {
            Some(repository) => repository["models--".len()..].replacen("--", "/", 1),
            None => folder.map_or_else(|| "model".into(), |name| name.into_owned()),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn component(&self, name: &str) -> PathBuf {
        match &self.other {
            Some((other, folder)) if *other == name => folder.clone(),
            _ => self.path.join(name),
        }
    }

    /// Whether the pipeline has this component: a refiner has no `text_encoder`.
    pub fn has(&self, name: &str) -> bool {
        !matches!(self.index.get(name), Some(Value::Array(parts)) if parts.iter().any(Value::is_null))
    }

    /// Whether the UNet is told how good the picture shall be, in the place of its size: a refiner's is.
    pub fn requires_aesthetics_score(&self) -> bool {
        self.index.get("requires_aesthetics_score").and_then(Value::as_bool).unwrap_or(false)
    }

    /// `config.json` of a component.
    pub fn config(&self, component: &str) -> Result<Value> {
        read_json(&self.component(component).join("config.json"))
    }

    pub fn scheduler_config(&self) -> Result<SchedulerConfig> {
        let path = self.component("scheduler").join("scheduler_config.json");
        SchedulerConfig::from_json(&read_text(&path)?).map_err(|e| {
            Error::setup("model_invalid", format!("{} cannot be read", path.display())).source(e).remedy(WHOLE_MODEL)
        })
    }

    /// Whether an absent negative prompt means zeros rather than the encoding of an empty text.
    pub fn force_zeros_for_empty_prompt(&self) -> bool {
        self.index.get("force_zeros_for_empty_prompt").and_then(Value::as_bool).unwrap_or(true)
    }
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| {
        Error::setup("model_invalid", format!("{} cannot be read", path.display())).source(e).remedy(WHOLE_MODEL)
    })
}

const WHOLE_MODEL: &str = "the model folder must be whole, in the diffusers layout; download it again";

/// Reads a JSON file of the model.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?).map_err(|e| {
        Error::setup("model_invalid", format!("{} is not JSON", path.display())).source(e).remedy(WHOLE_MODEL)
    })
}

/// A whole number of a configuration, or the default that diffusers gives it.
pub(super) fn integer(config: &Value, key: &str, default: i64) -> i64 {
    config.get(key).and_then(Value::as_i64).unwrap_or(default)
}
