//! The agent with real processes: launchers are copies of this test binary, workers are shells.

mod common;
mod many_nodes;
mod one_node;
mod ranks;
mod recovery;
mod torch;
mod trust;

/// Plays the launcher when this process was started as one.
#[test]
fn as_launcher() {
    common::play_launcher();
}
