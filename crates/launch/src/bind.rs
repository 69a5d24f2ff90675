//! Which of this machine's addresses others are to reach it at.

use spec::{Error, Result};
use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

/// For ranks: what `--bind` is for `phalanx launch`.
const VARIABLE: &str = "PHALANX_BIND";

/// What was asked for: an address, an interface, or the network that the address is to be in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bind {
    /// This address.
    Addr(IpAddr),
    /// An address of this interface.
    Interface(String),
    /// An address whose first bits are these.
    Subnet(IpAddr, u8),
}

impl FromStr for Bind {
    type Err = ();

    fn from_str(text: &str) -> Result<Bind, ()> {
        let text = text.trim();
        if let Ok(addr) = text.parse() {
            return Ok(Bind::Addr(addr));
        }
        match text.split_once('/') {
            Some((net, bits)) => {
                let (net, bits): (IpAddr, u8) = (net.parse().map_err(drop)?, bits.parse().map_err(drop)?);
                let most = if net.is_ipv4() { Ipv4Addr::BITS } else { Ipv6Addr::BITS };
                if u32::from(bits) <= most { Ok(Bind::Subnet(net, bits)) } else { Err(()) }
            }
            // As the kernel names interfaces: 15 bytes at most.
            None if !text.is_empty() && text.len() < 16 && !text.contains([':', ' ']) => {
                Ok(Bind::Interface(text.to_owned()))
            }
            None => Err(()),
        }
    }
}

impl Bind {
    /// The address of this machine that is meant.
    ///
    /// # Errors
    /// There is none: those that there are, are named.
    pub(crate) fn resolve(&self) -> Result<IpAddr> {
        self.choose(&interfaces())
    }

    /// The same among these interfaces and their addresses. Of several the first one, IPv4 before IPv6.
    fn choose(&self, interfaces: &[(String, IpAddr)]) -> Result<IpAddr> {
        let fits = |(name, addr): &&(String, IpAddr)| match self {
            Bind::Addr(own) => own == addr,
            Bind::Interface(own) => own == name,
            Bind::Subnet(net, bits) => is_in(*addr, *net, *bits),
        };
        // Addresses that hold for one cable only lead nowhere without the cable's name.
        let usable =
            |(_, addr): &&(String, IpAddr)| !matches!(addr, IpAddr::V6(a) if a.is_unicast_link_local());
        let found = interfaces.iter().filter(fits).filter(usable).min_by_key(|(_, addr)| addr.is_ipv6());
        // Not every address shows on an interface: all of 127.0.0.0/8 are this machine's.
        match (found, self) {
            (Some((_, addr)), _) => Ok(*addr),
            (None, Bind::Addr(addr)) if addr.is_loopback() || addr.is_unspecified() => Ok(*addr),
            _ => {
                let all: Vec<String> = interfaces.iter().map(|(name, a)| format!("{a} ({name})")).collect();
                let what = match self {
                    Bind::Addr(addr) => format!("{addr} is no address of this machine"),
                    Bind::Interface(name) => format!("there is no interface {name} with an address here"),
                    Bind::Subnet(net, bits) => format!("no address of this machine is in {net}/{bits}"),
                };
                Err(Error::user(format!("--bind: {what}")).hint(format!("there are: {}", all.join(", "))))
            }
        }
    }
}

/// The address that this rank is to be reached at, if its environment says so.
///
/// # Errors
/// The variable is no address, interface or subnet, or none of this machine's.
pub fn from_env() -> Result<Option<IpAddr>> {
    let Some(text) = std::env::var(VARIABLE).ok().filter(|v| !v.trim().is_empty()) else { return Ok(None) };
    let bind: Bind = text.parse().map_err(|()| {
        Error::user(format!(
            "environment variable {VARIABLE}={text}: expected an address, an interface or a subnet"
        ))
    })?;
    bind.resolve().map(Some)
}

/// A SOCKS proxy that ranks reach each other through.
const PROXY: &str = "PHALANX_PROXY";

/// The proxy that connections to ranks of other hosts go through, if `PHALANX_PROXY` (`ADDRESS:PORT`) names one.
///
/// # Errors
/// What it says is no address with a port.
pub fn proxy_from_env() -> Result<Option<SocketAddr>> {
    let Some(text) = std::env::var(PROXY).ok().filter(|v| !v.trim().is_empty()) else { return Ok(None) };
    let wrong = |_| {
        Error::user(format!("environment variable {PROXY}={text}: expected ADDRESS:PORT of a SOCKS proxy"))
            .hint("unset it to connect to other ranks directly")
    };
    text.trim().parse().map(Some).map_err(wrong)
}

