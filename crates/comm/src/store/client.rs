use super::auth::{Line, Refusal};
use super::wire::{self, Reply, Request};
use super::{MAX_KEY_BYTES, MAX_VALUE_BYTES, MAX_WAIT_KEYS};
use crate::awake::Awake;
use crate::os::{is_out_of_files, os_error};
use crate::secret::Secret;
use crate::waiting::Waiting;
use spec::{Error, Result};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long the server may take over a call that does not wait.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// One server-side wait; a longer one is asked again, so that a dead host is noticed.
const WAIT_SLICE: Duration = Duration::from_secs(10);
/// How long the server may take over the greeting.
const GREET_TIMEOUT: Duration = Duration::from_secs(5);
/// After so long without a greeting from whoever takes connections there it is not a store. Twice a slow greeting: a
/// busy machine is no stranger.
const MUTE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between attempts to reach a server that is not there yet.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Idle connections kept for reuse.
const MAX_IDLE: usize = 8;

/// A handle on a store; clones share it, and threads may call it at once (each call takes a connection of its own).
#[derive(Clone, Debug)]
pub struct StoreClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    addr: String,
    local: IpAddr,
    secret: Secret,
    idle: Mutex<Vec<Line<TcpStream>>>,
}

impl StoreClient {
    /// [`StoreClient::connect_with`] to a store [without a secret](Secret::none).
    ///
    /// # Errors
    /// As there.
    pub fn connect(addr: &str, deadline: Duration) -> Result<StoreClient> {
        StoreClient::connect_with(addr, &Secret::none(), deadline)
    }

    /// Connects to `host:port`, trying again until `deadline` has passed: the server may start later than we do. Both
    /// sides prove that they hold `secret`.
    ///
    /// # Errors
    /// The address cannot be parsed or resolved, nobody listens there in time, or it is no store, or one with another
    /// secret.
    pub fn connect_with(addr: &str, secret: &Secret, deadline: Duration) -> Result<StoreClient> {
        StoreClient::connect_again(addr, secret, deadline, &mut Tries::begin())
    }

    /// The same for who does other things between `tries`.
    ///
    /// # Errors
    /// As [`StoreClient::connect_with`].
    pub fn connect_again(
        addr: &str,
        secret: &Secret,
        deadline: Duration,
        tries: &mut Tries,
    ) -> Result<StoreClient> {
        check_address(addr)?;
        let (began, until) = (Instant::now(), tries.spent() + deadline);
        let doing = format!("connect to the store at {addr}");
        let mut spoken: Option<Waiting> = None;
        let line = loop {
            let tried = tries.spent();
            let left = until.saturating_sub(tried);
            let opened = open(addr, secret, left);
            tries.awake.paused(left);
            let failed = match opened {
                Ok(line) => break line,
                Err(failed) => failed,
            };
            let e = match failed {
                Failed::Connect(e) if is_out_of_files(&e) => return Err(os_error(&doing, &e)),
                Failed::Connect(e) => {
                    tries.mute_since = None;
                    e
                }
                Failed::Greet(e) => {
                    let is_foreign = e.kind() == io::ErrorKind::InvalidData;
                    let mute = tries.spent() - *tries.mute_since.get_or_insert(tried);
                    if is_foreign || mute >= MUTE_TIMEOUT {
                        return Err(Error::user(format!(
                            "{doing}: what listens there is not a store of this version ({e})"
                        ))
                        .hint("another program may use the port: give the job a free one"));
                    }
                    e
                }
                failed => return Err(failed.into_error(&doing)),
            };
            if tries.spent() + RETRY_PAUSE >= until {
                return Err(Error::failure(format!(
                    "{doing}: {e} (tried for {:.1} s)",
                    deadline.as_secs_f64()
                ))
                .hint("check that the host that serves the store is up and its port is open"));
            }
            let what = format!("the store at {addr}, {} s at most: {e}", deadline.as_secs());
            match &spoken {
                Some(spoken) => spoken.now_for(what),
                None => {
                    spoken = Some(Waiting::begin_at(began, format!("process {}", std::process::id()), what))
                }
            }
            std::thread::sleep(RETRY_PAUSE);
            tries.awake.paused(RETRY_PAUSE);
        };
        drop(spoken);
        let local = line
            .stream()
            .local_addr()
            .map_err(|e| Error::failure(format!("connect to the store at {addr}: {e}")))?
            .ip();
        Ok(StoreClient {
            inner: Arc::new(Inner {
                addr: addr.to_string(),
                local,
                secret: secret.clone(),
                idle: Mutex::new(vec![line]),
            }),
        })
    }

