//! How long to wait before trying again.

use std::time::Duration;

/// Doubles from `base` to `cap`; each wait is drawn from the upper half, so that many workers do not knock together.
#[derive(Debug)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
    failures: u32,
}

impl Backoff {
    pub fn new(base: Duration, cap: Duration) -> Self {
        Backoff { base, cap, failures: 0 }
    }

    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure; never shorter than what the host asked for, nor than it makes sense to listen to.
    pub fn next(&mut self, retry_after: Option<Duration>) -> Duration {
        let full = self.base.saturating_mul(1 << self.failures.min(16)).min(self.cap);
        self.failures += 1;
        jittered(full).max(retry_after.unwrap_or_default().min(LONGEST_RETRY_AFTER))
    }
}

/// A host that asks for more is asked again all the same.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(120);

/// Between half of it and all of it.
pub fn jittered(full: Duration) -> Duration {
    full.mul_f64(0.5 + 0.5 * fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_never_fall_below_half() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(500));
        for full in [100, 200, 400, 500, 500] {
            let wait = backoff.next(None).as_millis();
            assert!((full / 2..=full).contains(&wait), "{wait} of {full}");
        }
        assert_eq!(backoff.next(Some(Duration::from_secs(7))), Duration::from_secs(7));
        assert_eq!(backoff.next(Some(Duration::MAX)), LONGEST_RETRY_AFTER);
        backoff.reset();
        assert!(backoff.next(None) <= Duration::from_millis(100));
    }
}
