//! Frames that cannot be changed, left out, repeated or turned around on their way: each carries a tag.
//!
//! A connection has a key for each direction, made of both sides' nonces, so that nothing of another connection or of the
//! other direction fits. A tag is HMAC-SHA256 over the frame's number in its direction and its bytes, cut to
//! [`TAG_BYTES`]. Long bodies are not hashed whole but as [`digest`] sums them up: what an altered body can get past is
//! the chance of one in 2^64 that its sums are the same, and a connection has but one try.

mod digest;

use self::digest::{CHUNK_BYTES, Digest};
use crate::secret::{KEY_BYTES, Key};
use hmac::{Hmac, Mac as _};
use sha2::Sha256;

/// Bytes of a tag (RFC 2104, section 5: no fewer than half of the hash).
pub(crate) const TAG_BYTES: usize = 16;

/// What a tag is over.
#[derive(Clone, Copy)]
#[repr(u8)]
enum Part {
    Head = 1,
    Body = 2,
}

/// One direction of one connection.
pub(crate) struct Seal {
    key: Key,
    mac: Hmac<Sha256>,
    /// Number of the next tag.
    next: u64,
    /// Made for the first body: not every connection has one.
    body: Option<Body>,
}

/// The tag of a body, on the way.
struct Body {
    digest: Digest,
    mac: Hmac<Sha256>,
    /// The beginning of a chunk that is not whole yet.
    part: Box<[u8; CHUNK_BYTES]>,
    filled: usize,
}

/// Both directions, as one side has them.
pub(crate) struct Seals {
    pub(crate) out: Seal,
    pub(crate) r#in: Seal,
}

impl Seals {
    /// Of a connection's `key`, for the side that called (or the other).
    pub(crate) fn new(key: &Key, is_caller: bool) -> Seals {
        let (to, from) = (Seal::new(key.derive("of the caller", &[])), Seal::new(key.derive("to it", &[])));
        if is_caller { Seals { out: to, r#in: from } } else { Seals { out: from, r#in: to } }
    }
}

impl Seal {
    fn new(key: Key) -> Seal {
        Seal { mac: key.derive("tags", &[]).mac(), key, next: 0, body: None }
    }

    /// The tag of a short part. Each call is for the next one.
    pub(crate) fn tag(&mut self, head: &[u8]) -> [u8; TAG_BYTES] {
        cut(self.over(head))
    }

    /// Whether `tag` is the one that the next part must carry; in constant time.
    #[must_use]
    pub(crate) fn is_tag(&mut self, head: &[u8], tag: &[u8; TAG_BYTES]) -> bool {
        self.over(head).verify_truncated_left(tag).is_ok()
    }

    fn over(&mut self, head: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.begin(Part::Head);
        mac.update(head);
        mac
    }

    fn begin(&mut self, part: Part) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(&self.next.to_le_bytes());
        mac.update(&[part as u8]);
        self.next += 1;
        mac
    }

    /// Begins a body, which comes in pieces, one body at a time. Its length must be in the head before it.
    pub(crate) fn begin_body(&mut self) {
        let mac = self.begin(Part::Body);
        match &mut self.body {
            Some(body) => (body.mac, body.filled) = (mac, 0),
            None => {
                let part = Box::new([0; CHUNK_BYTES]);
                self.body = Some(Body { digest: digest(&self.key), mac, part, filled: 0 });
            }
        }
    }

    /// The next bytes of the body.
    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        let Some(Body { digest, mac, part, filled }) = &mut self.body else { return };
        if *filled > 0 {
            let (fill, rest) = bytes.split_at(bytes.len().min(CHUNK_BYTES - *filled));
            part[*filled..][..fill.len()].copy_from_slice(fill);
            *filled += fill.len();
            bytes = rest;
            if *filled < CHUNK_BYTES {
                return;
            }
            mac.update(&digest.sum(&part[..]));
        }
        let chunks = bytes.chunks_exact(CHUNK_BYTES);
        let rest = chunks.remainder();
        chunks.for_each(|chunk| mac.update(&digest.sum(chunk)));
        part[..rest.len()].copy_from_slice(rest);
        *filled = rest.len();
    }

