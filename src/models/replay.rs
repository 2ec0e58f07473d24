//! Calls that come again with the same shapes are captured as CUDA graphs and replayed: one launch instead of two
//! thousand. Which calls are kept, and what happens where one cannot be captured, is decided here.

use std::cell::RefCell;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Device, Kind, Tensor};

use super::compiled::CompiledModule;
use crate::error::Result;
use crate::torch::{CapturedCall, GraphPool, capture_epoch};

thread_local! {
    /// Those of all modules of this engine: whatever touches a device lives on one thread.
    static CALLS: RefCell<Calls> = const { RefCell::new(Calls::new(0)) };
    /// Captured calls share it, since they never run at the same time; it is theirs.
    static POOL: RefCell<Weak<GraphPool>> = const { RefCell::new(Weak::new()) };
}

/// This thread keeps up to `limit` captured calls; the one used longest ago goes first. 0 captures none.
pub fn keep_captured_calls(limit: usize) {
    let limit = if GraphPool::is_supported() { limit } else { 0 };
    CALLS.with_borrow_mut(|calls| *calls = Calls::new(limit));
}

/// A module whose calls on a CUDA device may be replayed.
pub(super) struct ReplayedModule {
    module: CompiledModule,
    id: u64,
}

impl ReplayedModule {
    pub(super) fn new(module: CompiledModule) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        ReplayedModule { module, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }

    pub(super) fn forward(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let plain = || self.module.forward(inputs);
        if !inputs.iter().all(|input| matches!(input.device(), Device::Cuda(_))) {
            return plain();
        }
        let capture = || -> anyhow::Result<Box<dyn Call>> {
            let forward = |inputs: &[&Tensor]| Ok(self.module.forward(inputs)?);
            Ok(Box::new(CapturedCall::capture(inputs, shared_pool()?, forward)?))
        };
        CALLS.with_borrow_mut(|calls| calls.call(self.id, inputs, plain, capture))
    }
}

/// The pool of the captured calls that there are; else a new one.
fn shared_pool() -> anyhow::Result<Rc<GraphPool>> {
    if let Some(pool) = POOL.with_borrow(Weak::upgrade) {
        return Ok(pool);
    }
    let pool = Rc::new(GraphPool::new()?);
    POOL.set(Rc::downgrade(&pool));
    Ok(pool)
}

impl Drop for ReplayedModule {
    fn drop(&mut self) {
        // a thread that ends has dropped its calls already
        let _ = CALLS.try_with(|calls| calls.borrow_mut().forget(self.id));
    }
}

trait Call {
    fn run(&mut self, inputs: &[&Tensor]) -> anyhow::Result<Vec<Tensor>>;
}

impl Call for CapturedCall {
    fn run(&mut self, inputs: &[&Tensor]) -> anyhow::Result<Vec<Tensor>> {
        CapturedCall::run(self, inputs)
    }
}

/// Shapes and dtypes of the inputs.
type Signature = Vec<(Vec<i64>, Kind)>;

struct Entry {
    module: u64,
    signature: Signature,
    state: State,
}

enum State {
    /// Came once. What comes only once is not worth a capture.
    Seen,
    Captured(Box<dyn Call>),
    /// Cannot be captured.
    Refused,
}

/// Signatures are remembered up to this many, captured or not.
const MAX_ENTRIES: usize = 256;

struct Calls {
    limit: usize,
    /// The one used last is at the end.
    entries: Vec<Entry>,
    /// In which they were captured.
    epoch: u64,
}

impl Calls {
    const fn new(limit: usize) -> Self {
        Calls { limit, entries: Vec::new(), epoch: 0 }
    }

    fn call(
        &mut self,
        module: u64,
        inputs: &[&Tensor],
        plain: impl Fn() -> Result<Vec<Tensor>>,
        capture: impl Fn() -> anyhow::Result<Box<dyn Call>>,
    ) -> Result<Vec<Tensor>> {
        if self.limit == 0 {
            return plain();
        }
        if self.epoch != capture_epoch() {
            self.entries.clear();
            self.epoch = capture_epoch();
        }
        let signature: Signature = inputs.iter().map(|input| (input.size(), input.kind())).collect();
        let found = self.entries.iter().position(|e| e.module == module && e.signature == signature);
        let state = found.map(|index| self.entries.remove(index).state);
        let (result, state) = match state {
            None => (plain(), State::Seen),
            Some(State::Refused) => (plain(), State::Refused),
            Some(State::Captured(mut call)) => (call.run(inputs).map_err(Into::into), State::Captured(call)),
            Some(State::Seen) => {
                self.make_room();
                match capture() {
                    Ok(mut call) => (call.run(inputs).map_err(Into::into), State::Captured(call)),
                    Err(error) => {
                        tracing::warn!(error = format!("{error:#}"), "a call runs without a CUDA graph");
                        (plain(), State::Refused)
                    }
                }
            }
        };
        self.entries.push(Entry { module, signature, state });
        if self.entries.len() > MAX_ENTRIES {
            self.entries.remove(0);
        }
        result
    }

