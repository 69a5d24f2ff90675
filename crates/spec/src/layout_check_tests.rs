use super::*;
use crate::Experts;
use proptest::prelude::*;

fn tiny() -> ModelSpec {
    ModelSpec { layers: 6, heads: 8, kv_heads: 4, ffn: 96, ..ModelSpec::preset("tiny").expect("a preset") }
}

/// `message | hint`, or `ok`.
fn verdict(layout: &Layout, sequences: usize, sequence: usize) -> String {
    match layout.validate(&tiny(), sequences, sequence) {
        Ok(()) => "ok".to_owned(),
        Err(e) => format!("{e} | {}", e.hint_text().unwrap_or("no hint")),
    }
}

fn check(layout: Layout, expected: &str) {
    assert_eq!(verdict(&layout, 24, 128), expected, "{layout:?}");
}

fn one() -> Layout {
    Layout::default()
}

#[test]
fn tensor_parallel() {
    check(Layout { tp: 4, ..one() }, "ok");
    check(Layout { tp: 4, sequence_parallel: true, ..one() }, "ok");
    check(
        Layout { tp: 3, ..one() },
        "layout.tp = 3 does not divide the 8 query heads of tiny | values of layout.tp that work: 1, 2, 4",
    );
    check(
        Layout { tp: 8, ..one() },
        "layout.tp = 8 does not divide the 4 key and value heads of tiny | values of layout.tp that work: 1, 2, 4",
    );
    check(
        Layout { sequence_parallel: true, ..one() },
        "layout.sequence_parallel = true needs layout.tp > 1, found layout.tp = 1 | \
         set layout.sequence_parallel=false, or layout.tp=2",
    );
    let odd = Layout { tp: 4, sequence_parallel: true, ..one() };
    assert_eq!(
        verdict(&odd, 24, 126),
        "layout.sequence_parallel = true needs layout.tp = 4 to divide the sequence of 126 tokens | \
         set batch.sequence=128, or layout.sequence_parallel=false"
    );
}

#[test]
fn pipeline() {
    let interleaved = Layout { schedule: PipelineSchedule::Interleaved, chunks: 2, ..one() };
    check(Layout { pp: 6, ..one() }, "ok");
    check(Layout { pp: 3, ..interleaved.clone() }, "ok");
    check(Layout { pp: 3, stage_layers: vec![1, 4, 1], zero: Zero::Parameters, ..one() }, "ok");
    check(
        Layout { pp: 7, ..one() },
        "layout.pp x chunks = 7 x 1 stages, but tiny has 6 layers | set layout.pp to at most 6",
    );
    check(
        Layout { pp: 4, ..interleaved.clone() },
        "layout.pp x chunks = 4 x 2 stages, but tiny has 6 layers | set layout.pp to at most 3",
    );
    check(
        Layout { pp: 2, chunks: 2, ..one() },
        "layout.chunks = 2 needs layout.schedule = \"interleaved\", found 1f1b | \
         set layout.schedule=interleaved, or layout.chunks=1",
    );
    check(
        Layout { chunks: 1, ..interleaved.clone() },
        "layout.schedule = \"interleaved\" needs layout.chunks > 1, found layout.chunks = 1 | \
         set layout.chunks=2, or layout.schedule=1f1b",
    );
    check(
        interleaved.clone(),
        "layout.schedule = \"interleaved\" needs layout.pp > 1, found layout.pp = 1 | \
         set layout.pp=2, or layout.schedule=1f1b and layout.chunks=1",
    );
    check(
        Layout { pp: 2, stage_layers: vec![6], ..one() },
        "layout.stage_layers has 1 entries, expected layout.pp x chunks = 2 | for example layout.stage_layers=[3, 3]",
    );
    check(
        Layout { pp: 4, stage_layers: vec![1, 1, 1, 1], ..one() },
        "layout.stage_layers adds up to 4 layers, but tiny has 6 | for example layout.stage_layers=[2, 2, 1, 1]",
    );
    check(
        Layout { pp: 2, stage_layers: vec![0, 6], ..one() },
        "layout.stage_layers[0] = 0, expected at least one layer a stage | for example layout.stage_layers=[3, 3]",
    );
    let split =
        |stage_layers: &[usize]| Layout { pp: 4, stage_layers: stage_layers.to_vec(), ..interleaved.clone() };
    check(split(&[0, 1, 1, 1, 1, 1, 1, 0]), "ok");
    check(Layout { pp: 2, ..split(&[0, 3, 3, 0]) }, "ok");
    check(
        split(&[1, 0, 1, 1, 1, 1, 1, 0]),
        "layout.stage_layers[1] = 0, expected at least one layer a stage | \
         for example layout.stage_layers=[1, 1, 1, 1, 1, 1, 0, 0]",
    );
    check(
        Layout { pp: 3, dp: 8, micro_batch: 3, ..interleaved },
        "layout.schedule = \"interleaved\" needs layout.pp = 3 to divide the 1 micro-batches of a rank | \
         values of layout.pp that work: 1",
    );
}

