//! Starts a worker in the test's own process, with times short enough to wait for.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use sdxl_worker::error::Result;
use sdxl_worker::job::Runner;
use sdxl_worker::worker::{self, Exit, Hooks, Settings};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::fake_runner::{FakeRunner, Shared};
use crate::fake_runpod::FakeRunpod;

pub const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

pub fn job(id: &str, input: Value) -> Value {
    json!({ "id": id, "input": input })
}

pub fn settings_of(variables: &HashMap<String, String>) -> Settings {
    Settings::from_variables(|name| variables.get(name).cloned()).expect("a take URL is set")
}

/// The host's variables with everything that waits made quick.
pub fn settings(host: &FakeRunpod) -> Settings {
    quick(settings_of(&host.variables()))
}

pub fn quick(mut settings: Settings) -> Settings {
    settings.ping_interval = ms(200);
    settings.ping_floor = ms(20);
    settings.take_close_grace = ms(150);
    settings.held_poll = ms(100);
    settings.backoff = ms(20);
    settings.backoff_cap = ms(160);
    settings.busy_wait = ms(300);
    settings.last_try = ms(300);
    settings.stop_pod_wait = ms(10);
    settings.progress_interval = Some(Duration::ZERO);
    settings.chunk_budget = ms(300);
    settings.load_failure_wait = ms(1000);
    settings.result_retry_budget = Duration::from_secs(15);
    settings.checks.report_timeout = ms(500);
    settings
}

pub struct TestWorker {
    pub runner: Arc<FakeRunner>,
    pub concurrency: watch::Sender<usize>,
    signals: mpsc::Sender<()>,
    exit: JoinHandle<Exit>,
}

impl Drop for TestWorker {
    fn drop(&mut self) {
        self.exit.abort();
    }
}

pub fn start(settings: Settings) -> TestWorker {
    start_with(settings, Hooks::default(), std::future::ready(()))
}

/// Loads when `loaded` is done.
pub fn start_with(settings: Settings, hooks: Hooks, loaded: impl Future<Output = ()> + Send + 'static) -> TestWorker {
    let runner = Arc::new(FakeRunner::default());
    let shared = runner.clone();
    let load = async move {
        loaded.await;
        Ok(Arc::new(Shared(shared)) as Arc<dyn Runner>)
    };
    launch(settings, hooks, load, runner)
}

pub fn launch(
    settings: Settings,
    hooks: Hooks,
    load: impl Future<Output = Result<Arc<dyn Runner>>> + Send + 'static,
    runner: Arc<FakeRunner>,
) -> TestWorker {
    let (signals, receiver) = mpsc::channel(4);
    let (concurrency, changes) = watch::channel(settings.concurrency);
    let hooks = Hooks { concurrency: Some(hooks.concurrency.unwrap_or(changes)), ..hooks };
    let exit = tokio::spawn(worker::run(settings, load, receiver, hooks));
    TestWorker { runner, concurrency, signals, exit }
}

impl TestWorker {
    pub fn signal(&self) {
        self.signals.try_send(()).expect("the worker listens");
    }

    pub async fn exit(&mut self) -> Exit {
        timeout(Duration::from_secs(15), &mut self.exit).await.expect("the worker ends").expect("it does not panic")
    }

    pub fn has_ended(&self) -> bool {
        self.exit.is_finished()
    }

    /// A signal, and what comes of it.
    pub async fn stop(mut self) -> Exit {
        self.signal();
        self.exit().await
    }
}