    /// The server's address, as given to [`StoreClient::connect`].
    pub fn addr(&self) -> &str {
        &self.inner.addr
    }

    /// The job's secret, which the server holds too.
    pub(crate) fn secret(&self) -> &Secret {
        &self.inner.secret
    }

    /// The address of this machine that the server sees, which other machines can most likely reach too.
    pub fn local_ip(&self) -> IpAddr {
        self.inner.local
    }

    /// Stores `value` under `key`, over what was there.
    ///
    /// # Errors
    /// Key or value too long, or the server is gone.
    pub fn set(&self, key: &str, value: impl AsRef<[u8]>) -> Result<()> {
        let value = checked_value(key, value.as_ref())?;
        match self.call(&Request::Set { key: checked_key(key)?, value }, Duration::ZERO)? {
            Reply::Done => Ok(()),
            other => Err(self.odd("set", key, &other)),
        }
    }

    /// The value of `key`, waiting up to `timeout` for someone to set it.
    ///
    /// # Errors
    /// Not set in time, or the server is gone.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.wait_sliced(timeout, |slice| {
            let request = Request::Get { key: checked_key(key)?, timeout: slice };
            match self.call(&request, slice)? {
                Reply::Value(value) => Ok(Ok(value)),
                Reply::Missing(keys) => Ok(Err(keys)),
                other => Err(self.odd("get", key, &other)),
            }
        })
    }

    /// The value of `key` if it is set now.
    ///
    /// # Errors
    /// The server is gone.
    pub fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let request = Request::Get { key: checked_key(key)?, timeout: Duration::ZERO };
        match self.call(&request, Duration::ZERO)? {
            Reply::Value(value) => Ok(Some(value)),
            Reply::Missing(_) => Ok(None),
            other => Err(self.odd("get", key, &other)),
        }
    }

    /// Adds to the decimal number under `key` (0 if unset) and returns the sum.
    ///
    /// # Errors
    /// The value is no whole number, the sum overflows, or the server is gone.
    pub fn add(&self, key: &str, delta: i64) -> Result<i64> {
        match self.call(&Request::Add { key: checked_key(key)?, delta }, Duration::ZERO)? {
            Reply::Number(n) => Ok(n),
            other => Err(self.odd("add", key, &other)),
        }
    }

    /// Sets `key` to `new` if it now is `expect` (`None`: unset), in one step. Returns what is there afterwards:
    /// `new` if it was set, else the value that stood in the way (empty if there is none).
    ///
    /// # Errors
    /// Key or value too long, or the server is gone.
    pub fn compare_set(&self, key: &str, expect: Option<&[u8]>, new: impl AsRef<[u8]>) -> Result<Vec<u8>> {
        let new = checked_value(key, new.as_ref())?;
        let expect = expect.map(|e| checked_value(key, e)).transpose()?;
        let request = Request::CompareSet { key: checked_key(key)?, expect, new };
        match self.call(&request, Duration::ZERO)? {
            Reply::Value(value) => Ok(value),
            other => Err(self.odd("compare and set", key, &other)),
        }
    }

    /// Waits until every key is set.
    ///
    /// # Errors
    /// Some were not in time (they are named), or the server is gone.
    pub fn wait<K: AsRef<str>>(&self, keys: &[K], timeout: Duration) -> Result<()> {
        if keys.len() > MAX_WAIT_KEYS {
            return Err(Error::user(format!(
                "wait for {} keys, expected at most {MAX_WAIT_KEYS}",
                keys.len()
            )));
        }
        let keys = keys.iter().map(|k| checked_key(k.as_ref())).collect::<Result<Vec<_>>>()?;
        self.wait_sliced(timeout, |slice| {
            match self.call(&Request::Wait { keys: keys.clone(), timeout: slice }, slice)? {
                Reply::Done => Ok(Ok(())),
                Reply::Missing(keys) => Ok(Err(keys)),
                other => Err(self.odd("wait for", &keys.join(", "), &other)),
            }
        })
    }

    /// Removes `key`; whether it was there.
    ///
    /// # Errors
    /// The server is gone.
    pub fn delete(&self, key: &str) -> Result<bool> {
        match self.call(&Request::Delete { key: checked_key(key)? }, Duration::ZERO)? {
            Reply::Number(n) => Ok(n != 0),
            other => Err(self.odd("delete", key, &other)),
        }
    }

    /// All keys that begin with `prefix`, sorted.
    ///
    /// # Errors
    /// Too many to list in one reply, or the server is gone.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>> {
        match self.call(&Request::Keys { prefix: checked_key(prefix)? }, Duration::ZERO)? {
            Reply::Keys(keys) => Ok(keys),
            other => Err(self.odd("list", prefix, &other)),
        }
    }

    /// Asks in slices until `ask` gives a value or `timeout` has passed; then names the keys still missing.
    fn wait_sliced<T>(
        &self,
        timeout: Duration,
        mut ask: impl FnMut(Duration) -> Result<Result<T, Vec<String>>>,
    ) -> Result<T> {
        let mut awake = Awake::begin();
        loop {
            let slice = timeout.saturating_sub(awake.now()).min(WAIT_SLICE);
            match ask(slice)? {
                Ok(value) => return Ok(value),
                Err(missing) if awake.paused(slice) >= timeout => {
                    let mut shown = missing.iter().take(8).map(String::as_str).collect::<Vec<_>>().join(", ");
                    if missing.len() > 8 {
                        shown += &format!(" and {} more", missing.len() - 8);
                    }
                    return Err(Error::failure(format!(
                        "waited {:.1} s for key {shown} in the store at {}",
                        timeout.as_secs_f64(),
                        self.inner.addr
                    )));
                }
                Err(_) => {}
            }
        }
    }

    fn call(&self, request: &Request, wait: Duration) -> Result<Reply> {
        let gone = |e: io::Error| {
            let e = match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "no answer in time".to_string(),
                io::ErrorKind::UnexpectedEof => "it closed the connection".to_string(),
                _ => e.to_string(),
            };
            Error::failure(format!("lost the store at {}: {e}", self.inner.addr))
        };
        let gone = |e: io::Error| if is_out_of_files(&e) { os_error("call the store", &e) } else { gone(e) };
        let idle = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut line = match idle {
            Some(line) => line,
            None => open(&self.inner.addr, &self.inner.secret, CALL_TIMEOUT).map_err(|e| match e {
                Failed::Connect(e) | Failed::Greet(e) => gone(e),
                failed => failed.into_error(&format!("call the store at {}", self.inner.addr)),
            })?,
        };
        let body = exchange(&mut line, request, wait).map_err(gone)?;
        let reply = Reply::decode(&body)
            .map_err(|e| e.context(format!("answer of the store at {}", self.inner.addr)))?;
        if matches!(reply, Reply::Refused(_)) {
            return Ok(reply);
        }
        let mut idle = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MAX_IDLE {
            idle.push(line);
        }
        drop(idle);
        Ok(reply)
    }

    fn odd(&self, doing: &str, key: &str, reply: &Reply) -> Error {
        match reply {
            Reply::Refused(why) => refused(&format!("{doing} {key}"), why),
            other => {
                Error::failure(format!("{doing} {key}: the store at {} answered {other:?}", self.inner.addr))
            }
        }
    }
}

