//! Text becomes tokens, tokens become samples, in an order that is the same for every world size.
//!
//! Text goes through a [`Tokenizer`] into a Megatron `.bin/.idx` pair ([`IndexedWriter`], [`IndexedDataset`]);
//! llm.c shards are read too ([`Source`]). [`GptDataset`] orders one split as Megatron does, [`Epochs`] without an end,
//! [`Blend`] mixes several; all are [`TokenStream`]s, from which [`Batches`] takes the samples of a step.

mod atomic;
mod batches;
mod blend;
mod epochs;
mod glob;
mod gpt;
mod index_writer;
mod indexed;
mod manifest;
mod random;
mod sampler;
mod shards;
mod source;
mod split;
mod token_type;

pub use batches::{Batches, TokenStream};
pub use blend::{Blend, blend_len, blend_parts};
pub use epochs::Epochs;
pub use gpt::GptDataset;
pub use index_writer::IndexedWriter;
pub use indexed::{IndexedDataset, bin_path, idx_path};
pub use manifest::Manifest;
pub use random::{Mt19937, numpy_shuffle, torch_randperm};
pub use sampler::DistributedSampler;
pub use shards::TokenShards;
pub use source::Source;
pub use split::Split;
pub use token_type::TokenType;
