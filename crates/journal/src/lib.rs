//! The typed record of a run and its writers
