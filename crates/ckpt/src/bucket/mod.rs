//! A prefix in an object store (S3, Google Cloud Storage, Azure), spoken to from plain threads.
//!
//! Everything here waits for its answer. A few threads of their own carry the requests, so that parts of one file travel
//! at the same time.

mod connect;
mod credentials;
mod errors;
mod http;
mod signing;
mod upload;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path as Key;
use object_store::{
    Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload, UpdateVersion,
};
use spec::{Error, Result};
use tokio::runtime::Runtime;

pub(crate) use upload::Upload;

#[cfg(test)]
pub(crate) use connect::place;

#[cfg(test)]
mod conformance;

/// The S3 server that the program's own tests use.
#[cfg(test)]
#[path = "../../../phalanx/tests/stores/server.rs"]
mod server;

/// Requests of one call that travel at the same time.
const AT_ONCE: usize = 8;

/// Threads that carry requests: they wait for the network more than they compute.
const THREADS: usize = 2;

/// A prefix in an object store. What lies under it has plain names.
#[derive(Clone, Debug)]
pub(crate) struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Key,
    /// As the user gave it, for messages and for the names of what lies in it.
    url: PathBuf,
}

/// Which writing of an object it is.
pub(crate) struct Version(UpdateVersion);

impl Bucket {
    /// The prefix that a URL names. Reaches for nothing yet.
    ///
    /// # Errors
    /// When the URL names no store, or the environment does not say how to reach it.
    pub(crate) fn at(url: &Path) -> Result<Bucket> {
        let (store, prefix) = connect::store(url)?;
        Ok(Bucket { store, prefix, url: url.to_owned() })
    }

    /// A prefix under this one.
    pub(crate) fn inside(&self, name: &str) -> Bucket {
        let prefix = self.prefix.clone().join(name);
        Bucket { store: Arc::clone(&self.store), prefix, url: self.url.join(name) }
    }

    /// As the user gave it.
    pub(crate) fn url(&self) -> &Path {
        &self.url
    }

    /// Names of the prefixes right under this one.
    ///
    /// # Errors
    /// When the store cannot be reached, has no such bucket, or denies it; so do all that follow.
    pub(crate) fn folders(&self) -> Result<Vec<String>> {
        let listed = self.wait("list", "", self.store.list_with_delimiter(Some(&self.prefix)))?;
        let names = listed.common_prefixes.iter();
        Ok(names.filter_map(|key| key.filename().map(str::to_owned)).collect())
    }

    /// Names and bytes of the objects right under this prefix.
    ///
    /// # Errors
    /// As [`Bucket::folders`].
    pub(crate) fn files(&self) -> Result<Vec<(String, u64)>> {
        let listed = self.wait("list", "", self.store.list_with_delimiter(Some(&self.prefix)))?;
        let found = listed.objects.iter();
        Ok(found.filter_map(|o| Some((o.location.filename()?.to_owned(), o.size))).collect())
    }

    /// Which of these keys under the prefix are there.
    ///
    /// # Errors
    /// As [`Bucket::folders`].
    pub(crate) fn have(&self, names: &[String]) -> Result<Vec<bool>> {
        let one = |name: String| {
            let (store, key) = (Arc::clone(&self.store), self.key(&name));
            async move {
                match store.head(&key).await {
                    Ok(_) => Ok(true),
                    Err(StoreError::NotFound { .. }) => Ok(false),
                    Err(e) => Err(e),
                }
            }
        };
        let all = stream::iter(names.to_vec()).map(one).buffered(AT_ONCE);
        self.wait("find", names.first().map_or("", String::as_str), all.try_collect())
    }

