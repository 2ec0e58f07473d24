//! Files to tensors: safetensors checkpoints in the Hub's layout, mapped and bound to graphs by name.

mod checkpoint;
mod safetensors;

use std::collections::{BTreeMap, HashMap};

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::torch::Module;

pub use checkpoint::Checkpoint;

/// One component's tensors, in the dtype and on the device its graphs compute with. Graphs of one component bind the
/// same tensors, so a second graph costs no second copy.
pub struct Weights {
    checkpoint: Checkpoint,
    device: Device,
    kind: Kind,
    loaded: HashMap<String, Tensor>,
}

impl Weights {
    pub fn new(checkpoint: Checkpoint, device: Device, kind: Kind) -> Self {
        Weights { checkpoint, device, kind, loaded: HashMap::new() }
    }

    /// Binds each parameter of `module` to the checkpoint's tensor of that name.
    ///
    /// # Errors
    /// `weights_mismatch` lists what is missing, mis-shaped, or in the file but in none of `known`: the parameter names
    /// of every graph that this component has.
    pub fn bind<'a>(&mut self, module: &Module, known: impl Fn(&str) -> bool + 'a) -> Result<()> {
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
        for (name, parameter) in &mut parameters {
            parameter.set_data(&self.tensor(name)?);
        }
        Ok(())
    }

    /// Of what has been bound so far.
    pub fn bytes(&self) -> u64 {
        self.loaded.values().map(|tensor| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    }

    fn tensor(&mut self, name: &str) -> Result<Tensor> {
        if let Some(tensor) = self.loaded.get(name) {
            return Ok(tensor.shallow_clone());
        }
        let tensor = self.checkpoint.tensor(name)?.to_device(self.device).to_kind(self.kind);
        self.loaded.insert(name.to_owned(), tensor.shallow_clone());
        Ok(tensor)
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
