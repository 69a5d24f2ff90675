//! Ranks talking to each other: threads, shared memory and TCP
