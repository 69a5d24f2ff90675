//! Who may look. On the loopback address everybody on this machine may, but no page of another site: its requests name
//! another host. Elsewhere a token is asked for.

use std::net::{IpAddr, SocketAddr};

use crate::http::Request;

/// What is asked of requests.
#[derive(Clone, Debug)]
pub struct Access {
    token: Option<String>,
    bound: SocketAddr,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may look.
    Pass,
    /// It brought the token in its address: it gets a cookie and comes again without.
    Welcome { cookie: String },
    /// It named a host that this server is not.
    WrongHost,
    /// It has no token, or another.
    NoToken,
}

impl Access {
    /// For a server at `bound`; a token that is asked for is given in full to every request.
    pub fn new(bound: SocketAddr, token: Option<String>) -> Access {
        Access { token, bound }
    }

    /// The address to open in a browser.
    pub fn url(&self) -> String {
        let token = self.token.as_ref().map(|t| format!("?token={t}")).unwrap_or_default();
        format!("http://{}/{token}", self.bound)
    }

    pub(crate) fn judge(&self, request: &Request) -> Verdict {
        let Some(token) = &self.token else {
            let is_ours = request.header("host").is_some_and(|host| self.is_ours(host));
            return if is_ours { Verdict::Pass } else { Verdict::WrongHost };
        };
        let is_token = |given: &str| same(given.as_bytes(), token.as_bytes());
        let name = self.cookie_name();
        let cookies = request.header("cookie").unwrap_or_default().split(';');
        let mut given = cookies.filter_map(|c| c.trim().strip_prefix(&name)?.strip_prefix('='));
        let bearer = request.header("authorization").and_then(|a| a.strip_prefix("Bearer "));
        if given.any(is_token) || bearer.is_some_and(|b| is_token(b.trim())) {
            Verdict::Pass
        } else if request.query("token").is_some_and(is_token) {
            Verdict::Welcome { cookie: format!("{name}={token}; HttpOnly; SameSite=Strict; Path=/") }
        } else {
            Verdict::NoToken
        }
    }

    /// Cookies of one host are sent to all of its ports.
    fn cookie_name(&self) -> String {
        format!("phalanx_{}", self.bound.port())
    }

    /// Whether a `Host` header names this machine's loopback, or the very address that is served: a name that somebody
    /// else's DNS points here does neither.
    fn is_ours(&self, host: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port))
                if port.parse::<u16>().is_ok() && (!name.contains(':') || name.ends_with(']')) =>
            {
                name
            }
            _ => host,
        };
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        let ip = bare.parse::<IpAddr>().ok();
        name.eq_ignore_ascii_case("localhost")
            || ip.is_some_and(|ip| ip.is_loopback() || ip == self.bound.ip())
    }
}

/// Compares in a time that says nothing about where two texts differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (x, y)| all | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(access: &Access, target: &str, headers: &str, expected: Verdict) {
        let head = format!("GET {target} HTTP/1.1{headers}").replace('\n', "\r\n");
        let request = Request::parse(head.as_bytes()).expect("a request");
        assert_eq!(access.judge(&request), expected, "{head}");
    }

    #[test]
    fn on_loopback_the_host_must_be_ours() {
        let access = Access::new("127.0.0.1:8080".parse().expect("an address"), None);
        for host in
            ["localhost", "LocalHost:8080", "127.0.0.1:8080", "127.0.0.1", "[::1]:8080", "127.9.9.9:1"]
        {
            check(&access, "/", &format!("\nHost: {host}"), Verdict::Pass);
        }
        for host in
            ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil", "", "[::2]:80"]
        {
            check(&access, "/", &format!("\nHost: {host}"), Verdict::WrongHost);
        }
        check(&access, "/", "", Verdict::WrongHost);
    }

    #[test]
    fn elsewhere_the_token_is_asked_for() {
        let access = Access::new("10.0.0.7:80".parse().expect("an address"), Some("secret".into()));
        check(&access, "/", "\nHost: 10.0.0.7", Verdict::NoToken);
        check(&access, "/?token=secreT", "\nHost: x", Verdict::NoToken);
        check(&access, "/?token=secret1", "\nHost: x", Verdict::NoToken);
        check(&access, "/?token=", "\nHost: x", Verdict::NoToken);
        let cookie = "phalanx_80=secret; HttpOnly; SameSite=Strict; Path=/".to_owned();
        check(&access, "/?token=secret", "\nHost: x", Verdict::Welcome { cookie });
        check(&access, "/metrics", "\nAuthorization: Bearer secret", Verdict::Pass);
        check(&access, "/", "\nCookie: a=b; phalanx_80=secret", Verdict::Pass);
        check(&access, "/", "\nCookie: phalanx_81=secret", Verdict::NoToken);
        assert_eq!(access.url(), "http://10.0.0.7:80/?token=secret");
    }
}
