//! Just enough HTTP/1.1 over a socket to misuse it.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// A request, byte for byte but for the split into parts.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query as sent.
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    pub fn query(&self) -> &str {
        self.target.split_once('?').map_or("", |(_, query)| query)
    }

    /// Still encoded.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.query().split('&').find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name).map(|pair| pair.1))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

pub(super) struct Wire {
    stream: TcpStream,
    /// Read and not yet used.
    buffer: Vec<u8>,
    ended: bool,
}

impl Wire {
    pub(super) fn new(stream: TcpStream) -> Wire {
        Wire { stream, buffer: Vec::new(), ended: false }
    }

    pub(super) async fn read_request(&mut self) -> Option<Request> {
        let head_end = loop {
            if let Some(at) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            self.read_more().await?;
        };
        let head = String::from_utf8_lossy(&self.buffer[..head_end]).into_owned();
        let mut lines = head.split("\r\n");
        let mut first = lines.next()?.split(' ');
        let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        let mut request = Request { method, target, headers, body: Vec::new() };
        let length: usize = request.header("content-length").map_or(0, |length| length.parse().unwrap());
        while self.buffer.len() < head_end + length {
            self.read_more().await?;
        }
        request.body = self.buffer[head_end..head_end + length].to_vec();
        self.buffer.drain(..head_end + length);
        Some(request)
    }

    async fn read_more(&mut self) -> Option<()> {
        let mut part = [0; 64 << 10];
        match self.stream.read(&mut part).await {
            Ok(count) if count > 0 => self.buffer.extend(&part[..count]),
            _ => {
                self.ended = true;
                return None;
            }
        }
        Some(())
    }

    /// Returns once the other side has closed the connection.
    pub(super) async fn closed(&mut self) {
        while !self.ended {
            self.read_more().await;
        }
    }

    /// Whether the other side keeps the connection for at least so long, or uses it again.
    pub(super) async fn stays_open(&mut self, time: Duration) -> bool {
        self.buffer.is_empty() && timeout(time, self.read_more()).await.is_err() || !self.ended
    }

    pub(super) async fn write(&mut self, status: u16, headers: &[(&str, String)], body: &[u8]) -> Option<u16> {
        let mut answer = format!("HTTP/1.1 {status} Scripted\r\n");
        for (name, value) in headers {
            answer += &format!("{name}: {value}\r\n");
        }
        if status != 204 {
            answer += &format!("Content-Length: {}\r\n", body.len());
        }
        let bytes = [answer.as_bytes(), b"\r\n", body].concat();
        self.stream.write_all(&bytes).await.ok()?;
        Some(status)
    }

    pub(super) async fn write_half(&mut self, body: &[u8]) {
        let head =
            format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
        let bytes = [head.as_bytes(), &body[..body.len() / 2]].concat();
        self.stream.write_all(&bytes).await.ok();
    }
}
