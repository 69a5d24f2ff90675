//! Which store a URL names, and how the environment says to reach it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use spec::{Error, Result};

use super::credentials;
use super::http::Connector;
use super::signing::Crypto;

/// A request that fails because of the store or the network is made again this often.
const TRIES: usize = 6;

/// First and longest pause before it is; pauses double, and are drawn at random below that.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// After this time no request is made again: the save, or the command, has failed.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Stores by scheme and bucket: what lies in one bucket shares its connections.
static STORES: LazyLock<Mutex<HashMap<String, Arc<dyn ObjectStore>>>> = LazyLock::new(Mutex::default);

/// The store and the prefix in it.
pub(super) fn store(url: &Path) -> Result<(Arc<dyn ObjectStore>, Key)> {
    let shown = url.display();
    let text = url.to_str().ok_or_else(|| Error::user(format!("{shown} is not UTF-8")))?;
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(Error::user(format!("{shown} names no bucket"))
            .hint("write SCHEME://BUCKET/PREFIX, for example s3://models/run1"));
    }
    let prefix = Key::parse(prefix.trim_matches('/'))
        .map_err(|e| Error::user(format!("{shown}: {e}")).hint("write plain names between slashes"))?;
    let name = format!("{scheme}://{bucket}");
    let mut stores = STORES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = stores.get(&name) {
        return Ok((Arc::clone(known), prefix));
    }
    let store = open(scheme, bucket, &name)?;
    stores.insert(name, Arc::clone(&store));
    Ok((store, prefix))
}

/// Puts a store of a test's own in the place of the one that `name` (`memory://BUCKET`) would open.
#[cfg(test)]
pub(crate) fn place(name: &str, store: Arc<dyn ObjectStore>) {
    STORES.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), store);
}

fn open(scheme: &str, bucket: &str, name: &str) -> Result<Arc<dyn ObjectStore>> {
    credentials::check(scheme, name)?;
    let built = match scheme {
        "s3" | "s3a" => s3(bucket).map(|s| Arc::new(s) as Arc<dyn ObjectStore>),
        "gs" => {
            let builder = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retry());
            let built = builder.with_http_connector(Connector).with_crypto_provider(Arc::new(Crypto)).build();
            built.map(|s| Arc::new(s) as _)
        }
        "az" | "azure" | "abfs" | "abfss" => {
            let builder = MicrosoftAzureBuilder::from_env().with_container_name(bucket).with_retry(retry());
            let built = builder.with_http_connector(Connector).with_crypto_provider(Arc::new(Crypto)).build();
            built.map(|s| Arc::new(s) as _)
        }
        _ => {
            return Err(Error::user(format!("{name}: {scheme} is no kind of object store"))
                .hint("s3://, gs:// and az:// are; AWS_ENDPOINT_URL says where an s3:// store is reached"));
        }
    };
    built.map_err(|e| Error::user(format!("{name}: {e}")).hint(super::errors::credentials(name)))
}

fn s3(bucket: &str) -> object_store::Result<object_store::aws::AmazonS3> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(retry())
        .with_http_connector(Connector)
        .with_crypto_provider(Arc::new(Crypto));
    let endpoint = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];
    if let Some(endpoint) = endpoint.iter().find_map(|key| std::env::var(key).ok()) {
        // Who writes http:// means it.
        builder = builder.with_allow_http(endpoint.starts_with("http://")).with_endpoint(endpoint);
    }
    if let Some(found) = credentials::of_profile() {
        builder = builder.with_access_key_id(found.key).with_secret_access_key(found.secret);
        if let Some(token) = found.token {
            builder = builder.with_token(token);
        }
    }
    builder.build()
}

fn retry() -> RetryConfig {
    let (init_backoff, max_backoff) = PAUSE;
    let backoff = BackoffConfig { init_backoff, max_backoff, base: 2.0 };
    RetryConfig { backoff, max_retries: TRIES, retry_timeout: GIVE_UP }
}
