//! Uploads to an S3 server that verifies signatures, and to one that misbehaves.

use std::path::Path;

use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use reqwest::StatusCode;
use rusty_s3::S3Action;
use s3s::auth::SimpleAuth;
use s3s::service::S3ServiceBuilder;
use sdxl_worker::error::ErrorClass;
use sdxl_worker::job::PictureFile;
use sdxl_worker::net::{Bucket, Guard, GuardSettings, Uploader};
use serde_json::{Value, json};
use url::Url;

use crate::fake_host::*;

const KEY: &str = "AKIDEXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";

/// Serves a folder whose folders are buckets, and returns the server's address.
async fn s3_server(root: &Path) -> String {
    let mut service = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
    service.set_auth(SimpleAuth::from_single(KEY, SECRET));
    let service = service.build().into_shared();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service.clone();
            tokio::spawn(async move {
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    endpoint
}

/// A server with one bucket, named `pictures`, and a job's keys for it.
async fn server_and_config() -> (tempfile::TempDir, Value) {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("pictures")).unwrap();
    let endpoint = s3_server(root.path()).await;
    let config = json!({"endpointUrl": endpoint, "accessId": KEY, "accessSecret": SECRET, "bucketName": "pictures"});
    (root, config)
}

fn worker_bucket(endpoint: &str, secret: &str, name: &str) -> Option<Bucket> {
    let get = |variable: &str| match variable {
        "BUCKET_ENDPOINT_URL" => Some(endpoint.to_owned()),
        "BUCKET_ACCESS_KEY_ID" => Some(KEY.to_owned()),
        "BUCKET_SECRET_ACCESS_KEY" => Some(secret.to_owned()),
        "BUCKET_NAME" => Some(name.to_owned()),
        _ => None,
    };
    Bucket::from_variables(get).unwrap()
}

/// May reach the server on loopback.
fn uploader() -> Uploader {
    Uploader::new(Guard::open(GuardSettings::default()), None)
}

fn picture(text: &str, extension: &'static str) -> PictureFile {
    PictureFile { bytes: text.as_bytes().to_vec(), extension }
}

async fn upload_one(uploader: &Uploader, config: Option<&Value>) -> Result<String, sdxl_worker::error::Error> {
    let links = uploader.upload_pictures("job-1", config, vec![picture("one", "png")]).await?;
    let [link] = <[String; 1]>::try_from(links.expect("there is a bucket")).unwrap();
    Ok(link)
}

/// What anybody has who gets a link; no proxy of this machine's.
fn client() -> reqwest::Client {
    reqwest::Client::builder().no_proxy().build().unwrap()
}

async fn open(link: &str) -> (StatusCode, Vec<u8>) {
    let response = client().get(link).send().await.unwrap();
    (response.status(), response.bytes().await.unwrap().to_vec())
}

#[tokio::test]
async fn pictures_are_put_and_their_links_open() {
    let (root, config) = server_and_config().await;
    let files = vec![picture("one", "png"), picture("two", "webp"), picture(&"three".repeat(1_000_000), "jpeg")];
    let links = uploader().upload_pictures("sync-1a2b-e1", Some(&config), files.clone()).await.unwrap().unwrap();
    assert_eq!(links.len(), 3);
    for (link, file) in links.iter().zip(&files) {
        assert_eq!(open(link).await, (StatusCode::OK, file.bytes.clone()));
        let url = Url::parse(link).unwrap();
        let key = url.path().strip_prefix("/pictures/sync-1a2b-e1/").expect(link);
        let (name, extension) = key.split_once('.').unwrap();
        assert!(name.len() == 8 && name.bytes().all(|byte| byte.is_ascii_hexdigit()), "{link}");
        assert_eq!(extension, file.extension);
        assert!(url.query_pairs().any(|(key, value)| key == "X-Amz-Expires" && value == "604800"), "{link}");
        assert_eq!(std::fs::read(root.path().join(&url.path()[1..])).unwrap(), file.bytes);
    }
}

#[tokio::test]
async fn without_a_name_the_bucket_is_month_and_year() {
    let (_root, mut config) = server_and_config().await;
    config["bucketName"] = Value::Null;
    let today = jiff::Timestamp::now().strftime("%m-%y").to_string();
    let link = upload_one(&uploader(), Some(&config)).await.unwrap();
    assert!(Url::parse(&link).unwrap().path().starts_with(&format!("/{today}/job-1/")), "{link}");
    assert_eq!(open(&link).await.1, b"one");
}

#[tokio::test]
async fn odd_names_are_signed_as_they_are_sent() {
    let (root, mut config) = server_and_config().await;
    config["objectPath"] = json!("/bilder/köln 1/a+b=c&d'(e)*~!$,;@/");
    let links =
        uploader().upload_pictures("../ö?#%2e", Some(&config), vec![picture("one", "png")]).await.unwrap().unwrap();
    assert_eq!(open(&links[0]).await.1, b"one");
    let folder = root.path().join("pictures/bilder/köln 1/a+b=c&d'(e)*~!$,;@/.._____2e");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
}

#[tokio::test]
async fn a_wrong_key_fails() {
    let (root, config) = server_and_config().await;
    for (key, value, said) in [
        ("accessSecret", "hunter2", "SignatureDoesNotMatch"),
        ("accessSecret", &SECRET.to_lowercase(), "SignatureDoesNotMatch"),
        ("accessId", "AKIDUNKNOWN", "NotSignedUp"),
    ] {
        let mut config = config.clone();
        config[key] = json!(value);
        let error = upload_one(&uploader(), Some(&config)).await.unwrap_err();
        assert_eq!((error.code, error.class), ("upload_failed", ErrorClass::InvalidInput));
        assert_eq!(error.field.as_deref(), Some("s3Config"));
        assert!(error.message.contains("403") && error.message.contains(said), "{error}");
        let told = format!("{error} {}", error.to_json());
        for hidden in [value, KEY, SECRET, "X-Amz"] {
            assert!(!told.contains(hidden), "{told}");
        }
        // One wrong key among the worker's.
        let bucket = worker_bucket(config["endpointUrl"].as_str().unwrap(), "hunter2", "pictures");
        let error = upload_one(&Uploader::new(Guard::new(Default::default()), bucket), None).await.unwrap_err();
        assert_eq!((error.code, error.class, error.field), ("upload_failed", ErrorClass::Setup, None));
    }
    assert_eq!(std::fs::read_dir(root.path().join("pictures")).unwrap().count(), 0);
}

#[tokio::test]
async fn an_altered_link_or_an_expired_one_does_not_open() {
    let (root, config) = server_and_config().await;
    let link = upload_one(&uploader(), Some(&config)).await.unwrap();
    let other = upload_one(&uploader(), Some(&config)).await.unwrap();
    let url = Url::parse(&link).unwrap();
    let with = |key: &str, value: &str| {
        let mut altered = url.clone();
        let pairs: Vec<(String, String)> = url.query_pairs().into_owned().collect();
        altered.query_pairs_mut().clear().extend_pairs(
            pairs.into_iter().map(|(name, old)| if name == key { (name, value.to_owned()) } else { (name, old) }),
        );
        altered.to_string()
    };
    let of = |name: &str| url.query_pairs().find(|(key, _)| key == name).unwrap().1.into_owned();
    let flipped: String = of("X-Amz-Signature").chars().map(|c| if c == '0' { '1' } else { '0' }).collect();
    let mut elsewhere = url.clone();
    elsewhere.set_path(Url::parse(&other).unwrap().path());
    let mut unsigned = url.clone();
    unsigned.set_query(None);
    assert_eq!(open(&with("", "")).await.0, StatusCode::OK, "taking it apart and together changes nothing");
    for altered in [
        with("X-Amz-Signature", &flipped),
        with("X-Amz-Signature", ""),
        with("X-Amz-Expires", "604801"),
        with("X-Amz-Date", &of("X-Amz-Date").replace('Z', "1Z")),
        with("X-Amz-Date", "20240101T000000Z"),
        with("X-Amz-Credential", &of("X-Amz-Credential").replace("us-east-1", "eu-west-1")),
        elsewhere.to_string(),
        unsigned.to_string(),
    ] {
        let (status, bytes) = open(&altered).await;
        assert!(status.is_client_error(), "{status} {altered}");
        assert_ne!(bytes, b"one");
    }
    // A link does not let anybody write.
    let put = client().put(&link).body("two").send().await.unwrap();
    assert_eq!(put.status(), StatusCode::FORBIDDEN);
    assert_eq!(std::fs::read(root.path().join(&url.path()[1..])).unwrap(), b"one");

    let bucket = rusty_s3::Bucket::new(
        config["endpointUrl"].as_str().unwrap().parse().unwrap(),
        rusty_s3::UrlStyle::Path,
        "pictures",
        "us-east-1",
    );
    let (bucket, credentials) = (bucket.unwrap(), rusty_s3::Credentials::new(KEY, SECRET));
    let key = url.path().strip_prefix("/pictures/").unwrap();
    let signed = |days_ago: i64| {
        let time = jiff::Timestamp::now().as_second() - days_ago * 24 * 60 * 60;
        let time = jiff::Timestamp::from_second(time + 60).unwrap();
        let week = std::time::Duration::from_secs(604_800);
        bucket.get_object(Some(&credentials), key).sign_with_time(week, &time).to_string()
    };
    assert_eq!(open(&signed(7)).await.0, StatusCode::OK);
    assert_eq!(open(&signed(8)).await.0, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn the_jobs_bucket_comes_before_the_workers() {
    let (root, config) = server_and_config().await;
    std::fs::create_dir(root.path().join("workers")).unwrap();
    let bucket = worker_bucket(config["endpointUrl"].as_str().unwrap(), SECRET, "workers");
    let uploader = Uploader::new(Guard::open(GuardSettings::default()), bucket);
    for (config, name) in
        [(Some(&config), "pictures"), (Some(&json!({})), "workers"), (Some(&json!(null)), "workers"), (None, "workers")]
    {
        let link = upload_one(&uploader, config).await.unwrap();
        assert!(link.contains(&format!("/{name}/job-1/")), "{link}");
        assert_eq!(open(&link).await.1, b"one");
    }
    // Half a bucket is a mistake that the client should hear of, not a reason to use another.
    let half = json!({"accessId": "a"});
    assert_eq!(upload_one(&uploader, Some(&half)).await.unwrap_err().code, "invalid_s3_config");
}

#[tokio::test]
async fn without_a_bucket_there_are_no_links() {
    let uploader = Uploader::new(Guard::new(Default::default()), None);
    for config in [None, Some(&json!({})), Some(&json!(null))] {
        assert_eq!(uploader.upload_pictures("job", config, vec![picture("one", "png")]).await.unwrap(), None);
    }
}

#[tokio::test]
async fn a_jobs_endpoint_is_guarded_and_the_workers_is_not() {
    let (_root, config) = server_and_config().await;
    let endpoint = config["endpointUrl"].as_str().unwrap().to_owned();
    let guarded = Uploader::new(Guard::new(Default::default()), worker_bucket(&endpoint, SECRET, "pictures"));
    let inside = FakeHost::start(PRIVATE, |_, _| ok(""));
    for host in ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"] {
        let mut config = config.clone();
        config["endpointUrl"] = json!(format!("http://{host}:{}", inside.port));
        let error = upload_one(&guarded, Some(&config)).await.unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), ("url_refused", Some("s3Config")), "{host}");
    }
    assert!(inside.requests().is_empty());
    assert!(upload_one(&guarded, None).await.is_ok());
}

