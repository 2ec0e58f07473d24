//! LoRAs of a request: which files, how strongly, and what the reply says of them.

use serde::Serialize;
use serde_json::{Value, json};
use url::Url;

use super::request::LoraRequest;
use super::wording::in_range;
use crate::error::{Error, Result};

/// Far from what makes pictures, and small enough that nothing overflows.
const MAX_SCALE: f64 = 10.0;
const MAX_NAME: usize = 8192;

/// Where a file comes from; one of the three that a request may give.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum FileSource {
    /// A file of the worker's folder, with or without `.safetensors`.
    Name(String),
    /// A file on this machine, or of the Hub: `org/name/file.safetensors`, `org/name@revision`.
    Path(String),
    Url(String),
}

#[derive(Debug, Clone, PartialEq)]
pub struct LoraParams {
    pub source: FileSource,
    pub scale: f64,
    /// SHA-256 of the file: what the request expects it to be, and after the file was fetched what it is.
    pub sha256: Option<String>,
}

/// What became of one LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct LoraReport {
    pub name: String,
    pub scale: f64,
    /// Keys of the file that act.
    pub matched: usize,
    /// The first of those that name nothing in this model.
    pub unmatched: Vec<String>,
    pub unmatched_count: usize,
}

impl FileSource {
    /// Exactly one of the three, for `loras[0]` or `textual_inversions[0]`.
    ///
    /// # Errors
    /// `missing_field`, `conflicting_fields`, `invalid_value`.
    pub fn choose(name: Option<String>, path: Option<String>, url: Option<String>, entry: &str) -> Result<FileSource> {
        let mut given = [name.map(FileSource::Name), path.map(FileSource::Path), url.map(FileSource::Url)]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>();
        let remedy = "give exactly one of `name`, `path` and `url`";
        let Some(source) = given.pop() else {
            return Err(Error::invalid("missing_field", entry, format!("`{entry}` names no file")).remedy(remedy));
        };
        if let Some(other) = given.pop() {
            let message = format!("`{entry}` has both `{}` and `{}`", other.key(), source.key());
            return Err(Error::invalid("conflicting_fields", source.field(entry), message).remedy(remedy));
        }
        let text = source.text();
        if text.trim().is_empty() || text.len() > MAX_NAME {
            let message = format!("`{}` must have 1 to {MAX_NAME} characters", source.field(entry));
            return Err(Error::invalid("invalid_value", source.field(entry), message).remedy(remedy));
        }
        Ok(source)
    }

    fn key(&self) -> &'static str {
        match self {
            FileSource::Name(_) => "name",
            FileSource::Path(_) => "path",
            FileSource::Url(_) => "url",
        }
    }

    pub fn text(&self) -> &str {
        match self {
            FileSource::Name(text) | FileSource::Path(text) | FileSource::Url(text) => text,
        }
    }

    /// The canonical entry that finds this file again.
    pub(super) fn to_json(&self, sha256: Option<&str>) -> Value {
        let text = match self {
            FileSource::Url(url) => without_keys(url),
            _ => self.text().to_owned(),
        };
        let mut entry = json!({ self.key(): text });
        if let Some(sha256) = sha256 {
            entry["sha256"] = sha256.into();
        }
        entry
    }

    /// Path into the request.
    pub fn field(&self, entry: &str) -> String {
        format!("{entry}.{}", self.key())
    }
}

/// What an address says before its path or behind `?` may be a key, so it stays out, but for what Civitai chooses a file
/// by.
fn without_keys(url: &str) -> String {
    let Ok(mut url) = Url::parse(url) else { return String::new() };
    let kept: Vec<_> = url
        .query_pairs()
        .into_owned()
        .filter(|(key, _)| ["type", "format", "size", "fp"].contains(&key.as_str()))
        .collect();
    url.set_fragment(None);
    url.set_query(None);
    if !kept.is_empty() {
        url.query_pairs_mut().extend_pairs(kept);
    }
    // what has no host has neither
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    url.into()
}

/// # Errors
/// `too_many_loras`, `out_of_range`, and those of [`FileSource::choose`].
pub(super) fn loras(requests: Vec<LoraRequest>, max: usize) -> Result<Vec<LoraParams>> {
    if requests.len() > max {
        let message = format!("`loras` must have at most {max} entries, got {}", requests.len());
        return Err(Error::invalid("out_of_range", "loras", message).remedy("leave some of them out"));
    }
    let lora = |(index, request): (usize, LoraRequest)| {
        let entry = format!("loras[{index}]");
        let scale = in_range(&format!("{entry}.scale"), request.scale.unwrap_or(1.0), -MAX_SCALE..=MAX_SCALE)?;
        let source = FileSource::choose(request.name, request.path, request.url, &entry)?;
        let sha256 = sha256(request.sha256, &entry)?;
        Ok(LoraParams { source, scale, sha256 })
    };
    requests.into_iter().enumerate().map(lora).collect()
}

/// What an entry says of its file's content.
pub(super) fn sha256(text: Option<String>, entry: &str) -> Result<Option<String>> {
    let Some(text) = text else { return Ok(None) };
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(Some(text.to_ascii_lowercase()));
    }
    let field = format!("{entry}.sha256");
    Err(Error::invalid("invalid_value", &field, format!("`{field}` must be 64 hexadecimal digits"))
        .remedy("leave it out; it only says which content is expected"))
}

impl LoraParams {
    pub(super) fn to_json(&self) -> Value {
        let mut entry = self.source.to_json(self.sha256.as_deref());
        entry["scale"] = self.scale.into();
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(name: Option<&str>, url: Option<&str>, scale: Option<f64>) -> LoraRequest {
        let own = |text: Option<&str>| text.map(str::to_owned);
        LoraRequest { name: own(name), url: own(url), scale, ..LoraRequest::default() }
    }

    #[test]
    fn an_entry_names_exactly_one_file() {
        let code = |requests| loras(requests, 2).map_err(|e| (e.code, e.field.unwrap())).unwrap_err();
        assert_eq!(code(vec![request(None, None, None)]), ("missing_field", "loras[0]".into()));
        let both = vec![request(Some("a"), None, None), request(Some("a"), Some("https://b"), None)];
        assert_eq!(code(both), ("conflicting_fields", "loras[1].url".into()));
        assert_eq!(code(vec![request(Some(" "), None, None)]), ("invalid_value", "loras[0].name".into()));
        for scale in [10.1, -11.0, f64::NAN, f64::INFINITY] {
            assert_eq!(code(vec![request(Some("a"), None, Some(scale))]), ("out_of_range", "loras[0].scale".into()));
        }
        assert_eq!(code(vec![request(Some("a"), None, None); 3]), ("out_of_range", "loras".into()));
        let wrong = LoraRequest { sha256: Some("xyz".into()), ..request(Some("a"), None, None) };
        assert_eq!(code(vec![wrong]), ("invalid_value", "loras[0].sha256".into()));
    }

    #[test]
    fn the_record_holds_the_checksum_and_no_keys_of_an_address() {
        let mut lora =
            loras(vec![request(None, Some("https://me:SECRET@a.test/x?token=SECRET&fp=fp16#y"), Some(0.5))], 1)
                .unwrap();
        lora[0].sha256 = Some("ab".repeat(32));
        let expected = json!({ "url": "https://a.test/x?fp=fp16", "scale": 0.5, "sha256": "ab".repeat(32) });
        assert_eq!(lora[0].to_json(), expected);
    }
}
