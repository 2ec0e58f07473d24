//! What to do when the platform wants the process to end.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::Worker;
use crate::error::{Error, ErrorClass};

/// SIGTERM and SIGINT of this process, each as one message.
pub fn signals() -> std::io::Result<mpsc::Receiver<()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if sender.send(()).await.is_err() {
                return;
            }
        }
    });
    Ok(receiver)
}

/// The first signal: no more takes. The second, or the end of the budget: whatever runs is failed.
pub(super) async fn obey(worker: Arc<Worker>, mut signals: mpsc::Receiver<()>) {
    next(&mut signals).await;
    tracing::info!("asked to stop: no more jobs are taken, {} are finished", worker.jobs.ids().len());
    worker.phases.drain();
    let budget = async {
        match worker.settings.drain_budget {
            Some(budget) => sleep(budget).await,
            None => std::future::pending().await,
        }
    };
    let why = tokio::select! {
        () = next(&mut signals) => "the worker was told twice to stop",
        () = budget => "the worker was told to stop and had no more time",
    };
    let error = Error::new(ErrorClass::Cancelled, "worker_stopped", why).remedy("send the job again");
    worker.phases.stop(error);
}

/// Nobody who could send one is no signal.
async fn next(signals: &mut mpsc::Receiver<()>) {
    if signals.recv().await.is_none() {
        std::future::pending().await
    }
}
