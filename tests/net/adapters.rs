//! Files that are too large to fetch twice: pieces, versions, and one cache for several processes.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use sdxl_worker::api::FileSource;
use sdxl_worker::error::Error;
use sdxl_worker::net::{
    AdapterCache, AdapterFile, AdapterFiles, AdapterSettings, DownloadSettings, Downloader, Secret,
};

use crate::fake_host::*;

const MAX: u64 = 1_000_000;
/// Ten bytes that could be safetensors, and ten others.
const BODY: &[u8] = b"\x02\0\0\0\0\0\0\0{}";
const OTHER: &[u8] = b"\x01\0\0\0\0\0\0\0{]";

fn files(cache: &Path, downloader: Downloader) -> AdapterFiles {
    AdapterFiles::new(
        AdapterSettings::loras(Vec::new(), MAX),
        downloader,
        Arc::new(AdapterCache::new(cache.to_owned(), 10 << 20)),
    )
}

async fn get(files: &AdapterFiles, url: &str) -> Result<AdapterFile, Error> {
    files.fetch(&FileSource::Url(url.into()), None, "loras[0].url").await
}

fn content(file: &AdapterFile) -> Vec<u8> {
    let mut bytes = vec![0; file.stored.file.metadata().unwrap().len() as usize];
    file.stored.file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// The value of a request's header.
fn header<'a>(request: &'a str, name: &str) -> Option<&'a str> {
    let lines = request.lines().filter_map(|line| line.split_once(": "));
    lines.into_iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// An answer that promises more than it sends.
fn broken(headers: &str, promised: usize, body: &[u8]) -> Answer {
    let head = format!("HTTP/1.1 200 OK\r\n{headers}Content-Length: {promised}\r\nConnection: close\r\n\r\n");
    vec![Piece::Bytes([head.as_bytes(), body].concat())]
}

/// What is left of `body`, or all of it where another version is asked for.
fn rest(request: &str, body: &[u8], tag: &str) -> Answer {
    let start =
        header(request, "range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    match start.filter(|_: &usize| header(request, "if-range") == Some(tag)) {
        Some(start) => {
            let range = format!("Content-Range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len());
            answer("206 Partial Content", &format!("ETag: {tag}\r\n{range}"), &body[start..])
        }
        None => answer("200 OK", &format!("ETag: {tag}\r\n"), body),
    }
}

#[tokio::test]
async fn a_later_process_goes_on_where_an_earlier_one_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let host = FakeHost::start(PUBLIC, |number, request| match number {
        0 => broken("ETag: \"one\"\r\n", 10, &BODY[..5]),
        _ => rest(request, BODY, "\"one\""),
    });
    let url = format!("http://a.test:{}/style.safetensors", host.port);
    let once = downloader_with(DownloadSettings { tries: 1, ..settings() });
    let error = get(&files(folder.path(), once), &url).await.unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), ("download_failed", Some("loras[0].url")));
    let file = get(&files(folder.path(), downloader()), &url).await.unwrap();
    assert_eq!(content(&file), BODY);
    assert_eq!(file.name, "style");
    let second = &host.requests()[1];
    assert_eq!((header(second, "range"), header(second, "if-range")), (Some("bytes=5-"), Some("\"one\"")));
    assert_eq!(fs::read_dir(folder.path().join("parts")).unwrap().count(), 0);
}

#[tokio::test]
async fn pieces_of_two_versions_are_never_joined() {
    let folder = tempfile::tempdir().unwrap();
    let host = FakeHost::start(PUBLIC, |number, request| match number {
        0 => broken("ETag: \"one\"\r\n", 10, &BODY[..5]),
        _ => rest(request, OTHER, "\"two\""),
    });
    let url = format!("http://a.test:{}/x", host.port);
    assert_eq!(content(&get(&files(folder.path(), downloader()), &url).await.unwrap()), OTHER);

    // a host that sends another version's piece all the same
    let host = FakeHost::start(PUBLIC, |number, _| match number {
        0 => broken("ETag: \"one\"\r\n", 10, &BODY[..5]),
        1 => answer("206 Partial Content", "ETag: \"two\"\r\nContent-Range: bytes 5-9/10\r\n", &OTHER[5..]),
        _ => answer("200 OK", "ETag: \"two\"\r\n", OTHER),
    });
    let url = format!("http://a.test:{}/y", host.port);
    assert_eq!(content(&get(&files(folder.path(), downloader()), &url).await.unwrap()), OTHER);
}

