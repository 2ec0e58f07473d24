//! Where a model comes from: a folder of this machine, a cache in the Hub's layout, or the Hub itself.
//!
//! [`Hub::deliver`] looks for it in this order and answers with a folder. A start never needs the network for what is
//! here; [`Hub::fetch`] always asks for the newest. Caches are shared with Python's `huggingface_hub`: same layout
//! (`models--org--name/{blobs,refs,snapshots}`), same locks.

mod files;
mod transfer;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hf_hub::{Cache, Repo, RepoType};
use reqwest::StatusCode;
use url::Url;

use crate::error::{Error, Result};
use crate::net::{Downloader, Failure, HubFile};
use files::{Listing, Variants};
pub use files::{Variant, What};

/// Of a repository's description.
const MAX_LISTING: u64 = 16 << 20;
/// Of `model_index.json`.
const MAX_INDEX: u64 = 1 << 20;

/// Where it is looked for, and where downloads go.
#[derive(Debug, Clone)]
pub struct Settings {
    /// In this order.
    pub caches: Vec<(Source, PathBuf)>,
    pub download_to: PathBuf,
    pub offline: bool,
}

impl Settings {
    /// From `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HOME` and `HF_HUB_OFFLINE`, and the folder where a network volume
    /// is mounted. Downloads go where the variables say, else onto the volume, so that workers share them.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>, volume: &Path) -> Self {
        let path = |name: &str| get(name).filter(|value| !value.trim().is_empty()).map(PathBuf::from);
        let given = path("HF_HUB_CACHE").or_else(|| path("HF_HOME").map(|home| home.join("hub")));
        let own = path("XDG_CACHE_HOME").or_else(|| path("HOME").map(|home| home.join(".cache")));
        let own = own.unwrap_or_else(std::env::temp_dir).join("huggingface/hub");
        let on_volume = volume.join("sdxl-worker/hub");
        let download_to = match &given {
            Some(given) => given.clone(),
            None if volume.is_dir() => on_volume.clone(),
            None => own.clone(),
        };
        let offline = get("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_lowercase();
        Settings {
            caches: vec![
                (Source::RunPodCache, volume.join("huggingface-cache/hub")),
                (Source::HubCache, given.unwrap_or(own)),
                (Source::Volume, on_volume),
            ],
            download_to,
            offline: matches!(offline.as_str(), "1" | "true" | "yes" | "on"),
        }
    }
}

/// Where a model was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A path of this machine was named.
    Path,
    /// RunPod put it onto the machine.
    RunPodCache,
    /// `HF_HUB_CACHE`, `HF_HOME`, or the user's own.
    HubCache,
    /// What a worker downloaded to the network volume before.
    Volume,
    /// The Hub.
    Download,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Path => "path",
            Source::RunPodCache => "runpod-cache",
            Source::HubCache => "hub-cache",
            Source::Volume => "volume",
            Source::Download => "download",
        }
    }
}

/// What is looked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// A folder or file, or `org/name[@revision][/folder or file]`.
    pub name: String,
    pub what: What,
    /// Which weight files will do, the best first.
    pub variants: Vec<Variant>,
    /// The option that named it, for messages.
    pub option: &'static str,
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Delivered {
    pub name: String,
    pub path: PathBuf,
    pub source: Source,
    /// How long it took to find or fetch it.
    pub time: Duration,
    /// How much came over the network.
    pub downloaded: u64,
}

pub struct Hub {
    settings: Settings,
    endpoint: String,
    downloader: Downloader,
}

impl Hub {
    pub fn new(settings: Settings, downloader: &Downloader) -> Self {
        let token = Cache::new(settings.download_to.clone()).token();
        let (endpoint, downloader) = downloader.for_models(token);
        Hub { settings, endpoint, downloader }
    }

    /// The folder of what is wanted: where it is named, from a cache, else from the Hub.
    ///
    /// # Errors
    /// `model_not_found`, `model_gated`, `weights_missing`, `offline`, `hub_unreachable`, `checksum_mismatch`,
    /// `disk_full`, `model_cache`.
    pub async fn deliver(&self, wanted: &Wanted) -> Result<Delivered> {
        match self.find(wanted)? {
            Some(found) => Ok(found),
            None => self.download(wanted).await,
        }
    }

    /// The same, but what is named by its place on the Hub is brought up to date.
    pub async fn fetch(&self, wanted: &Wanted) -> Result<Delivered> {
        match self.find(wanted)? {
            Some(found) if found.source == Source::Path || self.settings.offline => Ok(found),
            _ => self.download(wanted).await,
        }
    }

