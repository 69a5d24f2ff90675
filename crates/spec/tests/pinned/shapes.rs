//! Models of every mixture of features: what they count, what they are written as, which are refused.

use std::fmt::Write as _;

use spec::hash::fnv1a;
use spec::{
    Activation, Experts, Latent, ModelSpec, NormKind, Position, Rope, RopeScaling, Router, Score, Window,
    Yarn,
};

use crate::check::check;
use crate::said;

/// Draws of a counter: the first of each list is the most likely.
struct Draw(u64);

impl Draw {
    fn of<T: Clone>(&mut self, list: &[T]) -> T {
        self.0 = spec::random::mix(self.0);
        list[(self.0 >> 20) as usize % list.len()].clone()
    }

    fn odds(&mut self, one_in: usize) -> bool {
        self.of(&(0..one_in).collect::<Vec<_>>()) == 0
    }
}

fn experts(d: &mut Draw) -> Experts {
    let router = match d.of(&[0, 0, 1, 2, 3]) {
        0 => Router::PLAIN,
        1 => Router { renormalise: false, ..Router::PLAIN },
        2 => Router { bias: true, balance_loss: 0.01, ..Router::PLAIN },
        _ => Router { score: Score::Sigmoid, scale: 2.5, groups: 4, top_groups: 2, ..Router::PLAIN },
    };
    Experts {
        count: d.of(&[8, 8, 12]),
        top_k: d.of(&[2, 1, 3]),
        ffn: d.of(&[24, 40]),
        shared_ffn: d.of(&[0, 0, 24, 48, 33]),
        dense_layers: d.of(&[0, 0, 1, 2]),
        every: d.of(&[1, 1, 2, 3]),
        router,
    }
}

fn scaling(d: &mut Draw) -> RopeScaling {
    let yarn = |attention_factor, truncate| {
        RopeScaling::Yarn(Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.5,
            original_max_positions: 32,
            attention_factor,
            truncate,
            mscale_all_dim: 0.0,
        })
    };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 16,
    };
    let none = RopeScaling::Default;
    let linear = RopeScaling::Linear { factor: 2.5 };
    let dynamic = RopeScaling::Dynamic { factor: 3.0 };
    d.of(&[
        none.clone(),
        none.clone(),
        none,
        linear,
        dynamic,
        llama3,
        yarn(None, true),
        yarn(Some(1.25), false),
    ])
}

fn position(d: &mut Draw) -> Position {
    let max_positions = d.of(&[64, 65]);
    match d.odds(5) {
        true => Position::Learned { max_positions },
        false => Position::Rope(Rope { theta: d.of(&[1e4, 5e5]), scaling: scaling(d), max_positions }),
    }
}

