//! What a download reaches, and how it ends.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sdxl_worker::error::Error;
use sdxl_worker::net::{Download, DownloadSettings, Downloader, Guard, GuardSettings, Proxies, Secret};

use crate::fake_host::*;

const MAX: u64 = 1_000_000;

async fn fetch(downloader: &Downloader, url: &str) -> Result<Download, Error> {
    downloader.fetch(url, "image", MAX).await
}

/// Does not try again.
fn once() -> Downloader {
    downloader_with(DownloadSettings { tries: 1, ..settings() })
}

async fn code(downloader: &Downloader, url: &str) -> &'static str {
    let error = fetch(downloader, url).await.unwrap_err();
    assert_eq!(error.field.as_deref(), Some("image"));
    assert!(!error.to_string().contains("SECRET"), "{error}");
    assert!(!error.to_json().to_string().contains("SECRET"), "{error}");
    error.code
}

#[tokio::test]
async fn a_public_file_arrives_with_its_type() {
    let host = FakeHost::start(PUBLIC, |_, _| ok("picture"));
    let url = format!("http://a.test:{}/x/cat.png?w=1#top", host.port);
    let download = fetch(&downloader(), &url).await.unwrap();
    assert_eq!(download, Download { bytes: b"picture".to_vec(), content_type: Some("image/png".into()) });
    let request = &host.requests()[0];
    assert!(request.starts_with("GET /x/cat.png?w=1 HTTP/1.1\r\n"), "{request}");
    let request = request.to_lowercase();
    assert!(request.contains(&format!("\r\nhost: a.test:{}\r\n", host.port)), "{request}");
    assert!(request.contains("\r\nuser-agent: sdxl-worker/"), "{request}");
    for absent in ["authorization", "cookie", "referer", "accept-encoding"] {
        assert!(!request.contains(absent), "{request}");
    }
}

#[tokio::test]
async fn a_name_or_literal_on_the_private_side_is_never_connected_to() {
    let inside = FakeHost::start(PRIVATE, |_, _| ok("secret"));
    let downloader = downloader();
    for host in
        ["inside.test", "127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]", "a.test@127.0.0.1"]
    {
        assert_eq!(code(&downloader, &format!("http://{host}:{}/", inside.port)).await, "url_refused", "{host}");
    }
    assert!(inside.requests().is_empty());
}

#[tokio::test]
async fn one_private_address_among_several_refuses_the_name() {
    let outside = FakeHost::start(PUBLIC, |_, _| ok("picture"));
    for addresses in [[PUBLIC, PRIVATE], [PRIVATE, PUBLIC]] {
        let downloader = Downloader::new(guard(&[("mixed.test", &[&addresses])]), settings());
        assert_eq!(code(&downloader, &format!("http://mixed.test:{}/", outside.port)).await, "url_refused");
    }
    assert!(outside.requests().is_empty());
}

/// DNS rebinding. The name is resolved once for a connection, and what was checked is what is connected to.
#[tokio::test]
async fn a_name_that_changes_after_the_check_wins_nothing() {
    let outside = FakeHost::start(PUBLIC, |_, _| ok("picture"));
    let inside = FakeHost::start(PRIVATE, |_, _| ok("secret"));
    let table: &[(&str, &[&[std::net::IpAddr]])] = &[("rebind.test", &[&[PUBLIC], &[PRIVATE]])];
    let downloader = Downloader::new(guard(table), settings());
    let first = fetch(&downloader, &format!("http://rebind.test:{}/", outside.port)).await.unwrap();
    assert_eq!(first.bytes, b"picture");
    assert_eq!(code(&downloader, &format!("http://rebind.test:{}/", inside.port)).await, "url_refused");
    assert_eq!(code(&downloader, &format!("http://rebind.test:{}/", outside.port)).await, "url_refused");
    assert!(inside.requests().is_empty());
}

