//! Columns of the tables that are read: what each holds, and which of a table are not read.

use spec::{Result, suggest};

use crate::inference::is_table;
use crate::runs::csv::Table;

/// A column and what it holds. A cell may be empty unless its column is required.
pub type Column = (&'static str, &'static str);

/// Of a table of runs.
pub const RUNS: [Column; 41] = [
    ("id", "required: a name of its own for the row; the letters that it begins with are its family"),
    ("accelerator", "required: of the catalogue"),
    ("n_accel", "required: accelerators"),
    ("layers", "required"),
    ("hidden", "required: width of the residual stream"),
    ("seq_len", "required: tokens of a sequence"),
    ("global_batch", "required: sequences of a step"),
    ("source", "where it was published"),
    ("confidence", "how sure that is; kept, not read"),
    ("model name", "a known model gives what other columns leave out"),
    ("params_b", "parameters, in 1e9"),
    ("ffn_hidden", "width of the feed-forward layers"),
    ("heads", "of attention"),
    ("kv_heads", "of grouped queries"),
    ("vocab", "tokens of the vocabulary"),
    ("tied_embeddings", "whether the head shares the embedding's parameters"),
    ("family", "llama or gpt"),
    ("experts", "of a mixture"),
    ("topk", "experts for a token; kept, not read"),
    ("micro_batch", "sequences at once"),
    ("tp", "tensor-parallel ranks"),
    ("pp", "pipeline stages"),
    ("dp", "data-parallel ranks"),
    ("cp", "context-parallel ranks"),
    ("ep", "expert-parallel ranks"),
    ("vpp", "chunks of a stage"),
    ("zero_fsdp", "ZeRO stage, or how parameters are sharded"),
    ("sequence_parallel", "whether the residual stream is split"),
    ("recompute", "none, selective or full"),
    ("precision", "bf16, fp16, fp8, mxfp8, nvfp4 or int8"),
    ("step_time_s", "seconds of a step; or one of the next four"),
    ("tokens_per_sec_per_gpu", "tokens a second of one accelerator"),
    ("tflops_per_gpu", "TFLOP/s of one accelerator, counted as flops_kind says"),
    ("mfu_pct", "model FLOPs utilisation in percent"),
    ("derived_step_time_s", "seconds of a step that somebody derived"),
    ("flops_kind", "how the source counts FLOP: model, hardware, ..."),
    ("gpu_hours_total", "of the whole training; kept, not read"),
    ("tokens_total", "of the whole training; kept, not read"),
    ("notes", "anything; some switches of stacks are found in it"),
    ("outcome", "ran, or out of memory"),
    ("reserved_gb", "GiB that the framework reserved on the first rank"),
];

/// Of a table of serving figures.
pub const SERVING: [Column; 16] = [
    ("id", "required: a name of its own for the row"),
    ("model", "required: of the catalogue"),
    ("accelerator", "required: of the catalogue"),
    ("tp", "required: accelerators of a replica"),
    ("concurrency", "required: requests at once"),
    ("input_tokens", "required: tokens of a prompt"),
    ("output_tokens", "required: tokens generated for a request"),
    ("latency_s", "seconds of a request; or one of the next three"),
    ("ttft_ms", "milliseconds to the first token"),
    ("itl_ms", "milliseconds between tokens"),
    ("tokens_per_s", "tokens generated a second, all requests together"),
    ("source", "where it was published"),
    ("precision", "of weights: bf16, fp16, fp8, int8, int4 or fp4; bf16 if empty"),
    ("stack", "serving stack; told from the source if empty"),
    ("cache", "format of cached keys and values"),
    ("use", "fit or check; kept for the tables of this repository"),
];

/// A sentence for each column of a table that nothing reads.
///
/// # Errors
/// If the text is no table.
pub fn unread(path: &str, text: &str) -> Result<Vec<String>> {
    let known: &[Column] = if is_table(text) { &SERVING } else { &RUNS };
    let table = Table::parse(path, text, &[])?;
    let names = || known.iter().map(|c| c.0);
    let strange = table.columns().into_iter().filter(|c| !names().any(|k| k == *c));
    let said = |c: &str| match suggest::nearest(c, names()) {
        Some(near) => format!("column \"{c}\" is not read; did you mean \"{near}\"?"),
        None => format!("column \"{c}\" is not read"),
    };
    Ok(strange.map(said).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_that_nobody_reads_are_named() {
        let check = |header: &str, said: &[&str]| {
            assert_eq!(unread("t.csv", &format!("{header}\n")).unwrap(), said, "{header}");
        };
        check("id,layers,step_time_s", &[]);
        check("id,my own", &["column \"my own\" is not read"]);
        check("id,layer", &["column \"layer\" is not read; did you mean \"layers\"?"]);
        check("id,input_tokens,output_tokens,layers", &["column \"layers\" is not read"]);
    }
}
