//! Adapter files (LoRA, textual inversion) that a request names: in the worker's folder, on this machine, on the Hub, or
//! behind an address. The one place where their names become files.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::StatusCode;
use serde::Deserialize;
use url::Url;

use super::download::{Failure, parse};
use super::{AdapterCache, Downloader, Folders, Stored};
use crate::api::{FileSource, nearest};
use crate::error::{Error, ErrorClass, Result};

/// Of a repository's description.
const MAX_LISTING: u64 = 4 << 20;
/// The name under which diffusers saves LoRAs; taken where a repository has several files.
const USUAL_FILE: &str = "pytorch_lora_weights.safetensors";

/// What kind of adapters these are, and where they may come from.
#[derive(Debug, Clone)]
pub struct AdapterSettings {
    /// In messages: `LoRA`.
    pub word: &'static str,
    /// The code for one that is not there: `lora_not_found`.
    pub not_found: &'static str,
    /// The code for one that is too large: `lora_too_large`.
    pub too_large: &'static str,
    /// The code for a format that is not read: `lora_unsupported`.
    pub unsupported: &'static str,
    /// The code for what is no safetensors file: `lora_damaged`.
    pub damaged: &'static str,
    /// The code for a file that is not the one the request expects: `lora_changed`.
    pub changed: &'static str,
    /// The option and variable of the folders: `--lora-dir (LORA_DIR)`.
    pub option: &'static str,
    /// The remedy for one that is too large.
    pub smaller: &'static str,
    pub folders: Vec<PathBuf>,
    pub max_bytes: u64,
    /// Any file of this machine may be named: the request comes from whoever started the program.
    pub any_path: bool,
}

impl AdapterSettings {
    pub fn loras(folders: Vec<PathBuf>, max_bytes: u64) -> Self {
        AdapterSettings {
            word: "LoRA",
            not_found: "lora_not_found",
            too_large: "lora_too_large",
            unsupported: "lora_unsupported",
            damaged: "lora_damaged",
            changed: "lora_changed",
            option: "--lora-dir (LORA_DIR)",
            smaller: "use a smaller file, or raise --max-lora-bytes (MAX_LORA_BYTES)",
            folders,
            max_bytes,
            any_path: false,
        }
    }

    pub fn textual_inversions(folders: Vec<PathBuf>, max_bytes: u64) -> Self {
        AdapterSettings {
            word: "textual inversion",
            not_found: "textual_inversion_not_found",
            too_large: "textual_inversion_too_large",
            unsupported: "textual_inversion_unsupported",
            damaged: "textual_inversion_invalid",
            changed: "textual_inversion_changed",
            option: "--embedding-dir (EMBEDDING_DIR)",
            smaller: "a textual inversion has a few kilobytes a vector; this is something else",
            folders,
            max_bytes,
            any_path: false,
        }
    }
}

pub struct AdapterFiles {
    settings: AdapterSettings,
    folders: Folders,
    downloader: Downloader,
    hub_endpoint: String,
    hub: Downloader,
    cache: Arc<AdapterCache>,
}

/// Where a name leads.
enum Place<'a> {
    /// This machine.
    Local(PathBuf),
    Hub(HubFile<'a>),
    Address(Url),
}

/// A file that is here, and what to call it.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    pub name: String,
    pub stored: Stored,
}

impl AdapterFiles {
    pub fn new(settings: AdapterSettings, downloader: Downloader, cache: Arc<AdapterCache>) -> Self {
        let folders = Folders::new(settings.folders.clone());
        let (hub_endpoint, hub) = downloader.for_hub();
        AdapterFiles { settings, folders, downloader, hub_endpoint, hub, cache }
    }

    /// Lets requests name any file of this machine.
    pub fn allow_any_path(&mut self) {
        self.settings.any_path = true;
    }

    /// Names of the files in the folders that requests name.
    pub fn names(&self) -> Vec<String> {
        let mut names = self.folders.list(".safetensors");
        names.sort_unstable();
        names
    }

