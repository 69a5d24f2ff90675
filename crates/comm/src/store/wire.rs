//! Frames of the store: a length, then a body of bounded fields, all little-endian.

use super::{MAX_KEY_BYTES, MAX_VALUE_BYTES, MAX_WAIT_KEYS};
use spec::{Error, Result};
use std::io::{self, Read, Write};
use std::time::Duration;

/// First bytes of a connection in both directions; the digits are the version. It ends in an empty line, so that
/// servers of other protocols answer, or hang up, at once.
pub(super) const HELLO: [u8; 12] = *b"PHXSTO03\r\n\r\n";

/// Longest frame: the largest value or list of keys, and its small fields.
const MAX_FRAME_BYTES: usize = MAX_VALUE_BYTES * 2 + MAX_KEY_BYTES + 64;

#[derive(Debug, PartialEq)]
pub(super) enum Request {
    Set { key: String, value: Vec<u8> },
    Get { key: String, timeout: Duration },
    Add { key: String, delta: i64 },
    CompareSet { key: String, expect: Option<Vec<u8>>, new: Vec<u8> },
    Wait { keys: Vec<String>, timeout: Duration },
    Delete { key: String },
    Keys { prefix: String },
}

#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    Done,
    Value(Vec<u8>),
    Number(i64),
    Keys(Vec<String>),
    /// Not there (`Get` with no wait), or still missing at the deadline: the keys that are.
    Missing(Vec<String>),
    Refused(String),
}

/// Sends one frame with one write, so that small calls are one packet.
pub(super) fn write_frame(to: &mut impl Write, body: &[u8]) -> io::Result<()> {
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(body);
    to.write_all(&frame)
}

/// Receives one frame; `None` when the other side closed between frames.
pub(super) fn read_frame(from: &mut impl Read) -> io::Result<Option<Vec<u8>>> {
    let mut length = [0; 4];
    loop {
        match from.read(&mut length[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    from.read_exact(&mut length[1..])?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("frame of {length} bytes, expected at most {MAX_FRAME_BYTES}"),
        ));
    }
    let mut body = Vec::new();
    // Grows as bytes arrive: a length alone cannot make the server allocate.
    from.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(body))
}

impl Request {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Request::Set { key, value } => w.byte(1).bytes(key.as_bytes()).bytes(value),
            Request::Get { key, timeout } => w.byte(2).bytes(key.as_bytes()).int(millis(*timeout)),
            Request::Add { key, delta } => w.byte(3).bytes(key.as_bytes()).int(*delta),
            Request::CompareSet { key, expect, new } => {
                w.byte(4).bytes(key.as_bytes()).byte(u8::from(expect.is_some()));
                w.bytes(expect.as_deref().unwrap_or_default()).bytes(new)
            }
            Request::Wait { keys, timeout } => w.byte(5).int(millis(*timeout)).list(keys),
            Request::Delete { key } => w.byte(6).bytes(key.as_bytes()),
            Request::Keys { prefix } => w.byte(7).bytes(prefix.as_bytes()),
        };
        w.0
    }

    pub(super) fn decode(body: &[u8]) -> Result<Request> {
        let mut r = Reader(body);
        let request = match r.byte()? {
            1 => Request::Set { key: r.key()?, value: r.value()? },
            2 => Request::Get { key: r.key()?, timeout: r.timeout()? },
            3 => Request::Add { key: r.key()?, delta: r.int()? },
            4 => {
                let (key, has) = (r.key()?, r.byte()? == 1);
                let (expect, new) = (r.value()?, r.value()?);
                Request::CompareSet { key, expect: has.then_some(expect), new }
            }
            5 => {
                let timeout = r.timeout()?;
                Request::Wait { timeout, keys: r.list()? }
            }
            6 => Request::Delete { key: r.key()? },
            7 => Request::Keys { prefix: r.key()? },
            other => return Err(Error::failure(format!("unknown request {other}"))),
        };
        r.end()?;
        Ok(request)
    }
}

impl Reply {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Reply::Done => w.byte(1),
            Reply::Value(value) => w.byte(2).bytes(value),
            Reply::Number(n) => w.byte(3).int(*n),
            Reply::Keys(keys) => w.byte(4).list(keys),
            Reply::Missing(keys) => w.byte(5).list(keys),
            Reply::Refused(why) => w.byte(6).bytes(why.as_bytes()),
        };
        w.0
    }

    pub(super) fn decode(body: &[u8]) -> Result<Reply> {
        let mut r = Reader(body);
        let reply = match r.byte()? {
            1 => Reply::Done,
            2 => Reply::Value(r.value()?),
            3 => Reply::Number(r.int()?),
            4 => Reply::Keys(r.list()?),
            5 => Reply::Missing(r.list()?),
            6 => Reply::Refused(String::from_utf8_lossy(&r.value()?).into_owned()),
            other => return Err(Error::failure(format!("unknown reply {other}"))),
        };
        r.end()?;
        Ok(reply)
    }
}

