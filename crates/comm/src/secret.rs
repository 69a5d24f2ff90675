//! What the processes of a job know and nobody else does, and what follows from it: proofs and keys.
//!
//! Everything is HMAC-SHA256 (RFC 2104): of the secret for a key of one purpose, of such a key for a proof. Parts are
//! preceded by their lengths, so that no two lists of parts are one text.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use spec::{Error, Result};
use std::fmt;
use std::sync::Arc;

/// Bytes of a key and of a whole proof.
pub(crate) const KEY_BYTES: usize = 32;
/// Bytes drawn afresh by each side of a connection.
pub(crate) const NONCE_BYTES: usize = 32;
/// Bytes by which two processes find out whose secret is another one.
pub(crate) const ID_BYTES: usize = 4;

/// Fewest bytes of a secret's text: 16 random bytes in hex.
const TEXT_BYTES_MIN: usize = 32;
/// Most: what is longer is some other file.
const TEXT_BYTES_MAX: usize = 4096;

/// Known to the processes of a job alone. Whoever holds it may do everything; whoever does not, nothing.
#[derive(Clone)]
pub struct Secret {
    key: Key,
    id: [u8; ID_BYTES],
    /// Where it is from, for messages.
    source: Arc<str>,
}

impl Secret {
    /// One that nobody has heard of, from the operating system.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub fn random(source: &str) -> Result<Secret> {
        Ok(Secret::new(Key(random()?), source))
    }

    /// None: everyone knows it. For tests, and for networks that only the job can reach.
    pub fn none() -> Secret {
        Secret { key: Key([0; KEY_BYTES]), id: [0; ID_BYTES], source: "none was given".into() }
    }

    /// Reads a secret that a person or a launcher has made; spaces and line ends around it do not count. `source` says
    /// in messages where it is from.
    ///
    /// ```
    /// let secret = comm::Secret::parse("  7c0b2e1f5a9d4836b1c2d3e4f5061728\n", "secret.txt")?;
    /// assert!(format!("{secret:?}").contains("secret.txt"));
    /// assert!(comm::Secret::parse("password", "secret.txt").is_err());
    /// # Ok::<(), spec::Error>(())
    /// ```
    ///
    /// # Errors
    /// It is too short to be one, or too long.
    pub fn parse(text: &str, source: &str) -> Result<Secret> {
        let text = text.trim();
        if !(TEXT_BYTES_MIN..=TEXT_BYTES_MAX).contains(&text.len()) {
            return Err(Error::user(format!(
                "the job's secret ({source}) has {} characters, expected {TEXT_BYTES_MIN} to {TEXT_BYTES_MAX}",
                text.len()
            ))
            .hint("a good one: openssl rand -hex 32"));
        }
        // What a person wrote, or hex digits, becomes a key of full strength by hashing.
        let key = Key([0; KEY_BYTES]).derive("secret", &[text.as_bytes()]);
        Ok(Secret::new(key, source))
    }

    fn new(key: Key, source: &str) -> Secret {
        let mut id = [0; ID_BYTES];
        id.copy_from_slice(&key.derive("id", &[]).0[..ID_BYTES]);
        // Zeros are nobody's.
        id[0] |= 1;
        Secret { key, id, source: source.into() }
    }

    /// The text that [`Secret::parse`] makes the same secret of; to be handed to the job's own processes only.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub fn random_text() -> Result<String> {
        Ok(hex(&random::<KEY_BYTES>()?))
    }

    /// Whether this is [`Secret::none`].
    pub fn is_none(&self) -> bool {
        self.id == [0; ID_BYTES]
    }

    pub(crate) fn id(&self) -> [u8; ID_BYTES] {
        self.id
    }

    /// A key for one purpose.
    pub(crate) fn derive(&self, purpose: &str, parts: &[&[u8]]) -> Key {
        self.key.derive(purpose, parts)
    }

    /// What to say where another process has another one, whose id is `theirs`.
    pub(crate) fn differs(&self, theirs: [u8; ID_BYTES]) -> String {
        let theirs = match theirs {
            [0, 0, 0, 0] => "has no secret".to_owned(),
            id => format!("has the secret {}", hex(&id)),
        };
        let ours = match self.id {
            [0, 0, 0, 0] => "has none".to_owned(),
            id => format!("has {} ({})", hex(&id), self.source),
        };
        format!("it {theirs}, this process (pid {}) {ours}", std::process::id())
    }
}

