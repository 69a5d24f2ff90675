//! Layouts under every tolerance, at the bounds of sizes, and beside worlds of other sizes; words, rates and sums.

use std::fmt::Write as _;

use spec::{Layout, LrSchedule, ModelSpec, ScheduleKind, SumTree, Tolerance, lcm, merge_at, suggest, units};

use crate::check::check;
use crate::{brief, layouts, models, said};

#[test]
fn layouts_are_tolerated_and_held_as_they_were() {
    let kept = Tolerance::NONE;
    let tolerances = [
        ("none", kept),
        ("copied", Tolerance { copied_kv_heads: true, ..kept }),
        ("padded", Tolerance { padded: true, ..kept }),
        ("sequence", Tolerance { padded_sequence: true, ..kept }),
        ("ends", Tolerance { empty_ends: true, ..kept }),
        ("all", Tolerance::ALL),
    ];
    let mut models = models();
    models.push(("learned", ModelSpec::preset("tiny-gpt2").expect("a preset")));
    let mut all = String::new();
    for (i, layout) in layouts().take(100).enumerate() {
        writeln!(all, "{}", brief(&layout)).unwrap();
        let sequence = [47, 48, 50, 72][i % 4];
        for (name, model) in &models {
            let mut line = String::new();
            for (word, tolerance) in tolerances {
                let verdict = layout.check(model, 24, sequence, tolerance);
                let verdict =
                    verdict.map_or_else(|broken| format!("{:?}", broken.rule), |()| "ok".to_owned());
                let (held, tokens) = tolerance.held(&layout, model, sequence);
                let e = held.experts.map_or((0, 0), |e| (e.count, e.shared_ffn));
                let [h, kv, ffn, most] = [held.heads, held.kv_heads, held.ffn, held.max_positions()];
                write!(line, " {word} {verdict} {h}/{kv}/{ffn}/{}+{}/{tokens}<{most}", e.0, e.1).unwrap();
            }
            writeln!(all, "  {name}:{line}").unwrap();
        }
    }
    check("tolerances", &all);
}

/// What is at a bound and just beyond it, and how many ranks were started.
#[test]
fn layouts_are_bounded_as_they_were() {
    const MOST: usize = 1 << 24;
    let one = Layout::default;
    let model =
        ModelSpec { layers: 12, heads: 96, kv_heads: 96, ffn: 96, ..ModelSpec::preset("tiny").unwrap() };
    let mixed = ModelSpec { layers: 4, ..ModelSpec::preset("moe-tiny").unwrap() };
    let mut all = String::new();
    let mut shown = |what: String, layout: &Layout, model: &ModelSpec, sequences, sequence| {
        let verdict =
            layout.validate(model, sequences, sequence).map_or_else(|e| said(&e), |()| "ok".to_owned());
        writeln!(all, "{what}: {verdict}").unwrap();
    };
    for size in [0, 1, MOST, MOST + 1] {
        shown(format!("dp {size}"), &Layout { dp: size, ..one() }, &model, MOST, 48);
        shown(format!("tp {size}"), &Layout { tp: size, ..one() }, &model, 24, 48);
        shown(format!("pp {size}"), &Layout { pp: size, ..one() }, &model, 24, 48);
        shown(format!("cp {size}"), &Layout { cp: size, ..one() }, &model, 24, 48);
        shown(format!("ep {size}"), &Layout { ep: size, ..one() }, &mixed, 24, 48);
        shown(format!("chunks {size}"), &Layout { chunks: size, ..one() }, &model, 24, 48);
        shown(format!("micro_batch {size}"), &Layout { micro_batch: size, ..one() }, &model, MOST, 48);
        shown(format!("sequences {size}"), &one(), &model, size, 48);
        shown(format!("all of {size}"), &Layout { dp: 4, tp: 4, pp: size / 16, ..one() }, &model, 24, 48);
    }
    shown("beyond".into(), &Layout { dp: MOST, tp: 2, ..one() }, &model, MOST, 48);
    shown("overflow".into(), &Layout { dp: MOST, tp: MOST, pp: MOST, cp: MOST, ..one() }, &model, 24, 48);
    // Many values work, none does.
    shown(
        "dozens".into(),
        &Layout { tp: 7, ..one() },
        &ModelSpec { heads: 720, kv_heads: 720, ffn: 720, ..model.clone() },
        24,
        48,
    );
    shown("a dozen".into(), &Layout { tp: 7, ..one() }, &model, 24, 48);
    shown("nothing".into(), &Layout { dp: 3, ep: 3, ..one() }, &mixed, 24, 48);
    for sequence in [1, 2, 6, 48] {
        for cp in [1, 2, 3, 4] {
            shown(format!("cp {cp} of {sequence}"), &Layout { cp, ..one() }, &model, 24, sequence);
        }
        for tp in [2, 3, 4] {
            let layout = Layout { tp, sequence_parallel: true, ..one() };
            shown(format!("tp {tp} of {sequence}"), &layout, &model, 24, sequence);
            shown(
                format!("tp {tp} of {sequence} mixed"),
                &Layout { tp, micro_batch: 3, ..one() },
                &mixed,
                24,
                sequence,
            );
        }
    }
    for world in 0..13 {
        for (tp, cp, pp, dp) in [(1, 1, 1, 1), (2, 1, 3, 1), (2, 2, 1, 3), (1, 2, 2, 1), (0, 1, 1, 1)] {
            let layout = Layout { tp, cp, pp, dp, ..one() };
            let verdict = layout.validate_world(world).map_or_else(|e| said(&e), |()| "ok".to_owned());
            writeln!(all, "{dp} x {cp} x {tp} x {pp} in {world}: {verdict}").unwrap();
        }
    }
    for (pp, chunks) in [(1, 1), (2, 1), (3, 1), (4, 1), (7, 1), (2, 3), (3, 4), (4, 3), (5, 2)] {
        let dealt = [1, 5, 12, 23, 24, 25].map(|layers| Layout { pp, chunks, ..one() }.deal(layers));
        writeln!(all, "{pp} x {chunks} deal {dealt:?}").unwrap();
    }
    check("layout_bounds", &all);
}

