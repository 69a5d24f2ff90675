//! Tokenizer, token datasets, blends and samplers
