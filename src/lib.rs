//! A Stable Diffusion XL worker on libtorch.
//!
//! A traced TorchScript graph is code, a checkpoint is data: weightless graphs are loaded and safetensors are bound to
//! them by name. The rest is here. From the outside in; a module uses what stands below it, never above:
//!
//! - [`commands`]: what the command line can do; [`cli`] declares it, [`config`] translates it
//! - [`worker`], [`server`]: jobs from RunPod, jobs over HTTP; [`job`] is the seam to whoever runs them
//! - [`handler`]: one job, from JSON to encoded pictures
//! - [`engine`]: the threads that own the model, one for each device
//! - [`pipeline`]: the recipe: encode the prompt, denoise, decode
//! - [`lora`]: LoRAs fused into the weights for one request, and taken back
//! - [`hub`]: where models come from: folders, caches, the Hub
//! - [`net`]: addresses and buckets that clients name: guarded downloads, uploads
//! - [`models`], [`schedulers`], [`media`]: graphs, noise schedules, picture files
//! - [`weights`]: checkpoints into graphs
//! - [`torch`]: what tch has no binding for; the only `unsafe`
//! - [`api`], [`error`], `fault`, [`context`], [`device`], [`memory`], [`telemetry`]: the words everything else is said in
// `json!` with a line for each of the request's fields
#![recursion_limit = "256"]

pub mod api;
pub mod cli;
pub mod commands;
pub mod config;
pub mod context;
pub mod device;
pub mod engine;
pub mod error;
mod fault;
pub mod handler;
pub mod hub;
pub mod inputs;
pub mod job;
pub mod lora;
pub mod media;
pub mod memory;
pub mod models;
pub mod net;
pub mod pipeline;
pub mod schedulers;
pub mod server;
pub mod telemetry;
pub mod torch;
pub mod weights;
pub mod worker;