#[tokio::test]
async fn without_a_strong_version_a_download_starts_anew() {
    for tag in ["", "ETag: W/\"weak\"\r\n"] {
        let folder = tempfile::tempdir().unwrap();
        let host = FakeHost::start(PUBLIC, move |number, _| match number {
            0 => broken(tag, 10, &BODY[..5]),
            _ => answer("200 OK", tag, BODY),
        });
        let url = format!("http://a.test:{}/x", host.port);
        assert_eq!(content(&get(&files(folder.path(), downloader()), &url).await.unwrap()), BODY);
        assert!(host.requests().iter().all(|request| header(request, "range").is_none()));
    }
}

#[tokio::test]
async fn progress_is_no_failure_however_often_it_breaks_off() {
    let folder = tempfile::tempdir().unwrap();
    let host = FakeHost::start(PUBLIC, |number, request| match rest(request, BODY, "\"one\"").remove(0) {
        Piece::Bytes(mut whole) if number < 6 => {
            let body = whole.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
            whole.truncate(body + 1);
            vec![Piece::Bytes(whole)]
        }
        piece => vec![piece],
    });
    let downloader = downloader_with(DownloadSettings { tries: 2, ..settings() });
    let url = format!("http://a.test:{}/x", host.port);
    let file = get(&files(folder.path(), downloader), &url).await.unwrap();
    assert_eq!((content(&file).as_slice(), host.requests().len()), (BODY, 7));
}

#[tokio::test]
async fn the_cap_holds_whether_or_not_the_length_is_told() {
    let promised = FakeHost::start(PUBLIC, |_, _| broken("", 5_000_000, b"0"));
    let endless = FakeHost::start(PUBLIC, |_, _| {
        let head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
        vec![Piece::Bytes(head), Piece::Forever(vec![0; 10_000])]
    });
    for host in [promised, endless] {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("http://a.test:{}/x", host.port);
        let error = get(&files(folder.path(), downloader()), &url).await.unwrap_err();
        assert_eq!(error.code, "download_too_large");
        assert!(error.remedy.unwrap().contains("--max-lora-bytes"));
        let parts = fs::read_dir(folder.path().join("parts")).unwrap().flatten();
        assert!(parts.map(|part| part.metadata().unwrap().len()).sum::<u64>() < 1000, "what is useless is not kept");
    }
}

#[tokio::test]
async fn private_addresses_are_refused_also_behind_a_redirect() {
    let inside = FakeHost::start(PRIVATE, |_, _| ok("secret"));
    let port = inside.port;
    let outside = FakeHost::start(PUBLIC, move |_, _| redirect("302 Found", &format!("http://inside.test:{port}/x")));
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path(), downloader());
    for url in [format!("http://127.0.0.1:{port}/x"), format!("http://a.test:{}/x", outside.port)] {
        assert_eq!(get(&files, &url).await.unwrap_err().code, "url_refused");
    }
    assert!(inside.requests().is_empty());
}

#[tokio::test]
async fn the_hub_s_token_stays_with_the_hub() {
    let cdn = FakeHost::start(PUBLIC, |_, request| rest(request, BODY, "\"one\""));
    let port = cdn.port;
    let hub = FakeHost::start(PUBLIC, move |_, _| redirect("302 Found", &format!("http://b.test:{port}/blob?key=x")));
    let settings = DownloadSettings {
        hub_token: Some(Secret::new("SECRET")),
        hub_endpoint: Some(format!("http://a.test:{}", hub.port)),
        ..settings()
    };
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path(), downloader_with(settings));
    let source = FileSource::Path("org/name@v1/sub/style.safetensors".into());
    let file = files.fetch(&source, None, "loras[0].path").await.unwrap();
    assert_eq!((file.name.as_str(), content(&file).as_slice()), ("style", BODY));
    let asked = &hub.requests()[0];
    assert!(asked.starts_with("GET /org/name/resolve/v1/sub/style.safetensors HTTP/1.1\r\n"), "{asked}");
    assert_eq!(header(asked, "authorization"), Some("Bearer SECRET"));
    assert_eq!(header(&cdn.requests()[0], "authorization"), None);
}

/// As if the host had been asked long ago.
fn make_stale(cache: &Path) {
    for entry in fs::read_dir(cache.join("urls")).into_iter().flatten() {
        let file = fs::File::options().write(true).open(entry.unwrap().path()).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3600)).unwrap();
    }
}