/// Never shows the key.
impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({}, {})", hex(&self.id), self.source)
    }
}

/// A key with one purpose.
#[derive(Clone)]
pub(crate) struct Key([u8; KEY_BYTES]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    pub(crate) fn mac(&self) -> Hmac<Sha256> {
        // Keys of every length are taken.
        Hmac::new_from_slice(&self.0).unwrap_or_else(|_| Hmac::new(&Default::default()))
    }

    fn over(&self, purpose: &str, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = self.mac();
        for part in [b"phalanx 1", purpose.as_bytes()].iter().chain(parts) {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    pub(crate) fn derive(&self, purpose: &str, parts: &[&[u8]]) -> Key {
        Key(self.prove(purpose, parts))
    }

    /// What only a holder of the key can say about `parts`.
    pub(crate) fn prove(&self, purpose: &str, parts: &[&[u8]]) -> [u8; KEY_BYTES] {
        self.over(purpose, parts).finalize().into_bytes().into()
    }

    /// Whether `proof` is that; in constant time.
    pub(crate) fn is_proof(&self, proof: &[u8; KEY_BYTES], purpose: &str, parts: &[&[u8]]) -> bool {
        self.over(purpose, parts).verify_slice(proof).is_ok()
    }
}

pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut got = 0;
    while got < N {
        match rustix::rand::getrandom(&mut bytes[got..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => got += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::failure(format!("get random bytes from the system: {e}"))),
        }
    }
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_purpose_and_parts_alone() {
        let key = Secret::random("here").unwrap().derive("test", &[]);
        let proof = key.prove("door", &[b"ab", b"c"]);
        let check = |key: &Key, proof: &[u8; KEY_BYTES], purpose: &str, parts: &[&[u8]], holds: bool| {
            assert_eq!(key.is_proof(proof, purpose, parts), holds, "{purpose} {parts:?}");
        };
        check(&key, &proof, "door", &[b"ab", b"c"], true);
        check(&key, &proof, "door", &[b"a", b"bc"], false);
        check(&key, &proof, "door", &[b"abc"], false);
        check(&key, &proof, "store", &[b"ab", b"c"], false);
        check(&Secret::none().derive("test", &[]), &proof, "door", &[b"ab", b"c"], false);
        for bit in 0..8 * KEY_BYTES {
            let mut other = proof;
            other[bit / 8] ^= 1 << (bit % 8);
            check(&key, &other, "door", &[b"ab", b"c"], false);
        }
    }

    #[test]
    fn the_same_text_is_the_same_secret_and_none_is_no_text() {
        let text = Secret::random_text().unwrap();
        let (a, b) = (Secret::parse(&text, "a"), Secret::parse(&format!("\n {text} "), "b"));
        assert_eq!(a.unwrap().id(), b.unwrap().id());
        assert_ne!(Secret::random_text().unwrap(), text);
        assert!(Secret::none().is_none() && !Secret::parse(&text, "a").unwrap().is_none());
        let said = Secret::parse(&text, "a").unwrap();
        assert!(!format!("{said:?}").contains(&text[..8]), "{said:?}");
    }

    /// RFC 4231, test case 2, through the crate that is used.
    #[test]
    fn proofs_are_hmac_sha256() {
        let mut mac = Hmac::<Sha256>::new_from_slice(b"Jefe").unwrap();
        mac.update(b"what do ya want for nothing?");
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hex(&mac.finalize().into_bytes()), expected);
    }
}