#[test]
fn data_parallel() {
    check(Layout { dp: 8, micro_batch: 3, ..one() }, "ok");
    check(Layout { dp: 3, reduce: Reduce::Ring, micro_batch: 2, ..one() }, "ok");
    check(
        Layout { dp: 3, ..one() },
        "layout.dp = 3 does not split the sum tree over 24 sequences (a power of two that divides 24) | \
         values of layout.dp that work: 1, 2, 4, 8; any divisor with layout.reduce=ring",
    );
    check(
        Layout { dp: 7, reduce: Reduce::Ring, ..one() },
        "layout.dp = 7 does not divide the global batch of 24 sequences | \
         values of layout.dp that work: 1, 2, 3, 4, 6, 8, 12, 24",
    );
    check(
        Layout { dp: 2, micro_batch: 5, ..one() },
        "layout.micro_batch = 5 does not divide a rank's share of 12 sequences (24 over layout.dp = 2) | \
         values of layout.micro_batch that work: 1, 3, 6, 12",
    );
    check(
        Layout { dp: 2, micro_batch: 2, ..one() },
        "layout.micro_batch = 2 is not a whole subtree of the sum over 24 sequences in 2 shares | \
         values of layout.micro_batch that work: 1, 3, 6, 12",
    );
    check(
        Layout { dp: 2, micro_batch: 1, zero: Zero::Gradients, ..one() },
        "layout.micro_batch = 1 is not a whole subtree of the sum over 24 sequences in 2 shares | \
         values of layout.micro_batch that work: 3, 6, 12",
    );
}

#[test]
fn contexts_and_experts() {
    check(Layout { cp: 4, ..one() }, "ok");
    check(
        Layout { cp: 3, ..one() },
        "layout.cp = 3 cuts a sequence into 6 pieces, which do not divide its 128 tokens | \
         values of layout.cp that work: 1, 2, 4, 8, 16, 32, 64",
    );
    check(Layout { cp: 32, tp: 4, dp: 2, sequence_parallel: true, ..one() }, "ok");
    check(
        Layout { cp: 64, tp: 4, sequence_parallel: true, ..one() },
        "layout.sequence_parallel = true needs layout.tp = 4 to divide a context-parallel rank's part of the \
         sequence, of 2 tokens | set batch.sequence=256, or layout.sequence_parallel=false",
    );
    check(Layout { ep: 2, dp: 2, ..one() }, "layout.ep = 2, but tiny has no experts | set layout.ep=1");

    let experts = Experts {
        count: 12,
        top_k: 2,
        ffn: 8,
        shared_ffn: 10,
        dense_layers: 0,
        every: 1,
        router: Default::default(),
    };
    let mixed = ModelSpec { experts: Some(experts), ffn: 97, ..tiny() };
    let verdict = |layout: Layout| {
        layout
            .validate(&mixed, 24, 128)
            .map_or_else(|e| format!("{e} | {}", e.hint_text().unwrap_or("no hint")), |()| "ok".to_owned())
    };
    // No layer has the odd width.
    assert_eq!(
        verdict(Layout { ep: 6, dp: 1, cp: 2, tp: 2, pp: 2, ..one() }),
        "layout.ep = 6 does not divide the 4 ranks of a stage (dp x cp x tp) | values of layout.ep that work: 1, 2, 4"
    );
    assert_eq!(verdict(Layout { ep: 4, dp: 2, cp: 2, tp: 2, pp: 2, ..one() }), "ok");
    assert_eq!(
        verdict(Layout { ep: 8, dp: 8, ..one() }),
        "layout.ep = 8 does not divide the 12 experts of tiny | values of layout.ep that work: 1, 2, 4"
    );
    assert_eq!(
        verdict(Layout { tp: 4, ..one() }),
        "layout.tp = 4 does not divide the 10 columns of the shared experts of tiny | \
         values of layout.tp that work: 1, 2, 5, 10"
    );
    let world = Layout { dp: 2, cp: 2, tp: 2, ep: 4, ..one() };
    assert_eq!((world.world(), world.replicas(), world.expert_replicas()), (8, 4, 2));
    let refused = world.validate_world(16).expect_err("half of it");
    assert_eq!(
        refused.to_string(),
        "layout.dp x cp x tp x pp = 2 x 2 x 2 x 1 = 8, but 16 ranks were started"
    );
    assert_eq!(refused.hint_text(), Some("set layout.dp=4, or start 8 ranks"));
}

