//! Which proxy the environment names for an address, by the variables that curl and Python's `requests` read.

use std::fmt;
use std::net::IpAddr;

use url::{Host, Url};

use super::variable;

/// Proxies by scheme, and the hosts that are reached without one. The default is no proxy at all.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    http: Option<String>,
    https: Option<String>,
    except: Vec<String>,
}

impl Proxies {
    /// From `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, where the names in lower case win.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| variable(&get, name).or_else(|| variable(&get, &name.to_ascii_uppercase()));
        let all = either("all_proxy");
        Proxies {
            http: either("http_proxy").or_else(|| all.clone()),
            https: either("https_proxy").or(all),
            except: either("no_proxy")
                .unwrap_or_default()
                .split(',')
                .map(|entry| entry.trim().trim_end_matches('.').to_ascii_lowercase())
                .filter(|entry| !entry.is_empty())
                .collect(),
        }
    }

    /// The proxy that a request to this address would take.
    pub fn for_url(&self, url: &Url) -> Option<Url> {
        let proxy = if url.scheme() == "https" { &self.https } else { &self.http };
        let proxy = proxy.as_deref().filter(|_| !self.excepts(url))?;
        let with_scheme = if proxy.contains("://") { proxy.to_owned() } else { format!("http://{proxy}") };
        // What cannot be read is still a proxy that somebody meant: nothing listens on this port, so the request fails.
        Url::parse(&with_scheme).or_else(|_| Url::parse("http://0.0.0.0:1")).ok()
    }

    fn excepts(&self, url: &Url) -> bool {
        let Some(host) = url.host() else { return false };
        self.except.iter().any(|entry| {
            if entry == "*" {
                return true;
            }
            match &host {
                Host::Ipv4(address) => in_network(IpAddr::V4(*address), entry),
                Host::Ipv6(address) => in_network(IpAddr::V6(*address), entry),
                Host::Domain(name) => {
                    let (entry, port) = match entry.rsplit_once(':').map(|(entry, port)| (entry, port.parse())) {
                        Some((entry, Ok(port))) => (entry, Some(port)),
                        _ => (entry.as_str(), None),
                    };
                    let entry = entry.trim_start_matches("*.").trim_start_matches('.');
                    let below = name.trim_end_matches('.').strip_suffix(entry);
                    let is_named = below.is_some_and(|below| below.is_empty() || below.ends_with('.'));
                    is_named && port.is_none_or(|port| Some(port) == url.port_or_known_default())
                }
            }
        })
    }
}

/// A proxy's address may hold a password.
impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hidden = |proxy: &Option<String>| proxy.as_ref().map(|_| "***");
        f.debug_struct("Proxies")
            .field("http", &hidden(&self.http))
            .field("https", &hidden(&self.https))
            .field("except", &self.except)
            .finish()
    }
}

/// Whether an address is this one, or lies in this network (`10.0.0.0/8`).
fn in_network(address: IpAddr, network: &str) -> bool {
    let (base, bits) = match network.split_once('/') {
        Some((base, bits)) => (base, bits.parse::<u32>().ok()),
        None => (network, Some(128)),
    };
    let base = base.trim_start_matches('[').trim_end_matches(']').parse();
    match (address, base, bits) {
        (IpAddr::V4(address), Ok(IpAddr::V4(base)), Some(bits)) => {
            let differing = u32::from(address) ^ u32::from(base);
            differing.leading_zeros() >= bits.min(32)
        }
        (IpAddr::V6(address), Ok(IpAddr::V6(base)), Some(bits)) => {
            let differing = u128::from(address) ^ u128::from(base);
            differing.leading_zeros() >= bits.min(128)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        let get = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Proxies::from_variables(get)
    }

    fn proxy(variables: &[(&str, &str)], url: &str) -> Option<String> {
        proxies(variables).for_url(&Url::parse(url).unwrap()).map(String::from)
    }

    #[test]
    fn a_proxy_belongs_to_a_scheme() {
        let one = [("HTTPS_PROXY", "http://proxy:3128")];
        assert_eq!(proxy(&one, "https://a.example/").as_deref(), Some("http://proxy:3128/"));
        assert_eq!(proxy(&one, "http://a.example/"), None);
        let all =
            [("ALL_PROXY", "proxy:1"), ("http_proxy", "lower:2"), ("HTTP_PROXY", "upper:3"), ("HTTPS_PROXY", " ")];
        assert_eq!(proxy(&all, "https://a.example/").as_deref(), Some("http://proxy:1/"));
        assert_eq!(proxy(&all, "http://a.example/").as_deref(), Some("http://lower:2/"));
        assert_eq!(proxy(&[], "http://a.example/"), None);
        assert!(proxy(&[("http_proxy", "::not a url::")], "http://a.example/").is_some());
    }

    #[test]
    fn hosts_are_excepted_by_name_port_and_network() {
        let except = |entries: &str, url: &str| proxy(&[("all_proxy", "p:1"), ("no_proxy", entries)], url).is_none();
        for (entries, url, expected) in [
            ("a.example", "http://a.example/", true),
            ("A.example.", "http://a.example./", true),
            (".example", "http://a.example/", true),
            ("*.example", "https://b.a.example/", true),
            ("x, example ,y", "http://a.example/", true),
            ("a.example:80", "http://a.example/", true),
            ("a.example:443", "http://a.example/", false),
            ("ample", "http://a.example/", false),
            ("b.example", "http://a.example/", false),
            ("*", "http://a.example/", true),
            ("", "http://a.example/", false),
            ("10.0.0.0/8", "http://10.1.2.3/", true),
            ("10.0.0.0/8", "http://11.1.2.3/", false),
            ("10.0.0.0/x", "http://10.1.2.3/", false),
            ("0.0.0.0/0", "http://11.1.2.3/", true),
            ("10.1.2.3", "http://10.1.2.3/", true),
            ("10.1.2.3", "http://10.1.2.4/", false),
            ("fd00::/8", "http://[fd12::1]/", true),
            ("[fd12::1]", "http://[fd12::1]/", true),
            ("fd00::/8", "http://10.1.2.3/", false),
        ] {
            assert_eq!(except(entries, url), expected, "{entries:?} {url}");
        }
    }

    #[test]
    fn a_password_is_not_printed() {
        let printed = format!("{:?}", proxies(&[("http_proxy", "http://user:hunter2@proxy:1")]));
        assert!(!printed.contains("hunter2"), "{printed}");
    }
}
