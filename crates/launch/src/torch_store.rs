//! As much of PyTorch's TCPStore protocol as it takes to leave one value for the other ranks: set, wait, get.
//!
//! Under torchrun the agent's store has the one port that all ranks know. Rank 0 puts the address of our own store
//! there. Wire format: PyTorch 2.15, `torch/csrc/distributed/c10d/TCPStore.cpp` and `TCPStoreBackend.hpp`; integers are
//! in the byte order of the machine, strings and values are preceded by their length as 64 bits.

use crate::net;
use comm::Waiting;
use spec::{Error, Result};
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const VALIDATE: u8 = 0;
const SET: u8 = 1;
const GET: u8 = 3;
const WAIT: u8 = 6;
const PING: u8 = 13;
/// Proves that we are a client of that store.
const MAGIC: u32 = 0x3C85_F7CE;
/// The answer to a wait: the keys are there.
const STOP_WAITING: u8 = 0;
/// The store's clients put this before every key.
const KEY_PREFIX: &str = "/";
/// An address is short; anything longer is not the value we left.
const LONGEST_VALUE: u64 = 4096;
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// A connection to PyTorch's store.
pub(crate) struct TorchStore {
    stream: TcpStream,
    until: Instant,
    name: String,
}

impl TorchStore {
    /// Connects within `timeout`, which bounds all calls together.
    pub(crate) fn connect(host: &str, port: u16, timeout: Duration) -> Result<TorchStore> {
        let name = net::join_endpoint(host, port);
        let until = Instant::now() + timeout;
        let _spoken =
            Waiting::begin("phalanx", format!("PyTorch's store at {name}, {} s at most", timeout.as_secs()));
        loop {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let opened =
                net::resolve(host, port).iter().find_map(|a| TcpStream::connect_timeout(a, left).ok());
            if let Some(stream) = opened {
                let mut store = TorchStore { stream, until, name };
                return match store.greet() {
                    Ok(()) => Ok(store),
                    Err(e) => Err(store.failed("greet", &e)),
                };
            }
            if Instant::now() + RETRY_PAUSE >= until {
                return Err(Error::failure(format!("connect to PyTorch's store at {name}: nobody answers"))
                    .hint("MASTER_ADDR and MASTER_PORT name it"));
            }
            std::thread::sleep(RETRY_PAUSE);
        }
    }

    /// Stores `value` under `key`.
    pub(crate) fn set(&mut self, key: &str, value: &[u8]) -> Result<()> {
        let mut message = vec![SET];
        push(&mut message, format!("{KEY_PREFIX}{key}").as_bytes());
        push(&mut message, value);
        self.send(&message).map_err(|e| self.failed(&format!("set {key}"), &e))
    }

    /// The value of `key`, once someone has set it.
    pub(crate) fn get(&mut self, key: &str) -> Result<Vec<u8>> {
        let _spoken =
            Waiting::begin("phalanx", format!("rank 0 to set {key} in PyTorch's store at {}", self.name));
        self.wait_and_get(key).map_err(|e| self.failed(&format!("wait for {key}"), &e))
    }

    fn wait_and_get(&mut self, key: &str) -> io::Result<Vec<u8>> {
        let key = format!("{KEY_PREFIX}{key}");
        let mut message = vec![WAIT];
        message.extend_from_slice(&1u64.to_ne_bytes());
        push(&mut message, key.as_bytes());
        self.send(&message)?;
        let mut answer = [0];
        self.receive(&mut answer)?;
        if answer[0] != STOP_WAITING {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut message = vec![GET];
        push(&mut message, key.as_bytes());
        self.send(&message)?;
        let mut length = [0; 8];
        self.receive(&mut length)?;
        let length = u64::from_ne_bytes(length);
        if length > LONGEST_VALUE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut value = vec![0; usize::try_from(length).unwrap_or(0)];
        self.receive(&mut value)?;
        Ok(value)
    }

    fn greet(&mut self) -> io::Result<()> {
        let mut message = vec![VALIDATE];
        message.extend_from_slice(&MAGIC.to_ne_bytes());
        self.send(&message)?;
        let nonce = std::process::id();
        let mut message = vec![PING];
        message.extend_from_slice(&nonce.to_ne_bytes());
        self.send(&message)?;
        let mut echo = [0; 4];
        self.receive(&mut echo)?;
        if u32::from_ne_bytes(echo) == nonce { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    fn left(&self) -> Option<Duration> {
        Some(self.until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)))
    }

    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.stream.set_write_timeout(self.left())?;
        self.stream.write_all(message)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.stream.set_read_timeout(self.left())?;
        self.stream.read_exact(buffer)
    }

    fn failed(&self, doing: &str, e: &io::Error) -> Error {
        let why = match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "not in time".to_owned(),
            io::ErrorKind::InvalidData => "the answer is not that of PyTorch's store".to_owned(),
            io::ErrorKind::UnexpectedEof => "the connection was closed".to_owned(),
            _ => e.to_string(),
        };
        Error::failure(format!("PyTorch's store at {}: {doing}: {why}", self.name))
    }
}

fn push(message: &mut Vec<u8>, bytes: &[u8]) {
    message.extend_from_slice(&(bytes.len() as u64).to_ne_bytes());
    message.extend_from_slice(bytes);
}