    fn end(&mut self) -> Hmac<Sha256> {
        let Some(Body { digest, mac, part, filled }) = &mut self.body else { return self.mac.clone() };
        if *filled > 0 {
            mac.update(&digest.sum(&part[..*filled]));
        }
        mac.clone()
    }

    /// The tag of the body that was begun last.
    pub(crate) fn body_tag(&mut self) -> [u8; TAG_BYTES] {
        cut(self.end())
    }

    /// Whether `tag` is that; in constant time.
    #[must_use]
    pub(crate) fn is_body_tag(&mut self, tag: &[u8; TAG_BYTES]) -> bool {
        self.end().verify_truncated_left(tag).is_ok()
    }
}

fn digest(key: &Key) -> Digest {
    let mut words = Box::new([0; CHUNK_BYTES]);
    for (i, block) in words.chunks_exact_mut(KEY_BYTES).enumerate() {
        block.copy_from_slice(&key.prove("digest", &[&(i as u64).to_le_bytes()]));
    }
    Digest::new(words)
}

fn cut(mac: Hmac<Sha256>) -> [u8; TAG_BYTES] {
    let whole: [u8; KEY_BYTES] = mac.finalize().into_bytes().into();
    let mut tag = [0; TAG_BYTES];
    tag.copy_from_slice(&whole[..TAG_BYTES]);
    tag
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;
    use proptest::prelude::*;

    fn both() -> (Seals, Seals) {
        let key = Secret::random("here").unwrap().derive("test", &[]);
        (Seals::new(&key, true), Seals::new(&key, false))
    }

    #[test]
    fn heads_come_once_in_order_and_from_the_other_side() {
        let (mut a, mut b) = both();
        let (first, second) = (a.out.tag(b"one"), a.out.tag(b"two"));
        // Turned around: a's own frame does not pass for one of b's.
        assert!(!a.r#in.is_tag(b"one", &first));
        let (_, mut other) = both();
        assert!(!other.r#in.is_tag(b"one", &first), "of another connection");
        assert!(b.r#in.is_tag(b"one", &first));
        assert!(!b.r#in.is_tag(b"one", &first), "repeated");
        assert!(!b.r#in.is_tag(b"two", &second), "what follows a bad one is bad");
        let (mut a, mut b) = both();
        let (_, second) = (a.out.tag(b"one"), a.out.tag(b"two"));
        assert!(!b.r#in.is_tag(b"two", &second), "one was left out");
        let (mut a, mut b) = both();
        let head = a.out.tag(b"");
        b.r#in.begin_body();
        assert!(!b.r#in.is_body_tag(&head), "a head is no body");
    }

    proptest! {
        #[test]
        fn bodies_may_come_in_any_pieces_and_no_bit_may_change(
            length in 0usize..20_000,
            cuts in proptest::collection::vec(0usize..20_000, 0..8),
            flipped in any::<prop::sample::Index>(),
        ) {
            let body: Vec<u8> = (0..length).map(|i| ((i * 31) >> 3) as u8).collect();
            let (mut a, mut b) = both();
            a.out.begin_body();
            a.out.update(&body);
            let tag = a.out.body_tag();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(length)).chain([0, length]).collect();
            cuts.sort_unstable();
            b.r#in.begin_body();
            cuts.windows(2).for_each(|w| b.r#in.update(&body[w[0]..w[1]]));
            prop_assert!(b.r#in.is_body_tag(&tag));
            if length > 0 {
                let (mut altered, at) = (body.clone(), flipped.index(length));
                altered[at] ^= 0x80;
                b.r#in.next = 0;
                b.r#in.begin_body();
                b.r#in.update(&altered);
                prop_assert!(!b.r#in.is_body_tag(&tag));
            }
        }
    }
}
