//! What an op does to bytes, on the CPU