#[tokio::test]
async fn the_next_checked_address_is_tried() {
    let host = FakeHost::start(PUBLIC, |_, _| ok("picture"));
    let other = "127.0.0.3".parse().unwrap();
    let lookup = names(&[("two.test", &[&[other, PUBLIC]])]);
    let guard = Guard::with_lookup(GuardSettings::default(), lookup, |address| address != PRIVATE);
    let download = fetch(&Downloader::new(guard, settings()), &format!("http://two.test:{}/", host.port)).await;
    assert_eq!(download.unwrap().bytes, b"picture");
}

#[tokio::test]
async fn every_kind_of_redirect_is_followed_and_checked() {
    let inside = FakeHost::start(PRIVATE, |_, _| ok("secret"));
    let port = inside.port;
    for status in ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"] {
        let outside = FakeHost::start(PUBLIC, move |_, request| match request.split(' ').nth(1).unwrap() {
            "/name" => redirect(status, &format!("http://inside.test:{port}/")),
            "/address" => redirect(status, &format!("http://127.0.0.1:{port}/")),
            "/mapped" => redirect(status, &format!("http://[::ffff:7f00:1]:{port}/")),
            "/relative" => redirect(status, &format!("//0x7f.1:{port}/")),
            "/file" => redirect(status, "file:///etc/passwd"),
            "/fine" => redirect(status, "/picture?x=1"),
            _ => ok("picture"),
        });
        let url = |path: &str| format!("http://a.test:{}/{path}", outside.port);
        for path in ["name", "address", "mapped", "relative", "file"] {
            assert_eq!(code(&downloader(), &url(path)).await, "url_refused", "{status} {path}");
        }
        assert_eq!(fetch(&downloader(), &url("fine")).await.unwrap().bytes, b"picture");
    }
    assert!(inside.requests().is_empty());
}

#[tokio::test]
async fn five_redirects_are_followed_and_no_more() {
    let host = FakeHost::start(PUBLIC, |_, request| {
        let left: usize = request.split(['/', ' ']).nth(2).unwrap().parse().unwrap();
        if left == 0 { ok("picture") } else { redirect("302 Found", &format!("/{}", left - 1)) }
    });
    let url = |redirects: usize| format!("http://a.test:{}/{redirects}", host.port);
    assert_eq!(fetch(&downloader(), &url(5)).await.unwrap().bytes, b"picture");
    assert_eq!(code(&downloader(), &url(6)).await, "download_failed");
    assert_eq!(host.requests().len(), 12);
}

#[tokio::test]
async fn a_redirect_to_nowhere_fails() {
    let host = FakeHost::start(PUBLIC, |number, _| match number {
        0 => answer("302 Found", "", b""),
        _ => redirect("302 Found", "http://[broken"),
    });
    for _ in 0..2 {
        assert_eq!(code(&downloader(), &format!("http://a.test:{}/", host.port)).await, "download_failed");
    }
}

#[tokio::test]
async fn a_declared_length_above_the_cap_is_not_read() {
    let host = FakeHost::start(PUBLIC, |_, _| {
        vec![
            Piece::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 1000001\r\n\r\n".to_vec()),
            Piece::Pause(Duration::from_secs(5)),
        ]
    });
    let start = Instant::now();
    assert_eq!(code(&downloader(), &format!("http://a.test:{}/", host.port)).await, "download_too_large");
    assert!(start.elapsed() < Duration::from_millis(400));
    assert_eq!(host.requests().len(), 1);
}

#[tokio::test]
async fn a_body_without_length_is_cut_at_the_cap() {
    let endless = [
        ("Transfer-Encoding: chunked\r\n", b"1000\r\n".iter().chain(&[7; 4096]).chain(b"\r\n").copied().collect()),
        ("", vec![7; 4096]),
    ];
    for (header, piece) in endless {
        let head = format!("HTTP/1.1 200 OK\r\n{header}Connection: close\r\n\r\n").into_bytes();
        let host = FakeHost::start(PUBLIC, move |_, _| vec![Piece::Bytes(head.clone()), Piece::Forever(piece.clone())]);
        assert_eq!(code(&downloader(), &format!("http://a.test:{}/", host.port)).await, "download_too_large");
        // What was on its way lies in the sockets.
        assert!(host.sent.load(Ordering::Relaxed) < 20 * MAX as usize);
    }
}