/// This machine's addresses that others may reach it at, IPv4 before IPv6.
pub(crate) fn reachable() -> Vec<IpAddr> {
    let local = |a: &IpAddr| matches!(a, IpAddr::V6(a) if a.is_unicast_link_local()) || a.is_loopback();
    let mut found: Vec<IpAddr> = interfaces().into_iter().map(|(_, a)| a).filter(|a| !local(a)).collect();
    found.sort_by_key(IpAddr::is_ipv6);
    found
}

/// The variable that tells workers.
pub(crate) fn variable(addr: IpAddr) -> (&'static str, String) {
    (VARIABLE, addr.to_string())
}

fn is_in(addr: IpAddr, net: IpAddr, bits: u8) -> bool {
    let bits = u32::from(bits);
    match (addr, net) {
        (IpAddr::V4(a), IpAddr::V4(n)) => {
            (a.to_bits() ^ n.to_bits()).checked_shr(Ipv4Addr::BITS - bits).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), IpAddr::V6(n)) => {
            (a.to_bits() ^ n.to_bits()).checked_shr(Ipv6Addr::BITS - bits).unwrap_or(0) == 0
        }
        _ => false,
    }
}

/// The addresses of this machine's interfaces that are up; none where the system does not tell.
fn interfaces() -> Vec<(String, IpAddr)> {
    let mut first: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the list is written to our pointer, and freed below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = first;
    // SAFETY: the system's list, whose entries live until it is freed.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        if entry.ifa_flags & libc::IFF_UP as u32 == 0 {
            continue;
        }
        // SAFETY: an entry has a name that ends in a zero, and an address or none.
        let (name, addr) = unsafe { (CStr::from_ptr(entry.ifa_name), address(entry.ifa_addr)) };
        found.extend(addr.map(|addr| (name.to_string_lossy().into_owned(), addr)));
    }
    // SAFETY: it is the list that we were given.
    unsafe { libc::freeifaddrs(first) };
    found
}

/// # Safety
/// `addr` is null or points to an address of the family that it names.
unsafe fn address(addr: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: by contract.
    unsafe {
        match i32::from(addr.as_ref()?.sa_family) {
            libc::AF_INET => {
                let v4 = addr.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                let v6 = addr.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(Ipv6Addr::from(v6.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Vec<(String, IpAddr)> {
        let list = [
            ("lo", "127.0.0.1"),
            ("eth0", "fe80::1"),
            ("eth0", "2001:db8::5"),
            ("eth0", "10.1.2.3"),
            ("ib0", "192.168.7.9"),
        ];
        list.map(|(name, addr)| (name.to_owned(), addr.parse().unwrap())).into()
    }

    #[test]
    fn an_address_an_interface_or_a_subnet() {
        let check = |text: &str, expected: Result<&str, &str>| {
            let chosen = text.parse::<Bind>().unwrap().choose(&here());
            match expected {
                Ok(addr) => assert_eq!(chosen.unwrap().to_string(), addr, "{text}"),
                Err(part) => {
                    let error = chosen.unwrap_err();
                    assert!(error.to_string().contains(part) && error.exit_code() == 2, "{text}: {error}");
                    assert!(error.hint_text().is_some_and(|h| h.contains("10.1.2.3 (eth0)")), "{error:?}");
                }
            }
        };
        check("10.1.2.3", Ok("10.1.2.3"));
        check("127.0.0.5", Ok("127.0.0.5"));
        check("eth0", Ok("10.1.2.3"));
        check("ib0", Ok("192.168.7.9"));
        check("192.168.0.0/16", Ok("192.168.7.9"));
        check("2001:db8::/32", Ok("2001:db8::5"));
        check("0.0.0.0/0", Ok("127.0.0.1"));
        check("10.1.2.4", Err("10.1.2.4 is no address"));
        check("eth1", Err("no interface eth1"));
        check("172.16.0.0/12", Err("in 172.16.0.0/12"));
        for wrong in ["", "10.0.0.0/33", "10.0.0/8", "an interface", "x/y"] {
            assert_eq!(wrong.parse::<Bind>(), Err(()), "{wrong}");
        }
    }

    #[test]
    fn this_machine_has_a_loopback_interface() {
        let found = interfaces();
        assert!(found.iter().any(|(_, a)| a.is_loopback()), "{found:?}");
        assert!(Bind::Subnet(Ipv4Addr::LOCALHOST.into(), 8).resolve().unwrap().is_loopback());
    }
}