#[tokio::test]
async fn a_version_that_is_known_is_not_sent_again() {
    let host = FakeHost::start(PUBLIC, |number, request| match header(request, "if-none-match") {
        Some("\"one\"") if number < 2 => answer("304 Not Modified", "ETag: \"one\"\r\n", b""),
        _ if number == 0 => answer("200 OK", "ETag: \"one\"\r\n", BODY),
        _ => answer("200 OK", "ETag: \"two\"\r\n", OTHER),
    });
    let folder = tempfile::tempdir().unwrap();
    let (files, url) = (files(folder.path(), downloader()), format!("http://a.test:{}/x", host.port));
    for (asked, body) in [(1, BODY), (1, BODY), (2, BODY), (2, BODY), (3, OTHER)] {
        if asked > host.requests().len() {
            make_stale(folder.path());
        }
        assert_eq!(content(&get(&files, &url).await.unwrap()), body);
        assert_eq!(host.requests().len(), asked);
    }
}

#[tokio::test]
async fn the_file_here_is_used_when_the_host_is_silent_but_not_when_it_says_no() {
    let gone = Arc::new(AtomicBool::new(false));
    let is_gone = gone.clone();
    let host = FakeHost::start(PUBLIC, move |number, _| match number {
        0 => answer("200 OK", "", BODY),
        _ if is_gone.load(Ordering::Relaxed) => answer("404 Not Found", "", b""),
        _ => answer("503 Service Unavailable", "", b""),
    });
    let folder = tempfile::tempdir().unwrap();
    let (files, url) = (files(folder.path(), downloader()), format!("http://a.test:{}/x", host.port));
    get(&files, &url).await.unwrap();
    make_stale(folder.path());
    assert_eq!(content(&get(&files, &url).await.unwrap()), BODY);
    gone.store(true, Ordering::Relaxed);
    let error = get(&files, &url).await.unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), ("download_failed", Some("loras[0].url")));
    assert!(error.remedy.unwrap().contains("--lora-dir"));
}

#[tokio::test]
async fn a_host_that_drips_is_given_up() {
    let host = FakeHost::start(PUBLIC, |_, _| {
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n".to_vec();
        let drip = || [Piece::Pause(Duration::from_millis(50)), Piece::Bytes(vec![0])];
        [Piece::Bytes(head)].into_iter().chain((0..1000).flat_map(|_| drip())).collect()
    });
    let folder = tempfile::tempdir().unwrap();
    let downloader = downloader_with(DownloadSettings { total_timeout: Duration::from_millis(300), ..settings() });
    let error = get(&files(folder.path(), downloader), &format!("http://a.test:{}/x", host.port)).await.unwrap_err();
    assert_eq!(error.code, "download_timeout");
}

#[tokio::test]
async fn what_is_no_safetensors_file_is_not_kept() {
    let bodies: [(&[u8], &str); 5] = [
        (b"<html>please log in</html>", "lora_damaged"),
        (b"\xff\0\0\0\0\0\0\0{}", "lora_damaged"),
        (b"short", "lora_damaged"),
        (b"PK\x03\x04 and more", "lora_unsupported"),
        (b"\x80\x02cposix\nsystem\n", "lora_unsupported"),
    ];
    for (body, code) in bodies {
        let host = FakeHost::start(PUBLIC, move |_, _| answer("200 OK", "ETag: \"one\"\r\n", body));
        let folder = tempfile::tempdir().unwrap();
        let error =
            get(&files(folder.path(), downloader()), &format!("http://a.test:{}/x", host.port)).await.unwrap_err();
        assert_eq!((error.code, error.field.as_deref()), (code, Some("loras[0].url")), "{body:?}");
        for kept in ["files", "urls", "parts"] {
            assert_eq!(fs::read_dir(folder.path().join(kept)).unwrap().count(), 0, "{kept}");
        }
    }
}

