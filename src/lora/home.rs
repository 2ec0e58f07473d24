//! LoRAs in weights that leave the device: what leaves is the base, and on its way back the LoRAs are fused again.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use super::{Loras, plan};
use crate::context::JobContext;
use crate::error::Result;
use crate::weights::{InUse, Weights};

/// Sees to it that those of `components` that the model has are on the device, with the LoRAs that were
/// [applied](Loras::apply).
///
/// # Errors
/// When they cannot be uploaded, and those of [`Loras::apply`] about fusing; then they are away.
pub(crate) fn in_use<'a>(loras: &'a RefCell<Loras>, components: &[&str], context: &JobContext) -> Result<InUse<'a>> {
    let mut all = InUse::none();
    let indices = loras.borrow().indices(components);
    for index in indices {
        let uploaded = loras.borrow_mut().enter(index, context)?;
        all = all.and(InUse::new(uploaded, move || loras.borrow_mut().exit(index)));
    }
    Ok(all)
}

impl Loras {
    /// See [`Weights::set_offload`].
    pub(crate) fn set_offload(&mut self, components: &[&str], offload: bool) {
        for index in self.indices(components) {
            if offload && self.components[index].is_idle() {
                self.take_out(index);
            }
            self.components[index].set_offload(offload);
        }
    }

    /// The weights of those of `components` that the model has.
    pub(crate) fn weights(&self, components: &[&str]) -> impl Iterator<Item = &Weights> {
        self.indices(components).into_iter().map(|index| &self.components[index])
    }

    fn indices(&self, components: &[&str]) -> Vec<usize> {
        (0..self.names.len()).filter(|&index| components.contains(&self.names[index])).collect()
    }

    pub(super) fn enter(&mut self, index: usize, context: &JobContext) -> Result<bool> {
        let uploaded = self.components[index].enter()?;
        if uploaded && !self.applied.wanted.is_empty() {
            let result = catch_unwind(AssertUnwindSafe(|| self.fuse_again(index, context)));
            if !matches!(result, Ok(Ok(()))) {
                self.exit(index);
            }
            result.unwrap_or_else(|panic| resume_unwind(panic))?;
        }
        Ok(uploaded)
    }

    pub(super) fn exit(&mut self, index: usize) {
        if self.components[index].leaves_on_exit() {
            self.take_out(index);
        }
        self.components[index].exit();
    }

    fn fuse_again(&mut self, index: usize, context: &JobContext) -> Result<()> {
        let wanted = self.applied.wanted.clone();
        let files = self.load(&wanted)?;
        let mut plan = plan(&wanted, &files);
        plan.retain(|target, _| target.component == index);
        self.check_memory(&plan)?;
        self.fuse(&plan, context)
    }

    /// What LoRAs changed in a component that leaves: pages of the mapped file are what they were, the rest goes with the
    /// device's copy. Runs while memory is short or a panic unwinds: what fails is logged.
    fn take_out(&mut self, index: usize) {
        let weights = &self.components[index];
        let own = self.applied.changed.keys().filter(|target| target.component == index);
        let mapped = own.map(|target| target.parameter.as_str()).filter(|parameter| weights.is_mapped(parameter));
        if let Err(error) = weights.restore(mapped) {
            tracing::error!(%error, "a LoRA could not be taken out of weights that leave the device");
        }
        self.applied.changed.retain(|target, _| target.component != index);
    }
}
