//! How far a worker is on its way out.

use std::sync::Arc;

use tokio::sync::watch;

use crate::error::Error;

#[derive(Clone, Debug)]
pub enum Phase {
    Taking,
    /// No new takes; what is held is finished.
    Draining,
    /// What is held is failed with this error, with one short try each.
    Stopping(Arc<Error>),
}

/// The phase of a worker; it only moves forward.
pub struct Phases(watch::Sender<Phase>);

impl Default for Phases {
    fn default() -> Self {
        Phases(watch::Sender::new(Phase::Taking))
    }
}

impl Phases {
    pub fn drain(&self) {
        self.0.send_if_modified(|phase| {
            let forward = matches!(phase, Phase::Taking);
            if forward {
                *phase = Phase::Draining;
            }
            forward
        });
    }

    pub fn stop(&self, why: Error) {
        self.0.send_if_modified(|phase| {
            let forward = !matches!(phase, Phase::Stopping(_));
            if forward {
                *phase = Phase::Stopping(Arc::new(why));
            }
            forward
        });
    }

    pub fn is_taking(&self) -> bool {
        matches!(*self.0.borrow(), Phase::Taking)
    }

    /// Waits until there are no more takes.
    pub async fn draining(&self) {
        self.0.subscribe().wait_for(|phase| !matches!(phase, Phase::Taking)).await.ok();
    }

    /// Waits until everything has to end; why.
    pub async fn stopping(&self) -> Arc<Error> {
        loop {
            let mut phases = self.0.subscribe();
            if let Ok(phase) = phases.wait_for(|phase| matches!(phase, Phase::Stopping(_))).await
                && let Phase::Stopping(why) = &*phase
            {
                return why.clone();
            }
        }
    }

    pub fn is_stopping(&self) -> Option<Arc<Error>> {
        match &*self.0.borrow() {
            Phase::Stopping(why) => Some(why.clone()),
            _ => None,
        }
    }
}
