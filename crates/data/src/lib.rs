//! Text becomes tokens, tokens become samples, in an order that is the same for every world size.
//!
//! Text goes through a [`Tokenizer`] into a Megatron `.bin/.idx` pair ([`IndexedWriter`], [`IndexedDataset`]);
//! llm.c shards are read too ([`Source`]). [`GptDataset`] orders one split as Megatron does, [`Epochs`] without an end,
//! [`Blend`] mixes several; all are [`TokenStream`]s, from which [`Batches`] takes the samples of a step.

mod atomic;
mod batches;
mod blend;
mod builder;
mod corpus;
mod end;
mod epochs;
mod field;
mod file;
mod fingerprint;
mod glob;
mod ids;
mod gpt;
mod index_writer;
mod indexed;
mod input;
mod json;
mod manifest;
mod open;
mod opened;
mod packed;
mod pieces;
mod prepare;
mod progress;
mod random;
mod rules;
mod sampler;
mod shards;
mod show;
mod skipped;
mod source;
mod split;
mod stream;
mod token_type;
mod tokenizer;
mod windows;

#[cfg(test)]
mod fuzz_test;

pub use batches::{Batches, TokenStream, sample_xxh3};
pub use blend::{Blend, blend_len, blend_parts};
pub use builder::{BuildOptions, BuildReport, build, tokenizer_path, train_tokenizer};
pub use corpus::{cargo_sources, default_cargo_home};
pub use epochs::Epochs;
pub use fingerprint::{
    Fingerprint, dataset_end, dataset_fingerprint, dataset_tokenizer, tokenizer_fingerprint,
};
pub use gpt::GptDataset;
pub use index_writer::IndexedWriter;
pub use indexed::{IndexedDataset, bin_path, idx_path};
pub use input::TextOptions;
pub use manifest::Manifest;
pub use open::{Order, StreamOptions, Streams, open_streams};
pub use prepare::{
    Prepared, TextSource, TokenizerChoice, prepare, prepare_default, prepare_with, prepared_in, text_key,
};
pub use progress::{OnProgress, Progress, Stage};
pub use random::{Mt19937, numpy_shuffle, torch_randperm};
pub use sampler::DistributedSampler;
pub use shards::TokenShards;
pub use show::{Bucket, Lengths, Summary, show};
pub use skipped::Skipped;
pub use source::Source;
pub use split::Split;
pub use stream::StreamDecoder;
pub use token_type::TokenType;
pub use tokenizer::{END_OF_DOCUMENT, Tokenizer};
pub use windows::Windows;
