//! Ranks talking to each other: threads, shared memory and TCP.

mod connect;
mod control;
mod element;
mod group;
mod header;
mod inner;
mod link;
mod memory;
mod mesh;
mod near;
mod op;
mod p2p;
mod progress;
pub mod store;
mod sum;
mod tree;
mod world;

pub use connect::host_id;
pub use element::{Element, ElementType, OpTag, Order, Span, even_ranges};
pub use group::{DEFAULT_DEPTH, Group};
pub use half::bf16;
pub use header::OpKind;
pub use inner::Transport;
pub use op::{Op, Ranges};
pub use progress::{Handle, Times};
pub use store::{StoreClient, StoreServer};
pub use tree::tree_radices;
pub use world::{Bootstrap, DEFAULT_TIMEOUT, SharedArena, TransportChoice, World};
