//! Addresses and ports.

use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket, sockopt};
use spec::{Error, Result};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};

/// A port that the kernel gives to nobody else until this is dropped, and that a worker can still listen on.
///
/// The socket is bound without listening and allows address reuse, so a listener that does the same (as PyTorch's
/// store, gRPC and Rust's standard library do) takes the port, and there is no moment at which a stranger can.
pub(crate) struct ReservedPort {
    /// The port's number.
    pub(crate) port: u16,
    _socket: OwnedFd,
}

impl ReservedPort {
    /// Any free port.
    pub(crate) fn any() -> Result<ReservedPort> {
        Self::at(0)
    }

    /// This port, or an error if a process uses it.
    pub(crate) fn at(port: u16) -> Result<ReservedPort> {
        let reserve = || -> rustix::io::Result<ReservedPort> {
            let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
            rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
            if port != 0 {
                // A port left in TIME_WAIT by an earlier run is free to use.
                sockopt::set_socket_reuseaddr(&socket, true)?;
            }
            bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
            // Set after the bind, or two of our reservations could be given the same free port.
            sockopt::set_socket_reuseaddr(&socket, true)?;
            let bound = SocketAddr::try_from(getsockname(&socket)?)?;
            Ok(ReservedPort { port: bound.port(), _socket: socket })
        };
        reserve().map_err(|e| match e {
            rustix::io::Errno::ADDRINUSE => taken(port),
            rustix::io::Errno::ACCESS => Error::user(format!("port {port} needs privileges"))
                .hint("take a port above 1023, or leave --master-port out"),
            e => Error::failure(format!("reserve port {port}: {e}")),
        })
    }
}

fn taken(port: u16) -> Error {
    Error::user(format!("port {port} is taken by another process on this machine"))
        .hint("another job may be running: give another --master-port, or leave it out for a free one")
}

/// `host:port` in its two halves; `host`, `[v6]:port` and a bare IPv6 address take the default port.
pub(crate) fn split_endpoint(text: &str, default_port: u16) -> Result<(String, u16)> {
    let wrong = || Error::user(format!("endpoint {text}: expected HOST or HOST:PORT"));
    let (host, port) = if let Some(rest) = text.strip_prefix('[') {
        let (host, tail) = rest.split_once(']').ok_or_else(wrong)?;
        (host, tail.strip_prefix(':'))
    } else {
        match text.rsplit_once(':') {
            Some((host, _)) if host.contains(':') => (text, None),
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let port = port.map_or(Ok(default_port), |p| p.parse().map_err(|_| wrong()))?;
    if host.is_empty() { Err(wrong()) } else { Ok((host.to_owned(), port)) }
}

/// `host:port`, with brackets around an IPv6 address.
pub(crate) fn join_endpoint(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The first address of `host`, which may be one itself.
pub(crate) fn ip_of(host: &str) -> Option<IpAddr> {
    host.parse().ok().or_else(|| resolve(host, 0).first().map(SocketAddr::ip))
}

/// The addresses of `host`; none if it cannot be resolved.
pub(crate) fn resolve(host: &str, port: u16) -> Vec<SocketAddr> {
    (host, port).to_socket_addrs().map_or_else(|_| Vec::new(), Iterator::collect)
}

/// Whether `host` is this machine: only then can its addresses be bound.
pub(crate) fn is_local(host: &str) -> bool {
    host == host_name()
        || resolve(host, 0).iter().any(|a| UdpSocket::bind(SocketAddr::new(a.ip(), 0)).is_ok())
}

/// Whether only processes of this machine can reach `host`.
pub(crate) fn is_loopback(host: &str, port: u16) -> bool {
    let found = resolve(host, port);
    host == "localhost" || !found.is_empty() && found.iter().all(|a| a.ip().is_loopback())
}

/// Where to listen so that others find us at `host`: its address if that is one of this machine's. A name that means a
/// loopback address here may mean another one elsewhere, and one that means none of ours (a proxy in front of us) leads
/// here by ways that we do not know: only then it is every address.
pub(crate) fn bindable(host: &str, port: u16) -> IpAddr {
    let found = resolve(host, port);
    if host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()) {
        return found.first().map_or(Ipv4Addr::LOCALHOST.into(), SocketAddr::ip);
    }
    let is_ours =
        |a: &&SocketAddr| !a.ip().is_loopback() && UdpSocket::bind(SocketAddr::new(a.ip(), 0)).is_ok();
    match found.iter().filter(is_ours).min_by_key(|a| a.is_ipv6()) {
        Some(addr) => addr.ip(),
        None if found.iter().any(SocketAddr::is_ipv4) || found.is_empty() => Ipv4Addr::UNSPECIFIED.into(),
        None => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// The address of this machine on the way to `peer`, found by the routing table alone (no packet is sent).
///
/// Peers can reach it without name resolution, and it is on the network that reaches the meeting point.
pub(crate) fn address_towards(peer: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr =
        if peer.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(peer).ok()?;
    socket.local_addr().ok().map(|a| a.ip())
}

/// This machine's name.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_reserved_port_can_be_listened_on_by_the_worker_and_reserved_by_nobody_else() {
        let reserved = ReservedPort::any().unwrap();
        let listener = TcpListener::bind(("0.0.0.0", reserved.port)).unwrap();
        let message = ReservedPort::at(reserved.port).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(message.contains(&format!("port {} is taken", reserved.port)), "{message}");
        drop(listener);
        let ports: std::collections::BTreeSet<u16> = (0..50)
            .map(|_| ReservedPort::any().unwrap())
            .collect::<Vec<_>>()
            .iter()
            .map(|r| r.port)
            .collect();
        assert_eq!(ports.len(), 50);
    }

    fn check_endpoint(text: &str, expected: Option<(&str, u16)>) {
        let found = split_endpoint(text, 29400).ok();
        assert_eq!(found, expected.map(|(h, p)| (h.to_owned(), p)), "{text}");
    }

    #[test]
    fn endpoints() {
        check_endpoint("head", Some(("head", 29400)));
        check_endpoint("head:1", Some(("head", 1)));
        check_endpoint("[::1]:2", Some(("::1", 2)));
        check_endpoint("[::1]", Some(("::1", 29400)));
        check_endpoint("fe80::1", Some(("fe80::1", 29400)));
        check_endpoint("head:x", None);
        check_endpoint(":1", None);
        assert_eq!(join_endpoint("::1", 2), "[::1]:2");
    }

    #[test]
    fn this_machine_is_local() {
        assert!(is_local("localhost") && is_local("127.0.0.1") && is_local(&host_name()));
        assert!(!is_local("192.0.2.1"));
        let towards = address_towards("127.0.0.2:9".parse().unwrap());
        assert_eq!(towards.map(|a| a.is_loopback()), Some(true));
        assert!(is_loopback("localhost", 1) && is_loopback("127.0.0.3", 1) && !is_loopback("192.0.2.1", 1));
        assert_eq!(bindable("127.0.0.2", 1).to_string(), "127.0.0.2");
        assert_eq!(bindable("192.0.2.1", 1).to_string(), "0.0.0.0");
    }
}
