//! As much of HTTP/1.1 as a page that only reads needs: the head of a GET in, one response out.

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// Longest head of a request: browsers send one to two kilobytes.
pub(crate) const HEAD_BYTES_MAX: usize = 8 << 10;

/// The whole head must have come by then.
pub(crate) const HEAD_TIME: Duration = Duration::from_secs(5);

/// A response must be taken by then.
pub(crate) const BODY_TIME: Duration = Duration::from_secs(30);

/// The head of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Without the query.
    pub(crate) path: String,
    pub(crate) query: Vec<(String, String)>,
    /// Names in lower case.
    headers: Vec<(String, String)>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn query(&self, name: &str) -> Option<&str> {
        self.query.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        self.query(name)?.parse().ok()
    }

    /// Parses a head, up to and without the empty line.
    pub(crate) fn parse(head: &[u8]) -> Result<Request, Status> {
        let head = std::str::from_utf8(head).map_err(|_| Status::BadRequest)?;
        if !head.bytes().all(|b| b == b'\t' || b == b'\r' || b == b'\n' || (0x20..0x7f).contains(&b)) {
            return Err(Status::BadRequest);
        }
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().split(' ');
        let (Some(method), Some(target), Some(version), None) =
            (first.next(), first.next(), first.next(), first.next())
        else {
            return Err(Status::BadRequest);
        };
        if !matches!(version, "HTTP/1.1" | "HTTP/1.0") || !target.starts_with('/') {
            return Err(Status::BadRequest);
        }
        let mut headers = Vec::new();
        for line in lines {
            let (name, value) = line.split_once(':').ok_or(Status::BadRequest)?;
            let is_name =
                !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
            if !is_name {
                return Err(Status::BadRequest);
            }
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        // Two of one of these would let two readers of the request disagree.
        for once in ["host", "cookie", "authorization", "content-length"] {
            if headers.iter().filter(|(n, _)| n == once).count() > 1 {
                return Err(Status::BadRequest);
            }
        }
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pairs = query.split('&').filter(|p| !p.is_empty());
        let query =
            pairs.map(|p| p.split_once('=').unwrap_or((p, ""))).map(|(n, v)| (n.to_owned(), v.to_owned()));
        let (method, path) = (method.to_owned(), path.to_owned());
        let request = Request { method, path, query: query.collect(), headers };
        if request.header("content-length").is_some_and(|n| n != "0")
            || request.header("transfer-encoding").is_some()
        {
            return Err(Status::BodyNotWanted);
        }
        match request.method.as_str() {
            "GET" | "HEAD" => Ok(request),
            _ => Err(Status::MethodNotAllowed),
        }
    }

    /// Reads a head within [`HEAD_TIME`] and [`HEAD_BYTES_MAX`]; none from one who closes without a word.
    pub(crate) fn read(stream: &mut TcpStream) -> io::Result<Option<Result<Request, Status>>> {
        let until = Instant::now() + HEAD_TIME;
        let mut head = Vec::new();
        let mut block = [0; 1024];
        loop {
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|l| !l.is_zero()) else {
                return Ok(Some(Err(Status::RequestTimeout)));
            };
            stream.set_read_timeout(Some(left))?;
            let n = match stream.read(&mut block) {
                Ok(0) if head.is_empty() => return Ok(None),
                Ok(0) => return Ok(Some(Err(Status::BadRequest))),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(Some(Err(Status::RequestTimeout)));
                }
                Err(e) => return Err(e),
            };
            let seen = head.len().saturating_sub(3);
            head.extend_from_slice(&block[..n]);
            if let Some(at) = head[seen..].windows(4).position(|w| w == b"\r\n\r\n") {
                return Ok(Some(Request::parse(&head[..seen + at])));
            }
            if head.len() > HEAD_BYTES_MAX {
                return Ok(Some(Err(Status::HeadTooLarge)));
            }
        }
    }
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    SeeOther,
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    RequestTimeout,
    BodyNotWanted,
    HeadTooLarge,
    Unavailable,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Status::Ok => "200 OK",
            Status::SeeOther => "303 See Other",
            Status::BadRequest => "400 Bad Request",
            Status::Unauthorized => "401 Unauthorized",
            Status::Forbidden => "403 Forbidden",
            Status::NotFound => "404 Not Found",
            Status::MethodNotAllowed => "405 Method Not Allowed",
            Status::RequestTimeout => "408 Request Timeout",
            Status::BodyNotWanted => "413 Content Too Large",
            Status::HeadTooLarge => "431 Request Header Fields Too Large",
            Status::Unavailable => "503 Service Unavailable",
        }
    }
}

/// What the page may do: load what this server has, and nothing else from anywhere.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A response whose body is known.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: Status,
    content_type: &'static str,
    body: Vec<u8>,
    extra: Vec<(&'static str, String)>,
}