fn drawn(i: u64) -> ModelSpec {
    let d = &mut Draw(spec::random::mix(i));
    let like = d.of(&["llama", "llama", "gpt2", "gpt-oss", "deepseek", "any"]);
    let heads = d.of(&[4, 8]);
    let (gpt2, oss, latent) = (like == "gpt2", like == "gpt-oss", like == "deepseek");
    let any = like == "any";
    let mut flag = |usual: bool, one_in: usize| if d.odds(one_in) { !usual } else { usual };
    let [qkv_bias, attn_out_bias, mlp_bias] = [0; 3].map(|_| flag(gpt2 || oss, if any { 2 } else { 9 }));
    let (qk_norm, tied_embeddings) = (flag(false, if latent || gpt2 { 9 } else { 3 }), flag(gpt2, 3));
    let sinks = flag(oss, 16);
    let layer_norm = flag(gpt2, if any { 2 } else { 16 });
    let has_experts = flag(oss || latent, 3);
    let with_experts = has_experts.then(|| experts(d));
    let query_rank = d.of(&[None, Some(12)]);
    let rank = Latent { query_rank, kv_rank: 10, nope_dim: 6, rope_dim: d.of(&[4, 2]), value_dim: 5 };
    let window =
        Window { tokens: d.of(&[5, 16]), full_layers: d.of(&[0, 1, 2]), full_every: d.of(&[0, 0, 2, 3]) };
    let plain = RopeScaling::Default;
    let rope = |scaling| Position::Rope(Rope { theta: 1e4, scaling, max_positions: 64 });
    ModelSpec {
        name: format!("m{i}"),
        vocab: d.of(&[300, 301]),
        layers: d.of(&[4, 5, 6]),
        hidden: 64,
        ffn: d.of(&[96, 100]),
        heads,
        kv_heads: if latent || gpt2 { heads } else { d.of(&[heads, heads / 2, 1]) },
        head_dim: if gpt2 && !d.odds(6) { 64 / heads } else { d.of(&[64 / heads, 16]) },
        norm: if layer_norm { NormKind::Layer } else { NormKind::Rms },
        norm_eps: if latent { d.of(&[1e-6, 1e-6, 1e-6, 1e-5]) } else { d.of(&[1e-5, 1e-6]) },
        position: match like {
            "gpt2" if !d.odds(6) => Position::Learned { max_positions: 64 },
            "deepseek" if !d.odds(6) => rope(plain),
            _ => position(d),
        },
        activation: match like {
            "gpt2" => d.of(&[Activation::GeluTanh, Activation::Gelu, Activation::Gelu, Activation::SwiGlu]),
            "gpt-oss" if !d.odds(9) => Activation::SwiGluClamped,
            _ if d.odds(12) => Activation::Gelu,
            _ => Activation::SwiGlu,
        },
        qkv_bias,
        attn_out_bias,
        mlp_bias,
        qk_norm,
        tied_embeddings,
        init_std: d.of(&[0.02, 0.006]),
        logit_softcap: if d.odds(20) { 30.0 } else { 0.0 },
        experts: with_experts,
        latent: latent.then_some(rank),
        window: d.odds(if latent { 9 } else { 3 }).then_some(window),
        sinks,
        mtp: None,
    }
}

/// Sizes in words of one letter.
fn brief(m: &ModelSpec) -> String {
    let text = m.to_toml();
    let lines: Vec<&str> =
        text.lines().filter(|l| !l.ends_with("false") && !l.starts_with("init_std")).collect();
    lines.join("; ").replace(" = ", "=")
}

#[test]
fn models_count_and_are_written_as_they_were() {
    let mut all = String::new();
    for i in 0..180 {
        let m = drawn(i);
        writeln!(all, "{}", brief(&m)).unwrap();
        let verdict = m.validate().map_or_else(|e| said(&e), |()| "sound".to_owned());
        let layers: Vec<String> =
            (0..m.layers).map(|l| format!("{}{:?}", u8::from(m.has_experts(l)), m.window_of(l))).collect();
        writeln!(
            all,
            "  {verdict}; {} {} {} {:?} {:?}; {:.0} {:.0} of {}; {} {} {} {}; {} {}",
            m.param_count(),
            m.active_param_count(),
            m.attention_params(),
            m.layer_params(true),
            m.layer_params(false),
            m.flops_per_token(7),
            m.flops_per_token(37),
            m.score_width(),
            m.q_width(),
            m.kv_width(),
            m.heads_per_kv(),
            m.max_positions(),
            m.expert_layers(),
            layers.join(" ")
        )
        .unwrap();
        let back = ModelSpec::from_toml("m.toml", &m.to_toml());
        let same = back.map_or_else(
            |e| said(&e),
            |back| if back == m { "reads back".into() } else { "differs".to_owned() },
        );
        let config = match m.to_hf_config() {
            Err(e) => said(&e),
            Ok(json) => {
                let again = ModelSpec::from_hf_config(&json.to_string()).map_or_else(
                    |e| said(&e),
                    |again| {
                        let was = m.to_toml();
                        let moved: Vec<String> = again
                            .to_toml()
                            .lines()
                            .filter(|l| !was.lines().any(|w| w == *l))
                            .map(str::to_owned)
                            .collect();
                        moved.join("; ")
                    },
                );
                let family = m.hf_architecture().expect("it has a family");
                format!("{family} {:016x}, again {again}", fnv1a(json.to_string().bytes()))
            }
        };
        writeln!(all, "  {same}; {config}").unwrap();
    }
    check("models", &all);
}

