//! The loop that hears which jobs are not wanted any more. Whatever goes wrong in it, jobs are still taken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::Worker;
use super::backoff::{Backoff, jittered};
use super::client::Stops;

/// For a host that has no such channel.
const LONG: Duration = Duration::from_secs(60);

pub async fn stop_jobs(worker: Arc<Worker>) {
    if !worker.client.has_stop_channel() {
        return tracing::info!("the take URL has no segment `job-take`: there is no stop channel and no batch route");
    }
    let settings = &worker.settings;
    let mut backoff = Backoff::new(settings.backoff.max(settings.held_poll), LONG);
    loop {
        let asked = Instant::now();
        let wait = match worker.client.stop().await {
            Stops::Ids(ids) => {
                backoff.reset();
                for id in ids {
                    let known = worker.jobs.stop(&id);
                    tracing::info!(request_id = id, known, "the host stops the job");
                }
                // A host that repeats itself is not asked in a circle.
                if asked.elapsed() < Duration::from_millis(20) { settings.backoff / 5 } else { Duration::ZERO }
            }
            Stops::TimedOut => Duration::ZERO,
            Stops::Nothing => {
                backoff.reset();
                if asked.elapsed() >= settings.held_poll { Duration::ZERO } else { jittered(settings.held_poll) }
            }
            Stops::Refused(refusal) => match refusal.status.map(|status| status.as_u16()) {
                Some(404 | 405) => jittered(LONG),
                Some(429) => refusal.retry_after.unwrap_or_else(|| jittered(settings.busy_wait)),
                _ => backoff.next(refusal.retry_after),
            },
        };
        sleep(wait).await;
    }
}