impl Response {
    pub(crate) fn new(content_type: &'static str, body: impl Into<Vec<u8>>) -> Response {
        Response { status: Status::Ok, content_type, body: body.into(), extra: Vec::new() }
    }

    pub(crate) fn json(value: &impl serde::Serialize) -> Response {
        // Values here have string keys and no other way to fail.
        Response::new("application/json", serde_json::to_vec(value).unwrap_or_default())
    }

    pub(crate) fn refusal(status: Status, why: &str) -> Response {
        Response { status, ..Response::new("text/plain; charset=utf-8", format!("{why}\n")) }
    }

    pub(crate) fn with(mut self, name: &'static str, value: String) -> Response {
        self.extra.push((name, value));
        self
    }

    /// Sends it, without the body if it answers a HEAD.
    pub(crate) fn send(&self, stream: &mut TcpStream, with_body: bool) -> io::Result<()> {
        let mut bytes = head(self.status, self.content_type, Some(self.body.len()), &self.extra);
        if with_body {
            bytes.extend_from_slice(&self.body);
        }
        write_by(stream, &bytes, Instant::now() + BODY_TIME)
    }
}

/// The head of a response; without a length it goes on until the connection ends.
pub(crate) fn head(
    status: Status,
    content_type: &str,
    len: Option<usize>,
    extra: &[(&str, String)],
) -> Vec<u8> {
    let mut head = format!(
        "HTTP/1.1 {}\r\nContent-Type: {content_type}\r\nConnection: close\r\nCache-Control: no-store\r\n\
         Content-Security-Policy: {POLICY}\r\nX-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n\
         Cross-Origin-Resource-Policy: same-origin\r\nCross-Origin-Opener-Policy: same-origin\r\n",
        status.line()
    );
    // Writing to a string cannot fail.
    if let Some(len) = len {
        let _ = write!(head, "Content-Length: {len}\r\n");
    }
    if status == Status::MethodNotAllowed {
        head.push_str("Allow: GET, HEAD\r\n");
    }
    for (name, value) in extra {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    head.push_str("\r\n");
    head.into_bytes()
}

/// Writes all of `bytes`, or fails at `until`: one who takes a byte now and then does not hold a thread for long.
pub(crate) fn write_by(stream: &mut TcpStream, mut bytes: &[u8], until: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = until.checked_duration_since(Instant::now()).filter(|l| !l.is_zero());
        stream.set_write_timeout(Some(left.ok_or(io::ErrorKind::TimedOut)?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(head: &str, expected: Result<(&str, &str), Status>) {
        let found = Request::parse(head.replace('\n', "\r\n").as_bytes());
        let found = found.as_ref().map(|r| (r.method.as_str(), r.path.as_str())).map_err(|e| *e);
        assert_eq!(found, expected, "{head}");
    }

    #[test]
    fn heads() {
        check("GET / HTTP/1.1\nHost: a", Ok(("GET", "/")));
        check("HEAD /api?x=1&y HTTP/1.0", Ok(("HEAD", "/api")));
        check("GET /../../etc/passwd HTTP/1.1\nHost: a", Ok(("GET", "/../../etc/passwd")));
        check("POST / HTTP/1.1\nHost: a", Err(Status::MethodNotAllowed));
        check("GET / HTTP/1.1\nHost: a\nContent-Length: 5", Err(Status::BodyNotWanted));
        check("GET / HTTP/1.1\nHost: a\nTransfer-Encoding: chunked", Err(Status::BodyNotWanted));
        for bad in [
            "",
            "GET",
            "GET /",
            "GET / HTTP/2",
            "GET  / HTTP/1.1",
            "GET http://a/ HTTP/1.1",
            "GET / HTTP/1.1\nHost a",
            "GET / HTTP/1.1\nHost: a\nHost: b",
            "GET / HTTP/1.1\n: a",
            "GET / HTTP/1.1\nA B: a",
            "GET /\u{e9} HTTP/1.1",
            "GET /\0 HTTP/1.1",
        ] {
            check(bad, Err(Status::BadRequest));
        }
        let request =
            Request::parse(b"GET /a?run=3&to=x HTTP/1.1\r\nHOST:  h \r\nAccept: t").expect("a request");
        assert_eq!((request.header("host"), request.header("accept")), (Some("h"), Some("t")));
        assert_eq!(
            (request.number("run"), request.number("to"), request.query("to")),
            (Some(3), None, Some("x"))
        );
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes: Vec<u8>, text in "[ -~\r\n:/?&=]{0,200}") {
            let _ = Request::parse(&bytes);
            let _ = Request::parse(text.as_bytes());
            let _ = Request::parse(format!("GET {text} HTTP/1.1\r\n{text}").as_bytes());
        }
    }
}
