//! Keeps requests to addresses that clients name away from private networks (SSRF). A name is resolved once, every
//! answer is checked, and only the checked addresses are connected to: the check sits in the resolver of the HTTP client,
//! so DNS that changes in between has nothing to win. Follows the rules of RunPod's SDK (`rp_download`, since 1.12.0).

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::{Client, Method, RequestBuilder, dns, redirect};
use url::{Host, Url};

use super::{Proxies, variable};
use crate::error::{Error, ErrorClass, Result};

const USER_AGENT: &str = concat!("sdxl-worker/", env!("CARGO_PKG_VERSION"));
/// Short, since a worker may be frozen between jobs and its connections die unnoticed.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(20);

pub type LookupFuture = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;
/// From a name to all its addresses.
pub type Lookup = Arc<dyn Fn(String) -> LookupFuture + Send + Sync>;

#[derive(Debug, Clone)]
pub struct Settings {
    /// Turns the address check and the refusal of proxies off.
    pub allow_private: bool,
    pub proxies: Proxies,
    pub connect_timeout: Duration,
}

impl Settings {
    /// From `RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS` and the usual proxy variables.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let allow = variable(&get, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS").unwrap_or_default().to_ascii_lowercase();
        Settings {
            allow_private: matches!(allow.as_str(), "1" | "true" | "yes"),
            proxies: Proxies::from_variables(get),
            ..Settings::default()
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings { allow_private: false, proxies: Proxies::default(), connect_timeout: Duration::from_secs(5) }
    }
}

/// An HTTP client that reaches public addresses only and follows no redirect by itself. Clones share its connections.
#[derive(Clone)]
pub struct Guard {
    settings: Settings,
    allowed: fn(IpAddr) -> bool,
    lookup: Lookup,
    client: Arc<OnceLock<Client>>,
}

impl Guard {
    pub fn new(settings: Settings) -> Self {
        Guard::with_lookup(settings, system_lookup(), is_global)
    }

    /// A guard that lets everything through, by way of the configured proxies.
    pub fn open(settings: Settings) -> Self {
        Guard::new(Settings { allow_private: true, ..settings })
    }

    /// The same for addresses that the operator configured.
    pub(super) fn opened(&self) -> Self {
        let settings = Settings { allow_private: true, ..self.settings.clone() };
        Guard::with_lookup(settings, self.lookup.clone(), self.allowed)
    }

    /// With another resolver and another idea of which addresses are public.
    pub fn with_lookup(settings: Settings, lookup: Lookup, allowed: fn(IpAddr) -> bool) -> Self {
        let allowed = if settings.allow_private { |_| true } else { allowed };
        Guard { settings, allowed, lookup, client: Arc::default() }
    }

    /// What can be said before the name is resolved: scheme, literal addresses, proxies.
    ///
    /// # Errors
    ///
    /// `url_refused`.
    pub fn check(&self, url: &Url) -> Result<()> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(refused("only `http` and `https` addresses are fetched"));
        }
        let literal = match url.host() {
            None => return Err(refused("the address names no host")),
            Some(Host::Domain(_)) => None,
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
        };
        if literal.is_some_and(|address| !(self.allowed)(address)) {
            return Err(refused(NotPublic.to_string()));
        }
        if !self.settings.allow_private && self.settings.proxies.for_url(url).is_some() {
            let message = "a proxy is configured, behind which the address cannot be checked";
            return Err(refused(message)
                .remedy("except the host with NO_PROXY, or set RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS=1 on the worker"));
        }
        Ok(())
    }

    /// A request that may be sent. If sending fails, [`refusal`] says whether it was the name's addresses.
    ///
    /// # Errors
    ///
    /// `url_refused`; `http_client`, if the installation has no usable certificates.
    pub fn request(&self, method: Method, url: &Url) -> Result<RequestBuilder> {
        self.check(url)?;
        Ok(self.client()?.request(method, url.clone()))
    }

    /// Built at its first use, since reading the certificates takes milliseconds and many workers never need them.
    fn client(&self) -> Result<&Client> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let resolver = CheckedLookup { lookup: self.lookup.clone(), allowed: self.allowed };
        let builder = Client::builder()
            .user_agent(USER_AGENT)
            .redirect(redirect::Policy::none())
            .connect_timeout(self.settings.connect_timeout)
            .pool_idle_timeout(POOL_IDLE_TIMEOUT)
            .dns_resolver(Arc::new(resolver))
            .no_proxy();
        let builder = if self.settings.allow_private {
            let proxies = self.settings.proxies.clone();
            builder.proxy(reqwest::Proxy::custom(move |url| proxies.for_url(url)))
        } else {
            builder
        };
        let client = builder.build().map_err(|error| {
            Error::setup("http_client", "the HTTP client could not be made")
                .remedy("install the CA certificates (package `ca-certificates`)")
                .source(error)
        })?;
        Ok(self.client.get_or_init(|| client))
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Guard").field(&self.settings).finish()
    }
}

