//! What callers see: the request as it arrives, the same request valid, and the reply. Serde types and pure rules, the
//! words everything else is said in; no tensors, no network, no files.
//!
//! A request goes [`parse()`] (names and JSON types) then [`validate()`] (values and limits); nothing after that meets a
//! default that is missing or a number out of range. Names are diffusers' names.

mod control;
mod params;
mod preprocessor;
mod request;
mod response;
mod scheduler_kind;
mod schema;
mod validate;
mod wording;

pub use control::{ControlNetFacts, ControlParams, FINGERPRINT, ScaleMode};
pub use params::{
    GenerateParams, InitParams, MaskParams, OutputFormat, ResponseFormat, SigmaSchedule, effective_request,
};
pub use preprocessor::Preprocessor;
pub use request::{
    ControlNetRequest, GenerateRequest, HiresRequest, LoraRequest, NumberOrName, PreprocessRequest, RefinerRequest,
    TextualInversionRequest, parse,
};
pub use response::{GenerateResponse, ImageDetails, Timings};
pub use scheduler_kind::SchedulerKind;
pub use validate::{Limits, PictureFacts, validate};
