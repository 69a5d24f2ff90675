//! Who may speak to the store: both sides prove that they hold the job's secret, then every frame carries a tag.
//!
//! | who | bytes |
//! | --- | --- |
//! | server | `C`, the id of its secret, its nonce; or `N` and why it takes nobody |
//! | client | the id of its secret, its nonce, its proof |
//! | server | its proof |
//!
//! Proofs and the connection's keys are made of the secret and both nonces. Before its proof a client can send no more
//! than it takes to bring one.

use super::wire;
use crate::seal::{Seals, TAG_BYTES};
use crate::secret::{ID_BYTES, KEY_BYTES, Key, NONCE_BYTES, Secret, random};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Instant;

const CHALLENGE: u8 = b'C';
const NOT_NOW: u8 = b'N';
/// Longest reason of a server that takes nobody.
const MAX_REASON_BYTES: usize = 1024;
const PROOF_BYTES: usize = ID_BYTES + NONCE_BYTES + KEY_BYTES;

/// A connection both of whose ends have shown that they belong to the job.
pub(super) struct Line<S> {
    stream: S,
    seals: Seals,
}

impl<S> std::fmt::Debug for Line<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Line")
    }
}

/// Why a server takes no client.
pub(super) enum Refusal {
    /// The connection failed, or what came was nothing that a store says.
    Io(io::Error),
    /// The store is another job's, or this process is; what to say about it.
    Secret(String),
    /// The store has no room; in its words.
    Full(String),
}

impl From<io::Error> for Refusal {
    fn from(e: io::Error) -> Refusal {
        Refusal::Io(e)
    }
}

impl<S: Read + Write> Line<S> {
    pub(super) fn stream(&self) -> &S {
        &self.stream
    }

    /// Sends one frame with one write, so that small calls are one packet.
    pub(super) fn send(&mut self, body: &[u8]) -> io::Result<()> {
        let mut frame = Vec::with_capacity(4 + body.len() + TAG_BYTES);
        wire::write_frame(&mut frame, body)?;
        frame.extend_from_slice(&self.seals.out.tag(body));
        self.stream.write_all(&frame)
    }

    /// Receives one frame; `None` when the other side closed between frames.
    pub(super) fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        let Some(body) = wire::read_frame(&mut self.stream)? else { return Ok(None) };
        let mut tag = [0; TAG_BYTES];
        self.stream.read_exact(&mut tag)?;
        if self.seals.r#in.is_tag(&body, &tag) {
            return Ok(Some(body));
        }
        Err(io::Error::new(
            ErrorKind::InvalidData,
            "a frame without the job's seal came: something in between has changed, repeated or left out some",
        ))
    }

    /// The client's part, after the greeting.
    pub(super) fn ask(mut stream: S, secret: &Secret) -> Result<Line<S>, Refusal> {
        let mut kind = [0];
        stream.read_exact(&mut kind)?;
        match kind[0] {
            CHALLENGE => {}
            NOT_NOW => return Err(Refusal::Full(reason(&mut stream)?)),
            _ => return Err(io::Error::from(ErrorKind::InvalidData).into()),
        }
        let (mut theirs, mut nonce) = ([0; ID_BYTES], [0; NONCE_BYTES]);
        stream.read_exact(&mut theirs)?;
        stream.read_exact(&mut nonce)?;
        if theirs != secret.id() {
            return Err(Refusal::Secret(secret.differs(theirs)));
        }
        let own: [u8; NONCE_BYTES] = random().map_err(|e| io::Error::other(e.to_string()))?;
        let key = connection(secret, &nonce, &own);
        stream.write_all(&[&theirs[..], &own, &key.prove("client", &[])].concat())?;
        let mut proof = [0; KEY_BYTES];
        stream.read_exact(&mut proof)?;
        if !key.is_proof(&proof, "server", &[]) {
            return Err(Refusal::Secret("it does not hold the job's secret, though it says so".into()));
        }
        Ok(Line { stream, seals: Seals::new(&key, true) })
    }
}

impl<'a> Line<&'a TcpStream> {
    /// The server's part, after the greeting; `None` if the client is none of the job's.
    pub(super) fn answer(
        mut stream: &'a TcpStream,
        secret: &Secret,
        until: Instant,
    ) -> io::Result<Option<Self>> {
        let nonce: [u8; NONCE_BYTES] = random().map_err(|e| io::Error::other(e.to_string()))?;
        stream.write_all(&[&[CHALLENGE], &secret.id()[..], &nonce].concat())?;
        let mut shown = [0; PROOF_BYTES];
        read_until(stream, &mut shown, until)?;
        let (theirs, proof) = shown[ID_BYTES..].split_at(NONCE_BYTES);
        let key = connection(secret, &nonce, theirs);
        let proof = proof.try_into().unwrap_or(&[0; KEY_BYTES]);
        if shown[..ID_BYTES] != secret.id() || !key.is_proof(proof, "client", &[]) {
            return Ok(None);
        }
        stream.write_all(&key.prove("server", &[]))?;
        Ok(Some(Line { stream, seals: Seals::new(&key, false) }))
    }
}

fn connection(secret: &Secret, server: &[u8], client: &[u8]) -> Key {
    secret.derive("store", &[&wire::HELLO, server, client])
}

/// Reads all of `bytes`, however slowly they come, until the deadline.
pub(super) fn read_until(mut stream: &TcpStream, bytes: &mut [u8], until: Instant) -> io::Result<()> {
    let mut got = 0;
    while got < bytes.len() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[got..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => got += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Says why nobody is taken, in place of a challenge.
pub(super) fn refuse(stream: &mut impl Write, why: &str) -> io::Result<()> {
    let why = &why.as_bytes()[..why.len().min(MAX_REASON_BYTES)];
    stream.write_all(&[&[NOT_NOW], &(why.len() as u16).to_le_bytes()[..], why].concat())
}

fn reason(stream: &mut impl Read) -> io::Result<String> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut why = vec![0; usize::from(u16::from_le_bytes(length)).min(MAX_REASON_BYTES)];
    stream.read_exact(&mut why)?;
    Ok(String::from_utf8_lossy(&why).into_owned())
}
