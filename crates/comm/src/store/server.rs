use super::auth::{self, Line};
use super::wire::{self, Reply, Request};
use super::{MAX_CONNECTIONS, MAX_KEY_BYTES, MAX_STORE_BYTES, MAX_STRANGERS, MAX_VALUE_BYTES};
use crate::os::{is_out_of_files, os_error, raise_file_limit};
use crate::secret::Secret;
use spec::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a client may take over the greeting or to drain a reply before it is cut off.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait of one request; clients ask again, so a vanished client does not keep its thread.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// How long a caller that cannot be served may take to hear it.
const TURN_AWAY_TIMEOUT: Duration = Duration::from_millis(500);
/// Stack of a connection thread: it holds no more than a frame header.
const STACK_BYTES: usize = 128 << 10;

/// A running store; dropping it closes every connection and joins every thread.
#[derive(Debug)]
pub struct StoreServer {
    addr: SocketAddr,
    shared: Arc<Served>,
    accept: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Served {
    secret: Secret,
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    map: BTreeMap<String, Vec<u8>>,
    /// Of all keys and values.
    bytes: usize,
    connections: HashMap<u64, Arc<TcpStream>>,
    /// Those of them that have not shown yet that they are the job's, the oldest first.
    strangers: BTreeSet<u64>,
}

impl StoreServer {
    /// [`StoreServer::start_with`], [without a secret](Secret::none).
    ///
    /// # Errors
    /// As there.
    pub fn start(bind: SocketAddr) -> Result<StoreServer> {
        StoreServer::start_with(bind, &Secret::none())
    }

    /// Serves those who hold `secret`. Listens on `bind` (port 0 picks a free one, see [`StoreServer::addr`]) and serves until dropped.
    ///
    /// # Errors
    /// The address is taken or not one of this machine's.
    pub fn start_with(bind: SocketAddr, secret: &Secret) -> Result<StoreServer> {
        raise_file_limit();
        let listener = TcpListener::bind(bind).map_err(|e| {
            let hint = match e.kind() {
                std::io::ErrorKind::AddrInUse => "another program has this port: give all ranks another one",
                std::io::ErrorKind::AddrNotAvailable => {
                    "the first rank's address must be one of this machine's"
                }
                _ => "give all ranks a port that this process may listen on",
            };
            Error::user(format!("start the store on {bind}: {e}")).hint(hint)
        })?;
        let addr =
            listener.local_addr().map_err(|e| Error::failure(format!("start the store on {bind}: {e}")))?;
        let (secret, state) = (secret.clone(), Mutex::default());
        let (changed, stopping) = Default::default();
        let shared = Arc::new(Served { secret, state, changed, stopping });
        let accept = {
            let shared = shared.clone();
            spawn("store-accept", move || shared.accept(&listener))?
        };
        Ok(StoreServer { addr, shared, accept: Some(accept) })
    }