    /// What is on this machine; `None` where it could be fetched.
    ///
    /// # Errors
    /// `model_not_found` for what is neither here nor a name of the Hub's.
    pub fn find(&self, wanted: &Wanted) -> Result<Option<Delivered>> {
        let started = Instant::now();
        let found = |source, path| Delivered {
            name: wanted.name.clone(),
            path,
            source,
            time: started.elapsed(),
            downloaded: 0,
        };
        if Path::new(&wanted.name).exists() {
            return Ok(Some(found(Source::Path, PathBuf::from(&wanted.name))));
        }
        let id = self.parse(wanted)?;
        let here = |(source, cache): &(Source, PathBuf)| {
            let snapshot = snapshot(cache, &id, *source == Source::RunPodCache)?;
            let is_whole = match id.file.filter(|file| is_weights(file)) {
                Some(_) => snapshot.is_file(),
                None => files::is_whole(&snapshot, wanted.what, &wanted.variants),
            };
            is_whole.then(|| found(*source, snapshot))
        };
        Ok(self.settings.caches.iter().find_map(here))
    }

    fn parse<'a>(&self, wanted: &'a Wanted) -> Result<HubFile<'a>> {
        HubFile::parse(&wanted.name).ok_or_else(|| {
            let Wanted { name, option, .. } = wanted;
            Error::setup(wanted.what.not_found(), format!("there is no {} {name}", wanted.what.folder())).remedy(
                format!("give {option} a folder in the diffusers layout, or a model of the Hub as org/name[@revision]"),
            )
        })
    }

    async fn download(&self, wanted: &Wanted) -> Result<Delivered> {
        let started = Instant::now();
        let id = self.parse(wanted)?;
        if self.settings.offline {
            let looked = self.settings.caches.iter().map(|(_, path)| path.display().to_string()).collect::<Vec<_>>();
            let message =
                format!("{id} is not here, and HF_HUB_OFFLINE forbids to fetch it; looked in {}", looked.join(", "));
            return Err(Error::setup("offline", message)
                .remedy(format!("unset HF_HUB_OFFLINE, run `sdxl-worker fetch`, or give {} a folder", wanted.option)));
        }
        let listing = self.listing(&id, wanted).await?;
        let single = id.file.filter(|file| is_weights(file));
        let folder = id.file.filter(|_| single.is_none()).map(|folder| format!("{folder}/")).unwrap_or_default();
        let names = listing.names_below(&folder);
        let index = match wanted.what {
            What::Pipeline if single.is_none() && names.contains("model_index.json") => {
                Some(self.small_file(&id, &listing.sha, &format!("{folder}model_index.json"), wanted).await?)
            }
            _ => None,
        };
        let chosen = match single {
            Some(file) if names.contains(file) => vec![file.to_owned()],
            Some(_) => {
                let message = format!("the Hub has no {id}");
                return Err(Error::setup(wanted.what.not_found(), message).remedy("check the file's name"));
            }
            None => files::choose(&names, wanted.what, index.as_deref(), Variants(&wanted.variants))
                .map_err(|error| error.into_error(&id.to_string(), wanted.what))?,
        };
        let cache = Cache::new(self.settings.download_to.clone());
        let repo = Repo::with_revision(id.repository.into(), RepoType::Model, id.revision.into());
        let transfer = transfer::Transfer {
            name: id.to_string(),
            urls: format!("{}/{}/resolve/{}", self.endpoint, id.repository, listing.sha),
            root: self.settings.download_to.join(repo.folder_name()),
            locks: self.settings.download_to.join(".locks").join(repo.folder_name()),
            snapshot: cache.repo(repo.clone()).pointer_path(&listing.sha),
        };
        let files = chosen.iter().map(|name| listing.file(&format!("{folder}{name}"))).collect();
        let downloaded = transfer.run(&self.downloader, files).await?;
        cache.repo(repo).create_ref(&listing.sha).map_err(transfer::unwritable)?;
        let path = id.file.map_or(transfer.snapshot.clone(), |file| transfer.snapshot.join(file));
        let name = wanted.name.clone();
        Ok(Delivered { name, path, source: Source::Download, time: started.elapsed(), downloaded })
    }

    async fn listing(&self, id: &HubFile<'_>, wanted: &Wanted) -> Result<Listing> {
        let revision = id.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.endpoint, id.repository);
        let bytes = self.get(&url, MAX_LISTING, id, wanted).await?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Error::setup("hub_unreachable", format!("what {} says of {id} is no list of files", self.host()))
                .source(error)
                .remedy("check HF_ENDPOINT")
        })
    }

    async fn small_file(&self, id: &HubFile<'_>, commit: &str, name: &str, wanted: &Wanted) -> Result<Vec<u8>> {
        let url = format!("{}/{}/resolve/{commit}/{name}", self.endpoint, id.repository);
        self.get(&url, MAX_INDEX, id, wanted).await
    }

    async fn get(&self, url: &str, max_bytes: u64, id: &HubFile<'_>, wanted: &Wanted) -> Result<Vec<u8>> {
        let url = Url::parse(url).map_err(|error| {
            Error::setup("hub_unreachable", "HF_ENDPOINT is no address").source(error).remedy("correct HF_ENDPOINT")
        })?;
        let answer = self.downloader.fetch_small(&url, max_bytes).await;
        answer.map(|answer| answer.bytes).map_err(|failure| match failure {
            Failure::Refused(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, error) => {
                let message = format!("the Hub shows {id} to nobody without the right token");
                Error::setup("model_gated", message).source(transfer::cause(error)).remedy(
                    "accept the model's licence on its page, and set HF_TOKEN to a token of that account; \
                     check the name too: the Hub answers so for names that it does not know",
                )
            }
            Failure::Refused(StatusCode::NOT_FOUND, error) => {
                Error::setup(wanted.what.not_found(), format!("the Hub has no {id}"))
                    .source(transfer::cause(error))
                    .remedy(format!(
                        "check name and revision, or give {} a folder in the diffusers layout",
                        wanted.option
                    ))
            }
            failure => transfer::unreachable(id, failure.into_error()),
        })
    }

    fn host(&self) -> &str {
        self.endpoint.split("://").last().unwrap_or(&self.endpoint)
    }
}

