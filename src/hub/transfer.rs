//! From the Hub into a cache: several pieces of several files at a time, each where it belongs in its file, so that a
//! download goes on where it broke off; every file is checked before it gets its name. One worker fetches a file, the
//! others wait for it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{IsTerminal, Read, stderr};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use rustix::fs::{FlockOperation, flock};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::sleep;
use url::Url;

use super::files::{Checksum, Listed};
use crate::error::{Error, Result};
use crate::memory::format_bytes;
use crate::net::{Downloader, Failure, back_off, success};

/// Pieces that are on their way at the same time, of all files together.
const CONNECTIONS: usize = 8;
const PIECE: u64 = 32 << 20;
/// Tries of a piece that bring nothing.
const TRIES: u32 = 6;
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How often progress is logged where there is no terminal.
const REPORT: Duration = Duration::from_secs(5);

/// One repository's files, and where they go.
pub(super) struct Transfer {
    /// For messages.
    pub(super) name: String,
    /// What a file's name is appended to.
    pub(super) urls: String,
    /// `models--org--name`
    pub(super) root: PathBuf,
    pub(super) locks: PathBuf,
    /// Where the files get their names, as links.
    pub(super) snapshot: PathBuf,
}

/// A file on its way.
struct Job {
    listed: Listed,
    url: Url,
    /// What its content is called in the cache.
    blob: PathBuf,
    lock: PathBuf,
}

/// What all pieces share.
struct Progress {
    done: AtomicU64,
    received: AtomicU64,
    total: u64,
    is_over: AtomicBool,
}

impl Transfer {
    /// Fetches what is not there yet and names all of it. Gives the number of bytes that came.
    pub(super) async fn run(&self, downloader: &Downloader, files: Vec<Listed>) -> Result<u64> {
        for folder in [&self.root.join("blobs"), &self.locks, &self.snapshot] {
            fs::create_dir_all(folder).map_err(unwritable)?;
        }
        let mut jobs = files.into_iter().map(|listed| self.job(listed)).collect::<Result<Vec<_>>>()?;
        jobs.sort_by_key(|job| std::cmp::Reverse(job.listed.size()));
        let links: Vec<(PathBuf, String)> =
            jobs.iter().map(|job| (job.blob.clone(), job.listed.name.clone())).collect();
        jobs.retain(|job| !job.is_here());
        self.check_space(&jobs)?;
        let total = jobs.iter().filter_map(|job| job.listed.size()).sum();
        let progress = Arc::new(Progress { done: 0.into(), received: 0.into(), total, is_over: false.into() });
        let reporter = (!jobs.is_empty()).then(|| tokio::spawn(report(self.name.clone(), progress.clone())));
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let mut running = JoinSet::new();
        for job in jobs {
            let (downloader, progress, connections) = (downloader.clone(), progress.clone(), connections.clone());
            let name = self.name.clone();
            running.spawn(async move { Arc::new(job).fetch(&name, &downloader, &progress, &connections).await });
        }
        let mut result = Ok(());
        while let Some(ended) = running.join_next().await {
            let ended = ended.map_err(anyhow::Error::from)?;
            if ended.is_err() && result.is_ok() {
                running.abort_all();
                result = ended;
                break;
            }
        }
        progress.is_over.store(true, Ordering::Relaxed);
        if let Some(reporter) = reporter {
            reporter.await.ok();
        }
        result?;
        for (blob, name) in links {
            link(&blob, &self.snapshot, &name).map_err(unwritable)?;
        }
        Ok(progress.received.load(Ordering::Relaxed))
    }

    fn job(&self, listed: Listed) -> Result<Job> {
        let is_plain = !listed.name.split('/').any(|part| matches!(part, "" | "." | ".."));
        let id = match listed.checksum() {
            Checksum::Sha256(id) | Checksum::GitBlob(id) => id,
            // the place in the repository must do
            Checksum::Unknown => hex(&Sha256::digest(format!("{}/{}", self.urls, listed.name))),
        };
        let is_id = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let url = Url::parse(&format!("{}/{}", self.urls, listed.name));
        match url {
            Ok(url) if is_plain && is_id => Ok(Job {
                url,
                blob: self.root.join("blobs").join(&id),
                lock: self.locks.join(format!("{id}.lock")),
                listed,
            }),
            _ => Err(Error::setup("hub_unreachable", format!("{} has a file that cannot be named here", self.name))
                .remedy("check HF_ENDPOINT")),
        }
    }