#[tokio::test]
async fn an_upload_follows_no_redirect() {
    let inside = FakeHost::start(PRIVATE, |_, _| ok(""));
    let port = inside.port;
    let outside = FakeHost::start(PUBLIC, move |_, _| redirect("307 Temporary", &format!("http://127.0.0.1:{port}/")));
    let uploader = Uploader::new(guard(&[("a.test", &[&[PUBLIC]])]), None);
    let endpoint = format!("http://a.test:{}", outside.port);
    let config = json!({"endpointUrl": endpoint, "accessId": "a", "accessSecret": "b"});
    assert_eq!(upload_one(&uploader, Some(&config)).await.unwrap_err().code, "upload_failed");
    assert_eq!((outside.requests().len(), inside.requests().len()), (1, 0));
}

#[tokio::test]
async fn passing_faults_are_tried_again_and_final_ones_are_not() {
    let error = |code: &str| answer("400 Bad", "", format!("<Error><Code>{code}</Code></Error>").as_bytes());
    let uploader = Uploader::new(guard(&[("a.test", &[&[PUBLIC]])]), None);
    let config = |host: &FakeHost| json!({"endpointUrl": format!("http://a.test:{}/base", host.port), "accessId": "a", "accessSecret": "b"});

    let host = FakeHost::start(PUBLIC, |number, _| match number {
        0 => answer("503 Slow Down", "", b"<Code>SlowDown</Code>"),
        1 => vec![],
        _ => answer("200 OK", "", b""),
    });
    let link = upload_one(&uploader, Some(&config(&host))).await.unwrap();
    assert!(link.starts_with(&format!("http://a.test:{}/base/", host.port)), "{link}");
    let requests = host.requests();
    assert_eq!(requests.len(), 3);
    let key = |request: &str| request.split(['?', ' ']).nth(1).unwrap().to_owned();
    assert!(requests.iter().all(|request| key(request) == key(&requests[0])), "{requests:?}");
    assert!(requests[2].contains("&X-Amz-SignedHeaders=content-type%3Bhost&"), "{requests:?}");
    assert!(requests[2].to_lowercase().contains("content-type: image/png\r\n"), "{requests:?}");
    assert!(requests[2].ends_with("\r\n\r\none") || requests[2].ends_with("\r\n\r\n"), "{requests:?}");

    let host = FakeHost::start(PUBLIC, |_, _| answer("500 Broken", "", &[b'x'; 100_000]));
    let failed = upload_one(&uploader, Some(&config(&host))).await.unwrap_err();
    assert!(failed.message.contains("500"), "{failed}");
    assert_eq!(host.requests().len(), 3);

    for (code, remedy) in [("AuthorizationHeaderMalformed", "s3Config.region"), ("NoSuchBucket", "s3Config.bucketName")]
    {
        let host = FakeHost::start(PUBLIC, move |_, _| error(code));
        let failed = upload_one(&uploader, Some(&config(&host))).await.unwrap_err();
        assert!(failed.message.ends_with(&format!("400 Bad Request ({code})")), "{failed}");
        assert!(failed.remedy.unwrap().contains(remedy));
        assert_eq!(host.requests().len(), 1);
    }

    let port = std::net::TcpListener::bind((PUBLIC, 0)).unwrap().local_addr().unwrap().port();
    let config = json!({"endpointUrl": format!("http://a.test:{port}"), "accessId": "a", "accessSecret": "b"});
    let failed = upload_one(&uploader, Some(&config)).await.unwrap_err();
    assert_eq!(failed.code, "upload_failed");
    assert!(failed.message.ends_with("cannot be reached"), "{failed}");
    assert!(!format!("{failed} {}", failed.to_json()).contains("X-Amz"), "{failed}");
}
