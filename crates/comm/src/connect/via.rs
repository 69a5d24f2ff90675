//! Connections to other ranks through a proxy: SOCKS version 5 without a login (RFC 1928).

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

/// Version, one method, and that is no login.
const GREETING: [u8; 3] = [5, 1, 0];
/// Version, connect, reserved.
const CONNECT: [u8; 3] = [5, 1, 0];
const IPV4: u8 = 1;
const IPV6: u8 = 4;

/// Connects to `to`, through `proxy` if there is one.
pub(crate) fn connect(to: &SocketAddr, proxy: Option<&SocketAddr>, timeout: Duration) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(proxy.unwrap_or(to), timeout)?;
    stream.set_nodelay(true)?;
    if proxy.is_some() {
        stream.set_read_timeout(Some(timeout))?;
        ask(&stream, to)?;
        stream.set_read_timeout(None)?;
    }
    Ok(stream)
}

fn ask(mut stream: &TcpStream, to: &SocketAddr) -> Result<()> {
    stream.write_all(&GREETING)?;
    let mut method = [0; 2];
    stream.read_exact(&mut method)?;
    if method != [5, 0] {
        return Err(Error::new(ErrorKind::PermissionDenied, "the proxy wants a login, or is none"));
    }
    let mut request = CONNECT.to_vec();
    match to.ip() {
        IpAddr::V4(ip) => request.extend([IPV4].into_iter().chain(ip.octets())),
        IpAddr::V6(ip) => request.extend([IPV6].into_iter().chain(ip.octets())),
    }
    request.extend(to.port().to_be_bytes());
    stream.write_all(&request)?;
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    if head[1] != 0 {
        return Err(Error::new(ErrorKind::ConnectionRefused, format!("the proxy answers {}", head[1])));
    }
    let address = match head[3] {
        IPV4 => 4,
        IPV6 => 16,
        _ => return Err(Error::new(ErrorKind::InvalidData, "the proxy answers with no address")),
    };
    stream.read_exact(&mut [0; 18][..address + 2])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Connects through a proxy that answers with `replies`, one after each message.
    #[track_caller]
    fn check(replies: &'static [&'static [u8]], expected: std::result::Result<(), &str>) {
        let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = proxy.local_addr().unwrap();
        let served = std::thread::spawn(move || {
            let (mut stream, _) = proxy.accept().unwrap();
            let mut heard = Vec::new();
            for (reply, len) in replies.iter().zip([3, 10]) {
                let mut message = vec![0; len];
                stream.read_exact(&mut message).unwrap();
                heard.extend(message);
                stream.write_all(reply).unwrap();
            }
            heard
        });
        let found = connect(&"10.1.2.3:258".parse().unwrap(), Some(&at), Duration::from_secs(5));
        let heard = served.join().unwrap();
        match (found, expected) {
            (Ok(_), Ok(())) => assert_eq!(heard, [5, 1, 0, 5, 1, 0, 1, 10, 1, 2, 3, 1, 2]),
            (Err(e), Err(part)) => assert!(e.to_string().contains(part), "{e}"),
            (found, _) => panic!("{found:?}"),
        }
    }

    #[test]
    fn a_proxy_connects_or_says_no() {
        check(&[&[5, 0], &[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]], Ok(()));
        check(&[&[5, 2]], Err("wants a login"));
        check(&[&[5, 0], &[5, 5, 0, 1]], Err("answers 5"));
        check(&[&[5, 0], &[5, 0, 0, 9]], Err("no address"));
        check(&[&[5, 0], &[]], Err("fill whole buffer"));
    }
}
