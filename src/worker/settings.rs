//! What the worker is told by its environment. Read once; nothing else here looks at a variable.
//!
//! Never refuses to start: the platform's harness sets odd values, and a worker that dies on one is a crash loop. What
//! cannot be read keeps its default and is named in [`Settings::warnings`].

use std::str::FromStr;
use std::time::Duration;

use super::urls::Urls;
use crate::net::Secret;

#[derive(Debug, Clone)]
pub struct Settings {
    pub urls: Urls,
    /// Sent raw in `Authorization`.
    pub api_key: Secret,
    /// `RUNPOD_POD_ID`, or a random one.
    pub worker_id: String,
    /// Both as error reports show them: `unknown` when unset.
    pub reported_worker_id: String,
    pub hostname: String,
    /// The SDK version whose behaviour is matched; sent with each ping and in error reports.
    pub runpod_version: String,
    pub user_agent: String,

    /// Jobs held at once. The start value: what [`super::Hooks::concurrency`] says later wins.
    pub concurrency: usize,
    /// Take jobs before the model is loaded; they wait for it.
    pub take_while_loading: bool,
    /// How long a worker whose model cannot be loaded waits for a job to report that to.
    pub load_failure_wait: Duration,

    pub ping_interval: Duration,
    /// The shortest time between two pings.
    pub ping_floor: Duration,
    /// How long the take loop may stand still before pings stop and an unhealthy report goes out.
    pub wedged_after: Duration,

    pub take_timeout: Duration,
    /// How long a pending take stays open after a signal to stop.
    pub take_close_grace: Duration,
    /// A poll answered sooner than this was not held, so the next one waits.
    pub held_poll: Duration,
    pub backoff: Duration,
    pub backoff_cap: Duration,
    /// The wait after a 429 without `Retry-After`.
    pub busy_wait: Duration,

    pub post_timeout: Duration,
    /// How long an unsent result is retried.
    pub result_retry_budget: Duration,
    /// For one last try on the way out.
    pub last_try: Duration,
    /// How long running jobs may go on after a signal; `None` for as long as they last.
    pub drain_budget: Option<Duration>,
    /// What is left to the host, after a result that asks for a new worker, before the process ends by itself.
    pub stop_pod_wait: Duration,

    /// Bytes of a result's body, by the kind of id.
    pub max_result_bytes: usize,
    pub max_sync_result_bytes: usize,
    pub max_chunk_bytes: usize,
    /// How long a stream's chunk is retried, and what a finished job waits for those that are left.
    pub chunk_budget: Duration,
    /// The shortest time between two progress updates of a job; `None` for no updates at all.
    pub progress_interval: Option<Duration>,
    /// Repeats all chunks of a streamed job in its result, as the SDK's `return_aggregate_stream`.
    pub aggregate_stream: bool,

    pub checks: CheckSettings,
    /// Variables that could not be read, for the log.
    pub warnings: Vec<String>,
}

/// The start-up checks' variables.
#[derive(Debug, Clone)]
pub struct CheckSettings {
    pub skip_auto: bool,
    pub skip_gpu: bool,
    pub min_memory_gib: f64,
    pub min_disk_percent: f64,
    pub network_timeout: Duration,
    pub min_cuda_version: (u32, u32),
    pub benchmark_timeout: Duration,
    pub gpu_test_timeout: Duration,
    pub max_error_lines: usize,
    /// For the unhealthy report.
    pub report_timeout: Duration,
}