    /// The file that `source` means; with `sha256` it must have this content. `field` is the source's path in the request.
    ///
    /// # Errors
    /// The settings' codes; `path_refused`; those of [`Downloader::fetch`]; `adapter_cache`.
    pub async fn fetch(&self, source: &FileSource, sha256: Option<&str>, field: &str) -> Result<AdapterFile> {
        let name = display_name(source);
        let place = match source {
            FileSource::Name(name) => Place::Local(self.named(name, field)?),
            FileSource::Path(path) => self.at_path(path, field)?,
            FileSource::Url(url) => {
                self.refuse_format(url.split(['?', '#']).next().unwrap_or_default(), field)?;
                Place::Address(parse(url).map_err(|error| error.field(field))?)
            }
        };
        let stored = match place {
            Place::Local(path) => {
                // before all of it is read for its checksum
                self.check_size(&name, path.metadata().map_or(0, |metadata| metadata.len()), field)?;
                self.cache.local(&path).map_err(|error| self.not_found(&name, field).source(error))?
            }
            place => match sha256.and_then(|sha256| self.cache.by_content(sha256)) {
                Some(stored) => stored,
                None => self.download(&place, field).await?,
            },
        };
        self.check_size(&name, stored.file.metadata().map_err(anyhow::Error::from)?.len(), field)?;
        if sha256.is_some_and(|expected| expected != stored.sha256) {
            let message = format!("{name} is not the file that the request's sha256 names");
            return Err(Error::invalid(self.settings.changed, field, message)
                .remedy("leave `sha256` out to use the file as it is now"));
        }
        Ok(AdapterFile { name, stored })
    }

    fn named(&self, name: &str, field: &str) -> Result<PathBuf> {
        self.refuse_format(name, field)?;
        let whole = format!("{name}.safetensors");
        let candidates = if has_extension(name) { vec![name] } else { vec![&whole, name] };
        let mut refused = None;
        for candidate in candidates {
            match self.folders.resolve(candidate, field) {
                Ok(path) => return Ok(path),
                Err(error) if error.code == "file_not_found" => {}
                Err(error) => refused = refused.or(Some(error)),
            }
        }
        Err(match refused {
            Some(error) => error.remedy(self.folder_hint()),
            None => self.not_found(name, field),
        })
    }

