//! A model: which component is where, and its configuration. A folder in the diffusers layout, or a checkpoint in one file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::stock::{Marks, Stock};
use crate::error::{Error, Result};
use crate::schedulers::SchedulerConfig;

/// A pipeline's folder with its `model_index.json`, or one file with all its weights.
pub struct ModelDir {
    path: PathBuf,
    configuration: Configuration,
    index: Value,
    /// A component from elsewhere.
    other: Option<(&'static str, PathBuf)>,
}

/// Where configuration and vocabulary come from.
enum Configuration {
    Folder(PathBuf),
    Stock(Stock, Marks),
}

impl Configuration {
    fn text(&self, name: &str) -> Result<String> {
        match self {
            Configuration::Folder(folder) => read_text(&folder.join(name)),
            Configuration::Stock(stock, _) => stock.text(name).map(str::to_owned).ok_or_else(|| {
                Error::setup("model_invalid", format!("a checkpoint in one file has no {name}"))
                    .remedy("give --model a folder in the diffusers layout")
            }),
        }
    }

    fn json(&self, name: &str) -> Result<Value> {
        match self {
            Configuration::Folder(folder) => read_json(&folder.join(name)),
            Configuration::Stock(..) => Ok(serde_json::from_str(&self.text(name)?).expect("ours is JSON")),
        }
    }
}

impl ModelDir {
    /// `configuration` is the folder of a model that a checkpoint in one file is like, if not a published SDXL.
    pub fn open(path: &Path, configuration: Option<&Path>) -> Result<Self> {
        let configuration = match configuration {
            Some(folder) if path.is_file() => Configuration::Folder(folder.to_owned()),
            None if path.is_file() => {
                let (stock, marks) = Stock::of(path)?;
                Configuration::Stock(stock, marks)
            }
            _ if path.is_dir() => Configuration::Folder(path.to_owned()),
            _ => {
                return Err(Error::setup("model_not_found", format!("there is no model {}", path.display()))
                    .remedy("give --model (or MODEL_ID) a folder in the diffusers layout, a .safetensors file, or org/name of the Hub"));
            }
        };
        let index = configuration.json("model_index.json")?;
        let class = index.get("_class_name").and_then(Value::as_str).unwrap_or("no class");
        if !class.starts_with("StableDiffusionXL") {
            let message = format!("{} is a model of {class}", path.display());
            return Err(Error::setup("unsupported_model", message).remedy("give --model a Stable Diffusion XL model"));
        }
        Ok(ModelDir { path: path.to_owned(), configuration, index, other: None })
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
            None => folder.map_or_else(|| "model".into(), |name| name.trim_end_matches(".safetensors").to_owned()),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where its weights are: a folder, or a file.
    pub fn component(&self, name: &str) -> PathBuf {
        match &self.other {
            Some((other, folder)) if *other == name => folder.clone(),
            _ if self.path.is_file() => self.path.clone(),
            _ => self.path.join(name),
        }
    }

    /// The folder of a tokenizer; `None` means CLIP's own vocabulary.
    pub fn tokenizer(&self, name: &str) -> Option<PathBuf> {
        match &self.configuration {
            Configuration::Folder(folder) => Some(folder.join(name)),
            Configuration::Stock(..) => None,
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
        match &self.other {
            Some((other, folder)) if *other == component && folder.is_dir() => read_json(&folder.join("config.json")),
            _ => self.configuration.json(&format!("{component}/config.json")),
        }
    }

    pub fn scheduler_config(&self) -> Result<SchedulerConfig> {
        let name = "scheduler/scheduler_config.json";
        let mut text = self.configuration.text(name)?;
        if let Configuration::Stock(_, marks) = &self.configuration {
            let mut config = self.configuration.json(name)?;
            if marks.v_prediction {
                config["prediction_type"] = "v_prediction".into();
            }
            if marks.zero_terminal_snr {
                config["rescale_betas_zero_snr"] = true.into();
            }
            text = config.to_string();
        }
        SchedulerConfig::from_json(&text).map_err(|e| {
            let path = self.path.join(name);
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
