//! What whoever starts the server decides, and the things it does not know by itself.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::RangeInclusive;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use crate::api::Capabilities;
use crate::error::{Error, Result};
use crate::job::{Reply, Runner};
use crate::net::Secret;

const MIB: usize = 1 << 20;

/// Limits and names. The defaults are RunPod's where RunPod has one.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Shown as `workerId`.
    pub worker_id: String,
    /// Clients must send it, bare or after `Bearer`. `None` lets everybody in.
    pub api_key: Option<Secret>,
    /// Web pages of these origins may call, such as `http://localhost:3000`; `*` is every page. Empty: none but our own.
    pub allow_origins: Vec<String>,
    /// A second path that answers like `/ping`, for a load balancer that asks elsewhere.
    pub health_path: String,
    /// Jobs that run at the same time.
    pub concurrency: usize,
    /// Jobs that may wait. A client that comes later is told so with 429 instead of being kept waiting.
    pub max_queue: usize,
    /// Bytes of inputs, outputs and stream chunks in memory. The oldest results go first, then new jobs are refused.
    pub max_held_bytes: usize,
    /// Finished jobs that are remembered, the oldest go first.
    pub max_finished: usize,
    /// Bytes of a request's body at `/run`.
    pub max_run_body: usize,
    /// Bytes of a request's body at `/runsync` and `/realtime`.
    pub max_sync_body: usize,
    /// How long a request's body may take to arrive.
    pub body_timeout: Duration,
    /// How long `/runsync` waits when the request does not say.
    pub wait: Duration,
    /// What `?wait=` may ask for; a value outside is moved to the nearer end. The same for the next two.
    pub wait_range: RangeInclusive<Duration>,
    /// How long a job may run when its policy does not say.
    pub execution_timeout: Duration,
    pub execution_timeout_range: RangeInclusive<Duration>,
    /// How long a job may exist, running included, when its policy does not say.
    pub ttl: Duration,
    pub ttl_range: RangeInclusive<Duration>,
    /// How long a result of `/run` can be fetched.
    pub keep: Duration,
    /// How long a result of `/runsync` can be fetched.
    pub keep_sync: Duration,
    /// Between two of the three tries of a webhook.
    pub webhook_pause: Duration,
    /// How long running jobs may go on after the first signal; `None` is as long as they last.
    pub drain: Option<Duration>,
    /// How long clients have, at the end, to fetch the results of jobs that ended while the server stopped.
    pub linger: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        let (seconds, day) = (Duration::from_secs, Duration::from_secs(24 * 3600));
        Settings {
            worker_id: "local".into(),
            api_key: None,
            allow_origins: Vec::new(),
            health_path: "/ping".into(),
            concurrency: 1,
            max_queue: 100,
            max_held_bytes: 512 * MIB,
            max_finished: 10_000,
            max_run_body: 10 * MIB,
            max_sync_body: 20 * MIB,
            body_timeout: seconds(60),
            wait: seconds(90),
            wait_range: seconds(1)..=seconds(300),
            execution_timeout: seconds(600),
            execution_timeout_range: seconds(5)..=7 * day,
            ttl: day,
            ttl_range: seconds(10)..=7 * day,
            keep: seconds(30 * 60),
            keep_sync: seconds(60),
            webhook_pause: seconds(10),
            drain: None,
            linger: seconds(2),
        }
    }
}

/// How far the one who runs jobs is.
pub enum RunnerState {
    /// Jobs are accepted and wait.
    Loading,
    Ready(Arc<dyn Runner>),
    /// Jobs that wait fail with this, and the server ends.
    Failed(Error),
}

pub type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// What the server leaves to others.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Makes the output that clients get from a reply, uploads included. `None`: the reply with its pictures inside.
    pub encode: Option<Encode>,
    /// Posts a webhook. `None`: a request that names one is refused.
    pub post_webhook: Option<PostWebhook>,
    /// Read at each `/metrics`; `None` from it where there is no GPU.
    pub gpu_memory: Option<ReadGpuMemory>,
    /// Read at each `/metrics`: how many devices take jobs.
    pub engines: Option<CountEngines>,
    /// Read at each `/metrics`: calls of the UNet that jobs may share, by the number of images in them.
    pub unet_calls: Option<CountCalls>,
    /// Read at each `/metrics`: how long the phases of the start took, those that are over.
    pub cold_start: Option<ColdStart>,
    /// Read at each `/metrics`: where each model was found.
    pub model_sources: Option<ModelSources>,
    /// Read at each `/capabilities`, where blocking is allowed; `None` from it while the model is loaded.
    pub capabilities: Option<ReadCapabilities>,
}

pub type Encode = Arc<dyn Fn(Finished) -> Boxed<Result<Value>> + Send + Sync>;

/// A job that ran, before its output is made.
pub struct Finished {
    pub id: String,
    /// The request's own bucket.
    pub s3_config: Option<Value>,
    pub reply: Box<dyn Reply>,
}

/// Posts the JSON text (second) to the address (first) and says with which status it was answered. It guards against
/// private addresses and has its own timeout; an `InvalidInput` error means that there is no point in trying again.
pub type PostWebhook = Arc<dyn Fn(String, String) -> Boxed<Result<u16>> + Send + Sync>;

pub type ReadGpuMemory = Arc<dyn Fn() -> Option<GpuMemory> + Send + Sync>;

pub type CountEngines = Arc<dyn Fn() -> usize + Send + Sync>;

pub type CountCalls = Arc<dyn Fn() -> BTreeMap<usize, u64> + Send + Sync>;

pub type ModelSources = Arc<dyn Fn() -> Vec<&'static str> + Send + Sync>;

pub type ColdStart = Arc<dyn Fn() -> Vec<(&'static str, Duration)> + Send + Sync>;

pub type ReadCapabilities = Arc<dyn Fn() -> Option<Capabilities> + Send + Sync>;

#[derive(Debug, Clone, Copy)]
pub struct GpuMemory {
    pub used_bytes: u64,
    pub total_bytes: u64,
}