    fn at_path<'a>(&self, path: &'a str, field: &str) -> Result<Place<'a>> {
        self.refuse_format(path, field)?;
        let local = Path::new(path);
        if self.settings.any_path && local.is_file() {
            return Ok(Place::Local(local.to_owned()));
        }
        match self.named(path, field) {
            Err(error) if error.code == self.settings.not_found => HubFile::parse(path).map(Place::Hub).ok_or(error),
            other => other.map(Place::Local),
        }
    }

    async fn download(&self, place: &Place<'_>, field: &str) -> Result<Stored> {
        let check = |file: &File| self.check_format(file);
        let max_bytes = self.settings.max_bytes;
        let found = match place {
            Place::Hub(hub) => {
                let key = format!("{}/{hub}", self.hub_endpoint);
                self.cache.fetch(&self.hub, &key, async || self.hub_url(hub, field).await, max_bytes, check).await
            }
            Place::Address(url) => {
                self.cache.fetch(&self.downloader, url.as_str(), async || Ok(url.clone()), max_bytes, check).await
            }
            Place::Local(_) => unreachable!("it is here"),
        };
        found.map_err(|failure| self.explain(failure, place).field(field))
    }

    /// Asks the Hub for the file's name where the request names the repository alone.
    async fn hub_url(&self, hub: &HubFile<'_>, field: &str) -> Result<Url, Failure> {
        let HubFile { repository, revision, file } = hub;
        let endpoint = &self.hub_endpoint;
        let file = match file {
            Some(file) => (*file).to_owned(),
            None => {
                let url = parse(&format!("{endpoint}/api/models/{repository}/revision/{revision}"));
                let listing = self.hub.fetch_small(&url.map_err(Failure::Final)?, MAX_LISTING).await?;
                only_file(&listing.bytes).map_err(|names| Failure::Final(self.not_one(repository, &names, field)))?
            }
        };
        parse(&format!("{endpoint}/{repository}/resolve/{revision}/{file}")).map_err(Failure::Final)
    }

    /// In words for adapters, which cannot be sent inline.
    fn explain(&self, failure: Failure, place: &Place) -> Error {
        let word = self.settings.word;
        match (failure, place) {
            (Failure::Refused(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND, _), Place::Hub(hub)) => {
                let message = format!("the Hub has no {hub}, or shows it to nobody without the right token");
                Error::new(ErrorClass::NotFound, self.settings.not_found, message).remedy(
                    "check the names of repository, revision and file; for private and gated ones set HF_TOKEN on the worker",
                )
            }
            (Failure::Refused(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, error), _) => error.remedy(
                "name an address that anybody may read; for files of civitai.com that need an account set CIVITAI_TOKEN \
                 on the worker, for those of the Hub HF_TOKEN",
            ),
            (Failure::Refused(_, error) | Failure::Passing(error), _) => {
                error.remedy(format!("check the address, or put the {word} into the folder of {}", self.settings.option))
            }
            (Failure::Final(error), _) if error.code == "download_too_large" => error.remedy(self.settings.smaller),
            (Failure::Final(error), _) => error,
        }
    }

    fn check_size(&self, name: &str, bytes: u64, field: &str) -> Result<()> {
        if bytes <= self.settings.max_bytes {
            return Ok(());
        }
        let message = format!("{name} has {bytes} bytes, more than {}", self.settings.max_bytes);
        Err(Error::new(ErrorClass::TooLarge, self.settings.too_large, message)
            .field(field)
            .remedy(self.settings.smaller))
    }

    /// Keeps pages that ask for a password, or say "gone" with the status of success, out of the cache.
    fn check_format(&self, file: &File) -> Result<()> {
        let mut start = [0; 9];
        let is_whole = file.read_exact_at(&mut start, 0).is_ok();
        let header = u64::from_le_bytes(start[..8].try_into().expect("eight bytes"));
        let length = file.metadata().map_err(anyhow::Error::from)?.len();
        if is_whole && start[8] == b'{' && header <= length - 8 {
            return Ok(());
        }
        let what = match start.trim_ascii_start() {
            [b'P', b'K', ..] | [0x80, ..] => return Err(self.can_run_code("the pickle that the host sent")),
            [b'<', ..] => "a web page",
            _ => "no whole safetensors file",
        };
        Err(Error::new(ErrorClass::InvalidInput, self.settings.damaged, format!("the host sent {what}")).remedy(
            "name the address of the file itself; where it needs an account, set CIVITAI_TOKEN or HF_TOKEN on the worker",
        ))
    }

    /// Formats that can run code are known by their names.
    fn refuse_format(&self, name: &str, field: &str) -> Result<()> {
        let lower = name.to_ascii_lowercase();
        match [".pt", ".pth", ".ckpt", ".bin", ".pkl", ".zip"].iter().find(|end| lower.ends_with(*end)) {
            None => Ok(()),
            Some(end) => Err(self.can_run_code(&format!("a {end} file")).field(field)),
        }
    }

    fn can_run_code(&self, what: &str) -> Error {
        let message = format!("{what} can run code when it is read; only safetensors files are");
        Error::new(ErrorClass::InvalidInput, self.settings.unsupported, message).remedy("convert it to .safetensors")
    }

    fn not_found(&self, name: &str, field: &str) -> Error {
        let name: String = name.chars().take(200).collect();
        let message = format!("there is no {} {name:?}", self.settings.word);
        let known = self.folders.list(".safetensors");
        let near = nearest(&name, known.iter().map(String::as_str))
            .map(|near| format!("; the nearest that is here is {near}"));
        let remedy = self.folder_hint() + &near.unwrap_or_default();
        Error::new(ErrorClass::NotFound, self.settings.not_found, message).field(field).remedy(remedy)
    }

    fn folder_hint(&self) -> String {
        format!("name a file below the folder of {}, a file of the Hub in `path`, or a `url`", self.settings.option)
    }

    fn not_one(&self, repository: &str, names: &[String], field: &str) -> Error {
        let message = format!("{repository} has {} safetensors files, so one must be named", names.len());
        let shown = names.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
        let remedy = match names.first() {
            Some(first) => format!("write {repository}/{first}; it has {shown}"),
            None => "name a repository with a safetensors file".into(),
        };
        Error::new(ErrorClass::NotFound, self.settings.not_found, message).field(field).remedy(remedy)
    }
}

/// `org/name[@revision][/file]`.
pub(crate) struct HubFile<'a> {
    pub(crate) repository: &'a str,
    pub(crate) revision: &'a str,
    pub(crate) file: Option<&'a str>,
}

