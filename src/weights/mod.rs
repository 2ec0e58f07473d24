//! Files to tensors: safetensors checkpoints in the Hub's layout, mapped and bound to graphs by name.

mod checkpoint;
mod home;
mod restore;
mod safetensors;
mod upload;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::Module;

pub use checkpoint::{Checkpoint, read_ahead};
pub(crate) use home::{InUse, in_use, unbind};
pub(crate) use safetensors::MappedFile;

/// One component's tensors, in the dtype and on the device its graphs compute with. Graphs of one component bind the
/// same tensors, so a second graph costs no second copy.
pub struct Weights {
    checkpoint: Checkpoint,
    device: Device,
    kind: Kind,
    /// By parameter name; as long as they are away each is the stub, seen as the tensor's shape.
    loaded: HashMap<String, Tensor>,
    /// The graphs' own parameters.
    bound: Vec<(String, Tensor)>,
    /// One element on the device.
    stub: Tensor,
    /// Leave the device when nobody computes with them.
    offload: bool,
    here: bool,
    users: u32,
    /// See [`Weights::when_leaving`].
    when_leaving: Vec<Box<dyn Fn() + Send>>,
    /// Of the calls of [`bind`](Self::bind).
    bind_time: Duration,
}

impl Weights {
    pub fn new(checkpoint: Checkpoint, device: Device, kind: Kind) -> Self {
        let stub = Tensor::zeros([1], (kind, device));
        let (loaded, bound) = (HashMap::new(), Vec::new());
        Weights {
            checkpoint,
            device,
            kind,
            loaded,
            bound,
            stub,
            offload: false,
            here: true,
            users: 0,
            when_leaving: Vec::new(),
            bind_time: Duration::ZERO,
        }
    }

    /// Binds each parameter of `module` to the checkpoint's tensor of that name.
    ///
    /// # Errors
    /// `weights_mismatch` lists what is missing, mis-shaped, or in the file but in none of `known`: the parameter names
    /// of every graph that this component has.
    pub fn bind<'a>(&mut self, module: &Module, known: impl Fn(&str) -> bool + 'a) -> Result<()> {
        let started = Instant::now();
        let mut parameters = module.named_parameters()?;
        let (mut missing, mut mis_shaped) = (Vec::new(), Vec::new());
        for (name, parameter) in &parameters {
            match self.checkpoint.shape(name) {
                None => missing.push(name.clone()),
                Some(shape) if shape != parameter.size() => {
                    mis_shaped.push(format!("{name} is {shape:?}, the graph wants {:?}", parameter.size()));
                }
                Some(_) => {}
            }
        }
        let unexpected: Vec<String> = self.checkpoint.names().filter(|name| !known(name)).map(str::to_owned).collect();
        let found = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", mis_shaped)];
        if found.iter().any(|(_, names)| !names.is_empty()) {
            return Err(mismatch(&self.checkpoint, found));
        }
        if self.here && self.device != Device::Cpu {
            let names: Vec<&str> = parameters.iter().map(|(name, _)| name.as_str()).collect();
            self.send(names.into_iter().filter(|name| !self.loaded.contains_key(*name)).map(str::to_owned).collect())?;
        }
        for (name, parameter) in &mut parameters {
            let tensor = self.tensor(name)?;
            parameter.f_set_data(&tensor).map_err(anyhow::Error::from)?;
        }
        self.bound.append(&mut parameters);
        self.bind_time += started.elapsed();
        Ok(())
    }

    /// How long it took to bring the weights to where they are.
    pub fn bind_time(&self) -> Duration {
        self.bind_time
    }

    /// Of what has been bound so far.
    pub fn bytes(&self) -> u64 {
        self.loaded.values().map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    }

    fn tensor(&mut self, name: &str) -> Result<Tensor> {
        if let Some(tensor) = self.loaded.get(name) {
            return Ok(tensor.shallow_clone());
        }
        let tensor = if self.here {
            self.read(name)?
        } else {
            let shape = self.checkpoint.shape(name).unwrap_or_default();
            self.stub.f_expand(shape, false).map_err(anyhow::Error::from)?
        };
        self.loaded.insert(name.to_owned(), tensor.shallow_clone());
        Ok(tensor)
    }

    /// Brings these to the device side by side.
    fn send(&mut self, names: Vec<String>) -> Result<()> {
        let names = names.iter().map(String::as_str);
        let sent = upload::upload(&self.checkpoint, names, self.device, self.kind, &upload::PINNED)?;
        self.loaded.extend(sent);
        Ok(())
    }

    /// The checkpoint's tensor in the dtype and on the device of these weights.
    fn read(&self, name: &str) -> Result<Tensor> {
        let stored = self.checkpoint.tensor(name)?;
        let moved = stored.f_to_device(self.device).and_then(|tensor| tensor.f_to_kind(self.kind));
        Ok(moved.map_err(anyhow::Error::from)?)
    }
}

fn mismatch(checkpoint: &Checkpoint, found: [(&str, Vec<String>); 3]) -> Error {
    let lists: BTreeMap<&str, String> = found
        .into_iter()
        .filter(|(_, names)| !names.is_empty())
        .map(|(what, mut names)| {
            names.sort();
            let more = names.len().saturating_sub(10);
            let shown = names.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
            let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
            (what, format!("{} {what}: {shown}{rest}", names.len()))
        })
        .collect();
    let lists = lists.into_values().collect::<Vec<_>>().join("; ");
    Error::setup("weights_mismatch", format!("{} does not fit the graph: {lists}", checkpoint.describe()))
        .remedy("use weights of this architecture, or export graphs for this model with torchscript/export.py")
}
