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

#[cfg(test)]
mod tests {
    use super::super::{Checkpoint, Weights};
    use super::*;

    #[test]
    fn parts_are_rows_of_one_tensor_wherever_they_are_edited() {
        let folder = tempfile::tempdir().unwrap();
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
        let stored = [("q", random(&[4, 3])), ("k", random(&[4, 3])), ("other", random(&[2]))];
        Tensor::write_safetensors(&stored, folder.path().join("model.safetensors")).unwrap();
        for kind in [Kind::Float, Kind::BFloat16] {
            let checkpoint = Checkpoint::open("unet", folder.path(), &[None]).unwrap();
            let mut weights = Weights::new(checkpoint, Device::Cpu, kind);
            weights.fuse(&Sources::from([("qk".into(), vec!["q".into(), "k".into()])]));
            let mut weights = weights.bind_all();
            let expected = |index: usize| stored[index].1.to_kind(kind);
            let base = Tensor::cat(&[expected(0), expected(1)], 0);
            let check_base = |weights: &Weights| {
                assert_eq!(weights.fused.tensor("qk").unwrap(), &base);
                for (name, tensor) in &stored {
                    assert_eq!(weights.parameter(name).unwrap(), tensor.to_kind(kind), "{name}");
                }
            };
            check_base(&weights);
            assert!(!weights.is_mapped("q"));
            assert_eq!(weights.is_mapped("other"), kind == Kind::BFloat16);

            let _ = weights.parameter("k").unwrap().fill_(7.0);
            let whole = weights.fused.tensor("qk").unwrap();
            assert_eq!(whole.narrow(0, 0, 4), expected(0));
            assert_eq!(whole.narrow(0, 4, 4), expected(1).full_like(7.0));
            weights.restore(["k"].into_iter()).unwrap();
            check_base(&weights);

            weights.set_offload(true);
            assert!(weights.fused.tensor("qk").is_none());
            assert!(weights.enter().unwrap());
            check_base(&weights);
            let _ = weights.parameter("q").unwrap().fill_(7.0);
            assert_eq!(weights.fused.tensor("qk").unwrap().narrow(0, 0, 4), expected(0).full_like(7.0));
        }
    }
}
