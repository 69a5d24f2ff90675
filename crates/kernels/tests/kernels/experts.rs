//! Routers, copies of rows, and the products of experts.

use kernels::*;
use proptest::prelude::*;

use crate::reference::*;

const PLAIN: Router = Router {
    top_k: 2,
    sigmoid: false,
    renormalise: true,
    scale: 1.0,
    groups: 1,
    top_groups: 1,
    balance: 0.0,
    z: 0.0,
};

/// What [`route`] gives.
struct Routed {
    gates: Vec<f32>,
    index: Vec<u32>,
    counts: Vec<u32>,
}

fn routed(
    pool: &Pool,
    logits: &[f32],
    bias: Option<&[f32]>,
    r: &Router,
    shape: (usize, usize, usize),
) -> Routed {
    let (n, experts, leaves) = shape;
    let mut out = Routed {
        gates: vec![f32::NAN; n * r.top_k],
        index: vec![u32::MAX; 2 * n * r.top_k],
        counts: vec![u32::MAX; experts * leaves],
    };
    let mut ws = scratch(route_workspace_len(experts, pool.threads()));
    let outs = (&mut out.gates[..], &mut out.index[..], &mut out.counts[..]);
    route(pool, logits, bias, r, outs, shape, &mut ws);
    out
}

impl Routed {
    fn chosen(&self, row: usize, k: usize) -> Vec<usize> {
        self.index[(2 * row + 1) * k..2 * (row + 1) * k].iter().map(|e| *e as usize).collect()
    }
}

/// Scores of a row as the formula says.
fn scores(r: &Router, logits: &[f64]) -> Vec<f64> {
    if r.sigmoid {
        return logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
    }
    let sum: f64 = logits.iter().map(|l| l.exp()).sum();
    logits.iter().map(|l| l.exp() / sum).collect()
}

/// Gates of the chosen, and the router's own losses, of all rows; the choice is given.
fn gates_and_losses(
    r: &Router,
    logits: &[f64],
    out: &Routed,
    (n, experts, leaves): (usize, usize, usize),
) -> (Vec<f64>, f64) {
    let (mut gates, mut loss) = (Vec::new(), 0.0);
    let of_leaf = n / leaves;
    let mut means = vec![0.0; experts * leaves];
    for row in 0..n {
        let logits = &logits[row * experts..(row + 1) * experts];
        let s = scores(r, logits);
        let chosen = out.chosen(row, r.top_k);
        let sum: f64 = if r.renormalise { chosen.iter().map(|e| s[*e]).sum() } else { 1.0 };
        gates.extend(chosen.iter().map(|e| s[*e] / sum * f64::from(r.scale)));
        let whole: f64 = s.iter().sum();
        for e in 0..experts {
            means[e * leaves + row / of_leaf] += s[e] / whole / of_leaf as f64;
        }
        loss += f64::from(r.z) * logits.iter().map(|l| l.exp()).sum::<f64>().ln().powi(2);
    }
    let even = (r.top_k * of_leaf) as f64 / experts as f64;
    let balance: f64 = means.iter().zip(&out.counts).map(|(p, c)| p * f64::from(*c) / even).sum();
    (gates, loss + f64::from(r.balance) * balance)
}