    /// Before minutes are spent on what has no room.
    fn check_space(&self, jobs: &[Job]) -> Result<()> {
        let missing: u64 = jobs.iter().map(Job::missing).sum();
        let stat = rustix::fs::statvfs(&self.root).map_err(|error| unwritable(error.into()))?;
        let free = stat.f_bavail * stat.f_frsize;
        if missing <= free {
            return Ok(());
        }
        let (missing, free) = (format_bytes(missing), format_bytes(free));
        Err(disk_full(format!("{} needs {missing} more in {}, where {free} are free", self.name, self.root.display())))
    }
}

impl Job {
    fn is_here(&self) -> bool {
        let length = fs::metadata(&self.blob).ok().filter(fs::Metadata::is_file).map(|metadata| metadata.len());
        length.is_some_and(|length| self.listed.size().is_none_or(|size| size == length))
    }

    fn part(&self) -> PathBuf {
        self.blob.with_extension("part")
    }

    fn missing(&self) -> u64 {
        let size = self.listed.size().unwrap_or(0);
        let done = Pieces::read(&self.part(), size).map_or(0, |pieces| pieces.bytes());
        size.saturating_sub(done)
    }

    async fn fetch(
        self: Arc<Self>,
        name: &str,
        downloader: &Downloader,
        progress: &Arc<Progress>,
        connections: &Arc<Semaphore>,
    ) -> Result<()> {
        let _lock = self.wait_for_lock(name).await?;
        if self.is_here() {
            progress.done.fetch_add(self.listed.size().unwrap_or(0), Ordering::Relaxed);
            return Ok(());
        }
        for is_last in [false, true] {
            self.clone().fetch_pieces(name, downloader, progress, connections).await?;
            if self.is_here() {
                return Ok(()); // by a worker whose locks are not seen here
            }
            let job = self.clone();
            let is_right = spawn_blocking(move || job.has_checksum()).await.map_err(anyhow::Error::from)?;
            if is_right.map_err(unwritable)? {
                fs::rename(self.part(), &self.blob).map_err(unwritable)?;
                fs::remove_file(Pieces::path(&self.part())).ok();
                return Ok(());
            }
            let part = self.part();
            fs::remove_file(Pieces::path(&part)).ok();
            fs::remove_file(&part).map_err(unwritable)?;
            progress.done.fetch_sub(self.listed.size().unwrap_or(0), Ordering::Relaxed);
            if !is_last {
                tracing::warn!(
                    file = self.listed.name,
                    "what came is not the file that the Hub describes; it is fetched again"
                );
            }
        }
        let message = format!("{} of {name} came twice with another checksum than the Hub's", self.listed.name);
        Err(Error::setup("checksum_mismatch", message).remedy("check HF_ENDPOINT and any proxy; try again"))
    }

