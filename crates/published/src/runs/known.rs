use plan::shape::{Shape, Sizes, dense};
use plan::software::Software;
use spec::Family;

/// What is known of where and with what a source ran. Facts from the sources, no fitted figure.
pub(crate) struct Conditions {
    /// Node or platform of the catalogue.
    pub(crate) cluster: String,
    /// Whether the source states the fabric.
    pub(crate) stated: bool,
    /// The training stack.
    pub(crate) software: Software,
}

/// Part of a source's name, part of the accelerator's name, cluster (empty: the usual), software (empty: the usual).
/// The first line that matches counts.
const SOURCES: &[(&str, &str, &str, &str)] = &[
    ("ZeRO-3", "a100", "dgx-a100", "deepspeed-zero3"),
    ("2104.04473", "a100", "dgx-a100", "megatron-2021"),
    ("2205.05198", "a100", "dgx-a100", "megatron-2022"),
    ("Megatron-LM@2e90a342f5 README.md (GPT-3 Example)", "a100", "dgx-a100", "megatron-2021"),
    ("ground_truth_single", "a100", "hgx-a100-ib-800", "megatron-deepspeed-2023"),
    ("nanotron", "h100", "hf-h100", "nanotron-2024"),
    ("VIA-Research/vTrain", "a100", "hgx-a100-ib-800", "megatron-2022"),
    ("bigscience", "a100", "jean-zay-a100", "megatron-deepspeed"),
    ("GLM-130B", "a100", "", "megatron-deepspeed"),
    ("NeMo-Framework-Launcher", "a100", "dgx-a100", "nemo-2022"),
    ("2402.15627", "a100", "megascale", "megatron-2022"),
    ("InternEvo", "a100", "hgx-a100-roce-400", "internevo"),
    ("llm-foundry", "a100-80", "hgx-a100-roce-1600", "fsdp-2023"),
    ("llm-foundry", "a100-40", "hgx-a100-40-roce-1600", "fsdp-2023"),
    ("llm-foundry", "h100", "", "fsdp-2023"),
    ("fms-fsdp", "a100", "", "fsdp-2023"),
    ("torchtitan", "500w", "grand-teton-h100-500w", "torchtitan"),
    ("torchtitan", "", "", "torchtitan"),
    // Its device type is h100-80gb-8, that of the machines before Mega.
    ("maxtext/configs/gpu/a3", "h100", "gcp-a3-high", "maxtext-gpu"),
    ("maxtext", "", "", "maxtext-2024"),
    ("tpu-recipes", "", "", "maxtext-2025"),
    ("Google/results", "", "", "maxtext-2024"),
    ("ColossalAI", "", "", "fsdp-2023"),
    ("2407.21783", "h100", "meta-24k-roce", "megatron-core-2024"),
    ("Megatron-LM images", "h100", "dgx-h100", "megatron-core-2024"),
    ("Megatron-LM examples", "h100", "dgx-h100", "megatron-core-2024"),
    ("2406.11704", "h100", "dgx-h100", "megatron-core-2024"),
    ("training_results_v4", "h100", "dgx-h100", "megatron-core-2024"),
    ("training_results_v5", "h100", "dgx-h100", "megatron-core-2025"),
    ("training_results_v5", "", "", "megatron-core-2025"),
    ("(25.11", "", "", "megatron-core-2025h2"),
    ("(25.", "", "", "megatron-core-2025"),
    ("(26.06", "h100", "", "megatron-core-2026"),
    ("(26.08", "h100", "", "megatron-core-2026"),
    ("(26.06", "", "", "megatron-core-2026h2"),
    ("(26.08", "", "", "megatron-core-2026h2"),
    ("(26.", "", "", "megatron-core-2026"),
    ("SimuMax", "", "", "megatron-core-2025"),
];

/// Mixtures whose attention and routers the stack launches from CUDA graphs: releases, model and chips, as they stand in
/// ids. From `cuda_graph_impl` and `cuda_graph_scope` of NVIDIA-NeMo/Megatron-Bridge `scripts/performance/configs`
/// (`qwen/` at 01b2977, `deepseek/` at 0426418, `gpt_oss/` at 07eea52).
const GRAPHED: &[(&[&str], &str, &[&str])] = &[
    (&["25.11-", "26.04-", "26.04.01-"], "Qwen3", &["-GB200-", "-GB300-"]),
    (&["26.04-", "26.04.01-"], "Qwen330B", &["-B200-", "-B300-"]),
    (&["25.11-", "26.04-", "26.04.01-"], "DeepSeekV3", &["-GB200-"]),
    (&["26.04.01-"], "DeepSeekV3", &["-B200-", "-B300-"]),
    (&["25.11-", "26.04-", "26.04.01-"], "GPTOSS120B", &["-GB300-", "-B300-"]),
];

