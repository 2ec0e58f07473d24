//! Pictures into an S3 bucket, and links to them that anybody can open for a week. Keys, path-style addresses and the
//! bucket's default name are those of RunPod's SDK (`rp_upload`), so clients find what they know.

use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use reqwest::{Method, StatusCode};
use rusty_s3::{Credentials, S3Action, UrlStyle};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::sleep;
use url::Url;

use super::guard::refusal;
use super::{Guard, Secret, back_off, is_passing, variable};
use crate::error::{Error, ErrorClass, Result};
use crate::job::PictureFile;

/// S3's longest.
const LINK_LIFETIME: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// How long the signature of an upload holds.
const PUT_LIFETIME: Duration = Duration::from_secs(60 * 60);
/// For one try at one picture, which has 20 MB at most.
const PUT_TIMEOUT: Duration = Duration::from_secs(120);
const TRIES: u32 = 3;
/// More than an error of S3 needs for its code.
const MAX_ERROR_BODY: usize = 16 * 1024;

/// Where pictures go, and with whose keys.
#[derive(Debug, Clone)]
pub struct Bucket {
    endpoint: Url,
    /// `None` is the SDK's default: month and year of the upload.
    name: Option<String>,
    /// Folders before the job's own; empty or ending in `/`.
    prefix: String,
    region: String,
    access_id: Secret,
    access_secret: Secret,
    /// The field or variable that errors point at.
    source: Source,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Job,
    Worker,
}

impl Bucket {
    /// A job's own bucket: `{accessId, accessSecret, endpointUrl, bucketName?, objectPath?, region?}`. `None` for an
    /// object without any of the three. Look before the job runs: a mistake is cheaper then.
    ///
    /// # Errors
    ///
    /// `invalid_s3_config`.
    pub fn from_s3_config(config: &Value) -> Result<Option<Self>> {
        if !config.is_null() && !config.is_object() {
            return Err(Error::invalid("invalid_s3_config", "s3Config", "`s3Config` is not an object"));
        }
        let mut texts = [None; 6];
        let keys = ["endpointUrl", "accessId", "accessSecret", "bucketName", "objectPath", "region"];
        for (text, key) in texts.iter_mut().zip(keys) {
            *text = match config.get(key) {
                None | Some(Value::Null) => None,
                Some(Value::String(value)) => Some(value.trim()).filter(|value| !value.is_empty()),
                Some(_) => return Err(Source::Job.invalid(key, "is not a string")),
            };
        }
        let [endpoint, access_id, access_secret, name, path, region] = texts;
        Bucket::new(Source::Job, [endpoint, access_id, access_secret], name, path, region)
    }

