use crate::{Error, Experts, Latent, ModelSpec, Mtp, Position, Result, RopeScaling, Window, Yarn, divisors};

/// Upper bounds of a model's sizes: above any model known, and low enough that products of them (parameters, bytes,
/// FLOPs) stay far inside 64 bits.
const MAX_VOCAB: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 14;
const MAX_HIDDEN: usize = 1 << 20;
const MAX_FFN: usize = 1 << 22;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
const MAX_EXPERTS: usize = 1 << 16;
/// As many as the router can sort; published models have 8.
const MAX_GROUPS: usize = 1024;
/// Factors beyond it are slips of a unit.
const MAX_FACTOR: f32 = 1e4;
/// Far above the 1 that published models have.
const MAX_MSCALE: f64 = 100.0;
/// Longest context.
pub(crate) const MAX_POSITIONS: usize = 1 << 26;
/// Ten thousand times the largest model trained.
const MAX_PARAMS: u128 = 10_000_000_000_000_000;

impl ModelSpec {
    /// Checks that the shape can be built: sizes in range, heads that divide, finite constants.
    ///
    /// # Errors
    /// Names the key and what it has to be.
    ///
    /// ```
    /// use spec::ModelSpec;
    /// let model = ModelSpec { kv_heads: 4, ..ModelSpec::preset("llama-tiny-ref")? };
    /// let refused = model.validate().unwrap_err();
    /// assert_eq!(refused.to_string(), "model.kv_heads = 4 does not divide model.heads = 6");
    /// # Ok::<(), spec::Error>(())
    /// ```
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab", self.vocab, MAX_VOCAB),
            ("layers", self.layers, MAX_LAYERS),
            ("hidden", self.hidden, MAX_HIDDEN),
            ("ffn", self.ffn, MAX_FFN),
            ("heads", self.heads, MAX_HEADS),
            ("kv_heads", self.kv_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("max_positions", self.max_positions(), MAX_POSITIONS),
        ];
        for (key, size, most) in sizes {
            if size == 0 || size > most {
                return Err(Error::user(format!("model.{key} = {size}, expected 1 to {most}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let works: Vec<String> =
                (1..=self.heads).filter(|k| self.heads.is_multiple_of(*k)).map(|k| k.to_string()).collect();
            return Err(Error::user(format!(
                "model.kv_heads = {} does not divide model.heads = {}",
                self.kv_heads, self.heads
            ))
            .hint(format!("values of model.kv_heads that work: {}", works.join(", "))));
        }
        if self.q_width() > MAX_FFN {
            return Err(Error::user(format!(
                "model.heads x head_dim = {} x {}, expected a product of at most {MAX_FFN}",
                self.heads, self.head_dim
            )));
        }
        if let Some(experts) = &self.experts {
            self.check_experts(experts)?;
        }
        if let Some(latent) = &self.latent {
            self.check_latent(latent)?;
        }
        if let Some(window) = &self.window {
            self.check_window(window)?;
        }
        if let Some(mtp) = &self.mtp {
            self.check_mtp(mtp)?;
        }
        let params = self.param_sum();
        if params > MAX_PARAMS {
            return Err(Error::user(format!(
                "the model has {params} parameters, expected at most {MAX_PARAMS}"
            )));
        }
        self.check_constants()
    }

    fn check_experts(&self, e: &Experts) -> Result<()> {
        for (key, size, least, most) in [
            ("count", e.count, 1, MAX_EXPERTS),
            ("top_k", e.top_k, 1, e.count),
            ("ffn", e.ffn, 1, MAX_FFN),
            ("shared_ffn", e.shared_ffn, 0, MAX_FFN),
            ("dense_layers", e.dense_layers, 0, self.layers),
            ("every", e.every, 1, self.layers),
        ] {
            if size < least || size > most {
                return Err(Error::user(format!("model.experts.{key} = {size}, expected {least} to {most}")));
            }
        }
        check_router(e)?;
        if self.expert_layers() == 0 {
            return Err(Error::user(format!(
                "model.experts.dense_layers = {} and every = {} leave none of the {} layers with experts",
                e.dense_layers, e.every, self.layers
            ))
            .hint("set model.experts.dense_layers=0, or model.experts.count=0"));
        }
        Ok(())
    }

    fn check_mtp(&self, mtp: &Mtp) -> Result<()> {
        let weight = mtp.weight;
        if !(f32::MIN_POSITIVE..=MAX_FACTOR).contains(&weight) {
            return Err(Error::user(format!(
                "model.mtp.weight = {weight}, expected a number above 0 to {MAX_FACTOR}"
            ))
            .hint("set model.mtp.depth=0 for a model without"));
        }
        if self.tied_embeddings {
            return Err(Error::user("model.mtp needs an output projection of its own")
                .hint("set model.tied_embeddings=false, or model.mtp.depth=0"));
        }
        Ok(())
    }

    /// A window longer than the context is one that bounds nothing.
    fn check_window(&self, w: &Window) -> Result<()> {
        for (key, size, least, most) in [
            ("tokens", w.tokens, 1, MAX_POSITIONS),
            ("full_layers", w.full_layers, 0, self.layers),
            ("full_every", w.full_every, 0, MAX_LAYERS),
        ] {
            if size < least || size > most {
                return Err(Error::user(format!("model.window.{key} = {size}, expected {least} to {most}")));
            }
        }
        if self.windows().is_none() {
            return Err(Error::user(format!(
                "model.window.full_layers = {} and full_every = {} leave none of the {} layers with a window",
                w.full_layers, w.full_every, self.layers
            ))
            .hint("set model.window.full_layers=0 and full_every=0, or model.window.tokens=0"));
        }
        Ok(())
    }

    fn check_latent(&self, l: &Latent) -> Result<()> {
        for (key, size, most) in [
            ("query_rank", l.query_rank.unwrap_or(1), MAX_HIDDEN),
            ("kv_rank", l.kv_rank, MAX_HIDDEN),
            ("nope_dim", l.nope_dim, MAX_HEAD_DIM),
            ("rope_dim", l.rope_dim, MAX_HEAD_DIM),
            ("value_dim", l.value_dim, MAX_HEAD_DIM),
        ] {
            if size == 0 || size > most {
                return Err(Error::user(format!("model.latent.{key} = {size}, expected 1 to {most}")));
            }
        }
        if !l.rope_dim.is_multiple_of(2) {
            return Err(Error::user(format!(
                "model.latent.rope_dim = {} is odd, but rotary embedding turns pairs of dims",
                l.rope_dim
            ))
            .hint(format!("set model.latent.rope_dim={}", l.rope_dim + 1)));
        }
        if !matches!(self.position, Position::Rope(_)) {
            return Err(Error::user("model.latent needs rotary positions").hint("set model.position=rope"));
        }
        for (key, on) in
            [("qkv_bias", self.qkv_bias), ("attn_out_bias", self.attn_out_bias), ("qk_norm", self.qk_norm)]
        {
            if on {
                return Err(Error::user(format!("model.{key} = true has no meaning with model.latent"))
                    .hint(format!("set model.{key}=false")));
            }
        }
        Ok(())
    }

    fn check_constants(&self) -> Result<()> {
        for (key, x) in [("norm_eps", self.norm_eps), ("init_std", self.init_std)] {
            if !(x > 0.0 && x < 1.0) {
                return Err(Error::user(format!("model.{key} = {x}, expected a number above 0 and below 1")));
            }
        }
        // Below one the squeeze leaves no room for probabilities.
        if self.logit_softcap != 0.0 && !(1.0..=1e6).contains(&self.logit_softcap) {
            return Err(Error::user(format!(
                "model.logit_softcap = {}, expected 0 or a number from 1 to 1e6",
                self.logit_softcap
            ))
            .hint("Gemma 2 has 30; 0 leaves logits as they are"));
        }
        let Position::Rope(rope) = &self.position else { return Ok(()) };
        if self.latent.is_none() && !self.head_dim.is_multiple_of(2) {
            return Err(Error::user(format!(
                "model.head_dim = {} is odd, but rotary embedding turns pairs of dims",
                self.head_dim
            ))
            .hint(format!("set model.head_dim={}", self.head_dim + 1)));
        }
        let bad = |key: &str, x: f64, expected: &str| {
            Err(Error::user(format!("model.{key} = {x}, expected a number {expected}")))
        };
        // Rotations shrink with the dim only for a base above one.
        if !(rope.theta > 1.0 && rope.theta <= 1e12) {
            return bad("rope_theta", rope.theta, "above 1 and at most 1e12");
        }
        let factor = match rope.scaling {
            RopeScaling::Default => 1.0,
            RopeScaling::Linear { factor }
            | RopeScaling::Dynamic { factor }
            | RopeScaling::Llama3 { factor, .. }
            | RopeScaling::Yarn(Yarn { factor, .. }) => factor,
        };
        if !(1.0..=1e6).contains(&factor) {
            return bad("rope_scaling.factor", factor, "from 1 to 1e6");
        }
        match rope.scaling {
            RopeScaling::Llama3 {
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions,
                ..
            } => {
                if !(low > 0.0 && low < high && high < 1e6) {
                    return Err(Error::user(format!(
                        "model.rope_scaling.low_freq_factor = {low} and high_freq_factor = {high}, expected 0 < low < high"
                    )));
                }
                check_original(original_max_positions)
            }
            RopeScaling::Yarn(yarn) => self.check_yarn(yarn),
            _ => Ok(()),
        }
    }

    fn check_yarn(&self, yarn: Yarn) -> Result<()> {
        let Yarn { beta_fast, beta_slow, mscale_all_dim: m, .. } = yarn;
        let bad = |key: &str, x: f64, expected: &str| {
            Err(Error::user(format!("model.{key} = {x}, expected a number {expected}")))
        };
        if !(beta_slow > 0.0 && beta_slow <= beta_fast && beta_fast < 1e6) {
            return Err(Error::user(format!(
                "model.rope_scaling.beta_fast = {beta_fast} and beta_slow = {beta_slow}, expected 0 < slow <= fast"
            )));
        }
        if !(0.0..=MAX_MSCALE).contains(&m) {
            return bad("rope_scaling.mscale_all_dim", m, &format!("from 0 to {MAX_MSCALE}"));
        }
        if m != 0.0 && self.latent.is_none() {
            return Err(Error::user(format!(
                "model.rope_scaling.mscale_all_dim = {m} has no meaning without model.latent"
            ))
            .hint("set model.rope_scaling.mscale_all_dim=0"));
        }
        match yarn.attention_factor {
            Some(x) if !(x > 0.0 && x < 1e6) => bad("rope_scaling.attention_factor", x, "above 0"),
            _ => check_original(yarn.original_max_positions),
        }
    }
}

fn check_original(positions: usize) -> Result<()> {
    if (1..=MAX_POSITIONS).contains(&positions) {
        return Ok(());
    }
    Err(Error::user(format!(
        "model.rope_scaling.original_max_positions = {positions}, expected 1 to {MAX_POSITIONS}"
    )))
}

fn check_router(e: &Experts) -> Result<()> {
    let r = &e.router;
    let list =
        |works: &mut dyn Iterator<Item = usize>| works.map(|x| x.to_string()).collect::<Vec<_>>().join(", ");
    if !e.count.is_multiple_of(r.groups.max(1)) || !(1..=MAX_GROUPS).contains(&r.groups) {
        return Err(Error::user(format!(
            "model.experts.groups = {} does not divide model.experts.count = {}",
            r.groups, e.count
        ))
        .hint(format!(
            "values of model.experts.groups that work: {}",
            list(&mut divisors(e.count).take_while(|d| *d <= MAX_GROUPS))
        )));
    }
    if r.top_groups < 1 || r.top_groups > r.groups {
        return Err(Error::user(format!(
            "model.experts.top_groups = {}, expected 1 to {}",
            r.top_groups, r.groups
        )));
    }
    let reached = e.count / r.groups * r.top_groups;
    if e.top_k > reached {
        return Err(Error::user(format!(
            "model.experts.top_k = {} of the {reached} experts in model.experts.top_groups = {}",
            e.top_k, r.top_groups
        ))
        .hint(format!(
            "values of model.experts.top_groups that work: {} to {}",
            e.top_k.div_ceil(e.count / r.groups),
            r.groups
        )));
    }
    let numbers = [
        ("scale", r.scale, f32::MIN_POSITIVE),
        ("balance_loss", r.balance_loss, 0.0),
        ("z_loss", r.z_loss, 0.0),
        ("bias_rate", r.bias_rate, 0.0),
    ];
    for (key, x, least) in numbers {
        if !(least..=MAX_FACTOR).contains(&x) {
            let from = if least > 0.0 { "a number above 0" } else { "a number from 0" };
            return Err(Error::user(format!("model.experts.{key} = {x}, expected {from} to {MAX_FACTOR}")));
        }
    }
    if r.bias_rate != 0.0 && !r.expert_bias {
        return Err(Error::user(format!(
            "model.experts.bias_rate = {} without biases that it would move",
            r.bias_rate
        ))
        .hint("set model.experts.expert_bias=true, or model.experts.bias_rate=0"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(change: impl FnOnce(&mut ModelSpec), expected: &str) {
        let mut model = ModelSpec::preset("tiny").expect("a preset");
        change(&mut model);
        let verdict = model.validate().map_or_else(|e| e.to_string(), |()| "ok".to_owned());
        assert_eq!(verdict, expected);
    }

    fn rope(model: &mut ModelSpec, scaling: RopeScaling) {
        if let Position::Rope(rope) = &mut model.position {
            rope.scaling = scaling;
        }
    }

    #[test]
    fn refusals() {
        check(|_| (), "ok");
        check(|m| m.vocab = 0, "model.vocab = 0, expected 1 to 16777216");
        check(|m| m.hidden = usize::MAX, &format!("model.hidden = {}, expected 1 to 1048576", usize::MAX));
        check(|m| m.head_dim = 7, "model.head_dim = 7 is odd, but rotary embedding turns pairs of dims");
        check(|m| m.norm_eps = f32::NAN, "model.norm_eps = NaN, expected a number above 0 and below 1");
        check(|m| m.init_std = 0.0, "model.init_std = 0, expected a number above 0 and below 1");
        check(
            |m| (m.heads, m.kv_heads, m.head_dim) = (1 << 14, 1, 1 << 14),
            "model.heads x head_dim = 16384 x 16384, expected a product of at most 4194304",
        );
        check(
            |m| (m.layers, m.hidden, m.ffn) = (1 << 14, 1 << 20, 1 << 22),
            "the model has 216174465943339008 parameters, expected at most 10000000000000000",
        );
        check(
            |m| rope(m, RopeScaling::Linear { factor: 0.5 }),
            "model.rope_scaling.factor = 0.5, expected a number from 1 to 1e6",
        );
        check(
            |m| {
                rope(
                    m,
                    RopeScaling::Llama3 {
                        factor: 8.0,
                        low_freq_factor: 4.0,
                        high_freq_factor: 4.0,
                        original_max_positions: 8192,
                    },
                );
            },
            "model.rope_scaling.low_freq_factor = 4 and high_freq_factor = 4, expected 0 < low < high",
        );
    }

    #[test]
    fn mixtures_and_latents() {
        let experts = Experts {
            count: 8,
            top_k: 2,
            ffn: 16,
            shared_ffn: 0,
            dense_layers: 1,
            every: 1,
            router: Default::default(),
        };
        let with = |change: fn(&mut Experts)| {
            move |m: &mut ModelSpec| {
                let mut e = experts;
                change(&mut e);
                m.experts = Some(e);
            }
        };
        check(with(|_| ()), "ok");
        check(with(|e| e.top_k = 9), "model.experts.top_k = 9, expected 1 to 8");
        check(with(|e| e.every = 0), "model.experts.every = 0, expected 1 to 2");
        check(
            with(|e| e.dense_layers = 2),
            "model.experts.dense_layers = 2 and every = 1 leave none of the 2 layers with experts",
        );
        let latent = Latent { query_rank: None, kv_rank: 8, nope_dim: 4, rope_dim: 4, value_dim: 4 };
        check(|m| m.latent = Some(latent), "ok");
        check(
            |m| m.latent = Some(Latent { query_rank: Some(0), ..latent }),
            "model.latent.query_rank = 0, expected 1 to 1048576",
        );
        check(
            |m| m.latent = Some(Latent { value_dim: MAX_HEAD_DIM + 1, ..latent }),
            &format!("model.latent.value_dim = {}, expected 1 to {MAX_HEAD_DIM}", MAX_HEAD_DIM + 1),
        );
        check(
            |m| m.latent = Some(Latent { rope_dim: 3, ..latent }),
            "model.latent.rope_dim = 3 is odd, but rotary embedding turns pairs of dims",
        );
        check(
            |m| (m.latent, m.qk_norm) = (Some(latent), true),
            "model.qk_norm = true has no meaning with model.latent",
        );
    }

    /// Counts published with the weights, rounded by nobody.
    #[test]
    fn parameter_counts_match_published_weights() {
        for (name, expected) in [
            ("gpt2", 124_439_808),
            ("gpt2-medium", 354_823_168),
            ("gpt2-large", 774_030_080),
            ("gpt2-xl", 1_557_611_200),
            ("tinyllama-1.1b", 1_100_048_384),
            ("llama2-7b", 6_738_415_616),
            ("llama2-13b", 13_015_864_320),
            ("llama2-70b", 68_976_648_192),
            ("llama3-8b", 8_030_261_248),
            ("llama3-70b", 70_553_706_496),
            ("llama3-405b", 405_853_388_800),
            ("llama3.2-1b", 1_235_814_400),
            ("mistral-7b-v0.3", 7_248_023_552),
            ("qwen2-0.5b", 494_032_768),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen3-0.6b", 596_049_920),
            ("qwen3-8b", 8_190_735_360),
            ("llama-tiny-ref", 13_767_552),
            ("moe-tiny", 35_019_648),
        ] {
            assert_eq!(ModelSpec::preset(name).expect(name).param_count(), expected, "{name}");
        }
    }
}