/// Whether a run's layers are launched from graphs, so that the host need not keep up kernel by kernel.
pub(crate) fn is_graphed(id: &str) -> bool {
    let has = |parts: &[&str]| parts.iter().any(|part| id.contains(part));
    let bridge = id.starts_with("mbridge");
    bridge && GRAPHED.iter().any(|(release, model, chips)| has(release) && id.contains(model) && has(chips))
}

/// Ids of runs whose host waited for each kernel: BLOOM's layout tests, which hung otherwise on so many accelerators
/// ("dealing with JZ hanging", bigscience `train/tr11-176B-ml/chronicles-prequel.md`).
pub(crate) const BLOCKING: &str = "bloompre";

/// Entries of the vocabulary where a row does not say: BLOOM's layout tests had 250k (the same file), others mostly GPT-2's.
pub(crate) fn vocab(source: &str) -> usize {
    if source.contains("chronicles-prequel") { 250_000 } else { 51_200 }
}

/// Whether activations of runs that do not say are split along the sequence: Megatron-DeepSpeed of vTrain's time, unlike the
/// Megatron-LM that its kernels are those of, had no such thing (its single-node table says so).
pub(crate) fn splits_sequences(id: &str) -> bool {
    !id.starts_with("vtrain")
}

/// The precision of rows that name another: MaxText's script for GPT-3 on TPU v5p asks for `quantization=int8`
/// (`MaxText/configs/v5p/gpt3_175b/gpt3_175b_base.sh` of AI-Hypercomputer/maxtext at d32d207).
pub(crate) fn precision(id: &str) -> Option<&'static str> {
    (id == "tpurec-v5p-GPT3-175B").then_some("int8")
}

/// Whether attention's products are in 8 bit: DeepSeek-V3's on GB300 in the recipes of Megatron-Bridge v0.5.0
/// (`fp8_dot_product_attention`).
pub(crate) fn attends_in_8_bit(id: &str) -> bool {
    let release = id.starts_with("mbridge26.06-") || id.starts_with("mbridge26.08-");
    release && id.contains("DeepSeekV3-GB300-MXFP8")
}

/// The node or platform that an accelerator usually comes in.
const USUAL: &[(&str, &str)] = &[
    ("v100-sxm2", "dgx-v100"),
    ("a100-40-sxm", "dgx-a100-40"),
    ("a100-80-sxm", "dgx-a100"),
    ("h100-sxm5", "dgx-h100"),
    ("h100-sxm5-500w", "grand-teton-h100-500w"),
    ("h800-sxm", "hgx-h800"),
    ("h200-sxm", "dgx-h200"),
    ("b200-sxm", "dgx-b200"),
    ("b300-sxm", "dgx-b300"),
    ("gb200", "gb200-nvl72"),
    ("gb300", "gb300-nvl72"),
    ("mi250x-gcd", "frontier-node"),
    ("mi300x", "mi300x-node"),
    ("mi325x", "mi325x-node"),
    ("mi355x", "mi355x-node"),
    ("trainium1", "aws-trn1"),
    ("trainium2", "aws-trn2"),
    ("gaudi2", "gaudi2-node"),
    ("gaudi3", "gaudi3-node"),
    ("ascend-910b", "ascend-910b-node"),
    ("tpu-v3", "tpu-v3-pod"),
    ("tpu-v4", "tpu-v4-pod"),
    ("tpu-v5e", "tpu-v5e-pod"),
    ("tpu-v5p", "tpu-v5p-pod"),
    ("tpu-v6e", "tpu-v6e-pod"),
    ("tpu-v7x", "tpu-v7x-pod"),
];

pub(crate) fn conditions(source: &str, id: &str, accelerator: &str, family: &Family) -> Conditions {
    let usual = || {
        USUAL.iter().find(|u| u.0 == accelerator).map_or_else(|| accelerator.to_owned(), |u| u.1.to_owned())
    };
    let line = SOURCES.iter().find(|(part, chip, _, _)| {
        (source.contains(part) || id.contains(part)) && accelerator.contains(chip)
    });
    match line {
        Some((_, _, cluster, software)) => Conditions {
            cluster: if cluster.is_empty() { usual() } else { (*cluster).to_owned() },
            stated: !cluster.is_empty() || family.name.starts_with("tpu"),
            software: Software::named(software).unwrap_or_else(|| Software::usual(family)),
        },
        None => Conditions { cluster: usual(), stated: false, software: Software::usual(family) },
    }
}