    /// Where the file system has no locks, two workers may fetch the same: they write the same bytes to the same places.
    async fn wait_for_lock(&self, name: &str) -> Result<File> {
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&self.lock).map_err(unwritable)?;
        let mut is_told = false;
        while let Err(rustix::io::Errno::WOULDBLOCK) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            if !is_told {
                tracing::info!(file = self.listed.name, "another worker fetches this file of {name}; waiting for it");
                is_told = true;
            }
            sleep(Duration::from_millis(200)).await;
        }
        Ok(lock)
    }

    /// Fills the part, several pieces at a time where the host can send pieces.
    async fn fetch_pieces(
        self: Arc<Self>,
        name: &str,
        downloader: &Downloader,
        progress: &Arc<Progress>,
        connections: &Arc<Semaphore>,
    ) -> Result<()> {
        let part = self.part();
        let size = self.listed.size();
        let pieces =
            Pieces::read(&part, size.unwrap_or(0)).unwrap_or(Pieces { size: size.unwrap_or(0), done: BTreeSet::new() });
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&part).map_err(unwritable)?;
        file.set_len(pieces.size).map_err(unwritable)?;
        progress.done.fetch_add(pieces.bytes(), Ordering::Relaxed);
        let file = Arc::new(file);
        let missing: Vec<u64> = (0..pieces.count()).filter(|index| !pieces.done.contains(index)).collect();
        let pieces = Arc::new(Mutex::new(pieces));
        let mut running = JoinSet::new();
        for index in missing {
            let permit = connections.clone().acquire_owned().await.map_err(anyhow::Error::from)?;
            while let Some(ended) = running.try_join_next() {
                ended.map_err(anyhow::Error::from)??;
            }
            let (job, downloader, progress) = (self.clone(), downloader.clone(), progress.clone());
            let (file, pieces, part, name) = (file.clone(), pieces.clone(), part.clone(), name.to_owned());
            running.spawn(async move {
                let _permit = permit;
                let range = pieces.lock().expect("no panic").range(index);
                job.fetch_piece(&name, &downloader, &file, range, &progress).await?;
                let mut pieces = pieces.lock().expect("no panic");
                pieces.done.insert(index);
                pieces.write(&part).map_err(unwritable)
            });
        }
        while let Some(ended) = running.join_next().await {
            ended.map_err(anyhow::Error::from)??;
        }
        Ok(())
    }

    /// Writes bytes `from..to` of the file; tries again as long as something comes.
    async fn fetch_piece(
        &self,
        name: &str,
        downloader: &Downloader,
        file: &File,
        (from, to): (u64, u64),
        progress: &Progress,
    ) -> Result<()> {
        let (mut at, mut failures) = (from, 0);
        loop {
            let before = at;
            let failure = match self.try_piece(downloader, file, &mut at, to, progress).await {
                Ok(()) => return Ok(()),
                Err(Stop::Failure(Failure::Passing(error), wait)) => (error, wait),
                Err(Stop::Failure(Failure::Refused(status, error), _)) => {
                    let error = Error::setup("hub_unreachable", format!("{name}: {} was refused", self.listed.name))
                        .source(cause(error));
                    return Err(error.remedy(match status {
                        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "set HF_TOKEN to a token that may read it",
                        _ => "try again",
                    }));
                }
                Err(Stop::Failure(Failure::Final(error), _)) => return Err(unreachable(&name, error)),
                Err(Stop::Disk(error)) => return Err(unwritable(error)),
            };
            failures = if at > before { 1 } else { failures + 1 };
            let (error, wait) = failure;
            if failures >= TRIES {
                return Err(unreachable(&name, error));
            }
            tracing::debug!(file = self.listed.name, at, failures, "a transfer broke off and goes on");
            sleep(wait.unwrap_or_default().clamp(back_off(failures), LONGEST_WAIT)).await;
        }
    }

    async fn try_piece(
        &self,
        downloader: &Downloader,
        file: &File,
        at: &mut u64,
        to: u64,
        progress: &Progress,
    ) -> Result<(), Stop> {
        let size = self.listed.size();
        let is_all = *at == 0 && size.is_none_or(|size| to == size);
        let mut headers = HeaderMap::new();
        if !is_all {
            headers.insert(RANGE, HeaderValue::from_str(&format!("bytes={at}-{}", to - 1)).expect("digits"));
        }
        let mut response =
            downloader.follow(&self.url, &headers).await.map_err(|failure| Stop::Failure(failure, None))?;
        let wait = retry_after(&response);
        success(&response).map_err(|failure| Stop::Failure(failure, wait))?;
        // a host that knows no pieces sends the file from its beginning
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT if starts_at(&response) == Some(*at) => 0,
            StatusCode::PARTIAL_CONTENT => {
                let error =
                    Error::setup("hub_unreachable", "the host sent another piece than the one that was asked for");
                return Err(Stop::Failure(Failure::Passing(error), None));
            }
            _ => *at,
        };
        let url = response.url().clone();
        while size.is_none() || *at < to {
            let chunk =
                downloader.in_time(&url, response.chunk()).await.map_err(|failure| Stop::Failure(failure, None))?;
            let Some(chunk) = chunk else { break };
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            let mut new = &chunk[skipped as usize..];
            if size.is_some() {
                new = &new[..new.len().min((to - *at) as usize)];
            }
            file.write_all_at(new, *at).map_err(Stop::Disk)?;
            *at += new.len() as u64;
            progress.done.fetch_add(new.len() as u64, Ordering::Relaxed);
            progress.received.fetch_add(new.len() as u64, Ordering::Relaxed);
        }
        match size.is_some() && *at < to {
            true => {
                let error = Error::setup("hub_unreachable", "the host broke the transfer off");
                Err(Stop::Failure(Failure::Passing(error), None))
            }
            false => Ok(()),
        }
    }

    /// Whether the part is what the Hub describes.
    fn has_checksum(&self) -> std::io::Result<bool> {
        let mut file = File::open(self.part())?;
        let length = file.metadata()?.len();
        if self.listed.size().is_some_and(|size| size != length) {
            return Ok(false);
        }
        Ok(match self.listed.checksum() {
            Checksum::Sha256(expected) => digest::<Sha256>(&mut file, b"")? == expected,
            Checksum::GitBlob(expected) => {
                digest::<Sha1>(&mut file, format!("blob {length}\0").as_bytes())? == expected
            }
            Checksum::Unknown => true,
        })
    }
}

/// Why a try ended early.
enum Stop {
    /// With how long the host wants to be left alone.
    Failure(Failure, Option<Duration>),
    Disk(std::io::Error),
}

