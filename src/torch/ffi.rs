//! Declarations of `shim.cpp`, and of what torch-sys declares but tch does not pass on.

use std::ffi::{CStr, c_char, c_int, c_void};

use anyhow::{Result, anyhow};
use tch::Kind;
pub(super) use torch_sys::{C_tensor, CModule_, atm_free, atm_load_on_device, get_and_reset_last_err};

#[repr(C)]
pub(super) struct Generator {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct Lane {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct Event {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct Capture {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct Graph {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct Package {
    _private: [u8; 0],
}

/// Receives tensors that the shim hands out; the receiver owns each.
pub(super) type TensorSink = extern "C" fn(context: *mut c_void, name: *const c_char, tensor: *mut C_tensor);

unsafe extern "C" {
    pub(super) fn shim_free_message(message: *mut c_char);
    pub(super) fn shim_torch_version() -> *const c_char;
    pub(super) fn shim_from_mapping(
        data: *mut c_void,
        sizes: *const i64,
        dims: usize,
        kind: c_int,
        owner: *mut c_void,
        release: extern "C" fn(*mut c_void),
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(super) fn shim_module_parameters(module: *mut CModule_, context: *mut c_void, sink: TensorSink) -> *mut c_char;
    pub(super) fn shim_module_buffers(module: *mut CModule_, context: *mut c_void, sink: TensorSink) -> *mut c_char;
    pub(super) fn shim_module_forward(
        module: *mut CModule_,
        inputs: *const *const C_tensor,
        count: usize,
        context: *mut c_void,
        sink: TensorSink,
    ) -> *mut c_char;
    pub(super) fn shim_package_load(
        path: *const c_char,
        device: c_int,
        names: *const *const c_char,
        tensors: *const *const C_tensor,
        count: usize,
        out: *mut *mut Package,
    ) -> *mut c_char;
    pub(super) fn shim_package_free(package: *mut Package);
    pub(super) fn shim_package_run(
        package: *mut Package,
        inputs: *const *const C_tensor,
        count: usize,
        context: *mut c_void,
        sink: TensorSink,
    ) -> *mut c_char;
    pub(super) fn shim_cuda_versions(driver: *mut c_int, build: *mut c_int);
    pub(super) fn shim_compute_capability(device: c_int, major: *mut c_int, minor: *mut c_int) -> *mut c_char;
    pub(super) fn shim_generator_new(seed: u64, out: *mut *mut Generator) -> *mut c_char;
    pub(super) fn shim_generator_free(generator: *mut Generator);
    pub(super) fn shim_randn(
        generator: *mut Generator,
        sizes: *const i64,
        dims: usize,
        kind: c_int,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(super) fn shim_lane_new(device: c_int, buffer_bytes: usize, buffers: usize, out: *mut *mut Lane)
    -> *mut c_char;
    pub(super) fn shim_lane_copy(lane: *mut Lane, target: *mut C_tensor, source: *const u8) -> *mut c_char;
    pub(super) fn shim_lane_finish(lane: *mut Lane) -> *mut c_char;
    pub(super) fn shim_lane_free(lane: *mut Lane);
    pub(super) fn shim_mark_new(device: c_int, out: *mut *mut Event) -> *mut c_char;
    pub(super) fn shim_mark_is_reached(mark: *mut Event, out: *mut bool) -> *mut c_char;
    pub(super) fn shim_mark_free(mark: *mut Event);
    pub(super) fn shim_has_graphs() -> bool;
    pub(super) fn shim_graph_pool(pool: *mut u64) -> *mut c_char;
    pub(super) fn shim_capture_new(device: c_int, out: *mut *mut Capture) -> *mut c_char;
    pub(super) fn shim_capture_begin(capture: *mut Capture, pool: *const u64) -> *mut c_char;
    pub(super) fn shim_capture_end(capture: *mut Capture, out: *mut *mut Graph) -> *mut c_char;
    pub(super) fn shim_capture_free(capture: *mut Capture);
    pub(super) fn shim_graph_replay(graph: *mut Graph) -> *mut c_char;
    pub(super) fn shim_graph_free(graph: *mut Graph);
    pub(super) fn shim_empty_cache() -> *mut c_char;
    pub(super) fn shim_memory_info(device: c_int, free_bytes: *mut u64, total_bytes: *mut u64) -> *mut c_char;
    pub(super) fn shim_set_attention(flash: bool, efficient: bool, cudnn: bool, math: bool) -> *mut c_char;
    pub(super) fn shim_allow_tf32(allow: bool) -> *mut c_char;
}

unsafe extern "C" {
    pub(super) fn _exit(status: c_int) -> !;
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
unsafe extern "C" {
    pub(super) fn malloc_trim(pad: usize) -> c_int;
}

/// Turns the shim's answer into a `Result`, and frees the message.
pub(super) fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim gives a NUL-terminated string from malloc, ours to free.
    let text = unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        shim_free_message(message);
        text
    };
    Err(anyhow!(essence(&text).to_owned()))
}

/// What went wrong, without the C++ stack below it and the TorchScript trace above it.
fn essence(text: &str) -> &str {
    let text = text.split("\nException raised from").next().unwrap_or(text).trim();
    match text.contains("Traceback of TorchScript") {
        true => text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or(text),
        false => text,
    }
}

/// The error that the last torch-sys call on this thread left behind, if any.
pub(super) fn check_last_error() -> Result<()> {
    // SAFETY: the message is from malloc, ours to free; null when there was no error.
    check(unsafe { get_and_reset_last_err() })
}

/// torch's number for a dtype (`c10::ScalarType`).
pub(super) fn kind_code(kind: Kind) -> c_int {
    match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        Kind::Float8e5m2 => 23,
        Kind::Float8e4m3fn => 24,
        other => unreachable!("no weight file holds {other:?}"),
    }
}