fn millis(t: Duration) -> i64 {
    i64::try_from(t.as_millis()).unwrap_or(i64::MAX)
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn byte(&mut self, b: u8) -> &mut Self {
        self.0.push(b);
        self
    }
    fn int(&mut self, n: i64) -> &mut Self {
        self.0.extend_from_slice(&n.to_le_bytes());
        self
    }
    fn bytes(&mut self, b: &[u8]) -> &mut Self {
        self.0.extend_from_slice(&(b.len() as u32).to_le_bytes());
        self.0.extend_from_slice(b);
        self
    }
    fn list(&mut self, keys: &[String]) -> &mut Self {
        self.int(keys.len() as i64);
        for key in keys {
            self.bytes(key.as_bytes());
        }
        self
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n).ok_or_else(|| {
            Error::failure(format!("frame ends after {} bytes where {n} were expected", self.0.len()))
        })?;
        self.0 = rest;
        Ok(head)
    }
    fn byte(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }
    fn int(&mut self) -> Result<i64> {
        Ok(i64::from_le_bytes(self.take(8)?.try_into().unwrap_or_default()))
    }
    fn timeout(&mut self) -> Result<Duration> {
        Ok(Duration::from_millis(self.int()?.max(0) as u64))
    }
    fn sized(&mut self, what: &str, max: usize) -> Result<&'a [u8]> {
        let n = u32::from_le_bytes(self.take(4)?.try_into().unwrap_or_default()) as usize;
        if n > max {
            return Err(Error::failure(format!("{what} of {n} bytes, expected at most {max}")));
        }
        self.take(n)
    }
    fn value(&mut self) -> Result<Vec<u8>> {
        Ok(self.sized("value", MAX_VALUE_BYTES)?.to_vec())
    }
    fn key(&mut self) -> Result<String> {
        let key = self.sized("key", MAX_KEY_BYTES)?;
        String::from_utf8(key.to_vec()).map_err(|_| Error::failure("key is not valid UTF-8"))
    }
    fn list(&mut self) -> Result<Vec<String>> {
        let n = self.int()?;
        if !(0..=MAX_WAIT_KEYS as i64).contains(&n) {
            return Err(Error::failure(format!("list of {n} keys, expected at most {MAX_WAIT_KEYS}")));
        }
        (0..n).map(|_| self.key()).collect()
    }
    fn end(&self) -> Result<()> {
        match self.0.len() {
            0 => Ok(()),
            n => Err(Error::failure(format!("{n} bytes left over at the end of a frame"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(request: Request) {
        assert_eq!(Request::decode(&request.encode()).unwrap(), request);
    }

    #[test]
    fn requests_and_replies_survive_the_wire() {
        let (key, s) = ("k".to_string(), Duration::from_secs(1));
        check(Request::Set { key: key.clone(), value: vec![1, 2] });
        check(Request::Get { key: key.clone(), timeout: s });
        check(Request::Add { key: key.clone(), delta: -3 });
        check(Request::CompareSet { key: key.clone(), expect: None, new: vec![1] });
        check(Request::CompareSet { key: key.clone(), expect: Some(vec![]), new: vec![] });
        check(Request::Wait { keys: vec![key.clone(), "l".into()], timeout: s });
        check(Request::Delete { key: key.clone() });
        check(Request::Keys { prefix: String::new() });
        for reply in [
            Reply::Done,
            Reply::Value(vec![7]),
            Reply::Number(i64::MIN),
            Reply::Keys(vec!["a".into()]),
            Reply::Missing(vec![]),
            Reply::Refused("no".into()),
        ] {
            assert_eq!(Reply::decode(&reply.encode()).unwrap(), reply);
        }
    }

    #[test]
    fn fuzzed_frames_are_refused_or_read() {
        let framed = |body: Vec<u8>| {
            let mut frame = Vec::new();
            write_frame(&mut frame, &body).unwrap();
            frame
        };
        let (key, s) = ("rdzv/none/state".to_string(), Duration::from_secs(1));
        let keys = vec![key.clone(); 3];
        let requests = [
            Request::Set { key: key.clone(), value: vec![7; 90] },
            Request::Get { key: key.clone(), timeout: s },
            Request::CompareSet { key, expect: Some(vec![1; 20]), new: vec![2; 20] },
            Request::Wait { keys: keys.clone(), timeout: s },
        ];
        let replies = [Reply::Value(vec![7; 90]), Reply::Keys(keys), Reply::Refused("no".into())];
        let requests = requests.map(|r| framed(r.encode())).into_iter();
        let good: Vec<Vec<u8>> = requests.chain(replies.map(|r| framed(r.encode()))).collect();
        crate::fuzz_test::fuzz(
            "store",
            &good,
            &[],
            |input| input,
            |input| {
                let Ok(Some(body)) = read_frame(&mut &input[..]) else { return false };
                // Both are tried, for either side may be damaged.
                Request::decode(&body).is_ok() | Reply::decode(&body).is_ok()
            },
        );
    }
}
