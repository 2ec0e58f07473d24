//! Parameters of a graph that hold several of the checkpoint's, one below the other: one tensor, and views of its rows.

use std::collections::{BTreeMap, HashMap};

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// By the graph's name the checkpoint's: equal shares of the rows, in this order.
pub type Sources = BTreeMap<String, Vec<String>>;

#[derive(Default)]
pub(super) struct Fused {
    sources: Sources,
    /// By the checkpoint's name: the graph's, and which share of the rows it has.
    shares: HashMap<String, (String, usize)>,
    /// By the graph's name; only those of which a part is on the device.
    tensors: HashMap<String, Tensor>,
}

impl Fused {
    pub(super) fn new(sources: &Sources) -> Self {
        let each = sources.iter().flat_map(|(name, parts)| parts.iter().enumerate().map(move |part| (name, part)));
        let shares = each.map(|(name, (index, part))| (part.clone(), (name.clone(), index))).collect();
        Fused { sources: sources.clone(), shares, tensors: HashMap::new() }
    }

    /// The checkpoint's parameters in one of a graph; itself in most.
    pub(super) fn sources<'a>(&'a self, name: &'a str) -> Vec<&'a str> {
        match self.sources.get(name) {
            Some(sources) => sources.iter().map(String::as_str).collect(),
            None => vec![name],
        }
    }

    /// Whether one of the checkpoint's is a part of a graph's.
    pub(super) fn is_part(&self, name: &str) -> bool {
        self.shares.contains_key(name)
    }

    /// The graph's parameter that one of the checkpoint's is in; `None` for a name that is of graphs alone.
    pub(super) fn graph_name<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        match self.shares.get(name) {
            Some((whole, _)) => Some(whole),
            None => (!self.sources.contains_key(name)).then_some(name),
        }
    }

    /// The tensor of a graph's parameter, where there is one.
    pub(super) fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The rows for one of the checkpoint's parameters, of this shape; `None` where it has a tensor of its own. The first
    /// of its kind brings the tensor, with nothing in it.
    pub(super) fn rows(&mut self, name: &str, shape: &[i64], target: (Kind, Device)) -> Result<Option<Tensor>> {
        let Some((whole, index)) = self.shares.get(name) else { return Ok(None) };
        if !self.tensors.contains_key(whole) {
            let mut size = shape.to_vec();
            size[0] *= self.sources[whole].len() as i64;
            let tensor = Tensor::f_empty(size, target).map_err(anyhow::Error::from)?;
            self.tensors.insert(whole.clone(), tensor);
        }
        let rows = self.tensors[whole].f_narrow(0, *index as i64 * shape[0], shape[0]).map_err(anyhow::Error::from)?;
        Ok(Some(rows))
    }

    /// Lets go of the tensors.
    pub(super) fn clear(&mut self) {
        self.tensors.clear();
    }
}