    /// For one more.
    fn make_room(&mut self) {
        let is_captured = |entry: &Entry| matches!(entry.state, State::Captured(_));
        while self.entries.iter().filter(|entry| is_captured(entry)).count() >= self.limit {
            let oldest = self.entries.iter().position(is_captured).expect("just counted");
            self.entries[oldest].state = State::Seen;
        }
    }

    fn forget(&mut self, module: u64) {
        self.entries.retain(|entry| entry.module != module);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds 1 like the plain call, and notes that it ran.
    struct Fake(Rc<RefCell<Vec<&'static str>>>);

    impl Call for Fake {
        fn run(&mut self, inputs: &[&Tensor]) -> anyhow::Result<Vec<Tensor>> {
            self.0.borrow_mut().push("replay");
            Ok(vec![inputs[0] + 1])
        }
    }

    struct Bench {
        calls: Calls,
        log: Rc<RefCell<Vec<&'static str>>>,
        can_capture: bool,
    }

    impl Bench {
        fn new(limit: usize) -> Self {
            Bench { calls: Calls::new(limit), log: Rc::default(), can_capture: true }
        }

        /// What happens for an input of `size` ones.
        fn call(&mut self, module: u64, size: i64, kind: Kind) -> Vec<&'static str> {
            let input = Tensor::ones([size], (kind, Device::Cpu));
            let log = self.log.clone();
            let plain = || {
                log.borrow_mut().push("plain");
                Ok(vec![&input + 1])
            };
            let capture = || {
                log.borrow_mut().push("capture");
                anyhow::ensure!(self.can_capture, "it waits for the device");
                Ok(Box::new(Fake(log.clone())) as Box<dyn Call>)
            };
            let output = self.calls.call(module, &[&input], plain, capture).unwrap();
            assert_eq!(output[0], Tensor::full([size], 2, (kind, Device::Cpu)));
            std::mem::take(&mut *self.log.borrow_mut())
        }
    }

    #[test]
    fn a_call_is_captured_when_it_comes_again() {
        let mut bench = Bench::new(2);
        assert_eq!(bench.call(1, 4, Kind::Float), ["plain"]);
        assert_eq!(bench.call(1, 4, Kind::Float), ["capture", "replay"]);
        assert_eq!(bench.call(1, 4, Kind::Float), ["replay"]);
        // another shape, dtype or module is another call
        assert_eq!(bench.call(1, 5, Kind::Float), ["plain"]);
        assert_eq!(bench.call(1, 4, Kind::Double), ["plain"]);
        assert_eq!(bench.call(2, 4, Kind::Float), ["plain"]);
    }

    #[test]
    fn the_one_used_longest_ago_makes_room() {
        let mut bench = Bench::new(2);
        for size in [1, 2] {
            bench.call(1, size, Kind::Float);
            bench.call(1, size, Kind::Float);
        }
        assert_eq!(bench.call(1, 1, Kind::Float), ["replay"]);
        bench.call(1, 3, Kind::Float);
        assert_eq!(bench.call(1, 3, Kind::Float), ["capture", "replay"]);
        assert_eq!(bench.call(1, 1, Kind::Float), ["replay"]);
        assert_eq!(bench.call(1, 2, Kind::Float), ["capture", "replay"]);
    }

    #[test]
    fn what_cannot_be_captured_runs_as_it_is_and_is_not_tried_again() {
        let mut bench = Bench::new(2);
        bench.can_capture = false;
        assert_eq!(bench.call(1, 4, Kind::Float), ["plain"]);
        assert_eq!(bench.call(1, 4, Kind::Float), ["capture", "plain"]);
        assert_eq!(bench.call(1, 4, Kind::Float), ["plain"]);
    }

    #[test]
    fn a_module_that_is_gone_takes_its_calls_along() {
        let mut bench = Bench::new(2);
        for module in [1, 1, 2, 2] {
            bench.call(module, 4, Kind::Float);
        }
        bench.calls.forget(1);
        assert_eq!(bench.call(1, 4, Kind::Float), ["plain"]);
        assert_eq!(bench.call(2, 4, Kind::Float), ["replay"]);
    }

    #[test]
    fn weights_that_moved_void_what_was_captured() {
        let mut bench = Bench::new(2);
        bench.call(1, 4, Kind::Float);
        bench.call(1, 4, Kind::Float);
        crate::torch::forget_captured_calls();
        assert_eq!(bench.call(1, 4, Kind::Float), ["plain"]);
        assert_eq!(bench.call(1, 4, Kind::Float), ["capture", "replay"]);
    }

    #[test]
    fn without_a_limit_above_0_nothing_is_captured() {
        let mut bench = Bench::new(0);
        for _ in 0..3 {
            assert_eq!(bench.call(1, 4, Kind::Float), ["plain"]);
        }
    }
}
