//! The address table, and what is refused before any name is resolved.

use super::*;

fn check(url: &str) -> Result<(), &'static str> {
    let url = Url::parse(url).map_err(|_| "invalid_url")?;
    Guard::new(Settings::default()).check(&url).map_err(|error| error.code)
}

#[test]
fn every_class_of_address_that_is_not_public_is_refused() {
    // First and last of each block of IPv4, and some of IPv6.
    let refused = [
        ("this network", "0.0.0.0 0.255.255.255"),
        ("private", "10.0.0.0 10.255.255.255 172.16.0.0 172.31.255.255 192.168.0.0 192.168.255.255"),
        ("shared", "100.64.0.0 100.127.255.255"),
        ("loopback", "127.0.0.0 127.0.0.1 127.255.255.255"),
        ("link-local, cloud metadata", "169.254.0.0 169.254.169.254 169.254.255.255"),
        ("protocol assignments", "192.0.0.0 192.0.0.255"),
        ("documentation", "192.0.2.0 192.0.2.255 198.51.100.0 198.51.100.255 203.0.113.0 203.0.113.255"),
        ("relays of 6to4", "192.88.99.0 192.88.99.255"),
        ("benchmarks", "198.18.0.0 198.19.255.255"),
        ("multicast", "224.0.0.0 239.255.255.255"),
        ("reserved, broadcast", "240.0.0.0 255.255.255.254 255.255.255.255"),
        ("unspecified, loopback", ":: ::1"),
        ("IPv4-compatible", "::127.0.0.1 ::8.8.8.8"),
        ("IPv4-mapped", "::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0.0.0.0"),
        ("IPv4-translated", "::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8"),
        ("NAT64", "64:ff9b::127.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::8.8.8.8"),
        ("discard", "100::1 100:0:0:1::1"),
        ("Teredo", "2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2"),
        ("benchmarks, ORCHID, assignments", "2001:2::1 2001:10::1 2001:20::1 2001:1ff:ffff::1"),
        ("documentation", "2001:db8::1 2001:db8:ffff::1 3fff::1 3fff:fff:ffff::1"),
        ("6to4", "2002:7f00:1::1 2002:a00:1::1 2002:a9fe:a9fe::1 2002:c0a8:101::1"),
        ("not given out, segment routing", "4000::1 5f00::1 e000::1"),
        ("unique-local, cloud metadata", "fc00::1 fd00:ec2::254 fdff:ffff::1"),
        ("link-local", "fe80::1 febf::1"),
        ("site-local", "fec0::1"),
        ("multicast", "ff00::1 ff02::1 ff0e::1"),
    ];
    for (class, addresses) in refused {
        for address in addresses.split(' ') {
            let parsed: IpAddr = address.parse().unwrap();
            assert!(!is_global(parsed), "{class}: {address}");
            let host = if parsed.is_ipv6() { format!("[{address}]") } else { address.to_owned() };
            assert_eq!(check(&format!("http://{host}:8080/x")), Err("url_refused"), "{class}: {address}");
        }
    }
    let public = "1.0.0.0 1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 \
        169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.88.98.255 \
        192.88.100.0 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 \
        203.0.114.0 223.255.255.255 2000::1 2001:200::1 2001:db7::1 2001:db9::1 2002:808:808::1 2606:4700::1111 \
        2a00:1450:4001::1 3ffe:ffff::1 3fff:1000::1 ::ffff:8.8.8.8 64:ff9b::8.8.8.8";
    for address in public.split_whitespace() {
        assert!(is_global(address.parse().unwrap()), "{address}");
    }
}

