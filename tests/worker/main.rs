//! The worker against a fake host: a test for every behaviour that the protocol asks for, and for every way in which the
//! official SDK loses a job or time. Nothing here needs torch, a network or an accelerator.

#![allow(unreachable_pub, reason = "a test program exports nothing")]

mod fake_runner;
#[path = "../fake_runpod/mod.rs"]
#[allow(dead_code, reason = "other tests use other parts of it")]
mod fake_runpod;
mod heartbeat;
mod posting;
mod process;
mod results;
mod shutdown;
mod sizes;
mod soak;
mod start;
mod starting;
mod stopping;
mod streaming;
mod takes;
mod troubled_takes;