fn refused(message: impl Into<String>) -> Error {
    Error::new(ErrorClass::InvalidInput, "url_refused", message)
        .remedy("name a public address, or send the data inline")
}

/// `url_refused`, if this request failed because its host has an address that is not public.
pub fn refusal(error: &reqwest::Error) -> Option<Error> {
    let mut cause = error.source();
    while let Some(error) = cause {
        if error.is::<NotPublic>() {
            return Some(refused(NotPublic.to_string()));
        }
        cause = error.source();
    }
    None
}

/// The system's resolver, which knows `/etc/hosts`.
pub fn system_lookup() -> Lookup {
    Arc::new(|host| {
        Box::pin(async move {
            let resolve = move || (host.as_str(), 0).to_socket_addrs();
            let addresses = tokio::task::spawn_blocking(resolve).await.map_err(io::Error::other)??;
            Ok(addresses.map(|address| address.ip()).collect())
        })
    })
}

/// The marker by which a refusal is found among a request's causes. Says no address: what lies inside is not for clients.
#[derive(Debug)]
struct NotPublic;

impl fmt::Display for NotPublic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the host has an address that is not public")
    }
}

impl StdError for NotPublic {}

/// What the HTTP client asks for addresses, and so the only source of what it connects to. Literal addresses do not come
/// by here; [`Guard::check`] has seen them.
struct CheckedLookup {
    lookup: Lookup,
    allowed: fn(IpAddr) -> bool,
}

impl dns::Resolve for CheckedLookup {
    fn resolve(&self, name: dns::Name) -> dns::Resolving {
        let addresses = (self.lookup)(name.as_str().to_owned());
        let allowed = self.allowed;
        Box::pin(async move {
            let addresses = addresses.await?;
            if !addresses.iter().all(|address| allowed(*address)) {
                return Err(NotPublic.into());
            }
            // The client puts the port in place of the zero.
            Ok(Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0))) as dns::Addrs)
        })
    }
}

/// Whether an address can be reached through the public internet, and nothing but it: not loopback, private, link-local
/// (where clouds keep their metadata), shared, reserved, multicast, for documentation or benchmarks, nor an IPv6 form
/// with such an IPv4 address inside.
pub fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_global_v4(address),
        IpAddr::V6(address) => is_global_v6(address),
    }
}

fn is_global_v4(address: Ipv4Addr) -> bool {
    let refused = matches!(
        address.octets(),
        [0, ..]                         // this network
            | [10, ..]                  // private
            | [100, 64..=127, ..]       // shared by carriers
            | [127, ..]                 // loopback
            | [169, 254, ..]            // link-local
            | [172, 16..=31, ..]        // private
            | [192, 0, 0, _]            // protocol assignments
            | [192, 0, 2, _]            // documentation
            | [192, 88, 99, _]          // relays of 6to4, withdrawn
            | [192, 168, ..]            // private
            | [198, 18..=19, ..]        // benchmarks
            | [198, 51, 100, _]         // documentation
            | [203, 0, 113, _]          // documentation
            | [224..=255, ..] // multicast, reserved, broadcast
    );
    !refused
}

fn is_global_v6(address: Ipv6Addr) -> bool {
    let inner = |high: u16, low: u16| is_global_v4(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
    match address.segments() {
        // IPv4-mapped, and what DNS64 answers in networks without IPv4.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => inner(high, low),
        [0x2002, high, low, ..] => inner(high, low), // 6to4
        [0x2001, 0..=0x1ff, ..] => false,            // protocol assignments: Teredo, benchmarks, ORCHID
        [0x2001, 0xdb8, ..] => false,                // documentation
        [0x3fff, 0..=0xfff, ..] => false,            // documentation
        // All that is given out. Outside lie loopback, IPv4-compatible, local NAT64, unique-local, link-local, multicast.
        [0x2000..=0x3fff, ..] => true,
        _ => false,
    }
}

#[cfg(test)]
#[path = "guard_tests.rs"]
mod tests;
