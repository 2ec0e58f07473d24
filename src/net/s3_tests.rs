//! Settings, regions and keys. Uploads to a server that checks signatures are in `tests/net.rs`.

use serde_json::json;

use super::*;

fn config() -> Value {
    json!({"accessId": "AKIDSECRET", "accessSecret": "hunter2", "endpointUrl": "https://s3.eu-west-1.amazonaws.com"})
}

fn with(key: &str, value: Value) -> Result<Option<Bucket>> {
    let mut config = config();
    config[key] = value;
    Bucket::from_s3_config(&config)
}

#[test]
fn the_region_is_read_from_the_endpoint() {
    for (host, region) in [
        ("s3.amazonaws.com", "us-east-1"),
        ("b.s3.amazonaws.com", "us-east-1"),
        ("s3.eu-west-1.amazonaws.com", "eu-west-1"),
        ("b.s3.eu-west-1.amazonaws.com", "eu-west-1"),
        ("my.dotted.bucket.s3.eu-west-1.amazonaws.com", "eu-west-1"),
        ("s3-eu-west-1.amazonaws.com", "eu-west-1"),
        ("b.s3-eu-west-1.amazonaws.com", "eu-west-1"),
        ("s3-logs.s3.us-west-2.amazonaws.com", "us-west-2"),
        ("s3.s3.us-west-2.amazonaws.com", "us-west-2"),
        ("b.s3.dualstack.us-west-2.amazonaws.com", "us-west-2"),
        ("s3-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("b.s3-accelerate.amazonaws.com", "us-east-1"),
        ("s3.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("bucket.vpce-1a2b.s3.us-east-2.vpce.amazonaws.com", "us-east-2"),
        ("s3.us-west-004.backblazeb2.com", "us-west-004"),
        ("b.s3.us-west-004.backblazeb2.com", "us-west-004"),
        ("s3.eu-central-1.wasabisys.com", "eu-central-1"),
        ("s3.wasabisys.com", "us-east-1"),
        ("s3.fr-par.scw.cloud", "fr-par"),
        ("nyc3.digitaloceanspaces.com", "nyc3"),
        ("b.nyc3.digitaloceanspaces.com", "nyc3"),
        ("0123abcd.r2.cloudflarestorage.com", "auto"),
        ("0123abcd.eu.r2.cloudflarestorage.com", "auto"),
        ("storage.googleapis.com", "us-east-1"),
        ("minio.internal", "us-east-1"),
        ("s3", "us-east-1"),
        ("localhost", "us-east-1"),
        ("127.0.0.1", "us-east-1"),
        ("[::1]", "us-east-1"),
        ("", "us-east-1"),
    ] {
        assert_eq!(region_of(host), region, "{host}");
    }
}

#[test]
fn a_job_names_its_bucket() {
    let bucket = Bucket::from_s3_config(&config()).unwrap().unwrap();
    assert_eq!((bucket.name, bucket.prefix.as_str(), bucket.region.as_str()), (None, "", "eu-west-1"));
    assert_eq!(bucket.endpoint.as_str(), "https://s3.eu-west-1.amazonaws.com/");

    let bucket = with("bucketName", json!("my-bucket")).unwrap().unwrap();
    assert_eq!(bucket.name.as_deref(), Some("my-bucket"));
    assert_eq!(with("region", json!("eu-north-1")).unwrap().unwrap().region, "eu-north-1");
    assert_eq!(with("objectPath", json!("/a//b c/")).unwrap().unwrap().prefix, "a/b c/");
    let bucket = with("endpointUrl", json!("http://minio:9000/base#x")).unwrap().unwrap();
    assert_eq!(bucket.endpoint.as_str(), "http://minio:9000/base/");
    // What the local API's clients send along without meaning it.
    for nothing in [json!(null), json!({}), json!({"accessId": " ", "accessSecret": null, "bucketName": "x"})] {
        assert!(Bucket::from_s3_config(&nothing).unwrap().is_none(), "{nothing}");
    }
}

#[test]
fn a_wrong_s3_config_says_which_key() {
    let error = Bucket::from_s3_config(&json!("x")).unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), ("invalid_s3_config", Some("s3Config")));
    for (key, value) in [
        ("accessId", json!(null)),
        ("accessSecret", json!("")),
        ("endpointUrl", json!(null)),
        ("accessSecret", json!(7)),
        ("endpointUrl", json!("s3.amazonaws.com")),
        ("endpointUrl", json!("file:///etc")),
        ("endpointUrl", json!("https://user:password@s3.amazonaws.com")),
        ("endpointUrl", json!("https://s3.amazonaws.com?x=1")),
        ("bucketName", json!("..")),
        ("bucketName", json!("a/b")),
        ("bucketName", json!("//evil.example")),
        ("bucketName", json!("http://evil.example")),
        ("bucketName", json!("a?b")),
        ("bucketName", json!("x".repeat(256))),
        ("objectPath", json!("a/../b")),
        ("objectPath", json!("..")),
        ("objectPath", json!("a\\b")),
        ("objectPath", json!("a\nb")),
    ] {
        let error = with(key, value.clone()).unwrap_err();
        let field = format!("s3Config.{key}");
        assert_eq!((error.code, error.field), ("invalid_s3_config", Some(field)), "{value}");
        assert!(!error.message.contains("hunter2") && !error.message.contains("password"), "{}", error.message);
    }
}

