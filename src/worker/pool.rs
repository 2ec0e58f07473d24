//! The HTTP connections, and when not to trust them any more.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

/// Connections that are kept, and when they were last used.
pub struct Pool {
    http: reqwest::Client,
    user_agent: String,
    used: (Instant, SystemTime),
    renewed: Instant,
}

/// Between the clock on the wall and the one that stands still while a machine is paused.
const CLOCK_JUMP: Duration = Duration::from_secs(10);

impl Pool {
    pub fn new(user_agent: &str) -> Result<Pool> {
        let http = connect(user_agent).context("the HTTP client cannot be made")?;
        let now = Instant::now();
        Ok(Pool { http, user_agent: user_agent.into(), used: (now, SystemTime::now()), renewed: now })
    }

    /// For one request; it may keep what it got for as long as the request takes.
    pub fn client(&mut self) -> reqwest::Client {
        let (monotonic, wall) = self.used;
        self.used = (Instant::now(), SystemTime::now());
        let passed = self.used.1.duration_since(wall).unwrap_or_default();
        if passed > monotonic.elapsed() + CLOCK_JUMP {
            self.renew();
        }
        self.http.clone()
    }

    /// Lets go of all connections that lie idle. Reads the system's certificates again, so not more often than makes sense.
    pub fn renew(&mut self) {
        if self.renewed.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.renewed = Instant::now();
        match connect(&self.user_agent) {
            Ok(http) => self.http = http,
            Err(error) => tracing::warn!("the connections cannot be renewed: {error}"),
        }
    }
}

fn connect(user_agent: &str) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .user_agent(user_agent)
        .no_proxy()
        // The key goes to the host that was named, and to no other.
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(Duration::from_secs(10))
        // Short, since a paused worker finds its idle connections dead; probes find out about a held one.
        .pool_idle_timeout(Duration::from_secs(15))
        .tcp_keepalive(Duration::from_secs(10))
        .build()
}