prop_compose! {
    fn routers()(groups in 1usize..4, size in 1usize..9, top in 1usize..4, k in 1usize..5, sigmoid: bool, renormalise: bool, scale in 0.5f32..3.0, balance in 0.0f32..1.0, z in 0.0f32..0.3)
        -> (Router, usize)
    {
        let top_groups = top.min(groups);
        let top_k = k.min(size * top_groups);
        (Router { top_k, sigmoid, renormalise, scale, groups, top_groups, balance, z }, groups * size)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 40 }))]

    /// Gates follow their formula, their gradients and those of the router's losses are those of central differences.
    #[test]
    fn routers_follow_their_formula((r, experts) in routers(), leaves in 1usize..4, rows in 1usize..5, biased: bool, seed: u64) {
        let n = leaves * rows;
        let mut numbers = Numbers::new(seed);
        let (logits, bias) = (numbers.vec(n * experts), numbers.vec(experts));
        let pool = pool();
        let shape = (n, experts, leaves);
        let out = routed(&pool, &logits, biased.then_some(&bias[..]), &r, shape);
        let (gates, _) = gates_and_losses(&r, &wide(&logits), &out, shape);
        close(&out.gates, &gates, 2e-6);
        for row in 0..n {
            let rank: Vec<f64> = scores(&r, &wide(&logits[row * experts..(row + 1) * experts])).iter().zip(&bias)
                .map(|(s, b)| s + if biased { f64::from(*b) } else { 0.0 }).collect();
            let size = experts / r.groups;
            let good = |g: usize| {
                let mut of: Vec<f64> = rank[g * size..(g + 1) * size].to_vec();
                of.sort_by(|a, b| b.total_cmp(a));
                of.iter().take(2).sum::<f64>()
            };
            let mut order: Vec<usize> = (0..r.groups).collect();
            order.sort_by(|a, b| good(*b).total_cmp(&good(*a)));
            let mut open: Vec<usize> = order[..r.top_groups].iter().flat_map(|g| g * size..(g + 1) * size).collect();
            open.sort_by(|a, b| rank[*b].total_cmp(&rank[*a]));
            // Scores in single precision may choose otherwise between two that differ by less than they can tell apart.
            let close = |of: Vec<f64>| of.windows(2).any(|pair| pair[0] - pair[1] < 1e-6);
            let told = !close(order.iter().map(|g| good(*g)).collect())
                && !close(open.iter().take(r.top_k + 1).map(|e| rank[*e]).collect());
            if told {
                prop_assert_eq!(out.chosen(row, r.top_k), &open[..r.top_k]);
            }
        }
        let dgates = numbers.vec(n * r.top_k);
        let mut dlogits = vec![f32::NAN; n * experts];
        let mut ws = scratch(route_dx_workspace_len(experts, pool.threads()));
        route_dx(&pool, &dgates, &logits, &out.index, &out.counts, &r, &mut dlogits, shape, &mut ws);
        gradient(&dlogits, &logits, 5e-5, &|logits| {
            let (gates, losses) = gates_and_losses(&r, logits, &out, shape);
            dot(&gates, &dgates) + losses
        });
    }

    /// Places are the order of (expert, row), and counts say where each expert's rows of each leaf lie.
    #[test]
    fn places_sort_by_expert_and_row((r, experts) in routers(), leaves in 1usize..4, rows in 1usize..9, seed: u64) {
        let (n, k) = (leaves * rows, r.top_k);
        let logits = Numbers::new(seed).vec(n * experts);
        let out = routed(&pool(), &logits, None, &r, (n, experts, leaves));
        let mut copies: Vec<(usize, usize)> =
            (0..n).flat_map(|row| out.chosen(row, k).into_iter().map(move |e| (e, row))).collect();
        copies.sort_unstable();
        let mut counts = vec![0; experts * leaves];
        for (place, (e, row)) in copies.iter().enumerate() {
            let slot = out.chosen(*row, k).iter().position(|c| c == e).expect("chosen");
            prop_assert_eq!(out.index[2 * row * k + slot] as usize, place);
            counts[e * leaves + row / rows] += 1;
        }
        prop_assert_eq!(out.counts, counts);
    }

    #[test]
    fn copies_go_and_come_back((r, experts) in routers(), n in 1usize..9, dim in 1usize..300, seed: u64) {
        let (k, pool) = (r.top_k, pool());
        let mut numbers = Numbers::new(seed);
        let out = routed(&pool, &numbers.vec(n * experts), None, &r, (n, experts, 1));
        let (x, acc, dcopies, dy) =
            (numbers.vec(n * dim), numbers.vec(n * dim), numbers.vec(n * k * dim), numbers.vec(n * dim));
        let mut copies = vec![f32::NAN; n * k * dim];
        permute(&pool, &x, &out.index, &mut copies, (n, k, dim));
        let at = |row: usize, slot: usize| out.index[2 * row * k + slot] as usize * dim;
        for row in 0..n {
            for slot in 0..k {
                prop_assert_eq!(&copies[at(row, slot)..][..dim], &x[row * dim..][..dim]);
            }
        }
        let weighted = |copies: &[f64], gates: &dyn Fn(usize) -> f64, acc: &[f32]| -> Vec<f64> {
            let sum = |i: usize| (0..k).map(|s| gates(i / dim * k + s) * copies[at(i / dim, s) + i % dim]).sum::<f64>();
            (0..n * dim).map(|i| f64::from(acc[i]) + sum(i)).collect()
        };
        let mut dx = vec![f32::NAN; n * dim];
        permute_dx(&pool, &dcopies, &out.index, Acc::From(&acc), &mut dx, (n, k, dim));
        close(&dx, &weighted(&wide(&dcopies), &|_| 1.0, &acc), 1e-6);
        let mut y = acc.clone();
        unpermute(&pool, &copies, &out.gates, &out.index, Acc::InPlace, &mut y, (n, k, dim));
        close(&y, &weighted(&wide(&copies), &|i| f64::from(out.gates[i]), &acc), 1e-6);
        let (mut dc, mut dg) = (vec![f32::NAN; n * k * dim], vec![f32::NAN; n * k]);
        unpermute_dx(&pool, &dy, &copies, &out.gates, &out.index, (&mut dc, &mut dg), (n, k, dim));
        let of = |gates: &[f64]| dot(&weighted(&wide(&copies), &|i| gates[i], &acc), &dy);
        gradient(&dg, &out.gates, 2e-5, &of);
        gradient(&dc, &copies, 2e-5, &|c| dot(&weighted(c, &|i| f64::from(out.gates[i]), &acc), &dy));
    }

    /// Each expert's rows give the bits of the plain products of these rows alone; a leaf without rows adds zeros.
    #[test]
    fn grouped_products_are_plain_products(
        experts in 1usize..4, peers in 1usize..3, leaves in 1usize..4, dims in (1usize..40, 1usize..70), most in 0usize..30, spare in 0usize..5, seed: u64,
    ) {
        let mut numbers = Numbers::new(seed);
        let counts: Vec<u32> = (0..peers * experts * leaves).map(|_| numbers.below(most + 1) as u32).collect();
        grouped_like_plain(&mut numbers, (&counts, experts, leaves), dims, (most, spare));
    }
}