#[tokio::test]
async fn a_checksum_spares_the_request_but_no_rule() {
    let host = FakeHost::start(PUBLIC, |_, _| answer("200 OK", "", BODY));
    let folder = tempfile::tempdir().unwrap();
    let files = files(folder.path(), downloader());
    let sha256 = get(&files, &format!("http://a.test:{}/x", host.port)).await.unwrap().stored.sha256;
    let ask = async |source, sha256: &str| files.fetch(&source, Some(sha256), "f").await;
    let url = |path: &str| FileSource::Url(format!("http://a.test:{}/{path}", host.port));
    assert_eq!(content(&ask(url("y"), &sha256).await.unwrap()), BODY);
    assert_eq!(host.requests().len(), 1);
    assert_eq!(ask(url("x"), &"0".repeat(64)).await.unwrap_err().code, "lora_changed");
    assert_eq!(ask(url("x.ckpt"), &sha256).await.unwrap_err().code, "lora_unsupported");
    assert_eq!(ask(FileSource::Path("../x".into()), &sha256).await.unwrap_err().code, "path_refused");
    assert_eq!(ask(FileSource::Name("x".into()), &sha256).await.unwrap_err().code, "lora_not_found");
}

#[tokio::test]
async fn a_hub_inside_the_network_is_reached_by_path_alone() {
    let hub = FakeHost::start(PRIVATE, |_, request| match request.contains("/api/models/") {
        true => ok(r#"{"siblings": [{"rfilename": "style.safetensors"}]}"#),
        false if request.contains("/org/one/") => answer("200 OK", "", BODY),
        false => answer("401 Unauthorized", "", b""),
    });
    let endpoint = format!("http://inside.test:{}", hub.port);
    let folder = tempfile::tempdir().unwrap();
    let settings = DownloadSettings { hub_endpoint: Some(endpoint.clone()), ..settings() };
    let files = files(folder.path(), downloader_with(settings));
    let path = async |path: &str| files.fetch(&FileSource::Path(path.into()), None, "loras[0].path").await;
    assert_eq!(content(&path("org/one").await.unwrap()), BODY);
    assert_eq!(hub.requests().len(), 2);
    path("org/one").await.unwrap();
    assert_eq!(hub.requests().len(), 2, "nor is the repository asked for its files again");
    let error = path("org/two/style.safetensors").await.unwrap_err();
    assert_eq!((error.code, error.field.as_deref()), ("lora_not_found", Some("loras[0].path")));
    let error = get(&files, &format!("{endpoint}/org/one/resolve/main/style.safetensors")).await.unwrap_err();
    assert_eq!(error.code, "url_refused");
}

#[tokio::test]
async fn a_folder_s_nearest_name_is_told() {
    let (folder, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for name in ["ink-drawing.safetensors", "wool.safetensors", "notes.txt"] {
        fs::write(folder.path().join(name), BODY).unwrap();
    }
    let files = AdapterFiles::new(
        AdapterSettings::loras(vec![folder.path().to_owned()], MAX),
        downloader(),
        Arc::new(AdapterCache::new(cache.path().to_owned(), 10 << 20)),
    );
    for source in [FileSource::Name("ink-drawin".into()), FileSource::Path("loras/ink-drawing.safetensors".into())] {
        let error = files.fetch(&source, None, "loras[0].name").await.unwrap_err();
        assert_eq!(error.code, "lora_not_found");
        assert!(error.remedy.as_deref().unwrap().ends_with("is ink-drawing"), "{error}");
    }
}

#[tokio::test]
async fn several_who_want_one_file_share_a_cache_without_harm() {
    let body: &[u8] = Box::leak([BODY, &[7; 300_000]].concat().into_boxed_slice());
    let host = FakeHost::start(PUBLIC, move |_, request| {
        let mut pieces = vec![Piece::Pause(Duration::from_millis(50))];
        pieces.extend(rest(request, body, "\"one\""));
        pieces
    });
    let folder = tempfile::tempdir().unwrap();
    let url = format!("http://a.test:{}/style.safetensors", host.port);
    // each with a cache object of its own, as processes have
    let workers: Vec<AdapterFiles> = (0..4).map(|_| files(folder.path(), downloader())).collect();
    let fetched =
        tokio::join!(get(&workers[0], &url), get(&workers[1], &url), get(&workers[2], &url), get(&workers[3], &url));
    for file in [fetched.0, fetched.1, fetched.2, fetched.3] {
        assert_eq!(content(&file.unwrap()), body);
    }
    assert_eq!(fs::read_dir(folder.path().join("files")).unwrap().count(), 1);
    // two jobs of one worker wait for each other instead
    let asked = host.requests().len();
    let other = format!("http://a.test:{}/other.safetensors", host.port);
    let both = tokio::join!(get(&workers[0], &other), get(&workers[0], &other));
    assert!(both.0.is_ok() && both.1.is_ok());
    assert_eq!(host.requests().len(), asked + 1);
}
