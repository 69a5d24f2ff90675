//! Going on without a rank that was lost, or with one that came: what ranks hold of each other in memory, what they tell
//! the agent that watches them, and how they meet again.

pub(crate) mod agent;
pub(crate) mod choose;
pub(crate) mod copies;
pub(crate) mod fetch;
pub(crate) mod laps;
pub(crate) mod meet;
pub(crate) mod share;

pub use agent::{Agent, Pulse};
pub use meet::Way;
