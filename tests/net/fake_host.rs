//! A web server that answers what it is told, byte for byte, and remembers what it was asked.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sdxl_worker::net::{DownloadSettings, Downloader, Guard, GuardSettings, Lookup};

pub(crate) const PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2));
pub(crate) const PRIVATE: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1));

/// Pieces of an answer, with pauses between them; then the connection is closed.
pub(crate) type Answer = Vec<Piece>;

#[derive(Clone)]
pub(crate) enum Piece {
    Bytes(Vec<u8>),
    Pause(Duration),
    /// Again and again, until the other side has enough.
    Forever(Vec<u8>),
}

pub(crate) struct FakeHost {
    pub(crate) port: u16,
    /// Head and body of each request, as they came.
    pub(crate) requests: Arc<Mutex<Vec<String>>>,
    /// How many bytes of answers were taken.
    pub(crate) sent: Arc<AtomicUsize>,
}

impl FakeHost {
    /// Answers the n-th request with `answer(n, request)`.
    pub(crate) fn start(address: IpAddr, answer: impl Fn(usize, &str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let host =
            FakeHost { port: listener.local_addr().unwrap().port(), requests: Arc::default(), sent: Arc::default() };
        let (requests, sent, answer) = (host.requests.clone(), host.sent.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (requests, sent, answer) = (requests.clone(), sent.clone(), answer.clone());
                std::thread::spawn(move || {
                    let request = read_request(&stream);
                    let number = {
                        let mut requests = requests.lock().unwrap();
                        requests.push(request.clone());
                        requests.len() - 1
                    };
                    let _ = write_answer(stream, answer(number, &request), &sent);
                });
            }
        });
        host
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn read_request(mut stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(read) => bytes.extend_from_slice(&buffer[..read]),
        }
        if !bytes[0].is_ascii_alphabetic() {
            break; // a TLS greeting
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn write_answer(mut stream: TcpStream, answer: Answer, sent: &AtomicUsize) -> std::io::Result<()> {
    let mut write = |bytes: &[u8]| -> std::io::Result<()> {
        stream.write_all(bytes)?;
        sent.fetch_add(bytes.len(), Ordering::Relaxed);
        Ok(())
    };
    for piece in answer {
        match piece {
            Piece::Bytes(bytes) => write(&bytes)?,
            Piece::Pause(time) => std::thread::sleep(time),
            Piece::Forever(bytes) => loop {
                write(&bytes)?;
            },
        }
    }
    Ok(())
}

/// An answer with these headers and a body of this length, closing the connection.
pub(crate) fn answer(status: &str, headers: &str, body: &[u8]) -> Answer {
    let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    vec![Piece::Bytes([head.as_bytes(), body].concat())]
}

pub(crate) fn ok(body: &str) -> Answer {
    answer("200 OK", "Content-Type: image/png\r\n", body.as_bytes())
}

pub(crate) fn redirect(status: &str, to: &str) -> Answer {
    answer(status, &format!("Location: {to}\r\n"), b"")
}

/// A resolver with these names; the n-th question for a name gets its n-th answer, then the last one again.
pub(crate) fn names(table: &[(&str, &[&[IpAddr]])]) -> Lookup {
    let table: HashMap<String, Vec<Vec<IpAddr>>> = table
        .iter()
        .map(|(name, answers)| ((*name).to_owned(), answers.iter().map(|answer| answer.to_vec()).collect()))
        .collect();
    let asked = Mutex::new(HashMap::<String, usize>::new());
    Arc::new(move |name| {
        let answer = table.get(&name).map(|answers| {
            let mut asked = asked.lock().unwrap();
            let number = asked.entry(name).or_default();
            *number += 1;
            answers[(*number - 1).min(answers.len() - 1)].clone()
        });
        Box::pin(async move { answer.ok_or_else(|| std::io::Error::other("no such name")) })
    })
}

pub(crate) fn is_public(address: IpAddr) -> bool {
    address == PUBLIC
}

pub(crate) fn guard(table: &[(&str, &[&[IpAddr]])]) -> Guard {
    Guard::with_lookup(GuardSettings::default(), names(table), is_public)
}

/// With short timeouts.
pub(crate) fn settings() -> DownloadSettings {
    DownloadSettings {
        idle_timeout: Duration::from_millis(500),
        total_timeout: Duration::from_secs(10),
        ..DownloadSettings::default()
    }
}

/// Knows `a.test` and `b.test` on the public side, and `inside.test` on the private.
pub(crate) fn downloader() -> Downloader {
    downloader_with(settings())
}

pub(crate) fn downloader_with(settings: DownloadSettings) -> Downloader {
    Downloader::new(
        guard(&[("a.test", &[&[PUBLIC]]), ("b.test", &[&[PUBLIC]]), ("inside.test", &[&[PRIVATE]])]),
        settings,
    )
}