    /// The address that clients connect to; its IP is unspecified if the server was bound to all interfaces.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for connection in self.shared.lock().connections.values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        self.shared.changed.notify_all();
        // `accept` has no timeout: a connection of our own ends it.
        let mut wake = self.addr;
        if wake.ip().is_unspecified() {
            wake.set_ip(match wake {
                SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
            });
        }
        let woken = TcpStream::connect_timeout(&wake, Duration::from_secs(1)).is_ok();
        if let Some(accept) = self.accept.take().filter(|_| woken) {
            let _ = accept.join();
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK_BYTES)
        .spawn(work)
        .map_err(|e| Error::failure(format!("start thread {name}: {e}")))
}

impl Served {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code under the lock can leave the map half changed, so a poisoned lock is still good.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        let mut spare = spare();
        let stopping = || self.stopping.load(Ordering::SeqCst);
        // Looked at before as well: the connection that ends `accept` may have been turned away.
        for id in (0..).take_while(|_| !stopping()) {
            let stream = listener.accept();
            if stopping() {
                break;
            }
            threads.retain(|t| !t.is_finished());
            let stream = match stream {
                Ok((stream, _)) => Arc::new(stream),
                Err(e) if is_out_of_files(&e) && spare.take().is_some() => {
                    // With the spare descriptor the caller can be told why nobody answers.
                    let error = os_error("the store cannot take one more connection", &e);
                    let _ = listener.accept().map(|(stream, _)| turn_away(&stream, &error));
                    spare = self::spare();
                    continue;
                }
                Err(_) => {
                    std::thread::park_timeout(Duration::from_millis(20));
                    spare = spare.or_else(self::spare);
                    continue;
                }
            };
            if !self.lock().admit(id, &stream) {
                let error =
                    Error::failure(format!("the store holds {MAX_CONNECTIONS} connections, its most"));
                let _ = turn_away(&stream, &error);
                continue;
            }
            let shared = self.clone();
            let served = spawn("store-client", move || {
                // An error here is the client's: it sees its connection close.
                let _ = shared.serve(id, &stream);
                shared.lock().forget(id);
            });
            match served {
                Ok(thread) => threads.push(thread),
                Err(_) => self.lock().forget(id),
            }
        }
        // Connections accepted while `drop` was closing the others.
        for connection in self.lock().connections.values() {
            let _ = connection.shutdown(Shutdown::Both);
        }
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn serve(&self, id: u64, mut stream: &TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(PEER_TIMEOUT))?;
        let until = Instant::now() + PEER_TIMEOUT;
        let mut hello = [0; wire::HELLO.len()];
        auth::read_until(stream, &mut hello, until)?;
        stream.write_all(&wire::HELLO)?;
        if hello != wire::HELLO {
            return Ok(());
        }
        let Some(mut line) = Line::answer(stream, &self.secret, until)? else { return Ok(()) };
        self.lock().strangers.remove(&id);
        stream.set_read_timeout(None)?;
        while let Some(body) = line.receive()? {
            let reply = match Request::decode(&body) {
                Ok(request) => self.answer(request),
                Err(e) => Reply::Refused(e.to_string()),
            };
            line.send(&reply.encode())?;
        }
        Ok(())
    }

    fn answer(&self, request: Request) -> Reply {
        let mut state = self.lock();
        match request {
            Request::Set { key, value } => match state.put(key, value) {
                Ok(()) => {
                    self.changed.notify_all();
                    Reply::Done
                }
                Err(full) => full,
            },
            Request::Get { key, timeout } => {
                let keys = [key];
                state = match self.wait(state, &keys, timeout) {
                    Ok(state) => state,
                    Err(reply) => return reply,
                };
                state.map.get(&keys[0]).cloned().map_or(Reply::Missing(keys.to_vec()), Reply::Value)
            }
            Request::Wait { keys, timeout } => match self.wait(state, &keys, timeout) {
                Ok(_) => Reply::Done,
                Err(reply) => reply,
            },
            Request::Add { key, delta } => add(&mut state, key, delta, || self.changed.notify_all()),
            Request::CompareSet { key, expect, new } => {
                let now = state.map.get(&key);
                if now == expect.as_ref() {
                    if let Err(full) = state.put(key, new.clone()) {
                        return full;
                    }
                    self.changed.notify_all();
                    return Reply::Value(new);
                }
                Reply::Value(now.cloned().unwrap_or_default())
            }
            Request::Delete { key } => Reply::Number(i64::from(state.take(&key))),
            Request::Keys { prefix } => list(&state.map, &prefix),
        }
    }

