//! The one error that leaves this crate: a class that decides what happens next, a stable code, and words for a person.
//!
//! Inner layers use `anyhow`, where nobody branches; whoever knows the code wraps it here. The JSON form carries the
//! keys of RunPod's failure report beside our own, and is the same on the command line, over HTTP and in a job.

use std::fmt;
use std::io::{IsTerminal, stderr};

/// What an error means to whoever asked. Decides exit status, HTTP status and log level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// The request is wrong; the same request will fail again.
    InvalidInput,
    /// The request names something this worker does not have.
    NotFound,
    /// The request is valid but above a configured limit.
    TooLarge,
    /// The worker is busy; try later.
    Overloaded,
    /// Somebody asked for the job to stop.
    Cancelled,
    /// Memory ran out while the job ran.
    OutOfMemory,
    /// The accelerator's context is gone: this process cannot compute any more, a new one can.
    DeviceLost,
    /// The installation is wrong: model, graphs, libtorch, output folder.
    Setup,
    /// A fault of ours.
    Internal,
}

impl ErrorClass {
    /// The process exit status when this error ends a command.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorClass::InvalidInput | ErrorClass::NotFound | ErrorClass::TooLarge => 2,
            ErrorClass::Setup => 3,
            ErrorClass::Cancelled => 130,
            ErrorClass::Overloaded | ErrorClass::OutOfMemory | ErrorClass::DeviceLost | ErrorClass::Internal => 1,
        }
    }
}

/// An error with a stable code.
#[derive(Debug)]
pub struct Error {
    pub class: ErrorClass,
    /// Stable, snake_case: what a program matches on.
    pub code: &'static str,
    /// A fact about the input or the installation, for a person.
    pub message: String,
    /// Path into the request, such as `controlnets[0].image`.
    pub field: Option<String>,
    /// What to do about it.
    pub remedy: Option<String>,
    /// The chain of causes.
    pub source: Option<anyhow::Error>,
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub fn new(class: ErrorClass, code: &'static str, message: impl Into<String>) -> Self {
        Error { class, code, message: message.into(), field: None, remedy: None, source: None }
    }

    pub fn invalid(code: &'static str, field: impl Into<String>, message: impl Into<String>) -> Self {
        Error::new(ErrorClass::InvalidInput, code, message).field(field)
    }

    pub fn setup(code: &'static str, message: impl Into<String>) -> Self {
        Error::new(ErrorClass::Setup, code, message)
    }

    /// The same for another job that it ends too.
    pub fn again(&self) -> Self {
        Error {
            class: self.class,
            code: self.code,
            message: self.message.clone(),
            field: self.field.clone(),
            remedy: self.remedy.clone(),
            source: self.source.as_ref().map(|cause| anyhow::anyhow!("{cause:#}")),
        }
    }

    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    pub fn source(mut self, source: impl Into<anyhow::Error>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Ends a command: words for a person on stderr, and, unless a person is watching, the JSON object as the last line.
    pub fn print(&self) {
        eprintln!("error: {self}");
        self.print_json();
    }

    /// The last line alone, where the words have been said.
    pub fn print_json(&self) {
        if !stderr().is_terminal() {
            eprintln!("{}", self.to_json());
        }
    }

    /// The error as one JSON object: RunPod's keys (`error_type`, `error_message`, `error_traceback`, ...), then ours.
    pub fn to_json(&self) -> serde_json::Value {
        let env = |name: &str| std::env::var(name).unwrap_or_else(|_| "unknown".into());
        let causes: Vec<String> = self.source.iter().flat_map(|e| e.chain()).map(|e| e.to_string()).collect();
        serde_json::json!({
            "error_type": self.code,
            "error_message": self.message,
            "error_traceback": causes.join("\n"),
            "hostname": env("RUNPOD_POD_HOSTNAME"),
            "worker_id": env("RUNPOD_POD_ID"),
            "runpod_version": env!("CARGO_PKG_VERSION"),
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "remedy": self.remedy,
        })
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(field) = &self.field {
            write!(f, "{field}: ")?;
        }
        f.write_str(&self.message)?;
        for cause in self.source.iter().flat_map(|e| e.chain()) {
            write!(f, "\n  because: {cause}")?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "\n  remedy: {remedy}")?;
        }
        write!(f, "\n  code: {}", self.code)
    }
}

impl std::error::Error for Error {}

/// Whatever has no code of its own is a fault of ours; an [`Error`] inside the chain keeps its code.
impl From<anyhow::Error> for Error {
    fn from(error: anyhow::Error) -> Self {
        match error.downcast::<Error>() {
            Ok(error) => error,
            Err(error) => Error::new(ErrorClass::Internal, "internal", error.to_string()).source(error),
        }
    }
}