/// As many rows as are packed in several goes, and as wide a weight.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn grouped_products_of_more_than_is_packed_at_a_time() {
    let mut numbers = Numbers::new(1);
    grouped_like_plain(&mut numbers, (&[15_000; 6], 3, 2), (1, 1), (15_000, 2));
    grouped_like_plain(&mut numbers, (&[4, 0, 2, 1, 3, 7], 3, 1), (30_000, 1), (7, 0));
}

fn grouped_like_plain(
    numbers: &mut Numbers,
    (counts, experts, leaves): (&[u32], usize, usize),
    (in_, out): (usize, usize),
    (most, spare): (usize, usize),
) {
    let peers = counts.len() / experts / leaves;
    let pool = pool();
    let groups = Groups { counts, experts, leaves };
    let rows = groups.rows() + spare;
    let (x, w, dy) = (numbers.vec(rows * in_), numbers.vec(experts * out * in_), numbers.vec(rows * out));
    let tree = [leaves as u32];
    let units = peers * experts;
    let len = grouped_linear_workspace_len((units, experts), rows, in_, out, 2)
        .max(grouped_linear_workspace_len((units, experts), rows, out, in_, 2));
    let mut ws = scratch(len);
    let (mut y, mut dx) = (vec![7.0; rows * out], vec![7.0; rows * in_]);
    let b = numbers.vec(experts * out);
    grouped_linear(&pool, &x, (&w, Some(&b)), groups, &mut y, (in_, out), &mut ws);
    grouped_linear_dx(&pool, &dy, &w, groups, &mut dx, (in_, out), &mut ws);
    let mut dw = vec![f32::NAN; 2 * experts * out * in_];
    let mut ws = scratch(grouped_linear_dw_workspace_len(units, (rows, most), in_, out, &tree, 2));
    let merge = |peer: usize| (0, Merge { merge: peer, store: peer });
    grouped_linear_dw(&pool, &dy, &x, groups, &mut dw, (in_, out, most), &tree, &merge, &mut ws);

    let mut db = vec![f32::NAN; 2 * experts * out];
    let mut ws = scratch(grouped_bias_grad_workspace_len(units, out, &tree));
    grouped_bias_grad(&pool, &dy, groups, &mut db, out, &tree, &merge, &mut ws);

    let mut ws = scratch(4_000_000);
    let (mut want_y, mut want_dx) = (vec![7.0; rows * out], vec![7.0; rows * in_]);
    let mut sums: Vec<Vec<Vec<f32>>> = vec![Vec::new(); experts];
    let mut of_biases = sums.clone();
    let mut at = 0;
    for (unit, counts) in counts.chunks(leaves).enumerate() {
        let e = unit % experts;
        let (w, b) = (&w[e * out * in_..][..out * in_], &b[e * out..][..out]);
        let (mut of_leaves, mut of_bias) = (Vec::new(), Vec::new());
        for n in counts.iter().map(|c| *c as usize) {
            let (x, dy) = (&x[at * in_..(at + n) * in_], &dy[at * out..(at + n) * out]);
            let to = &mut want_y[at * out..(at + n) * out];
            linear(&pool, x, w, Some(b), Acc::None, to, n, in_, out, &mut ws);
            linear_dx(&pool, dy, w, Acc::None, &mut want_dx[at * in_..(at + n) * in_], n, in_, out, &mut ws);
            let mut dw = vec![0.0; out * in_];
            linear_dw(&pool, dy, x, &mut dw, n, in_, out, &[], Merge { merge: 0, store: 0 }, &mut ws);
            of_leaves.push(dw);
            let mut db = vec![0.0; out];
            bias_grad(&pool, dy, &mut db, n, out, &[], Merge { merge: 0, store: 0 }, &mut ws);
            of_bias.push(db);
            at += n;
        }
        sums[e].push(add_tree(&of_leaves, &tree));
        of_biases[e].push(add_tree(&of_bias, &tree));
    }
    assert_eq!(bits(&y), bits(&want_y));
    assert_eq!(bits(&dx), bits(&want_dx));
    for (e, of_peers) in sums.iter().enumerate() {
        let last = (peers - 1) * experts * out * in_ + e * out * in_;
        let want = add_tree(of_peers, &[peers as u32]);
        assert_eq!(bits(&dw[last..][..out * in_]), bits(&want));
        let last = (peers - 1) * experts * out + e * out;
        let want = add_tree(&of_biases[e], &[peers as u32]);
        assert_eq!(bits(&db[last..][..out]), bits(&want));
    }
}