#[test]
fn the_worker_has_a_bucket_if_all_three_variables_are_set() {
    let from = |variables: &[(&str, &str)]| {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Bucket::from_variables(get)
    };
    let all = [
        ("BUCKET_ENDPOINT_URL", "https://b.s3.eu-west-1.amazonaws.com"),
        ("BUCKET_ACCESS_KEY_ID", "AKID"),
        ("BUCKET_SECRET_ACCESS_KEY", "secret"),
        ("BUCKET_NAME", "pictures"),
        ("BUCKET_REGION", "eu-south-1"),
    ];
    let bucket = from(&all).unwrap().unwrap();
    assert_eq!((bucket.name.as_deref(), bucket.region.as_str()), (Some("pictures"), "eu-south-1"));
    let bucket = from(&all[..3]).unwrap().unwrap();
    assert_eq!((bucket.name.as_deref(), bucket.region.as_str()), (None, "eu-west-1"));
    assert!(from(&[]).unwrap().is_none());
    assert!(from(&[("BUCKET_ENDPOINT_URL", " "), ("BUCKET_NAME", "x")]).unwrap().is_none());
    let error = from(&all[..2]).unwrap_err();
    assert_eq!((error.code, error.message.as_str()), ("invalid_bucket", "BUCKET_SECRET_ACCESS_KEY is missing"));
}

#[test]
fn keys_stay_in_the_folder_of_their_job() {
    let bucket = with("objectPath", json!("out")).unwrap().unwrap();
    for (id, folder) in [
        ("sync-1a2b-e1", "sync-1a2b-e1"),
        ("..", "__"),
        ("", "_"),
        ("../../x", ".._.._x"),
        ("a/b?c#d", "a_b_c_d"),
        ("é\n", "__"),
        ("http://evil.example/", "http___evil.example_"),
    ] {
        let key = bucket.key(id, "png");
        let name = key.strip_prefix(&format!("out/{folder}/")).expect(&key);
        assert_eq!(name.len(), "01234567.png".len(), "{key}");
        assert!(name.ends_with(".png") && name[..8].bytes().all(|byte| byte.is_ascii_hexdigit()), "{key}");
    }
    assert_ne!(bucket.key("a", "png"), bucket.key("a", "png"));
    assert!(bucket.key(&"x".repeat(10_000), "png").len() < 300);
}

#[test]
fn keys_are_not_printed() {
    let bucket = Bucket::from_s3_config(&config()).unwrap();
    let printed = format!("{bucket:?} {:?}", Uploader::new(Guard::new(Default::default()), bucket.clone()));
    assert!(printed.contains("***"));
    assert!(!printed.contains("hunter2") && !printed.contains("AKIDSECRET"), "{printed}");
}

#[test]
fn of_an_answer_only_the_code_is_told() {
    let body = "<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>AKID</AWSAccessKeyId></Error>";
    assert_eq!(error_code(body).as_deref(), Some("SignatureDoesNotMatch"));
    for body in ["", "<Code>", "<Code></Code>", "<Code>a b</Code>", "</Code><Code>", "<html>no</html>"] {
        assert_eq!(error_code(body), None, "{body}");
    }
    assert_eq!(error_code(&format!("<Code>{}</Code>", "x".repeat(65))), None);
}