/// Which pieces of a file have come: a list beside the part.
struct Pieces {
    size: u64,
    done: BTreeSet<u64>,
}

impl Pieces {
    fn path(part: &Path) -> PathBuf {
        part.with_extension("pieces")
    }

    /// What an earlier worker left.
    fn read(part: &Path, size: u64) -> Option<Pieces> {
        let is_there = fs::metadata(part).is_ok_and(|metadata| metadata.len() == size);
        let text = fs::read_to_string(Pieces::path(part)).ok().filter(|_| is_there)?;
        let numbers = text.split_whitespace().map(|number| number.parse().ok()).collect::<Option<Vec<u64>>>()?;
        let [of, piece, done @ ..] = &numbers[..] else { return None };
        (*of == size && *piece == PIECE).then(|| Pieces { size, done: done.iter().copied().collect() })
    }

    fn write(&self, part: &Path) -> std::io::Result<()> {
        let done: String = self.done.iter().map(|index| format!(" {index}")).collect();
        let mut file = tempfile::NamedTempFile::new_in(part.parent().expect("in a folder"))?;
        std::io::Write::write_all(&mut file, format!("{} {PIECE}{done}\n", self.size).as_bytes())?;
        file.persist(Pieces::path(part))?;
        Ok(())
    }

    fn count(&self) -> u64 {
        self.size.div_ceil(PIECE).max(1)
    }

    fn range(&self, index: u64) -> (u64, u64) {
        (index * PIECE, ((index + 1) * PIECE).min(self.size))
    }

    fn bytes(&self) -> u64 {
        self.done.iter().map(|&index| self.range(index)).map(|(from, to)| to - from).sum()
    }
}

/// `snapshot/name` leads to the blob; without links on this file system it is the file.
fn link(blob: &Path, snapshot: &Path, name: &str) -> std::io::Result<()> {
    let path = snapshot.join(name);
    if path.exists() {
        return Ok(());
    }
    fs::create_dir_all(path.parent().expect("in the snapshot"))?;
    fs::remove_file(&path).ok(); // a link to what is gone
    let up = "../".repeat(name.split('/').count() + 1);
    let target = format!("{up}blobs/{}", blob.file_name().expect("it has a name").to_string_lossy());
    match symlink(target, &path) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(_) => fs::hard_link(blob, &path).or_else(|_| fs::copy(blob, &path).map(drop)),
        Ok(()) => Ok(()),
    }
}

/// Says how far it is: a bar on a terminal, else a line now and then.
async fn report(name: String, progress: Arc<Progress>) {
    let style = "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    let is_terminal = stderr().is_terminal();
    let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(progress.total), target);
    bar.set_style(ProgressStyle::with_template(style).expect("a template"));
    bar.set_message(name.clone());
    let (started, mut told) = (Instant::now(), Instant::now());
    while !progress.is_over.load(Ordering::Relaxed) {
        sleep(Duration::from_millis(100)).await;
        let done = progress.done.load(Ordering::Relaxed);
        bar.set_position(done);
        if !is_terminal && told.elapsed() >= REPORT {
            told = Instant::now();
            let rate = progress.received.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64();
            let left = progress.total.saturating_sub(done) as f64 / rate.max(1.0);
            let (done, total, rate) = (format_bytes(done), format_bytes(progress.total), format_bytes(rate as u64));
            tracing::info!("downloading {name}: {done} of {total}, {rate}/s, {left:.0} s left");
        }
    }
    bar.finish_and_clear();
}

fn digest<D: Digest>(file: &mut File, before: &[u8]) -> std::io::Result<String> {
    let mut hash = D::new();
    hash.update(before);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&buffer[..read]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn starts_at(response: &Response) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(reqwest::header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

pub(super) fn unreachable(name: &impl std::fmt::Display, error: Error) -> Error {
    Error::setup("hub_unreachable", format!("{name} cannot be fetched: {}", error.message)).source(cause(error)).remedy(
        "check the network, HF_ENDPOINT and proxies and start again: what has come is kept; or give --model a folder",
    )
}

/// An error of the network as the reason for another.
pub(super) fn cause(error: Error) -> anyhow::Error {
    match error.source {
        Some(source) => source.context(error.message),
        None => anyhow!(error.message),
    }
}

fn disk_full(message: String) -> Error {
    Error::setup("disk_full", message).remedy("make room, or set HF_HUB_CACHE to a folder on a larger disk")
}

pub(super) fn unwritable(error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::StorageFull {
        return disk_full("the disk of the model cache is full".into());
    }
    Error::setup("model_cache", "the folder of downloaded models cannot be written")
        .source(error)
        .remedy("set HF_HUB_CACHE to a folder that this user may write to")
}
