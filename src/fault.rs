//! What went wrong inside torch, said so that a caller can act on it: memory that ran out, a device that is lost.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, ErrorClass, Result};

/// Runs `work`; a panic in it becomes an error, and so does an error of torch's that means something to the caller.
///
/// tch turns a C++ exception behind a tensor operator into a panic, so this is a boundary that jobs cross in practice.
pub(crate) fn catch<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Err(error)) if error.code == "internal" => {
            let causes = error.source.iter().flat_map(|e| e.chain().map(|cause| cause.to_string()).collect::<Vec<_>>());
            let text = causes.collect::<Vec<_>>().join("\n");
            Err(meaning(&text))
        }
        Ok(result) => result,
        Err(payload) => Err(meaning(&panic_text(payload.as_ref()))),
    }
}

/// What torch's words mean to a caller.
fn meaning(text: &str) -> Error {
    if is_out_of_memory(text) {
        out_of_memory(text)
    } else if is_device_lost(text) {
        Error::new(ErrorClass::DeviceLost, "device_lost", "the accelerator failed; this process cannot use it any more")
            .source(anyhow::anyhow!(first_line(text).to_owned()))
            .remedy("try again: a new worker starts with a new context")
    } else {
        fault_of_ours(text)
    }
}

/// After one of these every call into CUDA fails until the process ends.
fn is_device_lost(text: &str) -> bool {
    let fatal =
        ["illegal memory access", "device-side assert", "launch failure", "uncorrectable ECC", "misaligned address"];
    text.contains("CUDA error") && fatal.iter().any(|words| text.contains(words))
}

fn fault_of_ours(text: &str) -> Error {
    Error::new(ErrorClass::Internal, "internal", "the job failed for a reason of ours")
        .source(anyhow::anyhow!(first_line(text).to_owned()))
        .remedy("report it, with the request")
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without words".into())
}

/// The words of torch, of the libraries below it, and of C++, on CUDA and on the CPU.
pub(crate) fn is_out_of_memory(text: &str) -> bool {
    let words = ["out of memory", "not enough memory", "allocate memory", "STATUS_ALLOC_FAILED", "bad_alloc"];
    // all that oneDNN says when it gets no memory; graphs that run at all ask for nothing that it does not have
    let vague = ["could not create a primitive", "could not create a memory object", "could not execute a primitive"];
    words.iter().chain(&vague).any(|words| text.contains(words))
}

fn out_of_memory(text: &str) -> Error {
    Error::new(ErrorClass::OutOfMemory, "out_of_memory", "memory ran out while the job ran")
        .source(anyhow::anyhow!(first_line(text).to_owned()))
        .remedy("ask for a smaller size or fewer images, or run on a machine with more memory")
}

/// torch's messages go on with a C++ stack; in tch's panics its line breaks are escaped.
fn first_line(text: &str) -> &str {
    text.split(['\n']).next().and_then(|line| line.split("\\n").next()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lost_context_asks_for_a_new_worker() {
        let class = |text: &str| meaning(text).class;
        assert_eq!(class("CUDA error: an illegal memory access was encountered"), ErrorClass::DeviceLost);
        assert_eq!(class("CUDA error: device-side assert triggered"), ErrorClass::DeviceLost);
        assert_eq!(class("CUDA out of memory. Tried to allocate 2.00 GiB"), ErrorClass::OutOfMemory);
        assert_eq!(class("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), ErrorClass::OutOfMemory);
        assert_eq!(class("std::bad_alloc"), ErrorClass::OutOfMemory);
        assert_eq!(class("CUDA error: invalid argument"), ErrorClass::Internal);
        assert_eq!(class("The size of tensor a (2) must match the size of tensor b (3)"), ErrorClass::Internal);
    }

    #[test]
    fn what_is_caught_twice_stays_what_it_was() {
        let error = |text: &'static str| catch(|| catch::<()>(|| panic!("{text}"))).unwrap_err();
        assert_eq!(error("CUDA out of memory. Tried").code, "out_of_memory");
        assert_eq!(error("a fault\nand its stack").code, "internal");
    }
}