#[test]
fn groups_that_shard() {
    let sharded = Layout { dp: 8, zero: Zero::Parameters, micro_batch: 3, ..one() };
    check(Layout { shard: Some(2), ..sharded.clone() }, "ok");
    check(Layout { shard: Some(8), ..sharded.clone() }, "ok");
    let works = "values of layout.shard that work: 2, 4, 8";
    check(
        Layout { shard: Some(3), ..sharded.clone() },
        &format!("layout.shard = 3 does not divide layout.dp = 8 | {works}"),
    );
    check(
        Layout { shard: Some(usize::MAX), ..sharded.clone() },
        &format!("layout.shard = {} does not divide layout.dp = 8 | {works}", usize::MAX),
    );
    check(
        Layout { shard: Some(1), ..sharded.clone() },
        &format!("layout.shard = 1 shards nothing | {works}"),
    );
    check(
        Layout { shard: Some(2), zero: Zero::Off, ..sharded.clone() },
        "layout.shard = 2, but layout.zero = 0 shards nothing | set layout.zero=1, 2 or 3, or leave layout.shard out",
    );
    // Context-parallel ranks shard with those of dp.
    check(Layout { shard: Some(1), cp: 2, ..sharded.clone() }, "ok");

    // A micro-batch of those that shard together is a subtree: of 24 sequences there are some of 3, 6, 12.
    check(Layout { dp: 4, shard: Some(2), zero: Zero::Gradients, micro_batch: 3, ..one() }, "ok");
    check(
        Layout { dp: 4, shard: Some(2), zero: Zero::Gradients, ..one() },
        "layout.micro_batch = 1 is not a whole subtree of the sum over 24 sequences in 4 shares | \
         values of layout.micro_batch that work: 3, 6",
    );

    // Groups hold whole sets of experts, or a part of one.
    let experts = Experts {
        count: 12,
        top_k: 2,
        ffn: 8,
        shared_ffn: 0,
        dense_layers: 0,
        every: 1,
        router: Default::default(),
    };
    let mixed = ModelSpec { experts: Some(experts), ..tiny() };
    let verdict = |ep: usize, shard: usize| {
        let layout =
            Layout { dp: 12, ep, shard: Some(shard), zero: Zero::Optimizer, reduce: Reduce::Ring, ..one() };
        layout.validate(&mixed, 24, 128).map_err(|e| format!("{e} | {}", e.hint_text().unwrap_or("no hint")))
    };
    for (ep, shard) in [(2, 2), (2, 4), (4, 2), (12, 3), (3, 3)] {
        assert_eq!(verdict(ep, shard), Ok(()), "ep = {ep}, shard = {shard}");
    }
    assert_eq!(
        verdict(4, 3).unwrap_err(),
        "layout.shard = 3 cuts the 4 ranks that hold all experts | values of layout.shard that work: 2, 4, 12"
    );
    let of = |ep: usize, shard: usize| Layout { dp: 12, ep, shard: Some(shard), ..one() }.expert_shards();
    assert_eq!([of(2, 2), of(2, 4), of(4, 2), of(1, 6)], [1, 2, 1, 6]);
}

#[test]
fn absurd_sizes() {
    check(Layout { dp: 0, ..one() }, "layout.dp = 0, expected 1 to 16777216 | no hint");
    check(
        Layout { micro_batch: usize::MAX, ..one() },
        &format!("layout.micro_batch = {}, expected 1 to 16777216 | no hint", usize::MAX),
    );
    check(
        Layout { dp: 1 << 24, pp: 1 << 24, tp: 1 << 24, ..one() },
        "layout.dp x tp x pp = 16777216 x 16777216 x 16777216 ranks, expected at most 16777216 | no hint",
    );
    assert_eq!(verdict(&one(), 0, 128), "global batch in sequences = 0, expected 1 to 16777216 | no hint");
}

#[test]
fn world() {
    let refused = one().validate_world(0).expect_err("no ranks");
    assert_eq!(refused.to_string(), "layout.dp x tp x pp = 1 x 1 x 1 = 1, but 0 ranks were started");
    assert_eq!(refused.hint_text(), Some("start 1 rank"));
    assert!(Layout { tp: 0, ..one() }.validate_world(4).is_err());
    assert!(one().validate_world(1).is_ok());
}

proptest! {
    /// Whatever the numbers, there is an answer, a refusal comes with words, and a hint's values are accepted.
    #[test]
    fn hints_work(dp in 1usize..10, tp in 1usize..6, pp in 1usize..5, chunks in 1usize..3, m in 1usize..9,
                  n in 1usize..50, zero in 0u8..4, ring: bool, interleaved: bool) {
        let layout = Layout {
            dp, tp, pp, chunks, micro_batch: m,
            zero: Zero::try_from(zero).expect("in range"),
            reduce: if ring { Reduce::Ring } else { Reduce::Tree },
            schedule: if interleaved { PipelineSchedule::Interleaved } else { PipelineSchedule::OneFOneB },
            ..one()
        };
        let Err(refused) = layout.validate(&tiny(), n, 64) else { return Ok(()) };
        let Some((key, values)) = refused.hint_text().and_then(|h| h.strip_prefix("values of layout.")?.split_once(" that work: ")) else {
            return Ok(());
        };
        for value in values.split(';').next().unwrap_or_default().split(", ").filter_map(|v| v.parse::<usize>().ok()) {
            let mut fixed = layout.clone();
            match key {
                "dp" => fixed.dp = value,
                "tp" => fixed.tp = value,
                "pp" => fixed.pp = value,
                _ => fixed.micro_batch = value,
            }
            let again = fixed.validate(&tiny(), n, 64).err().map(|e| e.to_string());
            let same = again.as_ref().is_some_and(|e| e.starts_with(&format!("layout.{key} = {value} ")));
            prop_assert!(!same, "{:?} after {refused}", again);
        }
    }
}