/// Head widths that models use when it is not hidden over heads.
const HEAD_DIMS: [usize; 4] = [64, 128, 192, 256];

/// What people usually do wins unless the count speaks against it by so much (as a logarithm): heads as wide as the
/// residual over their number, four times the residual without a gate, tied tables without one.
const ODD_HEADS: f64 = 0.04;
const ODD_GATE: f64 = 0.03;
const ODD_TIE: f64 = 0.005;

/// The kind of transformer whose parameter count comes closest to the published one: gated or plain, tables tied or
/// not, and the width of heads. Without a count, a feed-forward layer of four times the residual is plain.
pub(crate) fn closest(
    name: &str,
    layers: usize,
    hidden: usize,
    ffn: Option<usize>,
    heads: usize,
    kv_heads: usize,
    vocab: usize,
    params: Option<f64>,
) -> Sizes {
    let square = (hidden / heads).max(1);
    let intern = name.to_ascii_lowercase().contains("intern");
    // InternLM 7B is the one model in the tables without a width that is gated: 8/3 of the residual, rounded to 256.
    let ffns: &[usize] =
        &[ffn.unwrap_or(if intern { (hidden * 8 / 3).next_multiple_of(256) } else { 4 * hidden })];
    let mut best = None;
    for &ffn in ffns {
        for gated in [false, true] {
            for tied in [true, false] {
                for head_dim in std::iter::once(square).chain(HEAD_DIMS) {
                    let sizes = Sizes { layers, hidden, ffn, heads, kv_heads, head_dim, vocab, gated, tied };
                    let found = Shape::from_model(dense("", sizes)).params();
                    let off = match params {
                        Some(p) => (found / p).ln().abs(),
                        None => f64::from(u8::from((ffn == 4 * hidden) == gated)),
                    };
                    let odd_dim = if head_dim == square { 0.0 } else { ODD_HEADS };
                    let odd_gate = if (ffn == 4 * hidden) == gated { ODD_GATE } else { 0.0 };
                    let odd_tie = if tied == gated { ODD_TIE } else { 0.0 };
                    let cost = off + odd_dim + odd_gate + odd_tie;
                    if best.is_none_or(|(c, _)| cost < c) {
                        best = Some((cost, sizes));
                    }
                }
            }
        }
    }
    best.map_or(
        Sizes {
            layers,
            hidden,
            ffn: 4 * hidden,
            heads,
            kv_heads,
            head_dim: square,
            vocab,
            gated: false,
            tied: true,
        },
        |b| b.1,
    )
}

/// Heads for a residual of this width where none are published: a multiple of eight whose width is a multiple of eight
/// and as near to 128 as can be.
pub(crate) fn usual_heads(hidden: usize) -> usize {
    let off = |heads: &usize| ((hidden / heads) as f64 / 128.0).ln().abs();
    let even = (1..=hidden / 64).map(|e| 8 * e).filter(|h| hidden.is_multiple_of(8 * h));
    even.min_by(|a, b| off(a).total_cmp(&off(b))).unwrap_or((hidden / 128).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_transformers_are_told_apart_by_their_parameters() {
        let check = |args: (usize, usize, Option<usize>, usize, usize, usize),
                     billions: f64,
                     gated: bool,
                     tied: bool,
                     dim: usize| {
            let (l, h, f, a, kv, v) = args;
            let s = closest("", l, h, f, a, kv, v, Some(billions * 1e9));
            assert_eq!((s.gated, s.tied, s.head_dim), (gated, tied, dim), "{args:?}");
        };
        check((80, 8192, Some(28672), 64, 8, 128_256), 70.6, true, false, 128);
        check((32, 4096, Some(14336), 32, 8, 128_256), 8.03, true, false, 128);
        check((96, 12288, Some(49152), 96, 96, 51_200), 175.0, false, true, 128);
        check((32, 4096, Some(28672), 64, 64, 32_000), 16.0, true, false, 128);
        check((96, 12288, Some(49152), 128, 128, 64_000), 175.0, false, true, 96);
        check((80, 8192, Some(32768), 64, 64, 50_368), 64.862, false, true, 128);
    }
}