/// A model of a kind with one value changed.
type Change = Box<dyn Fn(&mut ModelSpec)>;

fn numbers<T: Copy + std::fmt::Debug + 'static>(
    name: &'static str,
    values: &[T],
    set: impl Fn(&mut ModelSpec, T) + Copy + 'static,
) -> Vec<(String, Change)> {
    let change = |&x: &T| (format!("{name} {x:?}"), Box::new(move |m: &mut ModelSpec| set(m, x)) as Change);
    values.iter().map(change).collect()
}

fn with_experts(m: &mut ModelSpec, change: impl FnOnce(&mut Experts)) {
    m.layers = 4;
    let plain = Experts {
        count: 12,
        top_k: 2,
        ffn: 8,
        shared_ffn: 0,
        dense_layers: 0,
        every: 1,
        router: Router::PLAIN,
    };
    let e = m.experts.get_or_insert(plain);
    change(e);
}

fn with_latent(m: &mut ModelSpec, change: impl FnOnce(&mut Latent)) {
    let plain = Latent { query_rank: Some(12), kv_rank: 8, nope_dim: 6, rope_dim: 2, value_dim: 4 };
    change(m.latent.get_or_insert(plain));
}

fn with_window(m: &mut ModelSpec, change: impl FnOnce(&mut Window)) {
    m.layers = 4;
    change(m.window.get_or_insert(Window { tokens: 8, full_layers: 0, full_every: 0 }));
}

fn with_rope(m: &mut ModelSpec, change: impl FnOnce(&mut Rope)) {
    m.position = match &m.position {
        Position::Rope(rope) => {
            let mut rope = rope.clone();
            change(&mut rope);
            Position::Rope(rope)
        }
        learned => learned.clone(),
    };
}

fn bounds() -> Vec<(String, Change)> {
    const SIZES: [usize; 12] = [
        0,
        1,
        1 << 14,
        (1 << 14) + 1,
        1 << 16,
        1 << 20,
        (1 << 20) + 1,
        1 << 22,
        (1 << 22) + 1,
        1 << 24,
        (1 << 24) + 1,
        1 << 26,
    ];
    let mut all = numbers("vocab", &SIZES, |m, x| m.vocab = x);
    all.extend(numbers("layers", &SIZES, |m, x| m.layers = x));
    all.extend(numbers("hidden", &SIZES, |m, x| m.hidden = x));
    all.extend(numbers("ffn", &SIZES, |m, x| m.ffn = x));
    all.extend(numbers("heads", &SIZES, |m, x| (m.heads, m.kv_heads) = (x, 1)));
    all.extend(numbers("kv_heads", &SIZES, |m, x| (m.heads, m.kv_heads) = (1 << 14, x)));
    all.extend(numbers("kv_heads of 12", &[5, 6], |m, x| (m.heads, m.kv_heads) = (12, x)));
    all.extend(numbers("head_dim", &SIZES, |m, x| (m.heads, m.kv_heads, m.head_dim) = (1, 1, x)));
    all.extend(numbers("heads of 1024", &[1 << 12, (1 << 12) + 1], |m, x| {
        (m.heads, m.kv_heads, m.head_dim) = (x, 1, 1024)
    }));
    all.extend(numbers("max_positions", &[0, 1, 1 << 26, (1 << 26) + 1], |m, x| {
        with_rope(m, |r| r.max_positions = x)
    }));
    all.extend(numbers("learned", &[0, 1, 1 << 26, (1 << 26) + 1], |m, x| {
        m.position = Position::Learned { max_positions: x }
    }));
    all.extend(expert_bounds());
    all.extend(numbers("window.tokens", &[0, 1, 1 << 26, (1 << 26) + 1], |m, x| {
        with_window(m, |w| w.tokens = x)
    }));
    all.extend(numbers("window.full_layers", &[3, 4, 5], |m, x| with_window(m, |w| w.full_layers = x)));
    all.extend(numbers("window.full_every", &[1, 2, 1 << 14, (1 << 14) + 1], |m, x| {
        with_window(m, |w| w.full_every = x)
    }));
    all.extend(latent_bounds());
    all.extend(constant_bounds());
    all
}