/// A refusal in the store's words, which may hold a hint.
fn refused(doing: &str, why: &str) -> Error {
    match why.split_once(super::HINT) {
        Some((why, hint)) => Error::failure(format!("{doing}: {why}")).hint(hint),
        None => Error::failure(format!("{doing}: {why}")),
    }
}

fn exchange(line: &mut Line<TcpStream>, request: &Request, wait: Duration) -> io::Result<Vec<u8>> {
    line.stream().set_read_timeout(Some(wait + CALL_TIMEOUT))?;
    line.send(&request.encode())?;
    line.receive()?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Tries to reach a store, one after another.
#[derive(Debug)]
pub struct Tries {
    awake: Awake,
    /// Since when whoever takes connections there has said nothing.
    mute_since: Option<Duration>,
}

impl Tries {
    /// None as yet.
    pub fn begin() -> Tries {
        Tries { awake: Awake::begin(), mute_since: None }
    }

    /// How long these tries have taken, without what this process was stopped for.
    pub fn spent(&self) -> Duration {
        self.awake.now()
    }
}

/// Why there is no connection: nobody answers, or not as a store does, or as the store of another job, or of one that
/// has no room.
enum Failed {
    Connect(io::Error),
    Greet(io::Error),
    Secret(String),
    Full(String),
}

impl Failed {
    fn into_error(self, doing: &str) -> Error {
        match self {
            Failed::Connect(e) | Failed::Greet(e) => Error::failure(format!("{doing}: {e}")),
            Failed::Full(why) => refused(doing, &why),
            Failed::Secret(why) => Error::user(format!("{doing}: its secret is not ours: {why}")).hint(
                "all processes of a job hold one secret: give each PHALANX_SECRET_FILE or PHALANX_SECRET of the same \
                 content, and each job a port of its own",
            ),
        }
    }
}

fn open(addr: &str, secret: &Secret, within: Duration) -> Result<Line<TcpStream>, Failed> {
    let until = Instant::now() + within;
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    let addrs: Vec<SocketAddr> = addr.to_socket_addrs().map_err(Failed::Connect)?.collect();
    for addr in addrs {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&addr, left) {
            Ok(stream) => {
                let stream = greet(stream, left).map_err(Failed::Greet)?;
                return Line::ask(stream, secret).map_err(|why| match why {
                    Refusal::Io(e) => Failed::Greet(e),
                    Refusal::Secret(why) => Failed::Secret(why),
                    Refusal::Full(why) => Failed::Full(why),
                });
            }
            Err(e) => last = e,
        }
    }
    Err(Failed::Connect(last))
}