/// Rates of every course, at its ends and inside.
#[test]
fn rates_are_what_they_were() {
    let mut all = String::new();
    let kinds = [ScheduleKind::Cosine, ScheduleKind::Wsd, ScheduleKind::Linear, ScheduleKind::Constant];
    for kind in kinds {
        for (steps, warmup_steps, decay_steps) in
            [(20, 0, 0), (20, 5, 6), (20, 5, 15), (20, 5, 30), (5, 7, 3), (1, 0, 1)]
        {
            let schedule = LrSchedule { kind, peak: 0.8, min: 0.1, steps, warmup_steps, decay_steps };
            let rates: Vec<String> = (0..24).map(|step| format!("{:.5}", schedule.at(step))).collect();
            writeln!(all, "{} {steps} {warmup_steps} {decay_steps}: {}", kind.name(), rates.join(" "))
                .unwrap();
        }
    }
    check("rates", &all);
}

/// Trees and sums over every number of sequences: what a counter adds is what recursion from the root adds.
#[test]
fn trees_are_what_they_were() {
    let mut all = String::new();
    for n in (0..=36).chain([48, 60, 64, 97, 121, 128, 210]) {
        let tree = SumTree::new(n);
        let parts = |f: &dyn Fn(usize) -> Option<Vec<u32>>| -> String {
            (0..=n + 1).filter_map(|m| Some(format!(" {m}{:?}", f(m)?))).collect()
        };
        let merged: Vec<String> = (0..n.min(20))
            .map(|i| merge_at(tree.radices(), i))
            .map(|(merge, store)| format!("{merge}>{store}"))
            .collect();
        writeln!(
            all,
            "{n}: {} {:?} {:?};{};{}; {} of {}",
            tree.leaves(),
            tree.radices(),
            tree.all_splits(),
            parts(&|m| tree.inner(m)),
            parts(&|m| tree.outer(m)),
            merged.join(" "),
            spec::sum_tree::levels(tree.radices())
        )
        .unwrap();
    }
    for a in [0, 1, 2, 6, 9, 35] {
        let all_lcm: Vec<usize> = [0, 1, 2, 4, 15, 21].map(|b| lcm(a, b)).to_vec();
        writeln!(all, "lcm of {a}: {all_lcm:?}").unwrap();
    }
    check("trees", &all);
}

/// Names that words may have been meant for.
const KNOWN: &str = "\
    train.steps train.seed optim.lr layout.dp model.experts.top_k llama3-8b gpt2 a ab abc abcdef \
    abcdefghi top_k";

/// Words, right and wrong.
const WORDS: &str = "\
    a b ba xy axc acb xyc abcd abcdxx abcxxx abcde bacdef badcfe abcdefghij abcdefghijk \
    abcdefghijkl abcdefghijklm abxdyfzhi wbxdyfzhi Train-Steps train.step steps lr x.lr optim.rl \
    experts.top_k model.top_k top-k lama3_8b llama3-80b gpt-2 gtp2 gpt é gpü2";

#[test]
fn words_and_numbers_of_tokens_are_read_as_they_were() {
    let mut all = String::new();
    let known: Vec<&str> = KNOWN.split_whitespace().collect();
    for word in WORDS.split_whitespace().chain([""]) {
        let far: Vec<usize> = known.iter().map(|k| suggest::distance(word, k)).collect();
        let near: Vec<&str> = known.iter().filter_map(|k| suggest::nearest(word, [*k])).collect();
        writeln!(all, "{word:?}: {} of {near:?}; {far:?}", suggest::hint(word, known.iter().copied()))
            .unwrap();
    }
    let catalog = spec::Catalog::builtin().expect("the catalogue");
    for word in "h1/h10/h1000/dgx/dgxx/superpod dgx/--/x/nod/h100 dgx node/gb20/gb2/tpu v".split('/') {
        let found = catalog.named(word).map_or_else(|e| said(&e), |all| format!("{} of it", all.len()));
        writeln!(all, "{word:?} in the catalogue: {found}").unwrap();
    }
    for text in "0/-0/1/2_048/1.5/1.5k/15.6T/2M tokens/2 Mtokens/3b/4G/4g/1e3/1e300T/9.2e18/9.3e18/9.2E/-1/nan/inf// 7 /tokens/k/1kk/7 tokens /0.0001M/1.0000000000001M/1.00000000001M".split('/') {
        // As a count where whole numbers are asked for.
        let set = [format!("batch.tokens={text:?}"), "batch.sequence=1".to_owned()];
        let run = spec::RunSpec::load(None, &set, &spec::RunSpec::no_files);
        let whole = run.map_or_else(|e| e.to_string(), |run| run.batch.tokens().to_string());
        writeln!(all, "{text:?}: {:?} {whole}", units::tokens(text)).unwrap();
    }
    check("words", &all);
}
