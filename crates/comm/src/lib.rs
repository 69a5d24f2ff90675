//! Ranks talking to each other: threads of one process, processes of one host, hosts.
//!
//! # For the caller
//!
//! A rank joins a [`World`] ([`World::connect`] through a [`Bootstrap`], or [`World::threads`] for tests), founds
//! [`Group`]s ([`World::group`]) and calls collectives and messages on them. Three ways lead to the same operation:
//!
//! | call | buffers | ends |
//! | --- | --- | --- |
//! | [`Group::all_reduce`] and its siblings | slices | when done |
//! | [`Group::run`] with an [`Op`] | [`RawSlice`]s (unsafe: raw memory) | when done |
//! | [`Group::start`] with an [`Op`] | [`RawSlice`]s (unsafe: raw memory) | later, see [`Handle::wait`] |
//!
//! Any memory may take part. Memory from [`World::alloc_shared`] is the fast case: neighbours then add up each
//! other's buffers where they lie and nothing is copied. Nobody need say which is which; it is looked up by address.
//!
//! ```
//! use comm::{OpTag, Order, World};
//!
//! let sums: Vec<f32> = std::thread::scope(|s| {
//!     let ranks = World::threads(4)?.into_iter().map(|world| {
//!         s.spawn(move || {
//!             let mut x = [world.rank() as f32; 3];
//!             world.all().all_reduce(OpTag(1), &mut x, Order::Tree)?;
//!             Ok::<f32, spec::Error>(x[0])
//!         })
//!     });
//!     let ranks: Vec<_> = ranks.collect();
//!     ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<spec::Result<_>>()
//! })?;
//! assert_eq!(sums, [6.0; 4]);
//! # Ok::<(), spec::Error>(())
//! ```
//!
//! # Promises
//!
//! - With [`Order::Tree`] a sum's bits depend on the values and their order in the group, and on nothing else:
//!   transport, placement, chunking and timing do not show. bf16 is added in f32 and rounded once.
//! - Every operation says what it is (group, number, tag, kind, element, count, ranges). If members disagree, the
//!   operation fails on all of them with both ranks and both versions named.
//! - Every wait has a deadline ([`Bootstrap::timeout`]). A rank that dies is noticed at once, one that stops at the
//!   deadline; the error on every rank names it. After the first failure every operation of the world fails with the
//!   same reason: a new world, in a new session, is the way on.
//! - Nothing is left behind, however a rank ends: shared memory and sockets have no names in any file system.
//!
//! # How it works, in reading order
//!
//! `header` (what messages say about themselves), `control` (what a rank shows its neighbours), `near` (collectives in
//! shared memory), `p2p` and `link` (messages, in memory, over sockets and through `mpi`), `mesh` (collectives made of messages),
//! `group` (which of these, or both levels), `progress` (who polls), `connect` (how ranks find each other), `secret` and `seal` (how they know each other), [`store`].

mod awake;
mod bench;
mod connect;
mod control;
mod element;
mod group;
mod header;
#[cfg(test)]
mod fuzz_test;
#[cfg(test)]
mod hostile;
mod inner;
mod link;
mod memory;
mod mesh;
mod mpi;
mod near;
mod op;
mod os;
mod p2p;
mod progress;
mod seal;
mod secret;
pub mod store;
mod sum;
mod tree;
mod waiting;
mod watch;
mod world;

pub use awake::Awake;
pub use bench::{BENCH_SIZES, BenchOp, Row, bench_collectives};
pub use connect::{give_up, host_id};
pub use element::{Element, ElementType, OpTag, Order, RawSlice, even_ranges};
pub use group::Group;
pub use half::bf16;
pub use header::OpKind;
pub use inner::{Transport, blamed, blames_peer};
pub use mpi::{Mpi, MpiLibrary, find_mpi};
pub use op::{Op, Ranges};
pub use os::os_error;
pub use progress::{Handle, Times};
pub use secret::Secret;
pub use store::{StoreClient, StoreServer, Tries};
pub use tree::tree_radices;
pub use waiting::Waiting;
pub use watch::Watch;
pub use world::{Bootstrap, DEFAULT_TIMEOUT, SharedArena, TransportChoice, World};
