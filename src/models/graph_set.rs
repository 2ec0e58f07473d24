//! A folder of weightless graphs and the `manifest.json` that says what each was traced for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Device, Kind};

use super::compiled::PackageEntry;
use super::dtype_name;
use crate::error::{Error, Result};
use crate::torch::Module;
use crate::weights::Sources;

/// The manifest format that this version reads.
const FORMAT: u64 = 1;

pub struct GraphSet {
    dir: PathBuf,
    graphs: Vec<GraphEntry>,
    packages: Vec<PackageEntry>,
}

#[derive(Deserialize)]
struct Manifest {
    graphs: Vec<GraphEntry>,
    /// Graphs compiled ahead of time.
    #[serde(default)]
    packages: Vec<PackageEntry>,
}

/// One graph's entry in the manifest.
#[derive(Deserialize)]
pub struct GraphEntry {
    file: String,
    component: String,
    dtype: String,
    /// The configuration keys that shape the graph.
    config: Map<String, Value>,
    /// What an absent key means.
    defaults: Map<String, Value>,
    inputs: Vec<Slot>,
    parameters: BTreeMap<String, Vec<i64>>,
    /// Those that hold several of the checkpoint's.
    #[serde(default)]
    fused: Sources,
}

/// An input of a graph.
#[derive(Deserialize)]
struct Slot {
    name: String,
}

impl GraphSet {
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("manifest.json");
        let setup = |code, message| Error::setup(code, message).remedy(EXPORT_HINT);
        let text = std::fs::read_to_string(&path)
            .map_err(|e| setup("graphs_not_found", format!("there are no graphs in {}", dir.display())).source(e))?;
        let unreadable = |e| setup("graphs_invalid", format!("{} cannot be read", path.display())).source(e);
        let manifest: Value = serde_json::from_str(&text).map_err(|e| unreadable(anyhow::Error::from(e)))?;
        let format = &manifest["format"];
        if *format != FORMAT {
            let message = format!("{} has format {format}, this version reads {FORMAT}", path.display());
            return Err(setup("graphs_invalid", message));
        }
        let manifest: Manifest = serde_json::from_value(manifest).map_err(|e| unreadable(anyhow::Error::from(e)))?;
        Ok(GraphSet { dir: dir.to_owned(), graphs: manifest.graphs, packages: manifest.packages })
    }

    /// The same without what was compiled ahead of time.
    pub fn without_packages(self) -> Self {
        GraphSet { packages: Vec::new(), ..self }
    }

    /// The graph of `component` in `kind` that was traced for this configuration.
    ///
    /// # Errors
    /// `no_matching_graph` names the keys in which the nearest graph differs, and the command that exports the right one.
    pub fn find(&self, component: &str, kind: Kind, config: &Value, model: &Path) -> Result<&GraphEntry> {
        let dtype = dtype_name(kind);
        let mut nearest: Option<Vec<String>> = None;
        for graph in self.graphs.iter().filter(|g| g.component == component) {
            let mut differences = differences(&graph.config, &graph.defaults, config);
            if graph.dtype != dtype {
                differences.push(format!("dtype is {}, not {dtype}", graph.dtype));
            }
            if differences.is_empty() {
                return Ok(graph);
            }
            if nearest.as_ref().is_none_or(|n| differences.len() < n.len()) {
                nearest = Some(differences);
            }
        }
        let why = match nearest {
            Some(differences) => format!("the nearest differs: {}", differences.join("; ")),
            None => "there is none for this component".into(),
        };
        let (dir, model) = (self.dir.display(), model.display());
        let fused = if component.ends_with("_fused") { " --fused" } else { "" };
        Err(Error::setup("no_matching_graph", format!("no graph in {dir} fits {component} of {model}: {why}"))
            .remedy(format!("run: python torchscript/export.py --model {model} --dtype {dtype}{fused} --out {dir}")))
    }

    /// Loads a graph onto `device`, still without weights, and checks it against its entry.
    pub fn load(&self, entry: &GraphEntry, device: Device) -> Result<Module> {
        let path = self.dir.join(&entry.file);
        let invalid = |message: String| {
            Error::setup("graphs_invalid", format!("{}: {message}", path.display())).remedy(EXPORT_HINT)
        };
        if !path.is_file() {
            return Err(invalid("the manifest names it, but it is not there".into()));
        }
        let module = Module::load(&path, device).map_err(|e| invalid("cannot be loaded".into()).source(e))?;
        let parameters = module.named_parameters()?;
        let agrees = parameters.len() == entry.parameters.len()
            && parameters.iter().all(|(name, tensor)| entry.parameters.get(name) == Some(&tensor.size()));
        if !agrees {
            return Err(invalid("its parameters are not those in the manifest".into()));
        }
        if !entry.fuses_equal_shares() {
            return Err(invalid("the manifest does not say what its parameters are fused of".into()));
        }
        // A buffer is the graph's own table; one left on another device means the graph is pinned to where it was traced.
        if let Some((name, _)) = module.named_buffers()?.iter().find(|(_, t)| t.device() != device) {
            return Err(invalid(format!("its buffer {name} is not on {device:?}")));
        }
        Ok(module)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn packages(&self) -> &[PackageEntry] {
        &self.packages
    }

    /// Every graph, for a report.
    pub fn entries(&self) -> impl Iterator<Item = &GraphEntry> {
        self.graphs.iter()
    }
}

