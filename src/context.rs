//! What travels with one job: its cancel flag and where its progress goes. Below pipeline and engine, so both use it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::error::{Error, ErrorClass, Result};

/// How far a job is.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// `step` of `steps` denoising steps are done.
    Denoising {
        step: usize,
        steps: usize,
        /// For the steps that are left; `None` before the first is done.
        seconds_left: Option<f64>,
        /// A small picture of what is there so far, as a data URI, where the request asked for it.
        preview: Option<String>,
    },
    /// Latents are being turned into pixels.
    Decoding,
}

impl Progress {
    /// What a client is shown: a progress update or a stream chunk.
    pub fn to_json(&self) -> Value {
        match self {
            Progress::Denoising { step, steps, seconds_left, preview } => {
                let mut update = json!({ "step": step, "steps": steps, "seconds_left": seconds_left });
                if let Some(preview) = preview {
                    update["preview"] = preview.as_str().into();
                }
                update
            }
            Progress::Decoding => json!({ "phase": "decoding" }),
        }
    }
}

/// One job's cancel flag and progress receiver. Clones share both.
#[derive(Clone, Default)]
pub struct JobContext {
    cancelled: Arc<AtomicBool>,
    progress: Option<Arc<dyn Fn(Progress) + Send + Sync>>,
}

impl JobContext {
    pub fn new(progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        JobContext { cancelled: Arc::default(), progress: Some(Arc::new(progress)) }
    }

    /// Asks the job to stop; it does so before its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub fn report(&self, progress: Progress) {
        if let Some(receive) = &self.progress {
            receive(progress);
        }
    }

    /// # Errors
    /// `cancelled`, once somebody asked for it.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(ErrorClass::Cancelled, "cancelled", "the job was cancelled"));
        }
        Ok(())
    }
}
