//! The ControlNets that a worker has: loaded when a job first needs them, and kept as long as memory allows.

use std::path::PathBuf;

use tch::{Device, Kind};

use super::ModelSource;
use crate::api::ControlNetFacts;
use crate::error::{Error, Result};
use crate::models::{ControlNet, ControlNetConfig, GraphSet};
use crate::torch;
use crate::weights::{Checkpoint, Weights};

pub(super) struct ControlNets {
    graphs: PathBuf,
    target: (Kind, Device),
    /// Most bytes of weights that are kept.
    limit: u64,
    available: Vec<(ModelSource, ControlNetConfig)>,
    /// Weights are on the device only while they are computed with.
    offload: bool,
    /// The one used last at the end.
    loaded: Vec<(String, ControlNet)>,
}

impl ControlNets {
    /// Reads the configurations; a folder that is missing or holds something else is told now.
    pub(super) fn open(sources: &[ModelSource], graphs: PathBuf, target: (Kind, Device), limit: u64) -> Result<Self> {
        let open = |source: &ModelSource| Ok((source.clone(), ControlNetConfig::open(&source.dir)?));
        let available = sources.iter().map(open).collect::<Result<_>>()?;
        Ok(ControlNets { graphs, target, limit, available, offload: false, loaded: Vec::new() })
    }

    pub(super) fn facts(&self) -> Vec<ControlNetFacts> {
        let facts = |(source, config): &(ModelSource, ControlNetConfig)| ControlNetFacts {
            name: source.name.clone(),
            num_control_type: config.num_control_type,
        };
        self.available.iter().map(facts).collect()
    }

    /// Loads, in the order of their configuration, those that fit beside each other.
    pub(super) fn preload(&mut self) -> Result<()> {
        let names: Vec<String> = self.available.iter().map(|(source, _)| source.name.clone()).collect();
        for name in names {
            let net = self.load(&name)?;
            if self.bytes() + net.bytes() > self.limit {
                tracing::info!(name, "no room for this ControlNet now; it is loaded when a job asks for it");
                break;
            }
            self.loaded.push((name, net));
        }
        Ok(())
    }

    /// Sees to it that the nets of a job are loaded, and drops those used longest ago where memory runs short.
    pub(super) fn require(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            match self.loaded.iter().position(|(loaded, _)| loaded == name) {
                Some(index) => {
                    let used = self.loaded.remove(index);
                    self.loaded.push(used);
                }
                None => {
                    let net = self.load(name)?;
                    self.loaded.push(((*name).to_owned(), net));
                }
            }
            // those of this job stay, however large they are together
            while self.bytes() > self.limit && !names.contains(&self.loaded[0].0.as_str()) {
                let (name, _) = self.loaded.remove(0);
                tracing::info!(name, "ControlNet dropped to make room");
                torch::empty_cache().ok();
            }
        }
        Ok(())
    }

    /// One that was [required](Self::require).
    pub(super) fn get(&self, name: &str) -> &ControlNet {
        &self.loaded.iter().find(|(loaded, _)| loaded == name).expect("required before").1
    }

    /// Those that are loaded.
    pub(super) fn loaded(&self) -> impl Iterator<Item = &ControlNet> {
        self.loaded.iter().map(|(_, net)| net)
    }

    /// For those that are loaded from now on.
    pub(super) fn set_offload(&mut self, offload: bool) {
        self.offload = offload;
    }

    fn bytes(&self) -> u64 {
        self.loaded.iter().map(|(_, net)| net.bytes()).sum()
    }

    fn load(&self, name: &str) -> Result<ControlNet> {
        let (ModelSource { dir, .. }, config) =
            self.available.iter().find(|(source, _)| source.name == name).ok_or_else(|| {
                Error::setup("controlnet_not_available", format!("this worker has no ControlNet {name}"))
            })?;
        let _no_grad = tch::no_grad_guard();
        let started = std::time::Instant::now();
        let graphs = GraphSet::open(&self.graphs)?;
        let variants = if self.target.0 == Kind::Float { [None, Some("fp16")] } else { [Some("fp16"), None] };
        let checkpoint = Checkpoint::open("controlnet", dir, &variants)?;
        let mut weights = Weights::new(checkpoint, self.target.1, self.target.0);
        weights.set_offload(self.offload);
        let net = ControlNet::load(&graphs, config, weights, dir, self.target)?;
        let seconds = format!("{:.2}", started.elapsed().as_secs_f64());
        tracing::info!(name, seconds, "ControlNet loaded");
        Ok(net)
    }
}
