//! The life of the server: what becomes of the runner, what has had its time, and the end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::attempts::End;
use super::jobs::{Jobs, shutting_down};
use super::settings::RunnerState;
use super::table::{RunnerSlot, Table};
use super::wire::Status;
use crate::error::{Error, ErrorClass};

/// How long jobs have to stop after they were cancelled, before the server ends without them.
const STOP_GRACE: Duration = Duration::from_secs(5);
/// How long the webhooks of the last jobs may take.
const WEBHOOK_GRACE: Duration = Duration::from_secs(10);

impl Jobs {
    /// Passes on what becomes of the runner, for as long as the server lives.
    pub(super) async fn follow_runner(self: Arc<Self>, mut states: watch::Receiver<RunnerState>) {
        loop {
            let failure = match &*states.borrow_and_update() {
                RunnerState::Loading => None,
                RunnerState::Ready(runner) => {
                    self.table().runner = RunnerSlot::Ready(runner.clone());
                    None
                }
                RunnerState::Failed(error) => Some(copy(error)),
            };
            match failure {
                Some(error) => self.fail(error),
                None => self.dispatch(),
            }
            self.changed();
            if states.changed().await.is_err() {
                return;
            }
        }
    }

    /// No job can run any more: those that wait are answered with the reason.
    pub(super) fn fail(self: &Arc<Self>, error: Error) {
        let mut table = self.table();
        table.runner = RunnerSlot::Failed;
        self.end_waiting(&mut table, &error);
        table.fatal.get_or_insert(error);
        drop(table);
        self.changed();
    }

    fn end_waiting(self: &Arc<Self>, table: &mut Table, error: &Error) {
        for id in table.queue.clone() {
            self.end(table, &id, None, End::with_error(Status::Failed, error));
        }
    }

    /// Waits until no job can run any more, and says why.
    pub(super) async fn failure(&self) -> Error {
        self.until(|table| table.fatal.is_some()).await;
        self.table().fatal.take().expect("it was there, and nobody else takes it")
    }

    /// Removes what has had its time, for as long as the server lives.
    pub(super) async fn expire(self: Arc<Self>) {
        let mut changes = self.changes.subscribe();
        loop {
            let next = self.sweep().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
            tokio::select! {
                () = sleep_until(next) => {}
                _ = changes.changed() => {}
            }
        }
    }

    /// Returns when to come again.
    fn sweep(self: &Arc<Self>) -> Option<Instant> {
        let mut table = self.table();
        loop {
            let (deadline, id) = table.deadlines.first()?;
            if *deadline > Instant::now() {
                return Some(*deadline);
            }
            let id = id.clone();
            let error = Error::new(ErrorClass::Cancelled, "expired", "the job was not done within its time to live")
                .remedy("give it more with policy.ttl");
            self.end(&mut table, &id, None, End::with_error(Status::TimedOut, &error));
            table.remove(&id);
        }
    }

    /// From now on no job is accepted, and those that wait are answered.
    pub(super) fn close(self: &Arc<Self>) {
        let mut table = self.table();
        self.closing.send_replace(true);
        self.end_waiting(&mut table, &shutting_down());
        drop(table);
        self.changed();
    }

    /// Waits until nothing runs.
    pub(super) async fn idle(&self) {
        self.until(|table| table.running == 0).await;
    }

    /// Ends the jobs that run, and gives them a moment to stop.
    pub(super) async fn stop_running(self: &Arc<Self>) {
        {
            let mut table = self.table();
            let running: Vec<String> = table.entries.keys().cloned().collect();
            for id in running {
                self.end(&mut table, &id, None, End::with_error(Status::Failed, &shutting_down()));
            }
        }
        self.changed();
        if timeout(STOP_GRACE, self.idle()).await.is_err() {
            tracing::warn!("a job did not stop when it was told to");
        }
    }

    /// Waits, not for ever, until everybody knows how the last jobs ended: by webhook, or by asking.
    pub(super) async fn everybody_told(&self) {
        let told =
            self.until(|table| table.entries.values().all(|entry| entry.delivered || !entry.ended_while_closing));
        timeout(self.settings.linger, told).await.ok();
        timeout(WEBHOOK_GRACE, self.until(|table| table.pending_webhooks == 0)).await.ok();
    }

    async fn until(&self, is_so: impl Fn(&Table) -> bool) {
        let mut changes = self.changes.subscribe();
        while !is_so(&self.table()) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

/// An error that has to be kept and passed on. The causes become one.
fn copy(error: &Error) -> Error {
    let Error { class, code, message, field, remedy, source } = error;
    let causes: Vec<String> = source.iter().flat_map(|e| e.chain()).map(|e| e.to_string()).collect();
    let source = (!causes.is_empty()).then(|| anyhow::anyhow!(causes.join("\n")));
    Error { class: *class, code, message: message.clone(), field: field.clone(), remedy: remedy.clone(), source }
}
