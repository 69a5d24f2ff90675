//! Start, watch and stop ranks: the local agent
