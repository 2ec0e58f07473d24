//! Downloads of large files: straight to the disk, and from where they broke off. What has come stays beside the target
//! as `*.part` with a note of which version it belongs to, so that a later job goes on with it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE};
use reqwest::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;
use url::Url;

use super::download::{Failure, failed, host, success, timed_out};
use super::{Downloader, back_off};
use crate::error::{Error, ErrorClass, Result};

/// What a download ended with.
#[derive(Debug)]
pub(super) enum Fetched {
    /// The file is whole. `version` is its entity tag, else its date, where the host names one.
    File { version: Option<String> },
    /// The host still has the version that was given.
    Unchanged,
}

/// What is known of an unfinished file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    version: Option<String>,
}

/// An unfinished download on the disk.
struct Partial {
    file: File,
    length: u64,
    note: Note,
    note_path: PathBuf,
    began: Instant,
}

impl Downloader {
    /// Writes what `url` leads to into `part`, going on where an earlier try stopped. With `known`, a version, nothing is
    /// fetched if the host still has that one. One download per `part` at a time.
    ///
    /// # Errors
    /// Those of [`Downloader::fetch`], and `adapter_cache` when the disk does not take it.
    pub(super) async fn fetch_file(
        &self,
        url: &Url,
        max_bytes: u64,
        part: &Path,
        known: Option<&str>,
    ) -> Result<Fetched, Failure> {
        let max_bytes = max_bytes.min(self.settings.max_bytes);
        let mut partial = Partial::open(part).map_err(Failure::Final)?;
        let (mut failures, mut reached) = (0, partial.length);
        loop {
            let failure = match self.fetch_rest(url, max_bytes, &mut partial, known).await {
                Err(Failure::Passing(error)) => error,
                other => return other,
            };
            // a try that got further does not count as one that failed
            failures = if partial.length > reached { 1 } else { failures + 1 };
            reached = reached.max(partial.length);
            if failures >= self.settings.tries {
                return Err(Failure::Passing(failure));
            }
            self.check_time(url, &partial, max_bytes)?;
            tracing::debug!(host = host(url), at = partial.length, "a download broke off and goes on");
            sleep(back_off(failures)).await;
        }
    }

    /// No host may hold a job for ever: the time for small things, and a second for each mebibyte.
    fn check_time(&self, url: &Url, partial: &Partial, bytes: u64) -> Result<(), Failure> {
        let limit = self.settings.total_timeout + Duration::from_secs(bytes >> 20);
        match partial.began.elapsed() > limit {
            true => Err(Failure::Final(timed_out(url, "was not done in time", limit))),
            false => Ok(()),
        }
    }

    async fn fetch_rest(
        &self,
        url: &Url,
        max_bytes: u64,
        partial: &mut Partial,
        known: Option<&str>,
    ) -> Result<Fetched, Failure> {
        let mut response = self.follow(url, &partial.headers(known)).await?;
        match response.status() {
            StatusCode::NOT_MODIFIED if known.is_some() => return Ok(Fetched::Unchanged),
            StatusCode::PARTIAL_CONTENT if partial.continues(&response) => {}
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                // what is here belongs to no file that the host has now
                partial.restart(None).map_err(Failure::Final)?;
                return Err(Failure::Passing(failed(format!("{} has another file now", host(url)))));
            }
            _ => {
                success(&response)?;
                if known.is_some() && version(&response).as_deref() == known {
                    return Ok(Fetched::Unchanged);
                }
                partial.restart(version(&response)).map_err(Failure::Final)?;
            }
        }
        let expected = response.content_length().map(|rest| partial.length + rest);
        let too_large = |bytes: u64| {
            let message = format!("what {} sends is larger than {max_bytes} bytes", host(url));
            let error = Error::new(ErrorClass::TooLarge, "download_too_large", message);
            (bytes > max_bytes).then_some(Failure::Final(error))
        };
        if let Some(error) = expected.and_then(too_large) {
            return Err(error);
        }
        partial.check_space(expected.unwrap_or(0)).map_err(Failure::Final)?;
        while let Some(chunk) = self.in_time(url, response.chunk()).await? {
            if let Some(error) = too_large(partial.length + chunk.len() as u64) {
                partial.restart(None).map_err(Failure::Final)?;
                return Err(error);
            }
            partial.append(&chunk).map_err(Failure::Final)?;
            self.check_time(url, partial, expected.unwrap_or(max_bytes))?;
        }
        if expected.is_some_and(|expected| partial.length != expected) {
            return Err(Failure::Passing(failed(format!("{} broke the transfer off", host(url)))));
        }
        partial.file.sync_all().map_err(|e| Failure::Final(unwritable(e)))?;
        Ok(Fetched::File { version: partial.note.version.clone() })
    }
}