    /// The worker's bucket, from `BUCKET_ENDPOINT_URL`, `BUCKET_ACCESS_KEY_ID` and `BUCKET_SECRET_ACCESS_KEY`, and, if
    /// set, `BUCKET_NAME` and `BUCKET_REGION`. `None` without any of the three.
    ///
    /// # Errors
    ///
    /// `invalid_bucket`.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let [endpoint, access_id, access_secret, name, region] = Source::WORKER_KEYS.map(|name| variable(&get, name));
        let needed = [endpoint.as_deref(), access_id.as_deref(), access_secret.as_deref()];
        Bucket::new(Source::Worker, needed, name.as_deref(), None, region.as_deref())
    }

    fn new(
        source: Source,
        needed: [Option<&str>; 3],
        name: Option<&str>,
        path: Option<&str>,
        region: Option<&str>,
    ) -> Result<Option<Self>> {
        if needed == [None; 3] {
            return Ok(None);
        }
        let [Some(endpoint), Some(access_id), Some(access_secret)] = needed else {
            let missing = needed.iter().position(Option::is_none).expect("not all of them are there");
            return Err(source.invalid(source.keys()[missing], "is missing"));
        };
        let endpoint_key = source.keys()[0];
        let mut endpoint = Url::parse(endpoint)
            .map_err(|error| source.invalid(endpoint_key, &format!("is not an address: {error}")))?;
        if !matches!(endpoint.scheme(), "http" | "https") {
            return Err(source.invalid(endpoint_key, "is neither `http` nor `https`"));
        }
        if !endpoint.username().is_empty() || endpoint.password().is_some() || endpoint.query().is_some() {
            return Err(source.invalid(endpoint_key, "holds more than scheme, host, port and path"));
        }
        endpoint.set_fragment(None);
        if !endpoint.path().ends_with('/') {
            let path = format!("{}/", endpoint.path());
            endpoint.set_path(&path);
        }
        if let Some(name) = name.filter(|name| !is_plain(name)) {
            let message = format!("has other characters than letters, digits, `.`, `-` and `_`: {name:?}");
            return Err(source.invalid(source.keys()[3], &message));
        }
        let mut prefix = String::new();
        for folder in path.unwrap_or_default().split('/').filter(|folder| !folder.is_empty()) {
            if matches!(folder, "." | "..") || folder.contains(|c: char| c.is_control() || c == '\\') {
                return Err(source.invalid("objectPath", "holds `.`, `..` or control characters"));
            }
            prefix.push_str(folder);
            prefix.push('/');
        }
        Ok(Some(Bucket {
            region: region.map_or_else(|| region_of(endpoint.host_str().unwrap_or_default()), str::to_owned),
            endpoint,
            name: name.map(str::to_owned),
            prefix,
            access_id: Secret::new(access_id),
            access_secret: Secret::new(access_secret),
            source,
        }))
    }

    /// Uploads one picture and links to it.
    async fn upload(&self, guard: &Guard, job_id: &str, file: &PictureFile) -> Result<String> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => jiff::Timestamp::now().strftime("%m-%y").to_string(),
        };
        let bucket = rusty_s3::Bucket::new(self.endpoint.clone(), UrlStyle::Path, name, self.region.clone())
            .map_err(|error| self.source.failed("the bucket has no address").source(anyhow!(error)))?;
        let credentials = Credentials::new(self.access_id.reveal(), self.access_secret.reveal());
        let key = self.key(job_id, file.extension);
        let content_type = format!("image/{}", file.extension);
        let mut failed = 0;
        loop {
            let mut put = bucket.put_object(Some(&credentials), &key);
            put.headers_mut().insert("content-type", content_type.as_str());
            let request = guard
                .request(Method::PUT, &put.sign(PUT_LIFETIME))
                .map_err(|error| self.source.point(error))?
                .header("content-type", &content_type)
                .timeout(PUT_TIMEOUT)
                .body(file.bytes.clone());
            let error = match self.put(request).await {
                Ok(()) => return Ok(bucket.get_object(Some(&credentials), &key).sign(LINK_LIFETIME).into()),
                Err((error, true)) => error,
                Err((error, false)) => return Err(error),
            };
            failed += 1;
            if failed >= TRIES {
                return Err(error);
            }
            tracing::debug!(host = self.host(), failed, "an upload failed and is tried again");
            sleep(back_off(failed)).await;
        }
    }

    /// One try; beside an error, whether another may succeed.
    async fn put(&self, request: reqwest::RequestBuilder) -> Result<(), (Error, bool)> {
        let mut response = match request.send().await {
            Ok(response) => response,
            Err(error) => {
                if let Some(refusal) = refusal(&error) {
                    return Err((self.source.point(refusal), false));
                }
                let what = match () {
                    () if error.is_timeout() => "did not take the picture in time",
                    () if error.is_connect() => "cannot be reached",
                    () => "broke the transfer off",
                };
                let message = format!("the bucket at {} {what}", self.host());
                return Err((self.source.failed(&message).source(anyhow!(error.without_url())), true));
            }
        };
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = response.chunk().await {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ERROR_BODY {
                break;
            }
        }
        let code = error_code(&String::from_utf8_lossy(&body));
        let said = code.as_deref().map(|code| format!(" ({code})")).unwrap_or_default();
        let error = self.source.failed(&format!("the bucket at {} answered {status}{said}", self.host()));
        let error = match code.as_deref() {
            Some("NoSuchBucket") => error.remedy(match self.source {
                Source::Job => "name an existing bucket as `s3Config.bucketName`",
                Source::Worker => "name an existing bucket with BUCKET_NAME",
            }),
            Some("AuthorizationHeaderMalformed" | "PermanentRedirect") => error.remedy(match self.source {
                Source::Job => "name the bucket's region in `s3Config.endpointUrl` or as `s3Config.region`",
                Source::Worker => "name the bucket's region in BUCKET_ENDPOINT_URL or with BUCKET_REGION",
            }),
            _ if status == StatusCode::FORBIDDEN => error.remedy("check the keys and their right to put objects"),
            _ => error,
        };
        Err((error, is_passing(status)))
    }

    /// `<objectPath>/<job id>/<8 hex>.<extension>`
    fn key(&self, job_id: &str, extension: &str) -> String {
        // A job's id is the host's; one that would climb out of its folder still gets a folder.
        let mut folder: String = job_id.chars().map(|c| if is_plain_char(c) { c } else { '_' }).take(256).collect();
        if folder.bytes().all(|byte| byte == b'.') {
            folder = "_".repeat(folder.len().max(1));
        }
        format!("{}{folder}/{:08x}.{extension}", self.prefix, fastrand::u32(..))
    }

    fn host(&self) -> &str {
        self.endpoint.host_str().unwrap_or_default()
    }
}