impl<'a> HubFile<'a> {
    pub(crate) fn parse(text: &'a str) -> Option<HubFile<'a>> {
        let plain =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '@' | ' ' | '(' | ')' | '+');
        if !text.chars().all(plain) || text.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return None;
        }
        let (org, rest) = text.split_once('/')?;
        let (name, file) = rest.split_once('/').map_or((rest, None), |(name, file)| (name, Some(file)));
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let repository = &text[..org.len() + 1 + name.len()];
        // a repository is no file, so this is a mistyped local one
        let is_file = has_extension(name) && file.is_none();
        (!is_file && !name.is_empty() && !revision.is_empty() && !org.contains('@')).then_some(HubFile {
            repository,
            revision,
            file,
        })
    }
}

impl fmt::Display for HubFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HubFile { repository, revision, file } = self;
        write!(f, "{repository}@{revision}")?;
        file.map_or(Ok(()), |file| write!(f, "/{file}"))
    }
}

/// The one safetensors file in a repository's description, or the usual one of several; else all their names.
fn only_file(listing: &[u8]) -> Result<String, Vec<String>> {
    #[derive(Deserialize)]
    struct Listing {
        siblings: Vec<Sibling>,
    }
    #[derive(Deserialize)]
    struct Sibling {
        rfilename: String,
    }
    let names: Vec<String> = serde_json::from_slice::<Listing>(listing)
        .map(|listing| listing.siblings.into_iter().map(|sibling| sibling.rfilename).collect())
        .unwrap_or_default();
    let mut files: Vec<String> = names.into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    match files.iter().position(|name| name == USUAL_FILE) {
        Some(index) => Ok(files.swap_remove(index)),
        None if files.len() == 1 => Ok(files.remove(0)),
        None => Err(files),
    }
}

fn has_extension(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".safetensors")
}

/// The file's name without folders and extension; for an address without one, its host.
fn display_name(source: &FileSource) -> String {
    let text = match source {
        FileSource::Name(name) => return name.strip_suffix(".safetensors").unwrap_or(name).to_owned(),
        FileSource::Path(path) if HubFile::parse(path).is_some_and(|hub| hub.file.is_none()) => return path.clone(),
        FileSource::Path(path) => path.as_str(),
        FileSource::Url(url) => match url::Url::parse(url) {
            Ok(parsed) => {
                let last = parsed.path_segments().and_then(|mut parts| parts.next_back().map(str::to_owned));
                return match last.filter(|name| has_extension(name)) {
                    Some(name) => name[..name.len() - ".safetensors".len()].to_owned(),
                    None => format!("{}{}", parsed.host_str().unwrap_or_default(), parsed.path()),
                };
            }
            Err(_) => return "the address".into(),
        },
    };
    let last = text.rsplit('/').next().unwrap_or(text);
    last.strip_suffix(".safetensors").unwrap_or(last).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_hub_are_told_from_other_paths() {
        let parse = |text| HubFile::parse(text).map(|hub| (hub.repository, hub.revision, hub.file));
        assert_eq!(parse("org/name"), Some(("org/name", "main", None)));
        assert_eq!(parse("org/name@v1/a/b.safetensors"), Some(("org/name", "v1", Some("a/b.safetensors"))));
        for text in [
            "name",
            "folder/x.safetensors",
            "/a/b",
            "a//b",
            "../a/b",
            "a/../b",
            "a/b/..",
            "a/",
            "a/b?x",
            "a/@x",
            "a/b/c#d",
            "a/b%2f",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_repository_s_only_or_usual_file_is_taken() {
        let of = |names: &[&str]| {
            let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({ "rfilename": name })).collect();
            only_file(serde_json::json!({ "siblings": siblings }).to_string().as_bytes())
        };
        assert_eq!(of(&["README.md", "a.safetensors"]), Ok("a.safetensors".into()));
        assert_eq!(of(&["a.safetensors", USUAL_FILE]), Ok(USUAL_FILE.into()));
        assert_eq!(of(&["a.safetensors", "b.safetensors"]).unwrap_err().len(), 2);
        assert!(of(&["a.bin"]).unwrap_err().is_empty() && only_file(b"no JSON").unwrap_err().is_empty());
    }

    #[test]
    fn an_address_is_called_by_its_file_and_never_by_its_keys() {
        let name = |url: &str| display_name(&FileSource::Url(url.into()));
        assert_eq!(name("https://a.test/x/style.safetensors?token=SECRET"), "style");
        assert_eq!(
            name("https://civitai.com/api/download/models/12?token=SECRET"),
            "civitai.com/api/download/models/12"
        );
    }
}
