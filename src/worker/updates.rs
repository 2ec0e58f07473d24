//! What a client hears while its job runs: progress updates, or the chunks of a stream. One queue per job, in order,
//! and closed before the final result is posted.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use super::Worker;
use super::backoff::Backoff;
use super::body;
use super::client::Posted;
use crate::context::{JobContext, Progress};

/// How long an update in flight may hold up the result.
const UPDATE_GRACE: Duration = Duration::from_millis(100);

/// The updates of one job; dropping it ends them.
pub struct Updates {
    closing: watch::Sender<bool>,
    /// Whether everything arrived.
    task: JoinHandle<bool>,
    patience: Duration,
    /// Every chunk of a stream, for the case that some are lost.
    chunks: Arc<Mutex<Vec<Value>>>,
}

impl Updates {
    /// Makes the context whose progress is told to the host.
    pub fn start(worker: &Arc<Worker>, job_id: &str, is_stream: bool) -> (Updates, JobContext) {
        let (closing, closed) = watch::channel(false);
        let chunks = Arc::<Mutex<Vec<Value>>>::default();
        let (worker, id) = (worker.clone(), job_id.to_owned());
        if is_stream && worker.client.has_stream() {
            let (sender, receiver) = mpsc::unbounded_channel();
            let patience = worker.settings.chunk_budget;
            let kept = chunks.clone();
            let task = tokio::spawn(send_chunks(worker, id, receiver, closed));
            let context = JobContext::new(move |progress| {
                let mut chunk = progress.to_json();
                // fails once the job has ended, when nobody wants to know any more
                if sender.send(chunk.clone()).is_ok() {
                    chunk.as_object_mut().map(|fields| fields.shift_remove("preview"));
                    kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(chunk);
                }
            });
            return (Updates { closing, task, patience, chunks }, context);
        }
        let (sender, receiver) = watch::channel(None);
        let task = tokio::spawn(send_progress(worker, id, receiver, closed));
        let context = JobContext::new(move |progress| drop(sender.send(Some(progress))));
        (Updates { closing, task, patience: UPDATE_GRACE, chunks }, context)
    }

    /// Ends the updates: after this, none reaches the host. Whether all did, and all chunks there were.
    pub async fn finish(mut self) -> (bool, Vec<Value>) {
        self.closing.send_replace(true);
        let arrived = match timeout(self.patience, &mut self.task).await {
            Ok(arrived) => arrived.unwrap_or(false),
            Err(_) => {
                self.task.abort();
                (&mut self.task).await.ok();
                false
            }
        };
        (arrived, std::mem::take(&mut *self.chunks.lock().unwrap_or_else(|poisoned| poisoned.into_inner())))
    }
}

impl Drop for Updates {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The latest update wins; one that fails is not repeated, since the next one says more.
async fn send_progress(
    worker: Arc<Worker>,
    id: String,
    mut updates: watch::Receiver<Option<Progress>>,
    mut closed: watch::Receiver<bool>,
) -> bool {
    let Some(interval) = worker.settings.progress_interval else { return true };
    loop {
        tokio::select! {
            biased;
            _ = closed.wait_for(|closed| *closed) => return true,
            Ok(()) = updates.changed() => {}
            else => return true,
        }
        let update = updates.borrow_and_update().as_ref().map(Progress::to_json).unwrap_or_default();
        let posted = worker.client.done(&id, body::progress(&update).to_string().into_bytes(), false).await;
        if let Posted::Gone(_) = posted {
            worker.jobs.stop(&id);
        }
        tokio::select! {
            _ = closed.wait_for(|closed| *closed) => return true,
            () = sleep(interval) => {}
        }
    }
}

/// In order, each tried for a while. Of those that wait, one without a preview says nothing that the next does not.
async fn send_chunks(
    worker: Arc<Worker>,
    id: String,
    mut chunks: mpsc::UnboundedReceiver<Value>,
    mut closed: watch::Receiver<bool>,
) -> bool {
    let (mut waiting, mut arrived) = (Vec::new(), true);
    loop {
        tokio::select! {
            biased;
            count = chunks.recv_many(&mut waiting, 64) => if count == 0 { return arrived },
            _ = closed.wait_for(|closed| *closed), if !chunks.is_closed() => chunks.close(),
        }
        let last = waiting.len().saturating_sub(1);
        for (index, chunk) in waiting.drain(..).enumerate() {
            if index == last || chunk.get("preview").is_some() {
                arrived &= send_chunk(&worker, &id, chunk).await;
            }
        }
    }
}

/// Whether the host has it.
pub async fn send_chunk(worker: &Worker, id: &str, mut chunk: Value) -> bool {
    let mut bytes = body::chunk(&chunk).to_string().into_bytes();
    if bytes.len() > worker.settings.max_chunk_bytes {
        chunk.as_object_mut().map(|fields| fields.shift_remove("preview"));
        bytes = body::chunk(&chunk).to_string().into_bytes();
    }
    bytes.len() <= worker.settings.max_chunk_bytes && send_bytes(worker, id, bytes).await
}

/// As [`send_chunk`], for a body that is made and fits.
pub async fn send_bytes(worker: &Worker, id: &str, bytes: Vec<u8>) -> bool {
    let deadline = Instant::now() + worker.settings.chunk_budget;
    let mut backoff = Backoff::new(worker.settings.backoff, worker.settings.backoff_cap);
    loop {
        match worker.client.stream(id, bytes.clone()).await {
            Posted::Accepted => return true,
            Posted::Rejected(_) => return false,
            Posted::Gone(_) => {
                worker.jobs.stop(id);
                return false;
            }
            Posted::Refused(refusal) => {
                let wait = backoff.next(refusal.retry_after);
                if Instant::now() + wait > deadline {
                    return false;
                }
                sleep(wait).await;
            }
        }
    }
}
