//! Checkpoints, resharding, Hugging Face import and export
