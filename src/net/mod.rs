//! Reaching out on behalf of a job: downloads of what a client names, uploads to a bucket, names under the configured
//! folders. Whatever a client can name goes through [`Guard`] or [`Folders`]. Nothing here reads the environment or
//! logs more of an address than its host.

mod adapter_cache;
mod adapters;
mod download;
mod download_file;
mod guard;
mod paths;
mod proxy;
mod s3;

use std::fmt;

pub use adapter_cache::{AdapterCache, Stored};
pub(crate) use adapters::HubFile;
pub use adapters::{AdapterFile, AdapterFiles, AdapterSettings};
pub use download::{Download, Downloader, Settings as DownloadSettings, from_inline};
pub(crate) use download::{Failure, success};
pub use guard::{Guard, Lookup, LookupFuture, Settings as GuardSettings, is_global, refusal, system_lookup};
pub use paths::Folders;
pub use proxy::Proxies;
pub use s3::{Bucket, Uploader};

/// A token or key: printed as `***`, so that no log can hold it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Secret(value.into())
    }

    /// The value itself, for the request that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A variable that is set to something.
fn variable(get: &impl Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    get(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
}

/// How long to wait before the try after this one: 0.25 s, 0.5 s, ..., and up to half as much again, so that workers
/// that failed together do not come back together.
pub(crate) fn back_off(failed: u32) -> std::time::Duration {
    let base = 250 << failed.saturating_sub(1).min(6);
    std::time::Duration::from_millis(base + fastrand::u64(0..=base / 2))
}

/// Whether the same request may succeed a moment later.
fn is_passing(status: reqwest::StatusCode) -> bool {
    matches!(status.as_u16(), 408 | 425 | 429) || status.is_server_error()
}
