//! The RunPod worker: takes jobs from the platform's host, has them run, and posts what came of them. It knows nothing of
//! torch; [`Runner`] is all it sees of the engine.
//!
//! - [`settings`], [`urls`]: what the environment says
//! - [`client`], [`pool`]: the six calls, one method each, and their connections
//! - [`take`], [`stop`], [`heartbeat`]: the loops that make them
//! - [`job`], [`jobs`], [`slots`]: a job as it comes, the jobs in hand, how many there may be
//! - [`execute`], [`updates`], [`body`], [`deliver`]: one job, to its answer
//! - [`checks`], [`phase`], [`signals`](mod@signals): how the process starts and ends
//!
//! The protocol is that of the official Python SDK; where the SDK loses a job or time, this does not.

pub mod backoff;
pub mod body;
pub mod checks;
pub mod client;
pub mod deliver;
pub mod execute;
pub mod heartbeat;
pub mod job;
pub mod jobs;
pub mod phase;
pub mod pool;
pub mod settings;
pub mod signals;
pub mod slots;
pub mod stop;
pub mod take;
pub mod updates;
pub mod urls;

use std::future::pending;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::error::{Error, ErrorClass, Result};
use crate::job::{PictureFile, Runner};
pub use checks::{Check, GpuChecks};
use client::Client;
use heartbeat::{Heartbeat, Pulse};
use jobs::Jobs;
use phase::Phases;
pub use settings::Settings;
pub use signals::signals;
use slots::Slots;

/// Puts pictures into a bucket: the job's id, its `s3Config`, the files. Answers one link for each, in order, or `None`
/// where neither the job nor the worker has a bucket.
pub type Upload = Arc<dyn Fn(String, Option<Value>, Vec<PictureFile>) -> Uploading + Send + Sync>;
pub type Uploading = Pin<Box<dyn Future<Output = Result<Option<Vec<String>>>> + Send>>;

/// What the program around the worker adds.
#[derive(Default)]
pub struct Hooks {
    pub upload: Option<Upload>,
    /// Jobs at once, when that may change; else [`Settings::concurrency`].
    pub concurrency: Option<watch::Receiver<usize>>,
    pub checks: Vec<Check>,
    pub gpu_checks: Option<GpuChecks>,
}

/// How the worker ended. The process should end at once after it, without waiting for threads: one may hang on the
/// device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Every job that was taken has been answered.
    Drained,
    /// Of this many jobs nobody knows what became.
    Lost(usize),
    /// A start-up check failed.
    Unhealthy,
    /// The model could not be loaded.
    NotLoaded,
    /// The settings do not make a worker.
    Misconfigured,
}

impl Exit {
    /// The process's exit status.
    pub fn code(self) -> u8 {
        match self {
            Exit::Drained => 0,
            Exit::Lost(_) | Exit::Unhealthy | Exit::NotLoaded => 1,
            Exit::Misconfigured => ErrorClass::Setup.exit_code(),
        }
    }
}

/// What all loops and jobs share.
pub struct Worker {
    settings: Settings,
    client: Client,
    jobs: Arc<Jobs>,
    slots: Slots,
    phases: Phases,
    pulse: Arc<Pulse>,
    runner: watch::Sender<Model>,
    upload: Option<Upload>,
    /// Jobs whose fate is unknown.
    lost: AtomicUsize,
    /// A result said `stopPod`.
    asks_for_new_one: AtomicBool,
}

#[derive(Clone)]
enum Model {
    Loading,
    Ready(Arc<dyn Runner>),
    Failed(Arc<Error>),
}

/// Works until `signals` or a lost device end it.
///
/// The heartbeat starts first. `load` runs beside the start-up checks and should end with a warm-up step, since the first
/// take goes out when it is done (or at once, with [`Settings::take_while_loading`]). Wants a runtime of several threads.
pub async fn run(
    settings: Settings,
    load: impl Future<Output = Result<Arc<dyn Runner>>> + Send + 'static,
    signals: mpsc::Receiver<()>,
    hooks: Hooks,
) -> Exit {
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let client = match Client::new(&settings) {
        Ok(client) => client,
        Err(error) => {
            tracing::error!("the worker cannot start: {error:#}");
            return Exit::Misconfigured;
        }
    };
    let (jobs, pulse) = (Arc::<Jobs>::default(), Arc::<Pulse>::default());
    let _heartbeat = Heartbeat::start(&settings, jobs.clone(), pulse.clone());
    let worker = Arc::new(Worker {
        slots: Slots::new(hooks.concurrency.unwrap_or_else(|| watch::channel(settings.concurrency).1)),
        client,
        jobs,
        phases: Phases::default(),
        pulse,
        runner: watch::Sender::new(Model::Loading),
        upload: hooks.upload,
        lost: AtomicUsize::new(0),
        asks_for_new_one: AtomicBool::new(false),
        settings,
    });
    tracing::info!(settings = ?worker.settings, "the worker starts");
    let helpers = [tokio::spawn(signals::obey(worker.clone(), signals)), tokio::spawn(stop::stop_jobs(worker.clone()))];
    let exit = tokio::select! {
        failed = prepare(&worker, load, hooks.checks, hooks.gpu_checks) => unhealthy(&worker, failed).await,
        exit = work(&worker) => exit,
    };
    helpers.iter().for_each(tokio::task::JoinHandle::abort);
    tracing::info!(?exit, "the worker ends");
    exit
}

