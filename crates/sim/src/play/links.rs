//! Links that change while a step is played, and the storage beside it.

use std::cmp::Reverse;

use plan::network::Traffic;

use super::{Event, Kind, Player};
use crate::clock::{Ticks, USUAL};

/// As which message of the log something is kept, if anything is.
pub(super) type Kept = Option<u32>;

impl Player<'_> {
    /// Sets the rate of a rank's ports to what its flapping makes of it, until it changes again.
    pub(super) fn set_port(&mut self, class: usize, now: Ticks) {
        let it = &self.world.classes[class];
        let Some(flap) = it.mark.flap else { return };
        let share = flap.share_at(now);
        for port in it.ports {
            let whole = u128::from(self.world.capacity[port]);
            let rate = (whole * u128::from(share) / u128::from(USUAL)) as u64;
            self.flows.set_capacity(port, rate.max(1));
        }
        self.heap.push(Reverse((flap.next_change(now), Event::Port { class })));
    }

    /// Begins to read the next step's tokens, and to write a checkpoint if one is due.
    pub(super) fn store(&mut self, class: usize, now: Ticks) {
        let Some(storage) = &self.world.storage else { return };
        let bytes = |outside_bytes: f64| Traffic { outside_bytes, ..Traffic::default() };
        let (read, write) = (storage.read_bytes, storage.write_bytes);
        if read > 0.0 {
            self.ranks[class].reads = true;
            self.begin(Kind::Read(class), bytes(read), (class, None), now);
        }
        if write > 0.0 {
            self.begin(Kind::Write(class), bytes(write), (class, None), now);
        }
    }
}