const EXPORT_HINT: &str = "export graphs: python torchscript/export.py --arch sdxl --dtype float16 --out graphs";

impl GraphEntry {
    pub fn describe(&self) -> String {
        format!("{} {} ({} parameters)", self.component, self.dtype, self.parameters.len())
    }

    pub fn has_parameter(&self, name: &str) -> bool {
        self.parameters.contains_key(name)
    }

    pub(super) fn fused(&self) -> &Sources {
        &self.fused
    }

    /// Whether each fused parameter has rows for its sources, and each source is in one place only.
    fn fuses_equal_shares(&self) -> bool {
        let mut seen = BTreeSet::new();
        let mut is_new = |source: &String| !self.parameters.contains_key(source) && seen.insert(source.clone());
        self.fused.iter().all(|(name, sources)| {
            let rows = self.parameters.get(name).and_then(|shape| shape.first());
            let shares = rows.is_some_and(|rows| !sources.is_empty() && rows % sources.len() as i64 == 0);
            shares && sources.iter().all(&mut is_new)
        })
    }

    /// # Errors
    /// `graphs_invalid`, unless the graph takes exactly these inputs in this order.
    pub(super) fn expect_inputs(&self, names: &[&str]) -> Result<()> {
        if self.inputs.len() > names.len() { self.unexpected(names) } else { self.expect_first_inputs(names) }
    }

    /// # Errors
    /// `graphs_invalid`, unless the graph's inputs begin with these.
    pub(super) fn expect_first_inputs(&self, names: &[&str]) -> Result<()> {
        if self.inputs.iter().map(|slot| slot.name.as_str()).take(names.len()).eq(names.iter().copied()) {
            return Ok(());
        }
        self.unexpected(names)
    }

    fn unexpected(&self, names: &[&str]) -> Result<()> {
        let given = self.inputs.iter().map(|slot| slot.name.as_str()).collect::<Vec<_>>().join(", ");
        let message = format!("{} takes ({given}), this version gives ({})", self.file, names.join(", "));
        Err(Error::setup("graphs_invalid", message).remedy(EXPORT_HINT))
    }
}

/// The keys in which `config` differs from what a graph was made for, where `defaults` say what an absent key means.
pub(super) fn differences(made_for: &Map<String, Value>, defaults: &Map<String, Value>, config: &Value) -> Vec<String> {
    let mut differences = Vec::new();
    for (key, traced) in made_for {
        // null is what diffusers writes for "the default"
        let given = config.get(key).filter(|value| !value.is_null());
        let given = given.or_else(|| defaults.get(key)).unwrap_or(&Value::Null);
        if !equal(given, traced) {
            differences.push(format!("{key} is {traced} in the graph, {given} in the model"));
        }
    }
    differences
}

/// Equality that takes 5 and 5.0 for the same number, as Python's JSON writers mix them.
fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| equal(a, b)),
        _ => a == b,
    }
}