fn expert_bounds() -> Vec<(String, Change)> {
    let mut all =
        numbers("experts.count", &[0, 1, 2, 1 << 16, (1 << 16) + 1], |m, x| with_experts(m, |e| e.count = x));
    all.extend(numbers("experts.top_k", &[0, 1, 12, 13], |m, x| with_experts(m, |e| e.top_k = x)));
    all.extend(numbers("experts.ffn", &[0, 1, 1 << 22, (1 << 22) + 1], |m, x| {
        with_experts(m, |e| e.ffn = x)
    }));
    all.extend(numbers("experts.shared_ffn", &[1 << 22, (1 << 22) + 1], |m, x| {
        with_experts(m, |e| e.shared_ffn = x)
    }));
    all.extend(numbers("experts.dense_layers", &[3, 4, 5], |m, x| with_experts(m, |e| e.dense_layers = x)));
    all.extend(numbers("experts.every", &[0, 4, 5], |m, x| with_experts(m, |e| e.every = x)));
    all.extend(numbers("experts.every of 3", &[2, 3], |m, x| {
        with_experts(m, |e| (e.dense_layers, e.every) = (2, x))
    }));
    all.extend(numbers("experts.groups", &[0, 1, 3, 5, 12, 13], |m, x| {
        with_experts(m, |e| e.router.groups = x)
    }));
    all.extend(numbers("many groups", &[512, 1024, 2048], |m, x| {
        with_experts(m, |e| (e.count, e.router.groups) = (1 << 16, x))
    }));
    all.extend(numbers("top_groups of 4", &[0, 1, 4, 5], |m, x| {
        with_experts(m, |e| (e.router.groups, e.router.top_groups) = (4, x));
    }));
    all.extend(numbers("top_k of groups", &[3, 4, 6, 7], |m, x| {
        with_experts(m, |e| (e.top_k, e.router.groups, e.router.top_groups) = (x, 4, 2));
    }));
    let factors = [0.0, -1.0, f32::MIN_POSITIVE, 1e4, 1.1e4, f32::NAN];
    all.extend(numbers("scale", &factors, |m, x| with_experts(m, |e| e.router.scale = x)));
    all.extend(numbers("balance_loss", &factors, |m, x| with_experts(m, |e| e.router.balance_loss = x)));
    all.extend(numbers("z_loss", &factors, |m, x| with_experts(m, |e| e.router.z_loss = x)));
    all
}

fn latent_bounds() -> Vec<(String, Change)> {
    const RANKS: [usize; 4] = [0, 1, 1 << 20, (1 << 20) + 1];
    const DIMS: [usize; 6] = [0, 1, 2, 3, 1 << 14, (1 << 14) + 1];
    let mut all = numbers("query_rank", &RANKS, |m, x| with_latent(m, |l| l.query_rank = Some(x)));
    all.extend(numbers("kv_rank", &RANKS, |m, x| with_latent(m, |l| l.kv_rank = x)));
    all.extend(numbers("nope_dim", &DIMS, |m, x| with_latent(m, |l| l.nope_dim = x)));
    all.extend(numbers("rope_dim", &DIMS, |m, x| with_latent(m, |l| l.rope_dim = x)));
    all.extend(numbers("value_dim", &DIMS, |m, x| with_latent(m, |l| l.value_dim = x)));
    all.extend(numbers("latent and bias", &[0, 1, 2, 3], |m, x| {
        with_latent(m, |_| ());
        (m.qkv_bias, m.attn_out_bias, m.qk_norm, m.mlp_bias) = (x == 0, x == 1, x == 2, x == 3);
    }));
    all.extend(numbers("latent and learned", &[64], |m, max_positions| {
        with_latent(m, |_| ());
        m.position = Position::Learned { max_positions };
    }));
    all.extend(numbers("latent and an odd head", &[7], |m, x| {
        with_latent(m, |_| ());
        m.head_dim = x;
    }));
    all
}

