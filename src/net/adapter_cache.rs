//! Downloaded adapters on the disk, by content: `files/<sha256>.safetensors`, `urls/<sha256 of the address>.json` for
//! which content an address led to, `parts/` for what has not all come yet. Several processes may share the folder:
//! files appear whole, by renaming, and a part belongs to whoever holds its lock.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use url::Url;

use super::Downloader;
use super::download::Failure;
use super::download_file::{Fetched, unwritable};
use crate::error::Result;

/// How long an address is taken to lead to the same content without asking.
const FRESH: Duration = Duration::from_secs(600);
/// A download under way has written to its part by then.
const IDLE: Duration = Duration::from_secs(3600);
/// Parts that nobody has gone on with for so long are thrown away.
const ABANDONED: Duration = Duration::from_secs(7 * 24 * 3600);

const MAX_KNOWN: usize = 4096;

/// A file and what is in it. The handle keeps the content even when the name goes.
#[derive(Debug, Clone)]
pub struct Stored {
    pub sha256: String,
    pub file: Arc<File>,
}

pub struct AdapterCache {
    folder: PathBuf,
    /// Most bytes of files, whole or not.
    limit: u64,
    /// Checksums of local files, as long as they look the same.
    known: Mutex<HashMap<Looks, String>>,
    /// One download per address at a time.
    busy: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Looks {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    sha256: String,
    version: Option<String>,
}

impl AdapterCache {
    pub fn new(folder: PathBuf, limit: u64) -> Self {
        AdapterCache { folder, limit, known: Mutex::default(), busy: Mutex::default() }
    }

    /// The downloaded file with this content.
    pub fn by_content(&self, sha256: &str) -> Option<Stored> {
        let path = self.content(sha256);
        let file = File::open(&path).ok()?;
        // the time says when it was last used
        file.set_modified(SystemTime::now()).ok();
        Some(Stored { sha256: sha256.to_owned(), file: Arc::new(file) })
    }

    /// A file on this machine with its checksum, which takes about 2 s per gigabyte the first time.
    pub fn local(&self, path: &Path) -> std::io::Result<Stored> {
        let file = File::open(path)?;
        let looks = looks(&file)?;
        let known = self.known.lock().expect("a map").get(&looks).cloned();
        let sha256 = match known {
            Some(sha256) => sha256,
            None => {
                let sha256 = sha256(&file)?;
                let mut known = self.known.lock().expect("a map");
                if known.len() >= MAX_KNOWN {
                    known.clear();
                }
                known.insert(looks, sha256.clone());
                sha256
            }
        };
        Ok(Stored { sha256, file: Arc::new(file) })
    }

    /// What `key` leads to: from here, where it was asked for a moment ago or the host has nothing newer. Else `url` says
    /// where it is, and what comes is kept if `check` takes it.
    pub(super) async fn fetch(
        &self,
        downloader: &Downloader,
        key: &str,
        url: impl AsyncFnOnce() -> Result<Url, Failure>,
        max_bytes: u64,
        check: impl Fn(&File) -> Result<()>,
    ) -> Result<Stored, Failure> {
        let key = hex(&Sha256::digest(key.as_bytes()));
        let turn = self.turn(&key);
        let _turn = turn.lock().await;
        for folder in ["files", "urls", "parts"] {
            fs::create_dir_all(self.folder.join(folder)).map_err(failure)?;
        }
        let index = self.folder.join("urls").join(format!("{key}.json"));
        let entry: Option<Entry> = fs::read(&index).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let here = entry.and_then(|entry| Some((self.by_content(&entry.sha256)?, entry)));
        let is_fresh =
            fs::metadata(&index).and_then(|m| m.modified()).is_ok_and(|t| t.elapsed().is_ok_and(|t| t < FRESH));
        if let Some((stored, _)) = here.as_ref().filter(|_| is_fresh) {
            return Ok(stored.clone());
        }
        self.make_room(here.as_ref().map(|(stored, _)| stored.sha256.as_str()));
        let (part, _lock) = self.part(&key).map_err(failure)?;
        let known = here.as_ref().and_then(|(_, entry)| entry.version.as_deref());
        let answer = match url().await {
            Ok(url) => downloader.fetch_file(&url, max_bytes, &part, known).await,
            Err(failure) => Err(failure),
        };
        match (answer, here) {
            (Ok(Fetched::File { version }), _) => {
                let file = File::open(&part).map_err(failure)?;
                if let Err(error) = check(&file) {
                    remove_part(&part);
                    return Err(Failure::Final(error));
                }
                self.take(file, &part, &index, version).map_err(failure)
            }
            (Ok(Fetched::Unchanged), Some((stored, entry))) => {
                write_whole(&index, &serde_json::to_vec(&entry).expect("an entry is JSON")).ok();
                Ok(stored)
            }
            // better the file of a while ago than none
            (Err(Failure::Passing(error)), Some((stored, _))) => {
                tracing::warn!(code = error.code, "the host cannot be asked for a newer adapter; the one here is used");
                Ok(stored)
            }
            (Ok(Fetched::Unchanged), None) => unreachable!("a version was given, so the file is here"),
            (Err(failure), _) => Err(failure),
        }
    }

