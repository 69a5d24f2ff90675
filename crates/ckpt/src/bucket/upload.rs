//! An object written in parts, of which a few are on their way at any time.

use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use spec::Result;
use tokio::task::JoinSet;

use super::{Bucket, errors, runtime};

/// Bytes of a part: large enough that the round trip for each does not show. Stores want at least 5 MiB.
const PART_BYTES: u64 = 8 << 20;

/// The same in a test's own store: many parts of few bytes.
#[cfg(test)]
const PART_BYTES_IN_MEMORY: u64 = 1 << 10;

/// Stores take at most 10,000 parts of an object.
const MAX_PARTS: u64 = 10_000;

/// Parts on their way. With the one being filled they are all the memory that an upload takes.
const ON_THE_WAY: usize = 4;

/// An object on its way. Dropped before it is finished it leaves nothing behind.
pub(crate) struct Upload {
    bucket: Bucket,
    name: String,
    part_bytes: usize,
    filling: Vec<u8>,
    parts: Option<Box<dyn MultipartUpload>>,
    on_the_way: JoinSet<object_store::Result<()>>,
}

impl Upload {
    pub(super) fn new(bucket: Bucket, name: &str, bytes: u64) -> Upload {
        let part_bytes = PART_BYTES.max(bytes.div_ceil(MAX_PARTS)) as usize;
        #[cfg(test)]
        let part_bytes = match bucket.url.starts_with("memory:") {
            true => PART_BYTES_IN_MEMORY as usize,
            false => part_bytes,
        };
        let (filling, on_the_way) = (Vec::new(), JoinSet::new());
        Upload { bucket, name: name.to_owned(), part_bytes, filling, parts: None, on_the_way }
    }

    /// Takes more bytes; waits while as many parts are on their way as may be.
    ///
    /// # Errors
    /// When a part could not be written.
    pub(crate) fn write_all(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if self.filling.len() == self.part_bytes {
                self.send()?;
            }
            if self.filling.capacity() == 0 {
                self.filling.reserve_exact(self.part_bytes);
            }
            let room = self.part_bytes - self.filling.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.filling.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    /// Makes the object appear, whole.
    ///
    /// # Errors
    /// When it could not be written; then nothing of it stays.
    pub(crate) fn finish(mut self) -> Result<()> {
        if self.parts.is_none() {
            let (key, all) =
                (self.bucket.key(&self.name), PutPayload::from(std::mem::take(&mut self.filling)));
            let store = self.bucket.store.clone();
            return self.wait(async move { store.put(&key, all).await.map(|_| ()) });
        }
        if !self.filling.is_empty() {
            self.send()?;
        }
        while self.landed()? {}
        let Some(mut parts) = self.parts.take() else { return Ok(()) };
        let completed = self.wait(async { parts.complete().await.map(|_| ()) });
        if completed.is_err() {
            self.parts = Some(parts);
        }
        completed
    }

    /// Sends the part that is full.
    fn send(&mut self) -> Result<()> {
        while self.on_the_way.len() >= ON_THE_WAY {
            self.landed()?;
        }
        if self.parts.is_none() {
            let (key, store) = (self.bucket.key(&self.name), self.bucket.store.clone());
            self.parts = Some(self.wait(async move { store.put_multipart(&key).await })?);
        }
        let part = PutPayload::from(std::mem::take(&mut self.filling));
        if let Some(parts) = &mut self.parts {
            let sent = parts.put_part(part);
            self.on_the_way.spawn_on(sent, runtime()?.handle());
        }
        Ok(())
    }

    /// Waits for a part to land; false when none is on its way.
    fn landed(&mut self) -> Result<bool> {
        let next = runtime()?.block_on(self.on_the_way.join_next());
        let Some(one) = next else { return Ok(false) };
        let one = one.unwrap_or_else(|e| Err(e.into()));
        one.map(|()| true).map_err(|e| self.told(&e))
    }

    fn wait<T>(&self, work: impl Future<Output = object_store::Result<T>>) -> Result<T> {
        runtime()?.block_on(work).map_err(|e| self.told(&e))
    }

    fn told(&self, e: &object_store::Error) -> spec::Error {
        errors::told("write", &self.bucket.url.join(&self.name), e)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let (Some(mut parts), Ok(runtime)) = (self.parts.take(), runtime()) else { return };
        let on_the_way = &mut self.on_the_way;
        // What is told is the first error; parts that could not be removed are the store's own rule's to remove.
        let _ = runtime.block_on(async {
            on_the_way.shutdown().await;
            parts.abort().await
        });
    }
}
