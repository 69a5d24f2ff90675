use std::path::PathBuf;

use clap::Args as ClapArgs;

const INFERENCE_EXAMPLES: &str = "\
Examples:
  Llama 2 7B on two H100 under three loads, with the price of a million tokens:
    phalanx inference --model llama2-7b --cluster dgx-h100 --tp 2 --concurrency 1,8,64 \\
      --input 200 --output 200 --price 2.5
  What a node of eight does with 8-bit weights, replicas as small as fit:
    phalanx inference --model Llama-3.1-70B --cluster dgx-h200 --accelerators 8 --weights fp8
  The same as one page with figures, assumptions and sources:
    phalanx inference --model Llama-3.1-70B --cluster dgx-h200 --accelerators 8 --html serving.html";

#[derive(Debug, ClapArgs)]
#[command(after_help = INFERENCE_EXAMPLES)]
pub(crate) struct Inference {
    /// Model of the catalogue, Hugging Face config.json, or run file
    #[arg(long, value_name = "NAME|FILE")]
    pub(crate) model: String,
    /// Platform or node of the catalogue
    #[arg(long, value_name = "NAME")]
    pub(crate) cluster: String,
    /// Accelerators that serve, as replicas of --tp each; one replica if absent
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) accelerators: Option<usize>,
    /// Tensor-parallel accelerators of a replica; the fewest that hold the model if absent
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) tp: Option<usize>,
    /// Clients at once over all replicas, one or several numbers; the whole curve if absent
    #[arg(long, value_name = "N,...", value_delimiter = ',', allow_negative_numbers = true)]
    pub(crate) concurrency: Vec<usize>,
    /// Tokens of a prompt
    #[arg(long, default_value_t = 1000, value_name = "TOKENS", allow_negative_numbers = true)]
    pub(crate) input: usize,
    /// Tokens generated for a request
    #[arg(long, default_value_t = 1000, value_name = "TOKENS", allow_negative_numbers = true)]
    pub(crate) output: usize,
    /// Format of the weights: bf16, fp16, fp8, int8, int4 or fp4
    #[arg(long, default_value = "bf16", value_name = "FORMAT")]
    pub(crate) weights: String,
    /// Format of cached keys and values, bf16 or fp8; the stack's usual one if absent
    #[arg(long, value_name = "FORMAT")]
    pub(crate) cache: Option<String>,
    /// Serving stack: trt-llm, vllm, or an older one
    #[arg(long, default_value = inference::stack::USUAL, value_name = "NAME")]
    pub(crate) stack: String,
    /// US dollars for an accelerator and hour; from the catalogue if absent
    #[arg(long, value_name = "USD", allow_negative_numbers = true)]
    pub(crate) price: Option<f64>,
    /// Let requests wait that do not fit at once
    #[arg(long)]
    pub(crate) queue: bool,
    /// More catalogue files, over the built-in ones
    #[arg(long, value_name = "FILE.toml")]
    pub(crate) catalog: Vec<PathBuf>,
    /// Write a page with figures, tables and sources, in one file that needs no network
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}