fn constant_bounds() -> Vec<(String, Change)> {
    let small = [0.0, f32::MIN_POSITIVE, 0.999, 1.0, -0.5, f32::NAN, f32::INFINITY];
    let mut all = numbers("norm_eps", &small, |m, x| m.norm_eps = x);
    all.extend(numbers("init_std", &small, |m, x| m.init_std = x));
    all.extend(numbers("softcap", &[-1.0, 0.0, 0.5, 1.0, 1e6, 1.1e6, f32::NAN], |m, x| m.logit_softcap = x));
    all.extend(numbers("theta", &[0.0, 1.0, 1.0001, 1e12, 1.1e12, f64::NAN], |m, x| {
        with_rope(m, |r| r.theta = x)
    }));
    let factors = [0.0, 0.999, 1.0, 1e6, 1.1e6, f64::NAN];
    all.extend(numbers("linear", &factors, |m, factor| {
        with_rope(m, |r| r.scaling = RopeScaling::Linear { factor })
    }));
    all.extend(numbers("dynamic", &factors, |m, factor| {
        with_rope(m, |r| r.scaling = RopeScaling::Dynamic { factor })
    }));
    let llama3 = |m: &mut ModelSpec, factor, low_freq_factor, high_freq_factor, original_max_positions| {
        let scaling =
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions };
        with_rope(m, |r| r.scaling = scaling);
    };
    all.extend(numbers("llama3 factor", &factors, move |m, x| llama3(m, x, 1.0, 4.0, 8)));
    all.extend(numbers("llama3 low", &[0.0, 1e-9, 3.9, 4.0, 5.0], move |m, x| llama3(m, 2.0, x, 4.0, 8)));
    all.extend(numbers("llama3 high", &[999_999.0, 1e6], move |m, x| llama3(m, 2.0, 1.0, x, 8)));
    all.extend(numbers("llama3 original", &[0, 1, 1 << 26, (1 << 26) + 1], move |m, x| {
        llama3(m, 2.0, 1.0, 4.0, x)
    }));
    let yarn = |m: &mut ModelSpec, factor, beta_fast, beta_slow, original_max_positions, attention_factor| {
        let truncate = true;
        let scaling = RopeScaling::Yarn(Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_max_positions,
            attention_factor,
            truncate,
            mscale_all_dim: 0.0,
        });
        with_rope(m, |r| r.scaling = scaling);
    };
    all.extend(numbers("yarn factor", &factors, move |m, x| yarn(m, x, 32.0, 1.0, 8, None)));
    all.extend(numbers("yarn fast", &[0.5, 1.0, 999_999.0, 1e6], move |m, x| yarn(m, 2.0, x, 1.0, 8, None)));
    all.extend(numbers("yarn slow", &[0.0, 1e-9, 32.0, 33.0], move |m, x| yarn(m, 2.0, 32.0, x, 8, None)));
    all.extend(numbers("yarn original", &[0, 1, 1 << 26, (1 << 26) + 1], move |m, x| {
        yarn(m, 2.0, 32.0, 1.0, x, None)
    }));
    let scales = [0.0, 1e-9, 999_999.0, 1e6, f64::NAN];
    all.extend(numbers("yarn scale", &scales, move |m, x| yarn(m, 2.0, 32.0, 1.0, 8, Some(x))));
    all.extend(numbers("yarn scale and original", &[0], move |m, x| yarn(m, 2.0, 32.0, 1.0, x, Some(1.0))));
    all
}

#[test]
fn models_are_bounded_as_they_were() {
    let mut all = String::new();
    for (what, change) in bounds() {
        let mut model = ModelSpec::preset("tiny").expect("a preset");
        change(&mut model);
        let verdict =
            model.validate().map_or_else(|e| said(&e), |()| format!("{} parameters", model.param_count()));
        writeln!(all, "{what}: {verdict}").unwrap();
    }
    check("model_bounds", &all);
}
