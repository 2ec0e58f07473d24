//! Files to tensors: safetensors checkpoints in the Hub's layout, mapped and bound to graphs by name.

mod checkpoint;
mod fused;
mod home;
mod restore;
mod safetensors;
mod single_file;
mod upload;

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::Module;

pub use checkpoint::{Checkpoint, read_ahead, weight_files};
use fused::Fused;
pub use fused::Sources;
pub(crate) use home::{InUse, in_use, unbind};
pub(crate) use safetensors::MappedFile;

/// One component's tensors, in the dtype and on the device its graphs compute with. Graphs of one component bind the
/// same tensors, so a second graph costs no second copy.
pub struct Weights {
    checkpoint: Checkpoint,
    device: Device,
    kind: Kind,
    /// By the checkpoint's parameter name; as long as they are away each is the stub, seen as the tensor's shape.
    loaded: HashMap<String, Tensor>,
    /// Some of these are rows of one tensor.
    fused: Fused,
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
            fused: Fused::default(),
            bound,
            stub,
            offload: false,
            here: true,
            users: 0,
            when_leaving: Vec::new(),
            bind_time: Duration::ZERO,
        }
    }

    /// The graphs hold several parameters in one. To be said before the first is bound.
    pub(crate) fn fuse(&mut self, sources: &Sources) {
        self.fused = Fused::new(sources);
    }

    /// Binds each parameter of `module` to the checkpoint's tensor of that name, or to those it is fused of.
    ///
    /// # Errors
    /// `weights_mismatch` lists what is missing, mis-shaped, or in the file but in none of `known`: the parameter names
    /// of every graph that this component has.
    pub fn bind<'a>(&mut self, module: &Module, known: impl Fn(&str) -> bool + 'a) -> Result<()> {
        let started = Instant::now();
        let mut parameters = module.named_parameters()?;
        let (mut missing, mut mis_shaped, mut new) = (Vec::new(), Vec::new(), Vec::new());
        for (name, parameter) in &parameters {
            let sources = self.fused.sources(name);
            let mut wanted = parameter.size();
            if let Some(rows) = wanted.first_mut() {
                *rows /= sources.len() as i64;
            }
            for source in sources {
                match self.checkpoint.shape(source) {
                    None => missing.push(source.to_owned()),
                    Some(shape) if shape != wanted => {
                        mis_shaped.push(format!("{source} is {shape:?}, the graph wants {wanted:?}"));
                    }
                    Some(_) if !self.loaded.contains_key(source) => new.push(source.to_owned()),
                    Some(_) => {}
                }
            }
        }
        let is_known = |name: &&str| self.fused.graph_name(name).is_some_and(&known);
        let unexpected = self.checkpoint.names().filter(|name| !is_known(name)).map(str::to_owned).collect();
        let found = [("missing", missing), ("unexpected", unexpected), ("mis-shaped", mis_shaped)];
        if found.iter().any(|(_, names)| !names.is_empty()) {
            return Err(mismatch(&self.checkpoint, found));
        }
        self.load(new)?;
        for (name, parameter) in &mut parameters {
            self.bind_parameter(name, parameter)?;
        }
        self.bound.append(&mut parameters);
        self.bind_time += started.elapsed();
        Ok(())
    }

    fn bind_parameter(&self, name: &str, parameter: &mut Tensor) -> Result<()> {
        if !self.here {
            return unbind(parameter, &self.stub);
        }
        let tensor = self.fused.tensor(name).unwrap_or_else(|| &self.loaded[name]);
        Ok(parameter.f_set_data(tensor).map_err(anyhow::Error::from)?)
    }

    /// These parameters of a graph under the checkpoint's names.
    pub(crate) fn unfused(&self, parameters: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
        let parts = |(name, tensor): (String, Tensor)| match self.fused.tensor(&name) {
            None => vec![(name, tensor)],
            Some(_) => {
                let own = |source: &str| (source.to_owned(), self.loaded[source].shallow_clone());
                self.fused.sources(&name).into_iter().map(own).collect()
            }
        };
        parameters.into_iter().flat_map(parts).collect()
    }

    /// How long it took to bring the weights to where they are.
    pub fn bind_time(&self) -> Duration {
        self.bind_time
    }

    /// Of what has been bound so far.
    pub fn bytes(&self) -> u64 {
        self.loaded.values().map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    }

    /// Brings these to where the graphs compute, or stubs of them while the weights are away.
    fn load(&mut self, names: Vec<String>) -> Result<()> {
        let mut targets = Vec::with_capacity(names.len());
        for name in names {
            let shape = self.checkpoint.shape(&name).unwrap_or_default();
            let target = (self.kind, self.device);
            let tensor = match self.here {
                false => self.stub.f_expand(shape, false).map_err(anyhow::Error::from)?,
                true => match (self.fused.rows(&name, shape, target)?, self.device) {
                    (None, Device::Cpu) => self.read(&name)?,
                    (Some(mut rows), Device::Cpu) => {
                        rows.f_copy_(&self.read(&name)?).map_err(anyhow::Error::from)?;
                        rows
                    }
                    // all memory belongs to the usual stream, so that it can be used again for anything
                    (None, _) => Tensor::f_empty(shape, target).map_err(anyhow::Error::from)?,
                    (Some(rows), _) => rows,
                },
            };
            targets.push((name, tensor));
        }
        if self.here && self.device != Device::Cpu {
            targets = upload::upload(&self.checkpoint, targets, &upload::PINNED)?;
        }
        self.loaded.extend(targets);
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
