//! Graphs compiled ahead of time, beside the TorchScript graph that runs at every other size.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::dtype_name;
use super::graph_set::{GraphSet, differences};
use crate::error::Result;
use crate::fault::is_out_of_memory;
use crate::torch::{self, Module, Package};
use crate::weights::Weights;

/// One package's entry in the manifest.
#[derive(Deserialize)]
pub(super) struct PackageEntry {
    file: String,
    component: String,
    dtype: String,
    config: Map<String, Value>,
    defaults: Map<String, Value>,
    /// `cpu`, or `cuda sm_90` and the like.
    device: String,
    /// Instruction sets of the CPU that it was compiled on, by Linux's names.
    cpu_flags: Vec<String>,
    /// Release of torch.
    torch: String,
    inputs: Vec<Input>,
    sha256: String,
}

#[derive(Deserialize)]
struct Input {
    shape: Vec<i64>,
}

/// A graph with its weights, and the packages of it that this machine can run, on the same tensors.
pub(super) struct CompiledModule {
    module: Module,
    packages: Arc<Mutex<Vec<ForShapes>>>,
}

/// A package, and the shapes of the inputs that it was compiled for.
type ForShapes = (Vec<Vec<i64>>, Package);

impl CompiledModule {
    /// The graph alone.
    pub(super) fn plain(module: Module) -> Self {
        CompiledModule { module, packages: Arc::default() }
    }

    /// With what is there for this component, configuration, dtype and machine. `weights` are bound to `module` already;
    /// packages hold on to them, so they go when the weights leave the device.
    ///
    /// What cannot be loaded is left out with a warning in the log: the graph itself does the work then.
    pub(super) fn load(
        graphs: &GraphSet,
        component: &str,
        config: &Value,
        module: Module,
        weights: &mut Weights,
        (kind, device): (Kind, Device),
    ) -> Self {
        let machine = Machine::of(device);
        let made_for_this = |entry: &&PackageEntry| {
            entry.component == component
                && entry.dtype == dtype_name(kind)
                && differences(&entry.config, &entry.defaults, config).is_empty()
                && machine.runs(entry)
        };
        let mut packages = Vec::new();
        let entries = graphs.packages().iter().filter(made_for_this);
        for entry in entries.filter(|_| weights.stay()) {
            match entry.load(graphs.dir(), device, &module, weights) {
                Ok(package) => {
                    tracing::info!(file = entry.file, "compiled graph loaded");
                    let shapes = entry.inputs.iter().map(|input| input.shape.clone()).collect();
                    packages.push((shapes, package));
                }
                Err(error) => {
                    let reason = format!("{error:#}");
                    tracing::warn!(file = entry.file, reason, "compiled graph left out; TorchScript takes its place");
                }
            }
        }
        let packages = Arc::new(Mutex::new(packages));
        let held = packages.clone();
        weights.when_leaving(move || lock(&held).clear());
        CompiledModule { module, packages }
    }

    /// The outputs: of a package where one was compiled for just these sizes, else of the graph.
    pub(super) fn forward(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let mut packages = lock(&self.packages);
        let fits = |shapes: &[Vec<i64>]| inputs.iter().map(|tensor| tensor.size()).eq(shapes.iter().cloned());
        if let Some(index) = packages.iter().position(|(shapes, _)| fits(shapes)) {
            match packages[index].1.run(inputs) {
                Err(error) if !is_out_of_memory(&format!("{error:#}")) => {
                    let reason = format!("{error:#}");
                    tracing::warn!(reason, "a compiled graph failed; TorchScript takes its place");
                    packages.remove(index);
                }
                result => return Ok(result?),
            }
        }
        Ok(self.module.forward(inputs)?)
    }
}

/// Nobody panics while they hold it, and if somebody did, the list would still be one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PackageEntry {
    fn load(&self, dir: &Path, device: Device, module: &Module, weights: &Weights) -> anyhow::Result<Package> {
        let path = dir.join(&self.file);
        // It is native code: what has changed on its way would not fail, but do anything.
        let bytes = fs::read(&path).context("cannot be read")?;
        ensure!(hex(&Sha256::digest(&bytes)) == self.sha256, "it is not the file that the manifest describes");
        // a package is compiled of the plain graph
        let mut tensors = weights.unfused(module.named_parameters()?);
        tensors.extend(module.named_buffers()?);
        Package::load(&path, device, &tensors)
    }
}

/// What decides here whether compiled code can run.
struct Machine {
    /// As in a [`PackageEntry`]; `None` where nothing is compiled for.
    device: Option<String>,
    cpu_flags: String,
}

impl Machine {
    fn of(device: Device) -> Self {
        let device = match device {
            Device::Cpu => Some("cpu".into()),
            Device::Cuda(index) => match torch::compute_capability(index) {
                Ok((major, minor)) => Some(format!("cuda sm_{major}{minor}")),
                Err(error) => {
                    tracing::warn!(reason = format!("{error:#}"), "no compiled graphs");
                    None
                }
            },
            Device::Mps | Device::Vulkan => None,
        };
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let is_list = |line: &&str| line.starts_with("flags") || line.starts_with("Features");
        Machine { device, cpu_flags: cpu.lines().find(is_list).unwrap_or_default().to_owned() }
    }

    fn runs(&self, entry: &PackageEntry) -> bool {
        let has = |flag: &String| self.cpu_flags.split_whitespace().any(|own| own == flag);
        self.device.as_ref() == Some(&entry.device)
            && entry.cpu_flags.iter().all(has)
            && entry.torch.split('+').next() == Some(torch::version())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
