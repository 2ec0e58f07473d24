//! What callers see: the request as it arrives, the same request valid, and the reply. Serde types and pure rules, the
//! words everything else is said in; no tensors, no network, no files.
//!
//! A request goes [`parse()`] (names and JSON types) then [`validate()`] (values and limits); nothing after that meets a
//! default that is missing or a number out of range. Names are diffusers' names.

mod capabilities;
mod control;
mod lora;
mod lora_tags;
mod params;
mod preprocessor;
mod preset;
mod request;
mod response;
mod schedule;
mod scheduler_kind;
mod schema;
mod sigma_schedule;
mod stages;
mod validate;
mod wording;

pub use capabilities::{Capabilities, ControlNetChoice, ModeChoice, PreprocessorChoice, SchedulerChoice, Strengths};
pub use control::{ControlNetFacts, ControlParams, FINGERPRINT, ScaleMode};
pub use lora::{FileSource, LoraParams, LoraReport};
pub use lora_tags::has_lora_tag;
pub use params::{
    GenerateParams, InitParams, MaskParams, OutputFormat, PromptWeighting, ResponseFormat, TextualInversionParams,
    effective_request,
};
pub use preprocessor::Preprocessor;
pub use preset::Preset;
pub use request::{
    ControlNetRequest, GenerateRequest, HiresRequest, LoraRequest, NumberOrName, PreprocessRequest, RefinerRequest,
    TextualInversionRequest, parse,
};
pub use response::{GenerateResponse, ImageDetails, Timings};
pub use scheduler_kind::{NamedScheduler, SchedulerKind};
pub use sigma_schedule::SigmaSchedule;
pub use stages::{HiresParams, RefinerBegin, RefinerParams, Upscaler};
pub use validate::{Limits, PictureFacts, validate};
pub use wording::nearest;
