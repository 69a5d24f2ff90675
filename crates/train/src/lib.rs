//! The executor and the step loop of one rank
