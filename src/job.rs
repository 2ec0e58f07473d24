//! What moves between those who bring jobs (the RunPod worker, the local API) and the one who runs them. No torch and no
//! network here: this is the seam at which either side can be replaced by a fake.

use std::future::Future;
use std::pin::Pin;

use serde_json::Value;

use crate::context::JobContext;
use crate::error::Result;

/// One request, as it was taken from RunPod or posted to the local API.
#[derive(Debug, Clone)]
pub struct Job {
    pub id: String,
    /// What the client sent; anything, until it was parsed.
    pub input: Value,
}

/// Runs jobs, one or several at a time.
pub trait Runner: Send + Sync + 'static {
    /// Runs a job to its end. Does not panic: whatever goes wrong is an error, also a fault of ours. A cancelled context
    /// ends it within a step. `context` hears of every step.
    fn run(&self, job: Job, context: JobContext) -> Running;
}

/// A job that runs. Dropping it does not stop the job; cancelling its context does.
pub type Running = Pin<Box<dyn Future<Output = Result<Box<dyn Reply>>> + Send>>;

/// A finished job's answer, which can still be made smaller. All of it may take milliseconds of computing (base64, image
/// encoding): call it on a thread where that is allowed.
pub trait Reply: Send + Sync {
    /// The whole answer, pictures inside.
    fn to_json(&self) -> Value;

    /// The picture files, for an upload; empty for an answer without pictures.
    fn pictures(&self) -> Vec<PictureFile>;

    /// Whether the client asked for links rather than pictures.
    fn wants_links(&self) -> bool {
        false
    }

    /// The answer with these links in place of the pictures, in order.
    fn with_links(&self, links: &[String]) -> Value;

    /// The same answer in the next smaller encoding (PNG, lossy WebP, JPEG) with a warning inside that says so; `None`
    /// when there is none.
    fn smaller(&self) -> Option<Box<dyn Reply>>;
}

/// One encoded picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PictureFile {
    pub bytes: Vec<u8>,
    /// Such as `png`; also the second half of the media type.
    pub extension: &'static str,
}