#[tokio::test]
async fn the_smaller_cap_counts() {
    let host = FakeHost::start(PUBLIC, |_, _| ok("0123456789"));
    let url = format!("http://a.test:{}/", host.port);
    let with = |max_bytes| downloader_with(DownloadSettings { max_bytes, ..settings() });
    assert_eq!(with(10).fetch(&url, "image", 10).await.unwrap().bytes.len(), 10);
    assert_eq!(with(9).fetch(&url, "image", 10).await.unwrap_err().code, "download_too_large");
    assert_eq!(with(10).fetch(&url, "image", 9).await.unwrap_err().code, "download_too_large");
    assert_eq!(with(4).load("MDEyMzQ1Njc4OQ==", "image", 10).await.unwrap_err().code, "data_too_large");
}

#[tokio::test]
async fn a_length_that_lies_fails_or_is_kept_to() {
    // More promised than sent: the transfer broke off, and is tried again.
    let short = FakeHost::start(PUBLIC, |_, _| {
        vec![Piece::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nten bytes!".to_vec())]
    });
    assert_eq!(code(&downloader(), &format!("http://a.test:{}/", short.port)).await, "download_failed");
    assert_eq!(short.requests().len(), 3);
    // Less promised than sent: the rest is not read.
    let long = FakeHost::start(PUBLIC, |_, _| {
        vec![Piece::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nten bytes!".to_vec())]
    });
    assert_eq!(fetch(&downloader(), &format!("http://a.test:{}/", long.port)).await.unwrap().bytes, b"ten");
    // Two lengths are nobody's truth.
    let two = FakeHost::start(PUBLIC, |_, _| {
        vec![Piece::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nfour".to_vec())]
    });
    assert_eq!(code(&downloader(), &format!("http://a.test:{}/", two.port)).await, "download_failed");
}

#[tokio::test]
async fn a_silent_host_times_out() {
    let host = FakeHost::start(PUBLIC, |number, _| match number % 3 {
        0 => vec![Piece::Pause(Duration::from_secs(3))],
        1 => vec![Piece::Bytes(b"HTTP/1.1 200 OK\r\n".to_vec()), Piece::Pause(Duration::from_secs(3))],
        _ => vec![
            Piece::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx".to_vec()),
            Piece::Pause(Duration::from_secs(3)),
        ],
    });
    assert_eq!(code(&downloader(), &format!("http://a.test:{}/?SECRET", host.port)).await, "download_timeout");
    assert_eq!(host.requests().len(), 3);
}

#[tokio::test]
async fn a_dripping_host_meets_the_total_timeout() {
    let host = FakeHost::start(PUBLIC, |_, _| {
        let mut answer = vec![Piece::Bytes(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n".to_vec())];
        for _ in 0..60 {
            answer.extend([Piece::Bytes(b"x".to_vec()), Piece::Pause(Duration::from_millis(50))]);
        }
        answer
    });
    let downloader = downloader_with(DownloadSettings { total_timeout: Duration::from_millis(700), ..settings() });
    let start = Instant::now();
    assert_eq!(code(&downloader, &format!("http://a.test:{}/", host.port)).await, "download_timeout");
    assert!(start.elapsed() < Duration::from_millis(2000), "{:?}", start.elapsed());
    assert_eq!(host.requests().len(), 1);
}

#[tokio::test]
async fn passing_faults_are_tried_again_and_final_ones_are_not() {
    let mut downloads = tokio::task::JoinSet::new();
    for (status, tries) in [
        ("500 Internal Server Error", 3),
        ("503 Busy", 3),
        ("429 Too Many", 3),
        ("408 Timeout", 3),
        ("425 Early", 3),
        ("404 Not Found", 1),
        ("403 Forbidden", 1),
        ("401 Unauthorized", 1),
        ("400 Bad", 1),
        ("304 Not Modified", 1),
    ] {
        downloads.spawn(async move {
            let host = FakeHost::start(PUBLIC, move |_, _| answer(status, "", b"SECRET"));
            let url = format!("http://a.test:{}/SECRET?SECRET", host.port);
            assert_eq!(code(&downloader(), &url).await, "download_failed");
            assert_eq!(host.requests().len(), tries, "{status}");
        });
    }
    downloads.join_all().await;
    let host = FakeHost::start(PUBLIC, |number, _| match number {
        0 => vec![],
        1 => answer("502 Bad Gateway", "", b""),
        _ => ok("picture"),
    });
    assert_eq!(fetch(&downloader(), &format!("http://a.test:{}/", host.port)).await.unwrap().bytes, b"picture");
}

#[tokio::test]
async fn a_host_that_is_not_there_fails() {
    let port = std::net::TcpListener::bind((PUBLIC, 0)).unwrap().local_addr().unwrap().port();
    assert_eq!(code(&once(), &format!("http://a.test:{port}/SECRET")).await, "download_failed");
    assert_eq!(code(&once(), "http://unknown.test/SECRET").await, "download_failed");
    assert_eq!(code(&once(), "http://a.test:0/").await, "download_failed");
}

#[tokio::test]
async fn answers_that_are_no_http_fail() {
    for bytes in
        [&b"\0\x01\x02"[..], b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 999999 X\r\n\r\n", b"HTTP/1.1 200 OK\r\n: x\r\n\r\n"]
    {
        let host = FakeHost::start(PUBLIC, move |_, _| vec![Piece::Bytes(bytes.to_vec())]);
        assert_eq!(code(&once(), &format!("http://a.test:{}/", host.port)).await, "download_failed");
    }
    let host = FakeHost::start(PUBLIC, |_, _| {
        vec![
            Piece::Bytes(b"HTTP/1.1 200 OK\r\n".to_vec()),
            Piece::Forever(b"x: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n".to_vec()),
        ]
    });
    assert_eq!(code(&once(), &format!("http://a.test:{}/", host.port)).await, "download_failed");
}

/// The server of the greeting is the name's, whatever address was connected to.
#[tokio::test]
async fn tls_asks_for_the_name() {
    let host = FakeHost::start(PUBLIC, |_, _| vec![]);
    assert_eq!(code(&once(), &format!("https://a.test:{}/", host.port)).await, "download_failed");
    let greeting = &host.requests()[0];
    assert!(greeting.contains("a.test"), "{greeting:?}");
}

#[tokio::test]
async fn a_proxy_is_never_asked_unless_private_addresses_are_allowed() {
    let proxy = FakeHost::start(PUBLIC, |_, _| ok("through the proxy"));
    let host = FakeHost::start(PUBLIC, |_, _| ok("direct"));
    let variables = format!("http://127.0.0.2:{}", proxy.port);
    let url = format!("http://a.test:{}/", host.port);
    let with = |allow_private, except: &'static str| {
        let get = |name: &str| match name {
            "http_proxy" => Some(variables.clone()),
            "no_proxy" => Some(except.to_owned()),
            _ => None,
        };
        let settings = GuardSettings { allow_private, proxies: Proxies::from_variables(get), ..Default::default() };
        Downloader::new(Guard::with_lookup(settings, names(&[("a.test", &[&[PUBLIC]])]), is_public), self::settings())
    };
    assert_eq!(code(&with(false, ""), &url).await, "url_refused");
    assert!(proxy.requests().is_empty());
    assert_eq!(fetch(&with(false, "a.test"), &url).await.unwrap().bytes, b"direct");
    assert_eq!(fetch(&with(true, ""), &url).await.unwrap().bytes, b"through the proxy");
    assert!(proxy.requests()[0].starts_with(&format!("GET {url} HTTP/1.1\r\n")), "{:?}", proxy.requests());
}

#[tokio::test]
async fn private_addresses_can_be_allowed() {
    let inside = FakeHost::start(PRIVATE, |_, _| ok("mine"));
    let guard = Guard::new(GuardSettings { allow_private: true, ..Default::default() });
    let downloader = Downloader::new(guard, settings());
    for host in ["127.0.0.1", "localhost"] {
        let download = fetch(&downloader, &format!("http://{host}:{}/", inside.port)).await;
        assert_eq!(download.unwrap().bytes, b"mine", "{host}");
    }
    // The same names through the system's resolver, guarded.
    let guarded = Downloader::new(Guard::new(Default::default()), settings());
    assert_eq!(code(&guarded, &format!("http://localhost:{}/", inside.port)).await, "url_refused");
}

#[tokio::test]
async fn a_token_goes_to_its_own_host_and_never_across_a_redirect() {
    // The "Hub" sends on to itself, to another host, and from there back.
    let other = FakeHost::start(PUBLIC, |_, request| match request.contains("back-to-") {
        true => {
            let port = request.split("back-to-").nth(1).unwrap().split(' ').next().unwrap();
            redirect("302 Found", &format!("http://a.test:{port}/end"))
        }
        false => ok("weights"),
    });
    let other_port = other.port;
    let hub = FakeHost::start(PUBLIC, move |_, request| {
        let port =
            request.to_lowercase().split("host: a.test:").nth(1).unwrap().split("\r\n").next().unwrap().to_owned();
        match request.split(' ').nth(1).unwrap() {
            "/same" => redirect("307 Temporary", "/end"),
            "/other" => redirect("302 Found", &format!("http://b.test:{other_port}/file")),
            "/there-and-back" => redirect("302 Found", &format!("http://b.test:{other_port}/back-to-{port}")),
            _ => ok("weights"),
        }
    });
    let settings = DownloadSettings {
        hub_token: Some(Secret::new("hf_SECRET")),
        hub_endpoint: Some(format!("http://a.test:{}", hub.port)),
        civitai_token: Some(Secret::new("civitai_SECRET")),
        ..settings()
    };
    let downloader = downloader_with(settings);
    for path in ["end", "same", "other", "there-and-back", "user"] {
        let user = if path == "user" { "name:word@" } else { "" };
        fetch(&downloader, &format!("http://{user}a.test:{}/{path}", hub.port)).await.unwrap();
    }
    fetch(&downloader, &format!("http://b.test:{}/direct", other.port)).await.unwrap();
    let seen = |host: &FakeHost| -> Vec<(String, Option<String>)> {
        let of = |request: &String| {
            let path = request.split(' ').nth(1).unwrap().split("back-to-").next().unwrap().to_owned();
            let header = request.lines().find(|line| line.to_lowercase().starts_with("authorization:"));
            (path, header.map(|header| header.split_once(' ').unwrap().1.to_owned()))
        };
        host.requests().iter().map(of).collect()
    };
    let token = || Some("Bearer hf_SECRET".to_owned());
    let path = |path: &str, header| (path.to_owned(), header);
    assert_eq!(
        seen(&hub),
        [
            path("/end", token()),
            path("/same", token()),
            path("/end", token()),
            path("/other", token()),
            path("/there-and-back", token()),
            path("/end", None),
            path("/user", Some("Basic bmFtZTp3b3Jk".into())),
        ]
    );
    assert_eq!(seen(&other), [path("/file", None), path("/", None), path("/direct", None)]);
}

#[tokio::test]
async fn a_field_may_hold_an_address_or_the_data() {
    let host = FakeHost::start(PUBLIC, |_, _| ok("picture"));
    let downloader = downloader();
    for source in [&format!("http://a.test:{}/", host.port), "data:image/png;base64,cGljdHVyZQ==", "cGljdHVyZQ"] {
        assert_eq!(downloader.load(source, "image", MAX).await.unwrap().bytes, b"picture", "{source}");
    }
    for (source, expected) in [
        ("file:///etc/passwd", "url_refused"),
        ("./picture.png", "invalid_base64"),
        ("C:\\picture.png", "url_refused"),
        ("a.test:80/x", "url_refused"),
        ("http://", "invalid_url"),
        ("data:text/html,x", "invalid_data_uri"),
        ("", "invalid_base64"),
        (&format!("http://a.test/{}", "x".repeat(9000)), "invalid_url"),
    ] {
        assert_eq!(downloader.load(source, "image", MAX).await.unwrap_err().code, expected, "{source}");
    }
    assert_eq!(host.requests().len(), 1);
}
