//! Tells the host that the worker lives and which jobs it holds. On a thread of its own with a runtime and connections of
//! its own, so that nothing the worker does can hold it up, and nothing that happens to a ping ends it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, interval, sleep, sleep_until};

use super::client::Client;
use super::jobs::Jobs;
use super::settings::Settings;

/// The heartbeat; it ends when this is dropped.
pub struct Heartbeat {
    _running: watch::Sender<()>,
}

/// Counts while the take loop moves; a heartbeat that sees it stand still falls silent.
#[derive(Default)]
pub struct Pulse(AtomicU64);

impl Pulse {
    /// Counts as long as `work` gets its turns.
    pub async fn beat_while<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut turn = interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = turn.tick() => self.beat(),
            }
        }
    }

    pub fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Heartbeat {
    /// Starts the thread; it does nothing where the host could not know whose heart it is.
    pub fn start(settings: &Settings, jobs: Arc<Jobs>, pulse: Arc<Pulse>) -> Heartbeat {
        let (running, ended) = watch::channel(());
        if settings.urls.ping.is_none() {
            tracing::info!("no heartbeat: it needs RUNPOD_WEBHOOK_PING, RUNPOD_AI_API_KEY and RUNPOD_POD_ID");
            return Heartbeat { _running: running };
        }
        let settings = settings.clone();
        let thread = thread::Builder::new().name("heartbeat".into());
        let spawned = thread.spawn(move || {
            loop {
                let (jobs, pulse, ended) = (jobs.clone(), pulse.clone(), ended.clone());
                match catch_unwind(AssertUnwindSafe(|| beat(&settings, &jobs, &pulse, ended))) {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => tracing::error!("the heartbeat starts again: {error:#}"),
                    Err(_) => tracing::error!("the heartbeat starts again after a panic"),
                }
                thread::sleep(Duration::from_secs(1));
            }
        });
        if let Err(error) = spawned {
            tracing::error!("no heartbeat: its thread cannot be started: {error}");
        }
        Heartbeat { _running: running }
    }
}

/// Pings until `ended` has no sender any more.
fn beat(settings: &Settings, jobs: &Jobs, pulse: &Pulse, mut ended: watch::Receiver<()>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = Client::new(settings)?;
    runtime.block_on(async {
        tokio::select! {
            () = ping_forever(settings, &client, jobs, pulse) => {}
            _ = async { while ended.changed().await.is_ok() {} } => {}
        }
    });
    runtime.shutdown_background();
    Ok(())
}

async fn ping_forever(settings: &Settings, client: &Client, jobs: &Jobs, pulse: &Pulse) {
    let interval = settings.ping_interval.max(settings.ping_floor);
    let mut changes = jobs.changes();
    let mut watchdog = Watchdog::new(settings.wedged_after, pulse);
    let mut trouble = None;
    loop {
        changes.mark_unchanged();
        let started = Instant::now();
        match watchdog.look(pulse, interval) {
            Health::Well => {
                // No longer than an interval: a ping that hangs must not cost the next one its turn.
                let failure = client.ping(&jobs.ids(), interval).await.err();
                if failure != trouble {
                    match &failure {
                        Some(reason) => tracing::warn!("pings fail: {reason}"),
                        None => tracing::info!("pings arrive again"),
                    }
                    trouble = failure;
                }
            }
            Health::JustWedged => {
                tracing::error!("the take loop stands still: no more pings, so that the host replaces this worker");
                client.unhealthy("watchdog", "WorkerWedged: the take loop stands still", interval).await;
            }
            Health::Wedged => {}
        }
        tokio::select! {
            () = sleep_until(started + interval) => {}
            Ok(()) = changes.changed() => sleep_until(started + settings.ping_floor).await,
        }
        // a clock that jumps must not make a hot loop
        sleep(Duration::from_millis(1)).await;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Health {
    Well,
    JustWedged,
    Wedged,
}

/// Judges by its own looks and not by the clock: after a pause of the whole process everybody is late.
struct Watchdog {
    limit: Duration,
    seen: u64,
    looked: Instant,
    still_for: Duration,
    reported: bool,
}

impl Watchdog {
    fn new(limit: Duration, pulse: &Pulse) -> Self {
        let seen = pulse.0.load(Ordering::Relaxed);
        Watchdog { limit, seen, looked: Instant::now(), still_for: Duration::ZERO, reported: false }
    }

    fn look(&mut self, pulse: &Pulse, interval: Duration) -> Health {
        let count = pulse.0.load(Ordering::Relaxed);
        let passed = self.looked.elapsed().min(interval);
        self.looked = Instant::now();
        if count != self.seen {
            (self.seen, self.still_for, self.reported) = (count, Duration::ZERO, false);
            return Health::Well;
        }
        self.still_for += passed;
        match (self.still_for > self.limit, self.reported) {
            (false, _) => Health::Well,
            (true, false) => {
                self.reported = true;
                Health::JustWedged
            }
            (true, true) => Health::Wedged,
        }
    }
}
