//! Inline data, and settings. What needs a server is in `tests/net.rs`.

use super::*;

fn inline(source: &str) -> Result<Download, &'static str> {
    from_inline(source, "image", 100).map_err(|error| {
        assert_eq!(error.field.as_deref(), Some("image"));
        error.code
    })
}

#[test]
fn data_uris_and_bare_base64_are_decoded() {
    let cat = Download { bytes: b"a cat?>".to_vec(), content_type: None };
    for text in ["YSBjYXQ/Pg==", "YSBjYXQ/Pg", "YSBjYXQ_Pg", " YSBj\r\nYXQ/\n\tPg== ", "YSBjYXQ/Pg="] {
        assert_eq!(inline(text), Ok(cat.clone()), "{text:?}");
        assert_eq!(inline(&format!("data:;base64,{text}")), Ok(cat.clone()));
        let uri = format!("DATA:image/png;charset=x;base64,{text}");
        assert_eq!(inline(&uri), Ok(Download { content_type: Some("image/png;charset=x".into()), ..cat.clone() }));
    }
}

#[test]
fn bad_inline_data_says_what_is_wrong() {
    for text in ["", "====", "a", "YSB!", "YSBj=YXQ", "é", "\0", "data:image/png;base64,", "data:;base64,YSBj,YXQ="] {
        assert_eq!(inline(text), Err("invalid_base64"), "{text:?}");
    }
    for text in ["data:", "data:,", "data:,hello", "data:text/plain,hello", "data:image/png;base64", "data:base64,YSBj"]
    {
        assert_eq!(inline(text), Err("invalid_data_uri"), "{text:?}");
    }
}

#[test]
fn inline_data_has_a_cap() {
    let of = |bytes: usize| base64::engine::general_purpose::STANDARD.encode(vec![7; bytes]);
    assert_eq!(inline(&of(100)).unwrap().bytes.len(), 100);
    for bytes in [101, 200, 1_000_000] {
        assert_eq!(inline(&of(bytes)), Err("data_too_large"), "{bytes}");
        assert_eq!(inline(&format!("data:image/png;base64,{}", of(bytes))), Err("data_too_large"));
    }
    assert_eq!(inline(&"!".repeat(1_000_000)), Err("data_too_large"));
}

#[test]
fn random_inline_data_does_not_panic() {
    let mut random = fastrand::Rng::with_seed(5);
    for _ in 0..50_000 {
        let bytes: Vec<u8> = (0..random.usize(0..60)).map(|_| random.u8(..)).collect();
        let text = String::from_utf8_lossy(&bytes);
        for source in [text.to_string(), format!("data:{text}"), format!("data:;base64,{text}")] {
            let _ = inline(&source);
        }
    }
}

#[test]
fn settings_come_from_variables() {
    let max_bytes = |value: &str| {
        let value = value.to_owned();
        Settings::from_variables(|name| (name == "RUNPOD_MAX_DOWNLOAD_BYTES").then(|| value.clone())).max_bytes
    };
    assert_eq!(max_bytes("1000"), 1000);
    for value in ["", "0", "-1", "1e9", "many", "99999999999999999999"] {
        assert_eq!(max_bytes(value), 5_368_709_120, "{value:?}");
    }
    let settings = Settings::from_variables(|name| Some(format!("https://{name}.example")));
    assert_eq!(settings.hub_endpoint.as_deref(), Some("https://HF_ENDPOINT.example"));
    let printed = format!("{settings:?} {:?}", Downloader::new(Guard::new(Default::default()), settings.clone()));
    assert!(!printed.contains("HF_TOKEN") && !printed.contains("CIVITAI_TOKEN"), "{printed}");
}

#[test]
fn a_token_has_one_host_by_one_scheme() {
    let secret = |text: &str| Some(Secret::new(text));
    let settings = Settings {
        hub_token: secret("hub"),
        hub_endpoint: Some("http://mirror.example:8080/hub/".into()),
        civitai_token: secret("civitai"),
        ..Settings::default()
    };
    let downloader = Downloader::new(Guard::new(Default::default()), settings);
    let token = |url: &str| {
        let origin = Url::parse(url).unwrap().origin();
        downloader.tokens.iter().find(|(owner, _)| *owner == origin).map(|(_, token)| token.reveal())
    };
    assert_eq!(token("https://huggingface.co/a/b/resolve/main/c?download=true"), Some("hub"));
    assert_eq!(token("https://HuggingFace.co:443/"), Some("hub"));
    assert_eq!(token("http://mirror.example:8080/x"), Some("hub"));
    assert_eq!(token("https://civitai.com/api/download/models/1"), Some("civitai"));
    for url in [
        "http://huggingface.co/",
        "https://huggingface.co:8443/",
        "https://huggingface.co.evil.example/",
        "https://evilhuggingface.co/",
        "https://huggingface.co@evil.example/",
        "https://cdn-lfs.huggingface.co/",
        "https://huggingface.co./",
        "https://mirror.example:8080/",
        "http://mirror.example/",
        "http://civitai.com/",
        "https://image.civitai.com/",
        "https://example.com/?https://civitai.com",
    ] {
        assert_eq!(token(url), None, "{url}");
    }
}