/// Whether a part of a repository is a file of weights, and not a folder.
fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// Where a cache has this revision. RunPod's may lack the revision's name; then its first snapshot is the model.
fn snapshot(cache: &Path, id: &HubFile, any: bool) -> Option<PathBuf> {
    let repo = Repo::with_revision(id.repository.into(), RepoType::Model, id.revision.into());
    let root = cache.join(repo.folder_name());
    let commit = fs::read_to_string(root.join("refs").join(id.revision)).ok();
    let commit = commit.map(|commit| commit.trim().to_owned()).unwrap_or_else(|| id.revision.to_owned());
    let named = Cache::new(cache.to_owned()).repo(repo).pointer_path(&commit);
    let first = || {
        let entries = fs::read_dir(root.join("snapshots")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| path.is_dir()).min()
    };
    let found = if named.is_dir() { Some(named) } else { first().filter(|_| any && id.revision == "main") }?;
    Some(id.file.map_or(found.clone(), |folder| found.join(folder)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)], volume: &Path) -> Settings {
        let get = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        Settings::from_variables(get, volume)
    }

    #[test]
    fn downloads_go_where_the_variables_say_else_onto_the_volume() {
        let (volume, nowhere) = (tempfile::tempdir().unwrap(), Path::new("/nowhere"));
        let to = |variables: &[(&str, &str)], volume: &Path| settings(variables, volume).download_to;
        assert_eq!(to(&[("HOME", "/h")], nowhere), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(to(&[("HOME", "/h")], volume.path()), volume.path().join("sdxl-worker/hub"));
        assert_eq!(to(&[("HOME", "/h"), ("HF_HOME", "/hf")], volume.path()), Path::new("/hf/hub"));
        assert_eq!(to(&[("HF_HOME", "/hf"), ("HF_HUB_CACHE", "/cache")], nowhere), Path::new("/cache"));
        assert_eq!(to(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], nowhere), Path::new("/x/huggingface/hub"));
        assert!(settings(&[("HF_HUB_OFFLINE", "1")], nowhere).offline && !settings(&[], nowhere).offline);
    }

    #[test]
    fn a_cache_that_lacks_the_revision_s_name_is_believed_where_it_is_runpod_s() {
        let cache = tempfile::tempdir().unwrap();
        let snapshots = cache.path().join("models--org--name/snapshots");
        for commit in ["bbb", "aaa"] {
            fs::create_dir_all(snapshots.join(commit)).unwrap();
        }
        let found = |id: &str, any| {
            let path = snapshot(cache.path(), &HubFile::parse(id).unwrap(), any)?;
            Some(path.strip_prefix(&snapshots).unwrap().display().to_string())
        };
        assert_eq!(found("org/name", false), None);
        assert_eq!(found("org/name", true).as_deref(), Some("aaa"));
        assert_eq!(found("org/name@v2", true), None);
        assert_eq!(found("org/name@bbb/vae", false).as_deref(), Some("bbb/vae"));
        fs::create_dir_all(cache.path().join("models--org--name/refs")).unwrap();
        fs::write(cache.path().join("models--org--name/refs/main"), "bbb\n").unwrap();
        assert_eq!(found("org/name", true).as_deref(), Some("bbb"));
    }
}
