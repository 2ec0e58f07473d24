//! Results that are too large: what is tried before a finished picture is given up.

use std::sync::{Arc, Mutex};

use sdxl_worker::error::{Error, ErrorClass};
use sdxl_worker::worker::{Hooks, Settings, Upload};
use serde_json::{Value, json};

use crate::fake_runpod::{FakeRunpod, Recorded};
use crate::posting::report;
use crate::start::{job, settings, start_with};

type Uploads = Arc<Mutex<Vec<(String, Option<Value>, usize)>>>;

/// A bucket for jobs that name one, and for all where the worker has one.
fn bucket(everywhere: bool, broken: bool) -> (Upload, Uploads) {
    let uploads = Uploads::default();
    let noted = uploads.clone();
    let upload: Upload = Arc::new(move |id, s3_config, pictures| {
        let known = s3_config.is_some() || everywhere;
        noted.lock().unwrap().push((id.clone(), s3_config, pictures[0].bytes.len()));
        Box::pin(async move {
            match (known, broken) {
                (_, true) => Err(Error::new(ErrorClass::Internal, "upload_failed", "the bucket refuses")),
                (true, _) => Ok(Some(vec![format!("link-of-{id}")])),
                (false, _) => Ok(None),
            }
        })
    });
    (upload, uploads)
}

async fn outcome(id: &str, mut input: Value, upload: Option<Upload>) -> Recorded {
    let host = FakeRunpod::start().await;
    let mut settings: Settings = settings(&host);
    (settings.max_result_bytes, settings.max_sync_result_bytes) = (10_000, 20_000);
    let s3_config = input.as_object_mut().unwrap().shift_remove("s3Config");
    let mut job = job(id, input);
    if let Some(s3_config) = s3_config {
        job["s3Config"] = s3_config;
    }
    host.give(job);
    let _worker = start_with(settings, Hooks { upload, ..Hooks::default() }, std::future::ready(()));
    let results = host.wait_for_results(1).await;
    assert_eq!(host.finals().len(), 1, "no doomed post");
    results[0].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_depends_on_the_kind_of_id() {
    let fits = outcome("sync-1", json!({ "picture": 15_000 }), None).await;
    assert_eq!(fits.json()["output"]["format"], "png");
    let shrunk = outcome("1-u1", json!({ "picture": 15_000 }), None).await;
    assert_eq!(shrunk.json()["output"]["format"], "webp");
    assert_eq!(shrunk.json()["output"]["warnings"], json!(["the pictures were made smaller"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_bucket_a_large_result_is_made_smaller_until_it_fits() {
    let webp = outcome("a", json!({ "picture": 30_000 }), None).await;
    assert_eq!(webp.json()["output"]["format"], "webp");
    let jpeg = outcome("a", json!({ "picture": 100_000 }), None).await;
    assert_eq!(jpeg.json()["output"]["format"], "jpeg");
    assert!(jpeg.request.body.len() <= 10_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_fits_in_no_form_becomes_an_error_with_size_and_remedy() {
    let post = outcome("a", json!({ "picture": 1_000_000 }), None).await;
    let report = report(&post);
    assert_eq!(report["code"], "result_too_large");
    assert!(report["message"].as_str().unwrap().contains("10000"), "{report}");
    assert!(report["message"].as_str().unwrap().contains("has 626"), "the smallest form's size: {report}");
    assert!(report["remedy"].as_str().unwrap().contains("BUCKET_ENDPOINT_URL"));
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_bucket_a_large_result_is_uploaded_in_full_and_a_small_one_is_not() {
    let (upload, uploads) = bucket(true, false);
    let large = outcome("a", json!({ "picture": 1_000_000 }), Some(upload.clone())).await;
    assert_eq!(large.json()["output"]["images"], json!(["link-of-a"]));
    assert_eq!(*uploads.lock().unwrap(), [("a".to_owned(), None, 1_000_000)]);
    let small = outcome("b", json!({ "picture": 100 }), Some(upload)).await;
    assert_eq!(small.json()["output"]["images"][0].as_str().unwrap().len(), 100);
    assert_eq!(uploads.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_jobs_own_bucket_or_its_wish_for_links_uploads_also_small_pictures() {
    let (upload, uploads) = bucket(false, false);
    let config = json!({ "endpointUrl": "https://s3.example" });
    let own = outcome("a", json!({ "picture": 100, "s3Config": config }), Some(upload.clone())).await;
    assert_eq!(own.json()["output"]["images"], json!(["link-of-a"]));
    assert_eq!(uploads.lock().unwrap()[0].1, Some(config));

    let wish = json!({ "picture": 100, "response_format": "url" });
    let none = outcome("b", wish.clone(), Some(upload)).await;
    assert_eq!(none.json()["output"]["format"], "png", "without a bucket the pictures come inside");
    let (upload, _) = bucket(true, false);
    let links = outcome("c", wish, Some(upload)).await;
    assert_eq!(links.json()["output"]["images"], json!(["link-of-c"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_fails_or_panics_does_not_cost_the_picture() {
    let (broken, _) = bucket(true, true);
    let panics: Upload = Arc::new(|_, _, _| Box::pin(async { panic!("in the upload") }));
    for upload in [broken, panics] {
        let post = outcome("a", json!({ "picture": 30_000 }), Some(upload)).await;
        let output = &post.json()["output"];
        assert_eq!(output["format"], "webp");
        assert!(output["warnings"][1].as_str().unwrap().starts_with("the pictures could not be uploaded"), "{output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_without_pictures_that_is_too_large_is_an_error() {
    let (upload, uploads) = bucket(true, false);
    let post = outcome("a", json!({ "return": "x".repeat(20_000) }), Some(upload)).await;
    assert_eq!(report(&post)["code"], "result_too_large");
    assert!(uploads.lock().unwrap().is_empty());
}
