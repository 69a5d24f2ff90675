use crate::inner::Core;
use spec::Error;
use std::sync::Arc;
use std::time::Duration;

/// A look at a [`World`](crate::World) from beside it, for what carries messages of its ranks by other means (a library of
/// the cards): it hears of losses, keeps the deadline of the world, and lets the world fail. Cheap to clone.
#[derive(Clone)]
pub struct Watch {
    core: Arc<Core>,
}

impl Watch {
    pub(crate) fn new(core: &Arc<Core>) -> Watch {
        Watch { core: core.clone() }
    }

    /// The error that all operations give since the world failed, if it has.
    pub fn failure(&self) -> Option<Error> {
        self.core.failure.get()
    }

    /// Deadline of every wait.
    pub fn timeout(&self) -> Duration {
        self.core.timeout
    }

    /// Lets the world fail because `missing` was waited for until the deadline; ranks that gave no sign of life are named.
    pub fn timed_out(&self, missing: &str) -> Error {
        self.core.timed_out(missing)
    }

    /// Ends every operation of every rank with `reason`, and gives the error that they end with.
    pub fn fail(&self, reason: &str) -> Error {
        self.core.fail(&format!("rank {}: {reason}", self.core.rank))
    }
}
