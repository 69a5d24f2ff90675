//! Addresses and ports.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use super::{Check, Verdict, line_of};

/// Where torchrun and `phalanx launch` meet unless told otherwise.
const RENDEZVOUS_PORT: u16 = 29500;

pub(super) fn checks() -> Vec<Check> {
    vec![loopback(), rendezvous(), ports(), name(), addresses()]
}

fn loopback() -> Check {
    let why = "ranks of one machine meet over loopback";
    match echo() {
        Ok(()) => Check::ok("loopback", "connects and answers", why),
        Err(e) => Check::ok("loopback", format!("fails: {e}"), why)
            .amiss(Verdict::Bad, "bring it up (ip link set lo up), and let a firewall pass it"),
    }
}

/// A byte there and back.
fn echo() -> std::io::Result<()> {
    const WAIT: Option<Duration> = Some(Duration::from_secs(2));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut there = TcpStream::connect_timeout(&listener.local_addr()?, Duration::from_secs(2))?;
    let (mut here, _) = listener.accept()?;
    there.set_read_timeout(WAIT)?;
    here.set_read_timeout(WAIT)?;
    let mut byte = [0];
    there.write_all(&[7])?;
    here.read_exact(&mut byte)?;
    here.write_all(&byte)?;
    there.read_exact(&mut byte)
}

fn rendezvous() -> Check {
    let why = "launchers meet there unless another port is named";
    match TcpListener::bind((Ipv4Addr::UNSPECIFIED, RENDEZVOUS_PORT)) {
        Ok(_) => Check::ok("port 29500", "free", why),
        Err(e) => Check::ok("port 29500", format!("{e}"), why)
            .amiss(Verdict::Warn, "another job may run here; name another with --master-port"),
    }
}

fn ports() -> Check {
    let range = line_of("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let ends: Vec<u32> = range.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let count = ends.last().zip(ends.first()).map_or(0, |(b, a)| (b + 1).saturating_sub(*a));
    let found = if ends.len() == 2 { format!("{} to {}", ends[0], ends[1]) } else { "not known".to_owned() };
    Check::ok("free ports", found, "each connection between ranks takes one").unless(
        ends.len() != 2 || count >= 8192,
        Verdict::Warn,
        "sysctl net.ipv4.ip_local_port_range='32768 60999'",
    )
}

fn name() -> Check {
    let name = line_of("/proc/sys/kernel/hostname").unwrap_or_default();
    let why = "other machines connect to the name that this one says it has";
    match (name.as_str(), 0).to_socket_addrs().map(|all| all.collect::<Vec<SocketAddr>>()) {
        Ok(all) if !all.is_empty() => {
            let ips: Vec<String> = all.iter().map(|a| a.ip().to_string()).collect();
            let only_loopback = all.iter().all(|a| a.ip().is_loopback());
            Check::ok("host name", format!("{name} is {}", ips.join(", ")), why).unless(
                !only_loopback,
                Verdict::Warn,
                "where several machines train: let the name resolve to their network's address, or give addresses",
            )
        }
        _ => Check::ok("host name", format!("{name} does not resolve"), why).amiss(
            Verdict::Warn,
            "where several machines train: add it to DNS or /etc/hosts, or give addresses",
        ),
    }
}

/// Interfaces that are up, with the rate that they claim.
fn addresses() -> Check {
    let why = "gradients cross this between machines";
    let names = std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let mut found: Vec<String> = names
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|name| name != "lo")
        .filter(|name| line_of(&format!("/sys/class/net/{name}/operstate")).is_some_and(|s| s != "down"))
        .map(|name| {
            let mbit = line_of(&format!("/sys/class/net/{name}/speed")).and_then(|s| s.parse::<i64>().ok());
            let rate =
                mbit.filter(|m| *m > 0).map(|m| format!(" {} Gbit/s", m as f64 / 1e3)).unwrap_or_default();
            let mtu = line_of(&format!("/sys/class/net/{name}/mtu")).unwrap_or_default();
            format!("{name}{rate} mtu {mtu}")
        })
        .collect();
    found.sort();
    let fabric = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten().flatten();
    found.extend(fabric.map(|e| format!("{} (RDMA)", e.file_name().to_string_lossy())));
    match found.is_empty() {
        true => Check::ok("interfaces", "loopback only", why)
            .amiss(Verdict::Warn, "one machine trains alone; for several, connect it"),
        false => Check::ok("interfaces", found.join(", "), why),
    }
}