#[test]
fn every_spelling_of_a_private_address_is_refused() {
    for host in [
        "2130706433",
        "0x7f000001",
        "017700000001",
        "0x7f.1",
        "127.1",
        "127.0.1",
        "0177.0.0.1",
        "0x7F.0x0.0x0.0x1",
        "127.0.0.1.",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
        "169.0xfe.43518",
        "0",
        "0x",
        "0.0",
        "\u{ff11}\u{ff12}\u{ff17}.0.0.1",
        "\u{2460}\u{2461}\u{2466}.\u{24ea}.\u{24ea}.\u{2460}",
        "127。0。0。1",
        "127%2e0%2e0%2e1",
        "%31%32%37.0.0.1",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:7f00:1]",
        "[0:0:0:0:0:ffff:127.0.0.1]",
        "[::FFFF:a9fe:a9fe]",
        "user:password@127.0.0.1",
        "8.8.8.8@127.0.0.1",
        "example.com@0x7f.1:8080",
        "user@[::1]:1",
        "127.0.0.1:80",
        "127.0.0.1:65535",
        "10.0.0.1:0",
        "127.0.0.1\\@8.8.8.8",
        "127.0.0.1#@8.8.8.8",
        "127.0.0.1?@8.8.8.8",
        "\t127.0.0.1",
        "12\n7.0.0.1",
    ] {
        for scheme in ["http", "https", "HTTP"] {
            assert_eq!(check(&format!("{scheme}://{host}/latest")), Err("url_refused"), "{host:?}");
        }
    }
    for odd in ["http:127.0.0.1/", "http:/127.0.0.1", "http:\\\\127.0.0.1", "///127.0.0.1", " http://127.0.0.1 "] {
        assert!(matches!(check(odd), Err("url_refused" | "invalid_url")), "{odd:?}");
    }
}

#[test]
fn only_http_is_fetched() {
    for url in [
        "file:///etc/passwd",
        "file://8.8.8.8/share",
        "ftp://8.8.8.8/",
        "gopher://8.8.8.8/",
        "data:text/plain,x",
        "javascript:1",
        "unix:/run/docker.sock",
        "ws://8.8.8.8/",
        "s3://bucket/key",
        "jar:http://8.8.8.8/!/",
        "blob:http://8.8.8.8/",
    ] {
        assert_eq!(check(url), Err("url_refused"), "{url}");
    }
}

#[test]
fn what_is_no_address_is_invalid() {
    for url in [
        "",
        "example.com",
        "//example.com",
        "http://",
        "http://:80",
        "http://a b/",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://[fe80::1%eth0]/",
        "http://example.com:99999/",
        "http://example.com:x/",
        "http://256.1.1.1/",
        "http://1.2.3.4.5/",
        "http://0x1ffffffff/",
        "http://[::g]/",
        "http://exa%00mple.com/",
        "http://a\0b/",
        "http://xn--\u{ff}/",
    ] {
        assert_eq!(check(url), Err("invalid_url"), "{url:?}");
    }
}

#[test]
fn names_and_public_addresses_pass_to_the_resolver() {
    for url in [
        "http://example.com",
        "https://example.com:8443/a?b#c",
        "http://user:password@example.com/",
        "http://127.0.0.1@example.com/",
        "http://example.com./",
        "http://8.8.8.8/",
        "https://[2606:4700::1111]:1/",
        "http://134744072/",
        "http://localhost/",
        "http://münchen.example/",
        "http://127.0.0.1.example.com/",
    ] {
        assert_eq!(check(url), Ok(()), "{url}");
    }
}

#[test]
fn the_escape_variable_and_the_proxies_come_from_the_environment() {
    let allows = |value: Option<&str>| {
        let get = |name: &str| value.filter(|_| name == "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS").map(str::to_owned);
        Guard::new(Settings::from_variables(get)).check(&Url::parse("http://127.0.0.1/").unwrap()).is_ok()
    };
    for value in ["1", "true", "yes", "TRUE", " Yes "] {
        assert!(allows(Some(value)), "{value}");
    }
    for value in [None, Some(""), Some("0"), Some("false"), Some("no"), Some("on"), Some("2")] {
        assert!(!allows(value), "{value:?}");
    }
}

