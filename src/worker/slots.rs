//! How many jobs at once. The number may change at any time: more are taken at once, fewer as soon as jobs end.

use tokio::sync::watch;

#[derive(Clone)]
pub struct Slots {
    occupied: watch::Sender<Occupied>,
    concurrency: watch::Receiver<usize>,
}

#[derive(Clone, Copy, Default)]
struct Occupied {
    held: usize,
    running: usize,
}

/// A job's place; given back on drop.
pub struct Slot {
    slots: Slots,
    running: bool,
}

impl Slots {
    pub fn new(concurrency: watch::Receiver<usize>) -> Slots {
        Slots { occupied: watch::Sender::new(Occupied::default()), concurrency }
    }

    fn capacity(&self) -> usize {
        (*self.concurrency.borrow()).max(1)
    }

    fn free(&self) -> usize {
        self.capacity().saturating_sub(self.occupied.borrow().held)
    }

    /// Waits until there is a free slot; how many there are.
    pub async fn free_ones(&self) -> usize {
        self.until(|| Some(self.free()).filter(|free| *free > 0)).await
    }

    /// Takes a slot for a job that the host has handed out, free or not: it is ours now.
    pub fn hold(&self) -> Slot {
        self.occupied.send_modify(|occupied| occupied.held += 1);
        Slot { slots: self.clone(), running: false }
    }

    /// Waits until `found` finds something, looking again after every change.
    async fn until<T>(&self, mut found: impl FnMut() -> Option<T>) -> T {
        let (mut occupied, mut concurrency) = (self.occupied.subscribe(), self.concurrency.clone());
        loop {
            occupied.mark_unchanged();
            concurrency.mark_unchanged();
            if let Some(found) = found() {
                return found;
            }
            tokio::select! {
                _ = occupied.changed() => {}
                Ok(()) = concurrency.changed() => {}
            }
        }
    }
}

impl Slot {
    /// Waits until this job may run beside the others.
    pub async fn start(&mut self) {
        let slots = self.slots.clone();
        let try_start = || {
            let capacity = slots.capacity();
            let started = slots.occupied.send_if_modified(|occupied| {
                let free = occupied.running < capacity;
                occupied.running += usize::from(free);
                free
            });
            started.then_some(())
        };
        slots.until(try_start).await;
        self.running = true;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.occupied.send_modify(|occupied| {
            occupied.held -= 1;
            occupied.running -= usize::from(self.running);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    #[tokio::test]
    async fn the_number_of_jobs_follows_the_concurrency_at_once() {
        let (concurrency, receiver) = watch::channel(1);
        let slots = Slots::new(receiver);
        let mut first = slots.hold();
        first.start().await;
        assert!(timeout(Duration::from_millis(20), slots.free_ones()).await.is_err());
        concurrency.send_replace(3);
        assert_eq!(slots.free_ones().await, 2);

        let (mut second, mut third) = (slots.hold(), slots.hold());
        second.start().await;
        concurrency.send_replace(1);
        assert!(timeout(Duration::from_millis(20), third.start()).await.is_err());
        drop((first, second));
        timeout(Duration::from_secs(1), third.start()).await.unwrap();
        drop(third);
        concurrency.send_replace(0);
        assert_eq!(slots.free_ones().await, 1, "a worker of no jobs makes no sense");
        drop(concurrency);
        assert_eq!(slots.free_ones().await, 1);
    }
}