impl Partial {
    fn open(part: &Path) -> Result<Partial> {
        let note_path = part.with_extension("note");
        let file = OpenOptions::new().create(true).append(true).open(part).map_err(unwritable)?;
        let length = file.metadata().map_err(unwritable)?.len();
        let note = fs::read(&note_path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Ok(Partial { file, length, note, note_path, began: Instant::now() })
    }

    /// Asks for what is missing, if the host still has this version; only then may the pieces be joined.
    fn headers(&self, known: Option<&str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if let Some(known) = known.filter(|tag| tag.contains('"')).and_then(|tag| HeaderValue::from_str(tag).ok()) {
            headers.insert(IF_NONE_MATCH, known);
        }
        // a weak tag says nothing about bytes
        let strong = self.note.version.as_deref().filter(|version| !version.starts_with("W/"));
        if let Some(version) = strong.filter(|_| self.length > 0).and_then(|text| HeaderValue::from_str(text).ok()) {
            headers.insert(RANGE, HeaderValue::from_str(&format!("bytes={}-", self.length)).expect("digits"));
            headers.insert(IF_RANGE, version);
        }
        headers
    }

    /// Whether the piece begins where this one ends.
    fn continues(&self, response: &Response) -> bool {
        let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let start = range.strip_prefix("bytes ").and_then(|range| range.split('-').next());
        start.and_then(|start| start.parse().ok()) == Some(self.length)
            && version(response).is_none_or(|own| Some(own) == self.note.version)
    }

    fn restart(&mut self, version: Option<String>) -> Result<()> {
        self.file.set_len(0).map_err(unwritable)?;
        self.length = 0;
        self.note = Note { version };
        let text = serde_json::to_vec(&self.note).expect("a note is JSON");
        fs::write(&self.note_path, text).map_err(unwritable)
    }

    /// Before a job's minutes are spent on what cannot be kept.
    fn check_space(&self, whole: u64) -> Result<()> {
        let stat = rustix::fs::fstatvfs(&self.file).map_err(|error| unwritable(error.into()))?;
        let (free, missing) = (stat.f_bavail * stat.f_frsize, whole.saturating_sub(self.length));
        match missing > free {
            true => Err(unwritable(std::io::Error::other(format!("{missing} bytes are to come, {free} are free")))),
            false => Ok(()),
        }
    }

    fn append(&mut self, chunk: &[u8]) -> Result<()> {
        self.file.write_all(chunk).map_err(unwritable)?;
        self.length += chunk.len() as u64;
        Ok(())
    }
}

/// What tells one version of a file from the next.
fn version(response: &Response) -> Option<String> {
    let header = |name| response.headers().get(name).and_then(|value| value.to_str().ok());
    header(ETAG).or_else(|| header(LAST_MODIFIED)).map(str::to_owned)
}

pub(super) fn unwritable(error: std::io::Error) -> Error {
    Error::setup("adapter_cache", "the folder of downloaded adapters cannot be written")
        .source(anyhow!(error))
        .remedy("give --adapter-cache (ADAPTER_CACHE) a folder that this user may write to, with space in it")
}