    /// Jobs that want the same file wait for each other.
    fn turn(&self, key: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut busy = self.busy.lock().expect("a map");
        busy.retain(|_, turn| Arc::strong_count(turn) > 1);
        busy.entry(key.to_owned()).or_default().clone()
    }

    /// Where to download to. A part that another process works on is left to it.
    fn part(&self, key: &str) -> std::io::Result<(PathBuf, Option<File>)> {
        let path = self.folder.join("parts").join(format!("{key}.part"));
        let lock = File::create(path.with_extension("lock"))?;
        let is_mine = flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok();
        // whoever had it before may have deleted it in between, and a third one locked a new file of that name
        let is_there =
            |path: PathBuf| fs::metadata(path).is_ok_and(|m| lock.metadata().is_ok_and(|l| l.ino() == m.ino()));
        if is_mine && is_there(path.with_extension("lock")) {
            return Ok((path, Some(lock)));
        }
        let own = format!("{key}-{}-{:x}.part", std::process::id(), fastrand::u64(..));
        Ok((self.folder.join("parts").join(own), None))
    }

    /// Names a whole file by its content, and makes room.
    fn take(&self, file: File, part: &Path, index: &Path, version: Option<String>) -> std::io::Result<Stored> {
        let sha256 = sha256(&file)?;
        let entry = Entry { sha256: sha256.clone(), version };
        fs::rename(part, self.content(&sha256))?;
        remove_part(part);
        write_whole(index, &serde_json::to_vec(&entry).expect("an entry is JSON"))?;
        self.make_room(Some(&sha256));
        Ok(Stored { sha256, file: Arc::new(file) })
    }

    fn content(&self, sha256: &str) -> PathBuf {
        self.folder.join("files").join(format!("{sha256}.safetensors"))
    }

    /// Deletes what was used longest ago, but not the content to keep, until the rest is within the limit. Parts count,
    /// and go too, unless somebody may be at work on them.
    fn make_room(&self, keep: Option<&str>) {
        let keep = keep.map(|sha256| self.content(sha256));
        let (mut files, parts) = (listing(&self.folder.join("files")), listing(&self.folder.join("parts")));
        let mut total: u64 = files.iter().chain(&parts).map(|(_, _, bytes)| bytes).sum();
        files.retain(|(path, ..)| Some(path) != keep.as_ref());
        files.extend(parts.into_iter().filter(|(_, time, _)| time.elapsed().is_ok_and(|age| age > IDLE)));
        files.sort_by_key(|(_, modified, _)| *modified);
        for (path, modified, bytes) in files {
            let is_abandoned = path.extension().is_some_and(|end| end != "safetensors")
                && modified.elapsed().is_ok_and(|age| age > ABANDONED);
            if (total > self.limit || is_abandoned) && fs::remove_file(path).is_ok() {
                total -= bytes;
            }
        }
    }
}

/// With what belongs to it.
fn remove_part(part: &Path) {
    for end in ["part", "note", "lock"] {
        fs::remove_file(part.with_extension(end)).ok();
    }
}

fn failure(error: std::io::Error) -> Failure {
    Failure::Final(unwritable(error))
}

/// Path, time of the last change, bytes.
fn listing(folder: &Path) -> Vec<(PathBuf, SystemTime, u64)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some((entry.path(), metadata.modified().ok()?, metadata.len()))
        })
        .collect()
}

fn looks(file: &File) -> std::io::Result<Looks> {
    let metadata = file.metadata()?;
    Ok(Looks {
        device: metadata.dev(),
        inode: metadata.ino(),
        bytes: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Of the rest of the file.
fn sha256(mut file: &File) -> std::io::Result<String> {
    let mut hash = Sha256::new();
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

fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(path.parent().expect("a file in a folder"))?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.persist(path)?;
    Ok(())
}