    /// An object of at most `max_bytes`, and which writing of it that is; `None` if it is not there.
    ///
    /// # Errors
    /// As [`Bucket::folders`]; when it is longer.
    pub(crate) fn read(&self, name: &str, max_bytes: usize) -> Result<Option<(Vec<u8>, Version)>> {
        let key = self.key(name);
        let read = async {
            let got = match self.store.get(&key).await {
                Ok(got) => got,
                Err(e @ StoreError::NotFound { .. }) if errors::is_missing_bucket(&e) => return Err(e),
                Err(StoreError::NotFound { .. }) => return Ok(None),
                Err(e) => return Err(e),
            };
            let (meta, bytes) = (got.meta.clone(), got.meta.size);
            if bytes > max_bytes as u64 {
                return Ok(Some(Err(bytes)));
            }
            let version = Version(UpdateVersion { e_tag: meta.e_tag, version: meta.version });
            Ok(Some(Ok((Vec::from(got.bytes().await?), version))))
        };
        let found = self.wait("read", name, read)?;
        let too_long = |bytes: u64| {
            Error::user(format!(
                "read {}: {bytes} bytes, expected at most {max_bytes}",
                self.url.join(name).display()
            ))
        };
        found.transpose().map_err(too_long)
    }

    /// Ranges of an object, several at the same time.
    ///
    /// # Errors
    /// As [`Bucket::folders`]; when the object is not there or ends before.
    pub(crate) fn ranges(&self, name: &str, ranges: &[Range<u64>]) -> Result<Vec<Vec<u8>>> {
        let key = self.key(name);
        let one = |range: Range<u64>| {
            let (store, key) = (Arc::clone(&self.store), key.clone());
            // A task each: a single one would take the parts off the wire one after another.
            let part = tokio::spawn(async move { store.get_range(&key, range).await.map(Vec::from) });
            async move { part.await.unwrap_or_else(|e| Err(e.into())) }
        };
        let all = async { stream::iter(ranges.to_vec()).map(one).buffered(AT_ONCE).try_collect().await };
        self.wait("read", name, all)
    }

    /// Puts an object that must not be there yet; false if one is.
    ///
    /// # Errors
    /// As [`Bucket::folders`]. Whether the object is there then is not known.
    pub(crate) fn create(&self, name: &str, bytes: &[u8]) -> Result<bool> {
        self.put(name, bytes, PutMode::Create)
    }

    /// Puts an object in place of the version that was read; false if that is no longer the one there.
    ///
    /// # Errors
    /// As [`Bucket::create`].
    pub(crate) fn replace(&self, name: &str, bytes: &[u8], version: Version) -> Result<bool> {
        self.put(name, bytes, PutMode::Update(version.0))
    }

    fn put(&self, name: &str, bytes: &[u8], mode: PutMode) -> Result<bool> {
        let (key, bytes) = (self.key(name), PutPayload::from(bytes.to_vec()));
        let put = async {
            match self.store.put_opts(&key, bytes, PutOptions::from(mode)).await {
                Ok(_) => Ok(true),
                Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => Ok(false),
                Err(e) => Err(e),
            }
        };
        self.wait("write", name, put)
    }

    /// Begins to write an object of `bytes` bytes that appears when it is finished.
    pub(crate) fn upload(&self, name: &str, bytes: u64) -> Upload {
        Upload::new(self.clone(), name, bytes)
    }

    /// Removes objects; those that are not there are fine.
    ///
    /// # Errors
    /// As [`Bucket::folders`].
    pub(crate) fn remove(&self, names: &[String]) -> Result<()> {
        let keys: Vec<object_store::Result<Key>> = names.iter().map(|name| Ok(self.key(name))).collect();
        let removed = async {
            let mut done = self.store.delete_stream(stream::iter(keys).boxed());
            while let Some(one) = done.next().await {
                match one {
                    Ok(_) | Err(StoreError::NotFound { .. }) => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(())
        };
        self.wait("remove", names.first().map_or("", String::as_str), removed)
    }

    fn key(&self, name: &str) -> Key {
        name.split('/').fold(self.prefix.clone(), Key::join)
    }

    fn wait<T>(
        &self,
        doing: &str,
        name: &str,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T> {
        let place = if name.is_empty() { self.url.clone() } else { self.url.join(name) };
        runtime()?.block_on(work).map_err(|e| errors::told(doing, &place, &e))
    }
}

/// The threads that carry requests, started when the first is made.
fn runtime() -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    let started = RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(THREADS).thread_name("object-store").enable_all().build()
    });
    started.as_ref().map_err(|e| Error::failure(format!("start threads for the object store: {e}")))
}
