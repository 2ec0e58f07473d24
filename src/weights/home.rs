//! Weights that leave the device while nobody computes with them. Their home is the checkpoint's mapped file: leaving drops
//! the device's copy, coming back uploads the same bytes again.

use std::cell::RefCell;

use tch::{Device, Tensor};

use super::Weights;
use crate::error::Result;
use crate::torch;

/// Weights are on the device as long as this lives.
#[must_use]
pub(crate) struct InUse<'a> {
    exits: Vec<Box<dyn Fn() + 'a>>,
    /// Whether they had to be uploaded.
    pub(crate) uploaded: bool,
}

impl<'a> InUse<'a> {
    /// `exit` runs at the end, also while a panic unwinds: it must not panic.
    pub(crate) fn new(uploaded: bool, exit: impl Fn() + 'a) -> Self {
        InUse { exits: vec![Box::new(exit)], uploaded }
    }

    /// Of nothing.
    pub(crate) fn none() -> Self {
        InUse { exits: Vec::new(), uploaded: false }
    }

    /// Both, for as long as the result lives.
    pub(crate) fn and(mut self, mut other: InUse<'a>) -> Self {
        self.exits.append(&mut other.exits);
        self.uploaded |= other.uploaded;
        self
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.exits.iter().for_each(|exit| exit());
    }
}

/// Sees to it that the weights are on the device.
///
/// # Errors
/// When they cannot be uploaded; then they are not there.
pub(crate) fn in_use(weights: &RefCell<Weights>) -> Result<InUse<'_>> {
    let uploaded = weights.borrow_mut().enter()?;
    Ok(InUse::new(uploaded, || weights.borrow_mut().exit()))
}

impl Weights {
    /// Whether weights leave the device when nobody computes with them. Idle ones leave at once.
    pub(crate) fn set_offload(&mut self, offload: bool) {
        self.offload = offload;
        if self.leaves_when_idle() && self.is_idle() {
            self.leave();
        }
    }

    /// Whether they are on the device for good, as far as is known now.
    pub(crate) fn stay(&self) -> bool {
        !self.offload
    }

    /// `let_go` drops what else holds on to the bound tensors, when they leave the device.
    pub(crate) fn when_leaving(&mut self, let_go: impl Fn() + Send + 'static) {
        self.when_leaving.push(Box::new(let_go));
    }

    /// Counts somebody who computes with the weights, and uploads them where they are away. Gives whether they were.
    pub(crate) fn enter(&mut self) -> Result<bool> {
        let away = !self.here;
        if away && let Err(error) = self.upload() {
            self.leave();
            return Err(error);
        }
        self.users += 1;
        Ok(away)
    }

    pub(crate) fn exit(&mut self) {
        self.users -= 1;
        if self.leaves_when_idle() && self.is_idle() {
            self.leave();
        }
    }

    /// Whether the next [`exit`](Self::exit) drops them.
    pub(crate) fn leaves_on_exit(&self) -> bool {
        self.leaves_when_idle() && self.users <= 1
    }

    /// Whether nobody computes with them.
    pub(crate) fn is_idle(&self) -> bool {
        self.users == 0
    }

    fn leaves_when_idle(&self) -> bool {
        self.offload && self.here
    }

    /// Whether they are on the device.
    pub(crate) fn is_here(&self) -> bool {
        self.here
    }

    /// Bytes that the weights take on the device when they are there. On the CPU those that are the mapped file itself
    /// take none.
    pub(crate) fn device_bytes(&self) -> u64 {
        let is_file = |name: &str| self.checkpoint.kind(name) == Some(self.kind) && !self.fused.is_part(name);
        let mapped = |name: &str| self.device == Device::Cpu && is_file(name);
        let own = self.loaded.iter().filter(|(name, _)| !mapped(name));
        own.map(|(_, tensor)| (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64).sum()
    }

    fn upload(&mut self) -> Result<()> {
        self.here = true;
        self.load(self.loaded.keys().cloned().collect())?;
        let mut bound = std::mem::take(&mut self.bound);
        let result = bound.iter_mut().try_for_each(|(name, parameter)| self.bind_parameter(name, parameter));
        self.bound = bound;
        result
    }

    /// Runs while memory is short or a panic unwinds: what fails is logged.
    fn leave(&mut self) {
        self.here = false;
        torch::forget_captured_calls();
        self.when_leaving.iter().for_each(|let_go| let_go());
        if let Err(error) = self.drop_copies() {
            tracing::error!(%error, "weights could not leave the device");
        }
        torch::empty_cache().ok();
    }

    fn drop_copies(&mut self) -> Result<()> {
        for (_, parameter) in &mut self.bound {
            unbind(parameter, &self.stub)?;
        }
        for tensor in self.loaded.values_mut() {
            *tensor = self.stub.f_expand(tensor.size(), false).map_err(anyhow::Error::from)?;
        }
        self.fused.clear();
        Ok(())
    }
}

/// Makes a graph's parameter what it is before it is bound: one element, seen as the whole shape.
pub(crate) fn unbind(parameter: &mut Tensor, stub: &Tensor) -> Result<()> {
    let seen = stub.f_expand(parameter.size(), false).map_err(anyhow::Error::from)?;
    parameter.f_set_data(&seen).map_err(anyhow::Error::from)?;
    Ok(())
}
