//! Bound tensors that are edited in place, and their way back to what the checkpoint holds, bit by bit.

use tch::Tensor;

use super::Weights;
use crate::error::Result;

impl Weights {
    /// Every bound tensor by its parameter name, in no order.
    pub(crate) fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.loaded.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The bound tensor itself: a write to it is seen by every graph of this component.
    pub(crate) fn parameter(&self, name: &str) -> Option<Tensor> {
        self.loaded.get(name).map(Tensor::shallow_clone)
    }

    /// Whether an edit copies pages of the file for this process: memory that [`Weights::restore`] gives back.
    pub(crate) fn is_mapped(&self, name: &str) -> bool {
        self.loaded.get(name).is_some_and(|tensor| self.checkpoint.holds(name, tensor))
    }

    /// Makes these parameters what they were when they were bound. They must be all that was edited.
    ///
    /// # Errors
    /// When the checkpoint's file can no longer be read.
    pub(crate) fn restore<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        for name in names {
            let mut tensor = self.loaded[name].shallow_clone();
            if self.checkpoint.holds(name, &tensor) {
                self.checkpoint.restore(name, &tensor)?;
            } else {
                // the same conversion of the same bytes; the mapping itself was not written to
                tensor.f_copy_(&self.read(name)?).map_err(anyhow::Error::from)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
impl Weights {
    /// Binds everything that the checkpoint has, as graphs would.
    pub(crate) fn bind_all(mut self) -> Self {
        let names: Vec<String> = self.checkpoint.names().map(str::to_owned).collect();
        self.load(names).expect("the checkpoint is whole");
        self
    }
}
