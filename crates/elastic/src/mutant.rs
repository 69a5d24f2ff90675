//! Rules broken on purpose, in tests alone: the simulation must notice each.

/// A rule that is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code, reason = "planted in tests"))]
pub(crate) enum Mutant {
    /// Restarts cost nothing.
    NoBudget,
    /// A stopped worker is never found.
    DeafToSilence,
    /// A failed world in which everybody lives is left alone.
    DeafToStranded,
    /// All workers are started over whenever one is lost.
    KeepsNobody,
    /// A new round has the number of the last.
    SameRound,
    /// A node that gives no sign of life stays in the job.
    DeadStay,
    /// A round starts with too few nodes.
    TooFew,
    /// A round that is full is ended for a spare.
    Restless,
    /// Every node counts its ranks from 0.
    RanksOverlap,
    /// A new node ends a round in which no step was done.
    NewcomersAtOnce,
    /// A node that keeps failing is taken in again and again.
    NoStrikes,
    /// A host that is out of reach counts as dead.
    Usurper,
    /// The round in which the host died goes on under the next.
    SameRoundAgain,
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Whether this thread's rules are broken so.
#[cfg(test)]
pub(crate) fn is_planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

#[cfg(not(test))]
pub(crate) const fn is_planted(_: Mutant) -> bool {
    false
}

#[cfg(test)]
pub(crate) const ALL: [Mutant; 13] = [
    Mutant::NoBudget,
    Mutant::DeafToSilence,
    Mutant::DeafToStranded,
    Mutant::KeepsNobody,
    Mutant::SameRound,
    Mutant::DeadStay,
    Mutant::TooFew,
    Mutant::Restless,
    Mutant::RanksOverlap,
    Mutant::NewcomersAtOnce,
    Mutant::NoStrikes,
    Mutant::Usurper,
    Mutant::SameRoundAgain,
];

#[cfg(test)]
pub(crate) fn plant(mutant: Option<Mutant>) {
    PLANTED.set(mutant);
}