    /// Waits until all `keys` are there; the reply to give if they are not by then.
    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        keys: &[String],
        timeout: Duration,
    ) -> Result<MutexGuard<'a, State>, Reply> {
        let deadline = Instant::now() + timeout.min(MAX_WAIT);
        loop {
            if keys.iter().all(|k| state.map.contains_key(k)) {
                return Ok(state);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let missing = keys.iter().filter(|k| !state.map.contains_key(*k));
                return Err(Reply::Missing(missing.cloned().collect()));
            }
            if self.stopping.load(Ordering::SeqCst) {
                return Err(Reply::Refused("the store is stopping".into()));
            }
            state = match self.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl State {
    /// Takes a connection that nothing is known of yet, if there is room. Those that come and say nothing make room for
    /// those that come after them.
    fn admit(&mut self, id: u64, stream: &Arc<TcpStream>) -> bool {
        if self.strangers.len() >= MAX_STRANGERS
            && let Some(oldest) = self.strangers.pop_first()
            && let Some(stream) = self.connections.remove(&oldest)
        {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let fits = self.connections.len() < MAX_CONNECTIONS;
        if fits {
            self.connections.insert(id, stream.clone());
            self.strangers.insert(id);
        }
        fits
    }

    fn forget(&mut self, id: u64) {
        self.connections.remove(&id);
        self.strangers.remove(&id);
    }

    /// Stores a value, unless that were too much altogether: the answer then.
    fn put(&mut self, key: String, value: Vec<u8>) -> Result<(), Reply> {
        let old = self.map.get(&key).map_or(0, |old| size(&key, old));
        let bytes = self.bytes - old + size(&key, &value);
        if bytes > MAX_STORE_BYTES {
            return Err(Reply::Refused(format!(
                "the store holds {} bytes, and {} more are over its most, {MAX_STORE_BYTES}",
                self.bytes,
                value.len()
            )));
        }
        self.bytes = bytes;
        self.map.insert(key, value);
        Ok(())
    }

    fn take(&mut self, key: &str) -> bool {
        let old = self.map.remove(key);
        self.bytes -= old.as_ref().map_or(0, |old| size(key, old));
        old.is_some()
    }
}

/// What an entry takes: its bytes, and about as much as a map adds to each.
fn size(key: &str, value: &[u8]) -> usize {
    const ENTRY_BYTES: usize = 96;
    key.len() + value.len() + ENTRY_BYTES
}

/// A descriptor to give up when all others are in use.
fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Answers a caller that cannot be served with the reason.
fn turn_away(mut stream: &TcpStream, error: &Error) -> std::io::Result<()> {
    let hint = error.hint_text().map_or(String::new(), |hint| format!("{}{hint}", super::HINT));
    stream.set_write_timeout(Some(TURN_AWAY_TIMEOUT))?;
    stream.set_read_timeout(Some(TURN_AWAY_TIMEOUT))?;
    stream.write_all(&wire::HELLO)?;
    auth::refuse(&mut stream, &format!("{error}{hint}"))?;
    stream.shutdown(Shutdown::Write)?;
    // Closing with something unread would take the answer away before it is read.
    let mut rest = [0; 256];
    while stream.read(&mut rest)? > 0 {}
    Ok(())
}

fn add(state: &mut State, key: String, delta: i64, changed: impl FnOnce()) -> Reply {
    let now = match state.map.get(&key) {
        None => 0,
        Some(text) => match std::str::from_utf8(text).ok().and_then(|t| t.parse::<i64>().ok()) {
            Some(n) => n,
            None => {
                return Reply::Refused(format!(
                    "add to key {key}: its value of {} bytes is not a whole number",
                    text.len()
                ));
            }
        },
    };
    let Some(sum) = now.checked_add(delta) else {
        return Reply::Refused(format!("add to key {key}: {now} + {delta} overflows"));
    };
    if let Err(full) = state.put(key, sum.to_string().into_bytes()) {
        return full;
    }
    changed();
    Reply::Number(sum)
}

fn list(map: &BTreeMap<String, Vec<u8>>, prefix: &str) -> Reply {
    let keys: Vec<String> = map
        .range(prefix.to_string()..)
        .map(|(k, _)| k)
        .take_while(|k| k.starts_with(prefix))
        .cloned()
        .collect();
    let bytes: usize = keys.iter().map(|k| k.len() + 4).sum();
    if bytes > MAX_VALUE_BYTES || keys.len() > super::MAX_WAIT_KEYS {
        return Reply::Refused(format!("{} keys begin with {prefix:?}: too many to list", keys.len()));
    }
    debug_assert!(keys.iter().all(|k| k.len() <= MAX_KEY_BYTES));
    Reply::Keys(keys)
}