/// Equal scores go to the first experts, and logits that are no numbers choose experts all the same, each once.
#[test]
fn ties_and_nonsense_choose_experts_once() {
    let pool = pool();
    let out = routed(&pool, &[1.0; 5], None, &PLAIN, (1, 5, 1));
    assert_eq!((out.chosen(0, 2), &out.gates[..]), (vec![0, 1], &[0.5, 0.5][..]));
    let out = routed(&pool, &[f32::NAN; 5], None, &PLAIN, (1, 5, 1));
    assert_eq!(out.chosen(0, 2), [0, 1]);
    assert!(out.gates.iter().all(|g| g.is_nan()));
    let r = Router { sigmoid: true, ..PLAIN };
    let out = routed(&pool, &[0.0, f32::NAN, f32::NEG_INFINITY, 2.0], None, &r, (1, 4, 1));
    assert_eq!(out.chosen(0, 2), [3, 0]);
}

#[test]
fn roots_of_counters_are_added_in_a_tree() {
    let (levels, len) = (3, 150);
    for tree in [&[2u32, 2][..], &[3, 2], &[5], &[1]] {
        let count: u32 = tree.iter().product();
        let mut counters = Numbers::new(5).vec(count as usize * levels * len);
        let roots: Vec<Vec<f32>> =
            counters.chunks(levels * len).map(|c| c[(levels - 1) * len..].to_vec()).collect();
        add_roots(&pool(), &mut counters, levels, len, tree);
        let sum = &counters[counters.len() - len..];
        assert_eq!(bits(sum), bits(&add_tree(&roots, tree)), "{tree:?}");
    }
}
