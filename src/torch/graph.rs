use std::cell::Cell;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use tch::{Device, Tensor};

use super::ffi;

/// Device memory that captured calls share. Only one of them runs at a time. libtorch frees it with the last of them, and
/// the next needs another.
pub struct GraphPool([u64; 2]);

impl GraphPool {
    pub fn new() -> Result<Self> {
        let mut pool = [0; 2];
        // SAFETY: the shim writes two numbers.
        ffi::check(unsafe { ffi::shim_graph_pool(pool.as_mut_ptr()) }).context("reserving memory for CUDA graphs")?;
        Ok(GraphPool(pool))
    }

    /// Whether this build can capture at all.
    pub fn is_supported() -> bool {
        // SAFETY: takes nothing.
        unsafe { ffi::shim_has_graphs() }
    }
}

thread_local! {
    static EPOCH: Cell<u64> = const { Cell::new(0) };
}

/// Tells that memory moved which this thread's captured calls may read: none of them may run again.
pub fn forget_captured_calls() {
    EPOCH.set(EPOCH.get() + 1);
}

/// Captured calls of an earlier epoch are void.
pub fn capture_epoch() -> u64 {
    EPOCH.get()
}

/// What this thread does on a device, on a stream of its own as long as this lives.
struct Capture(*mut ffi::Capture);

impl Capture {
    fn new(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { bail!("{device:?} has no graphs") };
        let mut capture = std::ptr::null_mut();
        // SAFETY: `capture` is valid for the write, and owned by the value built from it.
        ffi::check(unsafe { ffi::shim_capture_new(index as i32, &mut capture) })?;
        Ok(Capture(capture))
    }

    /// The graph of what `work` does, and what it returns; nothing of it is done.
    fn record<T>(&self, pool: &GraphPool, work: impl FnOnce() -> Result<T>) -> Result<(*mut ffi::Graph, T)> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the capture is alive; the shim reads two numbers of the pool, and writes one pointer.
        unsafe {
            ffi::check(ffi::shim_capture_begin(self.0, pool.0.as_ptr()))?;
            let result = work()?;
            ffi::check(ffi::shim_capture_end(self.0, &mut graph))?;
            Ok((graph, result))
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // SAFETY: made by `shim_capture_new`, freed once, on the thread that made it.
        unsafe { ffi::shim_capture_free(self.0) }
    }
}

/// One call as a CUDA graph: its kernels are launched at once, by nobody who reads the graph of the model. Computes with
/// the parameters as they are when it runs, as long as they stay where they were.
pub struct CapturedCall {
    graph: *mut ffi::Graph,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    _pool: Rc<GraphPool>,
}

impl CapturedCall {
    /// Runs `forward` on copies of `inputs`, all on one CUDA device: first to let the libraries make their plans, then to
    /// record it.
    ///
    /// # Errors
    /// Where it waits for the device or reads from it on the way, or memory runs out.
    pub fn capture(
        inputs: &[&Tensor],
        pool: Rc<GraphPool>,
        forward: impl Fn(&[&Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<Self> {
        let inputs: Vec<Tensor> = inputs.iter().map(|input| input.contiguous().copy()).collect();
        let own: Vec<&Tensor> = inputs.iter().collect();
        let capture = Capture::new(inputs[0].device())?;
        forward(&own)?;
        let (graph, outputs) = capture.record(&pool, || forward(&own)).context("capturing a CUDA graph")?;
        Ok(CapturedCall { graph, inputs, outputs, _pool: pool })
    }

    /// The outputs for these inputs, of the same shapes and dtypes.
    pub fn run(&mut self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        for (own, given) in self.inputs.iter_mut().zip(inputs) {
            own.f_copy_(given)?;
        }
        // SAFETY: the graph is alive, and so is all that it reads and writes.
        ffi::check(unsafe { ffi::shim_graph_replay(self.graph) }).context("running a CUDA graph")?;
        // the next run writes its results over these
        self.outputs.iter().map(|output| Ok(output.f_clone(output)?)).collect()
    }
}

impl Drop for CapturedCall {
    fn drop(&mut self) {
        // SAFETY: made by `shim_capture_end`, freed once, before the tensors that it writes.
        unsafe { ffi::shim_graph_free(self.graph) }
    }
}
