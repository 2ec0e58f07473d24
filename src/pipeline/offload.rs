//! What leaves the device when it is idle. Each part comes back from its mapped file when it is computed with.

use std::cell::RefCell;

use super::parts::ModelParts;
use super::{Settings, StableDiffusionXlPipeline};
use crate::context::JobContext;
use crate::error::Result;
use crate::lora;
use crate::weights::{InUse, Weights};

/// Each takes in what stands before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Offload {
    /// Everything stays.
    None,
    TextEncoders,
    /// All components: text encoders, UNets, VAE, ControlNets.
    All,
}

pub(super) const TEXT_ENCODERS: [&str; 2] = ["text_encoder", "text_encoder_2"];
pub(super) const UNET: [&str; 1] = ["unet"];

impl Offload {
    /// Whether a component of this name leaves.
    pub(super) fn takes(self, component: &str) -> bool {
        self == Offload::All || self == Offload::TextEncoders && TEXT_ENCODERS.contains(&component)
    }
}

impl ModelParts {
    /// The text encoders, for as long as the result lives.
    pub(super) fn text_encoders_in_use(&self, context: &JobContext) -> Result<InUse<'_>> {
        lora::in_use(&self.weights, &TEXT_ENCODERS, context)
    }

    pub(super) fn unet_in_use(&self, context: &JobContext) -> Result<InUse<'_>> {
        lora::in_use(&self.weights, &UNET, context)
    }

    pub(super) fn set_offload(&self, offload: Offload) {
        for components in [&TEXT_ENCODERS[..], &UNET] {
            self.weights.borrow_mut().set_offload(components, offload.takes(components[0]));
        }
    }
}

impl StableDiffusionXlPipeline {
    /// More leaves the device from now on, what is idle at once. Gives whether it is more.
    pub(super) fn raise_offload(&self, offload: Offload) -> bool {
        let raised = self.offload.get() < offload;
        if raised {
            self.offload.set(offload);
            self.all_parts().for_each(|parts| parts.set_offload(offload));
            let rest = self.vae_halves().chain(self.controlnets.loaded().map(|net| net.weights()));
            rest.for_each(|weights| weights.borrow_mut().set_offload(offload == Offload::All));
        }
        raised
    }

    /// The settings, for a part of the model that is loaded now.
    pub(super) fn settings_now(&self) -> Settings {
        Settings { offload: self.offload.get(), ..self.settings.clone() }
    }

    /// The base model's, and those of the refiner that is loaded.
    pub(super) fn all_parts(&self) -> impl Iterator<Item = &ModelParts> {
        std::iter::once(&self.base).chain(self.refiners.loaded())
    }

    /// Of the decoders and the encoder that are loaded.
    pub(super) fn vae_halves(&self) -> impl Iterator<Item = &RefCell<Weights>> {
        let decoders = std::iter::once(&self.vae).chain(self.vae_float32.get());
        decoders.map(|vae| vae.weights()).chain(self.vae_encoder.as_ref().map(|encoder| encoder.weights()))
    }
}