impl Source {
    const WORKER_KEYS: [&str; 5] =
        ["BUCKET_ENDPOINT_URL", "BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "BUCKET_NAME", "BUCKET_REGION"];
    const JOB_KEYS: [&str; 5] = ["endpointUrl", "accessId", "accessSecret", "bucketName", "region"];

    fn keys(self) -> [&'static str; 5] {
        match self {
            Source::Job => Source::JOB_KEYS,
            Source::Worker => Source::WORKER_KEYS,
        }
    }

    fn invalid(self, key: &str, message: &str) -> Error {
        match self {
            Source::Job => {
                Error::invalid("invalid_s3_config", format!("s3Config.{key}"), format!("`s3Config.{key}` {message}"))
            }
            Source::Worker => Error::setup("invalid_bucket", format!("{key} {message}")),
        }
    }

    fn failed(self, message: &str) -> Error {
        let class = match self {
            Source::Job => ErrorClass::InvalidInput,
            Source::Worker => ErrorClass::Setup,
        };
        self.point(Error::new(class, "upload_failed", message))
    }

    fn point(self, error: Error) -> Error {
        match self {
            Source::Job => error.field("s3Config"),
            Source::Worker => error,
        }
    }
}

/// Takes finished pictures where they belong: to the job's bucket, else to the worker's.
#[derive(Debug, Clone)]
pub struct Uploader {
    worker_bucket: Option<Bucket>,
    /// For buckets that jobs name.
    guard: Guard,
    /// For the worker's, which may be on a private network.
    open: Guard,
}

impl Uploader {
    pub fn new(guard: Guard, worker_bucket: Option<Bucket>) -> Self {
        Uploader { worker_bucket, open: guard.opened(), guard }
    }

    /// Uploads all, and links to them in order; `None` if there is neither a job's bucket nor a worker's.
    ///
    /// # Errors
    ///
    /// `invalid_s3_config`, `url_refused`, `upload_failed`: then none of the links is worth anything, and the pictures
    /// have to go another way.
    pub async fn upload_pictures(
        &self,
        job_id: &str,
        s3_config: Option<&Value>,
        files: Vec<PictureFile>,
    ) -> Result<Option<Vec<String>>> {
        let job_bucket = s3_config.map(Bucket::from_s3_config).transpose()?.flatten();
        let (bucket, guard) = match (job_bucket, &self.worker_bucket) {
            (Some(bucket), _) => (bucket, &self.guard),
            (None, Some(bucket)) => (bucket.clone(), &self.open),
            (None, None) => return Ok(None),
        };
        let bucket = Arc::new(bucket);
        let mut links = vec![String::new(); files.len()];
        let mut uploads = JoinSet::new();
        for (index, file) in files.into_iter().enumerate() {
            let (bucket, guard, job_id) = (bucket.clone(), guard.clone(), job_id.to_owned());
            uploads.spawn(async move { (index, bucket.upload(&guard, &job_id, &file).await) });
        }
        while let Some(upload) = uploads.join_next().await {
            let (index, link) = upload.map_err(anyhow::Error::from)?;
            links[index] = link?;
        }
        Ok(Some(links))
    }
}

fn is_plain_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

/// Whether a name stays one path segment whatever reads it.
fn is_plain(name: &str) -> bool {
    name.len() <= 255 && name.chars().all(is_plain_char) && !name.bytes().all(|byte| byte == b'.')
}

/// The region that an endpoint's name speaks of: the label after `s3.` or `s3-`, the one before `digitaloceanspaces`,
/// `auto` for R2; else S3's default.
fn region_of(host: &str) -> String {
    let labels: Vec<&str> = host.trim_end_matches('.').split('.').collect();
    if host.ends_with(".r2.cloudflarestorage.com") {
        return "auto".into();
    }
    let before = |name| labels.iter().position(|label| *label == name)?.checked_sub(1).map(|index| labels[index]);
    let region = if let Some(service) = labels.iter().rposition(|label| matches!(*label, "s3" | "s3-fips")) {
        let after = labels[service + 1..].iter().position(|label| *label != "dualstack");
        // Two labels are somebody's domain: `s3.example.com` names no region.
        after.map(|after| service + 1 + after).filter(|index| index + 2 < labels.len()).map(|index| labels[index])
    } else if let Some(label) = before("amazonaws") {
        label.strip_prefix("s3-").filter(|region| *region != "accelerate")
    } else {
        before("digitaloceanspaces")
    };
    region.filter(|region| *region != "amazonaws").unwrap_or("us-east-1").into()
}

/// What stands in `<Code>`. The rest of the answer may quote keys and signatures.
fn error_code(body: &str) -> Option<String> {
    let (_, rest) = body.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let is_code = !code.is_empty() && code.len() <= 64 && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_code.then(|| code.to_owned())
}

#[cfg(test)]
#[path = "s3_tests.rs"]
mod tests;