impl Settings {
    /// `None` when `RUNPOD_WEBHOOK_GET_JOB` is unset or empty: then this is no worker of a platform.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Option<Settings> {
        let mut variables = Variables { get: &get, warnings: Vec::new() };
        let text = |name: &str| get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let take = text("RUNPOD_WEBHOOK_GET_JOB")?;
        let worker_id = text("RUNPOD_POD_ID").unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        let urls = Urls {
            take,
            done: text("RUNPOD_WEBHOOK_POST_OUTPUT"),
            stream: text("RUNPOD_WEBHOOK_POST_STREAM"),
            // Without a key or an id of the pod the host could not tell whose heart it is.
            ping: text("RUNPOD_WEBHOOK_PING")
                .filter(|_| text("RUNPOD_AI_API_KEY").is_some() && text("RUNPOD_POD_ID").is_some()),
        };
        let integration = text("RUNPOD_UA_INTEGRATION").map(|name| format!(" Integration/{name}")).unwrap_or_default();
        let unknown = |name: &str| text(name).unwrap_or_else(|| "unknown".into());
        let seconds = |variables: &mut Variables, name, default: f64| variables.seconds(name, default);
        Some(Settings {
            urls: urls.filled(&worker_id, text("RUNPOD_GPU_TYPE_ID").as_deref()),
            api_key: Secret::new(text("RUNPOD_AI_API_KEY").unwrap_or_default()),
            reported_worker_id: unknown("RUNPOD_POD_ID"),
            hostname: unknown("RUNPOD_POD_HOSTNAME"),
            runpod_version: text("RUNPOD_VERSION_REPORTED").unwrap_or_else(|| "1.12.0".into()),
            user_agent: format!(
                "sdxl-worker/{} ({}; {}) Language/Rust{integration}",
                env!("CARGO_PKG_VERSION"),
                std::env::consts::OS,
                std::env::consts::ARCH
            ),
            worker_id,

            concurrency: variables.number("CONCURRENCY", 1_usize).max(1),
            take_while_loading: variables.flag("TAKE_WHILE_LOADING"),
            load_failure_wait: seconds(&mut variables, "LOAD_FAILURE_WAIT", 90.0),

            ping_interval: Duration::from_millis(variables.number("RUNPOD_PING_INTERVAL", 10_000)),
            ping_floor: Duration::from_secs(1),
            wedged_after: seconds(&mut variables, "WEDGED_AFTER", 60.0),

            take_timeout: Duration::from_secs(90),
            take_close_grace: seconds(&mut variables, "TAKE_CLOSE_GRACE", 2.0).min(Duration::from_secs(60)),
            held_poll: Duration::from_secs(1),
            backoff: Duration::from_millis(250),
            backoff_cap: Duration::from_secs(30),
            busy_wait: Duration::from_secs(5),

            post_timeout: seconds(&mut variables, "RESULT_POST_TIMEOUT", 90.0),
            result_retry_budget: seconds(&mut variables, "RESULT_RETRY_BUDGET", 600.0),
            last_try: Duration::from_secs(2),
            drain_budget: text("DRAIN_BUDGET").map(|_| seconds(&mut variables, "DRAIN_BUDGET", 0.0)),

            stop_pod_wait: Duration::from_secs(1),

            max_result_bytes: variables.number("MAX_RESULT_BYTES", 9_900_000),
            max_sync_result_bytes: variables.number("MAX_SYNC_RESULT_BYTES", 19_900_000),
            max_chunk_bytes: variables.number("MAX_CHUNK_BYTES", 990_000),
            chunk_budget: seconds(&mut variables, "STREAM_CHUNK_BUDGET", 5.0),
            progress_interval: match text("PROGRESS_INTERVAL").as_deref() {
                Some("off") => None,
                _ => Some(seconds(&mut variables, "PROGRESS_INTERVAL", 0.5)),
            },
            aggregate_stream: variables.flag("STREAM_AGGREGATE"),

            checks: CheckSettings {
                skip_auto: variables.flag("RUNPOD_SKIP_AUTO_SYSTEM_CHECKS"),
                skip_gpu: variables.flag("RUNPOD_SKIP_GPU_CHECK"),
                min_memory_gib: variables.number("RUNPOD_MIN_MEMORY_GB", 4.0),
                min_disk_percent: variables.number("RUNPOD_MIN_DISK_PERCENT", 10.0),
                network_timeout: seconds(&mut variables, "RUNPOD_NETWORK_CHECK_TIMEOUT", 5.0),
                min_cuda_version: variables.version("RUNPOD_MIN_CUDA_VERSION", (11, 8)),
                benchmark_timeout: seconds(&mut variables, "RUNPOD_GPU_BENCHMARK_TIMEOUT", 2.0),
                gpu_test_timeout: seconds(&mut variables, "RUNPOD_GPU_TEST_TIMEOUT", 30.0),
                max_error_lines: variables.number("RUNPOD_GPU_MAX_ERROR_MESSAGES", 10),
                report_timeout: Duration::from_secs(2),
            },
            warnings: variables.warnings,
        })
    }

    /// What a result of this job may weigh.
    pub fn result_limit(&self, job_id: &str) -> usize {
        if job_id.starts_with("sync-") { self.max_sync_result_bytes } else { self.max_result_bytes }
    }
}

/// Reads variables and remembers which could not be read.
struct Variables<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
    warnings: Vec<String>,
}

impl Variables<'_> {
    fn parse<T>(&mut self, name: &str, default: T, read: impl Fn(&str) -> Option<T>) -> T {
        let Some(value) = (self.get)(name) else { return default };
        match value.trim() {
            "" => default,
            text => read(text).unwrap_or_else(|| {
                self.warnings.push(format!("{name} cannot be read; its default holds"));
                default
            }),
        }
    }

    fn number<T: FromStr>(&mut self, name: &str, default: T) -> T {
        self.parse(name, default, |text| text.parse().ok())
    }

    /// At most ten years, so that it can be added to a clock.
    fn seconds(&mut self, name: &str, default: f64) -> Duration {
        let read = |text: &str| text.parse().ok().filter(|seconds| (0.0..3.2e8).contains(seconds));
        Duration::from_secs_f64(self.parse(name, default, read))
    }

    fn flag(&mut self, name: &str) -> bool {
        self.parse(name, false, |text| match text.to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" => Some(true),
            "0" | "false" | "no" | "off" => Some(false),
            _ => None,
        })
    }

    fn version(&mut self, name: &str, default: (u32, u32)) -> (u32, u32) {
        self.parse(name, default, |text| {
            let (major, minor) = text.split_once('.').unwrap_or((text, "0"));
            Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
        })
    }
}
