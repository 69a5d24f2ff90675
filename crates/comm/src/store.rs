//! The key-value store where ranks and agents meet, over TCP.
//!
//! One process starts a [`StoreServer`]; everyone else holds a [`StoreClient`]. Values are bytes, keys are short
//! strings. Every call has a deadline and every size a bound.
//!
//! ```
//! use comm::{StoreClient, StoreServer};
//! use std::time::Duration;
//!
//! let second = Duration::from_secs(1);
//! let server = StoreServer::start("127.0.0.1:0".parse().unwrap())?;
//! let client = StoreClient::connect(&server.addr().to_string(), second)?;
//! client.set("color", b"blue")?;
//! assert_eq!(client.get("color", second)?, b"blue");
//! assert_eq!(client.add("count", 2)?, 2);
//! # Ok::<(), spec::Error>(())
//! ```
//!
//! With a [`Secret`](crate::Secret) ([`StoreServer::start_with`], [`StoreClient::connect_with`]) both sides of a connection
//! prove that they hold it, and what they say carries tags. Without one, as above, everyone who reaches the server is
//! served: bind it to an address that only the job can reach.

mod auth;
mod client;
mod server;
mod wire;

pub use client::{StoreClient, Tries};
pub use server::StoreServer;

/// In a refusal, what stands between the reason and what to do about it.
const HINT: &str = "\nhint: ";

/// Longest key, bytes.
pub(crate) const MAX_KEY_BYTES: usize = 1024;
/// Longest value, bytes: endpoints, plans and error reports are kilobytes, so a larger one is a mistake.
pub(crate) const MAX_VALUE_BYTES: usize = 16 << 20;
/// Most connections a server holds at once: a few per rank of the largest job it is meant for.
pub(crate) const MAX_CONNECTIONS: usize = 4096;
/// Most connections that have not shown yet that they are the job's; one more takes the place of the oldest.
pub(crate) const MAX_STRANGERS: usize = 1024;
/// Most bytes of all keys and values: a thousand ranks leave kilobytes each.
pub const MAX_STORE_BYTES: usize = 64 << 20;
/// Most keys in one `wait`.
pub(crate) const MAX_WAIT_KEYS: usize = 16_384;
