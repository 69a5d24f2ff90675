//! Runs watched live: `phalanx dash` serves a page over their journals, `phalanx top` shows them on a terminal.
//!
//! [`watch`] follows journals and keeps a [`run::Run`] for each, [`view`] makes of it what a page or a terminal shows,
//! [`serve`] answers browsers and Prometheus. Nothing is ever written to a run.

pub mod curve;
pub mod ranks;
pub mod run;
pub mod view;
pub mod watch;

pub mod timeline;

pub mod access;
mod http;
mod live;
mod server;

pub use server::{Options, Server, serve};
