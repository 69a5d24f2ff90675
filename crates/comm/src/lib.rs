//! Ranks talking to each other: threads, shared memory and TCP.

pub mod store;

pub use store::{StoreClient, StoreServer};