fn greet(mut stream: TcpStream, left: Duration) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(CALL_TIMEOUT))?;
    stream.set_read_timeout(Some(left.min(GREET_TIMEOUT)))?;
    stream.write_all(&wire::HELLO)?;
    let mut hello = [0; wire::HELLO.len()];
    let mut got = 0;
    while got < hello.len() {
        let n = match stream.read(&mut hello[got..]) {
            Ok(n) => n,
            // A process that was stopped and goes on.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it takes connections and says nothing"));
            }
            Err(e) => return Err(e),
        };
        got += n;
        if n == 0 || hello[..got] != wire::HELLO[..got] {
            // Who hangs up may be a store that is just ending.
            let kind = if got == 0 { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::InvalidData };
            let said = String::from_utf8_lossy(&hello[..got]);
            return Err(io::Error::new(kind, format!("it answered {said:?}")));
        }
    }
    Ok(stream)
}

/// What can be no address is not asked of a name server again and again.
fn check_address(addr: &str) -> Result<()> {
    let Some((host, _)) = addr.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()) else {
        return Err(Error::user(format!("store address {addr:?}: expected host:port")));
    };
    let is_number = host.split('.').count() == 4 && host.chars().all(|c| c.is_ascii_digit() || c == '.');
    if is_number && host.parse::<Ipv4Addr>().is_err() {
        return Err(Error::user(format!("store address {addr}: {host} is no IPv4 address"))
            .hint("four numbers up to 255, or the name of the host"));
    }
    Ok(())
}

fn checked_key(key: &str) -> Result<String> {
    if key.len() > MAX_KEY_BYTES {
        return Err(Error::user(format!(
            "store key of {} bytes, expected at most {MAX_KEY_BYTES}",
            key.len()
        )));
    }
    Ok(key.to_string())
}

fn checked_value(key: &str, value: &[u8]) -> Result<Vec<u8>> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(Error::user(format!(
            "value of store key {key} has {} bytes, expected at most {MAX_VALUE_BYTES}",
            value.len()
        )));
    }
    Ok(value.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Tries of a moment each, with a mute stranger for long enough, find what one long try finds.
    #[test]
    fn a_mute_server_is_no_store_however_often_it_is_asked() {
        let mute = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = mute.local_addr().unwrap().to_string();
        let mut tries = Tries::begin();
        let mut ask = |passed: fn(&mut Awake)| {
            passed(&mut tries.awake);
            let moment = Duration::from_millis(60);
            StoreClient::connect_again(&addr, &Secret::none(), moment, &mut tries).unwrap_err()
        };
        assert_eq!(ask(|_| ()).exit_code(), 1);
        let error = ask(|awake| awake.skip(MUTE_TIMEOUT));
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("what listens there is not a store"), "{error}");
    }
}