/// Checks the machine and loads the model. Returns only where a check fails; else it is [`work`] that ends the worker.
async fn prepare(
    worker: &Worker,
    load: impl Future<Output = Result<Arc<dyn Runner>>> + Send + 'static,
    own: Vec<Check>,
    gpu: Option<GpuChecks>,
) -> checks::Failed {
    let settings = &worker.settings;
    let loading = async {
        let loaded = tokio::spawn(load).await;
        Ok(loaded.unwrap_or_else(|_| Err(Error::setup("internal", "loading the model failed for a reason of ours"))))
    };
    let checking = checks::run(&settings.checks, own, gpu, &settings.urls.take);
    let error = match tokio::try_join!(checking, loading) {
        Ok(((), Ok(runner))) => {
            worker.runner.send_replace(Model::Ready(runner));
            return pending().await;
        }
        Ok(((), Err(error))) => error,
        Err(failed) => return failed,
    };
    tracing::error!("the model cannot be loaded: {error}");
    // The jobs in hand are told why, or else the next one; without any, the worker ends all the same.
    if !worker.jobs.is_empty() {
        worker.phases.drain();
    }
    let accepted = worker.jobs.accepted();
    worker.runner.send_replace(Model::Failed(Arc::new(error)));
    let told = async {
        let mut changes = worker.jobs.changes();
        while worker.jobs.accepted() == accepted && changes.changed().await.is_ok() {}
    };
    tokio::select! {
        _ = timeout(settings.load_failure_wait, told) => worker.phases.drain(),
        () = worker.phases.draining() => {}
    }
    pending().await
}

/// Reports a failed check, fails what was taken meanwhile, and gives neither more than a moment.
async fn unhealthy(worker: &Worker, failed: checks::Failed) -> Exit {
    let (check, reason) = (failed.check, format!("CheckFailed: {:#}", failed.reason));
    tracing::error!(check, "a start-up check failed: {:#}", failed.reason);
    worker
        .phases
        .stop(Error::setup("check_failed", format!("the start-up check `{check}` failed: {:#}", failed.reason)));
    let limit = worker.settings.checks.report_timeout;
    let told = async {
        let mut changes = worker.jobs.changes();
        while !worker.jobs.is_empty() && changes.changed().await.is_ok() {}
    };
    tokio::join!(worker.client.unhealthy(&check, &reason, limit), timeout(limit, told)).1.ok();
    Exit::Unhealthy
}

/// Takes jobs, when it is time to, until the worker drains; then waits until all are answered.
async fn work(worker: &Arc<Worker>) -> Exit {
    if !worker.settings.take_while_loading {
        tokio::select! {
            _ = worker.pulse.beat_while(worker.runner()) => {}
            () = worker.phases.draining() => {}
        }
    }
    let (running, mut answered) = mpsc::channel(1);
    loop {
        let (worker, running) = (worker.clone(), running.clone());
        let taking = async move { worker.pulse.beat_while(take::take_jobs(worker.clone(), running)).await };
        if tokio::spawn(taking).await.is_ok() {
            break;
        }
        tracing::error!("the take loop starts again after a panic");
        sleep(Duration::from_secs(1)).await;
    }
    drop(running);
    worker.pulse.beat_while(answered.recv()).await;
    if worker.asks_for_new_one.load(Ordering::Relaxed) {
        sleep(worker.settings.stop_pod_wait).await;
    }
    let model = worker.runner.borrow().clone();
    if let Model::Failed(error) = model {
        let reason = format!("{}: {}", error.code, error.message);
        worker.client.unhealthy("model_load", &reason, worker.settings.checks.report_timeout).await;
        return Exit::NotLoaded;
    }
    match worker.lost.load(Ordering::Relaxed) {
        0 => Exit::Drained,
        lost => Exit::Lost(lost),
    }
}

impl Worker {
    /// Waits for the model.
    async fn runner(&self) -> Result<Arc<dyn Runner>, Arc<Error>> {
        let mut model = self.runner.subscribe();
        loop {
            match &*model.borrow_and_update() {
                Model::Ready(runner) => return Ok(runner.clone()),
                Model::Failed(error) => return Err(error.clone()),
                Model::Loading => {}
            }
            // the sender lives in `self`
            model.changed().await.ok();
        }
    }

    fn load_failed(&self) -> bool {
        matches!(*self.runner.borrow(), Model::Failed(_))
    }
}
