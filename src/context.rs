//! What travels with one job: its cancel flag and where its progress goes. Below pipeline and engine, so both use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorClass, Result};

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// `step` of `steps` denoising steps are done.
    Denoising { step: usize, steps: usize },
    /// Latents are being turned into pixels.
    Decoding,
}

/// One job's cancel flag and progress receiver. Clones share both.
#[derive(Clone, Default)]
pub struct JobContext {
    cancelled: Arc<AtomicBool>,
    progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
}

impl JobContext {
    pub fn new(progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        JobContext {
            cancelled: Arc::default(),
            progress: Some(Arc::new(progress)),
        }
    }

    /// Asks the job to stop; it does so before its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub fn report(&self, progress: Progress) {
        if let Some(receive) = &self.progress {
            receive(progress);
        }
    }

    /// # Errors
    /// `cancelled`, once somebody asked for it.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorClass::Cancelled, "cancelled", "the job was cancelled"));
        }
        Ok(())
    }
}