#[test]
fn a_proxy_is_refused_unless_it_is_excepted_or_private_addresses_are_allowed() {
    let guard = |allow: &'static str| {
        let get = move |name: &str| match name {
            "HTTPS_PROXY" => Some("http://10.0.0.1:3128".to_owned()),
            "NO_PROXY" => Some("direct.example".to_owned()),
            "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS" => Some(allow.to_owned()),
            _ => None,
        };
        Guard::new(Settings::from_variables(get))
    };
    let code = |guard: Guard, url: &str| guard.check(&Url::parse(url).unwrap()).map_err(|error| error.code);
    assert_eq!(code(guard(""), "https://example.com/"), Err("url_refused"));
    assert_eq!(code(guard(""), "https://8.8.8.8/"), Err("url_refused"));
    assert_eq!(code(guard(""), "http://example.com/"), Ok(()));
    assert_eq!(code(guard(""), "https://direct.example/"), Ok(()));
    assert_eq!(code(guard("1"), "https://example.com/"), Ok(()));
    assert_eq!(code(guard("1"), "file:///etc/passwd"), Err("url_refused"));
}

/// Whatever is made of pieces that confuse parsers: no panic, and what passes names a host or a public address.
#[test]
fn random_addresses_are_refused_or_public() {
    const PIECES: &[&str] = &[
        "http",
        "https",
        "file",
        ":",
        "/",
        "//",
        "\\",
        "@",
        "[",
        "]",
        "%",
        "%00",
        "%2e",
        "?",
        "#",
        ".",
        "..",
        "::",
        "::1",
        "ffff",
        "127",
        "0",
        "1",
        "0x7f",
        "017700000001",
        "2130706433",
        "169.254.169.254",
        "10.0.0.1",
        "8.8.8.8",
        "localhost",
        "example.com",
        "user",
        "password",
        "\0",
        "\t",
        "\r\n",
        " ",
        "\u{3002}",
        "\u{ff0e}",
        "\u{ad}",
        "é",
        "🦀",
        "xn--",
        "%25eth0",
        ":80",
        ":99999",
        "-",
    ];
    let guard = Guard::new(Settings::default());
    let mut random = fastrand::Rng::with_seed(46);
    let mut passed = 0;
    for round in 0..200_000 {
        let mut url = if round % 2 == 0 { "http://".to_owned() } else { String::new() };
        for _ in 0..random.usize(0..8) {
            url.push_str(PIECES[random.usize(..PIECES.len())]);
        }
        let Ok(url) = Url::parse(&url) else { continue };
        if guard.check(&url).is_err() {
            continue;
        }
        passed += 1;
        assert!(matches!(url.scheme(), "http" | "https"), "{url}");
        // As the HTTP client does: what reads as an address is not resolved.
        let host = url.host_str().unwrap().trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = host.parse::<IpAddr>() {
            assert!(is_global(address), "{url}");
        }
    }
    assert!(passed > 1000, "{passed}");
}

#[test]
fn random_bytes_do_not_panic_the_guard() {
    let guard = Guard::new(Settings::default());
    let mut random = fastrand::Rng::with_seed(8);
    for _ in 0..100_000 {
        let bytes: Vec<u8> = (0..random.usize(0..40)).map(|_| random.u8(..)).collect();
        let text = String::from_utf8_lossy(&bytes);
        for url in [text.to_string(), format!("http://{text}"), format!("https://[{text}]/")] {
            if let Ok(url) = Url::parse(&url) {
                let _ = guard.check(&url);
            }
        }
    }
}

#[test]
fn any_embedding_of_a_private_address_is_private() {
    let mut random = fastrand::Rng::with_seed(6);
    for _ in 0..100_000 {
        let inner = Ipv4Addr::from(random.u32(..));
        let [a, b, c, d] = inner.octets();
        let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
        for outer in [
            inner.to_ipv6_mapped(),
            Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, high, low),
            Ipv6Addr::new(0x2002, high, low, 0, 0, 0, 0, 1),
        ] {
            assert_eq!(is_global(outer.into()), is_global(inner.into()), "{outer}");
        }
        for outer in [
            Ipv6Addr::new(0, 0, 0, 0, 0, 0, high, low),
            Ipv6Addr::new(0x2001, 0, high, low, 0, 0, !high, !low),
            Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, high, low),
        ] {
            assert!(!is_global(outer.into()), "{outer}");
        }
    }
}
