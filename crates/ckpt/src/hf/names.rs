//! The one table of names: which Hugging Face tensor holds which logical parameters, and how.

use spec::{Experts, Latent, ModelSpec, NormKind, Position, Result};

/// A tensor in a Hugging Face file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HfTensor {
    /// Without the prefix of the model's body.
    pub(crate) name: String,
    /// Whether the prefix belongs in front: the head stands outside of the body.
    pub(crate) in_body: bool,
    /// Stored `[in, out]` (GPT-2's Conv1D) where logical weights are `[out, in]`.
    pub(crate) transposed: bool,
    /// The logical parameters, concatenated along their first dim before any transposing; slab after slab.
    pub(crate) parts: Vec<Part>,
    /// A first dim in front of the others, for experts that lie one behind another; each slab has as many parts.
    pub(crate) slabs: Option<usize>,
    /// The parts of a slab lie along its last dim by turns (GPT-OSS: gate, up, gate, ...), not one behind another.
    pub(crate) interleaved: bool,
    /// A class's own that the model does without: zeros.
    pub(crate) zeros: bool,
    /// In float32 whatever the others are in.
    pub(crate) single: bool,
    /// The parts of a slab lie side by side, not one under another.
    pub(crate) beside: bool,
    /// Another tensor's once more.
    pub(crate) copy: bool,
}

/// A logical parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

impl HfTensor {
    /// The shape in the file.
    pub(crate) fn shape(&self) -> Vec<usize> {
        let mut shape = self.slab_shape();
        if let Some(slabs) = self.slabs {
            shape.insert(0, slabs);
        }
        shape
    }

    /// The shape of one slab in the file.
    pub(crate) fn slab_shape(&self) -> Vec<usize> {
        let mut shape = self.parts[0].shape.clone();
        let along = usize::from(self.beside);
        shape[along] = self.parts[..self.parts_of_slab()].iter().map(|p| p.shape[along]).sum();
        if self.transposed {
            shape.reverse();
        }
        shape
    }

    pub(crate) fn parts_of_slab(&self) -> usize {
        self.parts.len() / self.slabs.unwrap_or(1)
    }

    pub(crate) fn elements(&self) -> usize {
        self.shape().iter().product()
    }
}

/// What the names of a family's body start with in files of the whole model.
pub(crate) fn prefix(spec: &ModelSpec) -> &'static str {
    if gpt2(spec) { "transformer." } else { "model." }
}

/// The logical embedding.
pub(crate) const EMBEDDING: &str = "embed.weight";

/// The head's tensor.
pub(crate) const HEAD: &str = "lm_head.weight";

/// A tensor's name without what wraps it: compilers and data-parallel wrappers leave their mark anywhere, the names of
/// a model's body and of a text model inside of another stand in front.
pub(crate) fn unwrapped(name: &str) -> String {
    const ANYWHERE: [&str; 5] =
        ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];
    const IN_FRONT: [&str; 4] = ["model", "transformer", "language_model", "text_model"];
    let marked = name.split('.').filter(|part| !ANYWHERE.contains(part));
    let plain: Vec<&str> = marked.skip_while(|part| IN_FRONT.contains(part)).collect();
    plain.join(".")
}

/// Whether a tensor is of a part beside the text model: eyes, ears, and what joins them to it.
pub(crate) fn of_another_part(name: &str) -> bool {
    const PARTS: [&str; 8] =
        ["vision", "visual", "image", "audio", "multi_modal", "multimodal", "mm_projector", "connector"];
    let mut front = name.split('.').skip_while(|part| ["model", "module", "_orig_mod"].contains(part));
    front.next().is_some_and(|part| PARTS.iter().any(|p| part.contains(p)))
}

/// Whether a tensor is a buffer that old versions saved: a mask, or rotary frequencies.
pub(crate) fn is_buffer(spec: &ModelSpec, name: &str) -> bool {
    if gpt2(spec) {
        name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
    } else {
        name.ends_with("rotary_emb.inv_freq")
    }
}

/// Tensors of the module that predicts one token more that are others once more, and which parameters those are.
pub(crate) fn copies(spec: &ModelSpec) -> Vec<(String, &'static str)> {
    let name = |of: &str| format!("layers.{}.{of}.weight", spec.layers);
    let all = [(name("embed_tokens"), EMBEDDING), (name("shared_head.head"), "head.weight")];
    all.into_iter().filter(|_| spec.mtp.is_some()).collect()
}

/// Whether a parameter gives a routed expert's output.
pub(crate) fn is_given_by_an_expert(name: &str) -> bool {
    name.contains(".experts.") && name.contains(".down.")
}

fn gpt2(spec: &ModelSpec) -> bool {
    matches!(spec.position, Position::Learned { .. })
}

/// Every tensor of the model, in the order of the forward pass.
///
/// # Errors
/// When none of the families has such a model.
pub(crate) fn table(spec: &ModelSpec) -> Result<Vec<HfTensor>> {
    spec.hf_architecture()?;
    let mut t = Table { spec, tensors: Vec::new() };
    if gpt2(spec) {
        t.gpt2()
    } else {
        t.llama()
    }
    if !spec.tied_embeddings {
        t.plain(HEAD, "head.weight", &[spec.vocab, spec.hidden]);
        t.tensors.iter_mut().filter(|x| x.name == HEAD).for_each(|x| x.in_body = false);
    }
    Ok(t.tensors)
}

struct Table<'a> {
    spec: &'a ModelSpec,
    tensors: Vec<HfTensor>,
}

impl Table<'_> {
    fn plain(&mut self, hf: &str, name: &str, shape: &[usize]) {
        self.push(hf, false, vec![Part { name: name.to_owned(), shape: shape.to_vec() }]);
    }

    fn push(&mut self, hf: &str, transposed: bool, parts: Vec<Part>) {
        self.tensors.push(HfTensor {
            name: hf.to_owned(),
            in_body: true,
            transposed,
            parts,
            slabs: None,
            interleaved: false,
            zeros: false,
            single: false,
            beside: false,
            copy: false,
        });
    }

    /// The tensor that was pushed last.
    fn last(&mut self) -> &mut HfTensor {
        self.tensors.last_mut().expect("one was pushed")
    }

    fn llama(&mut self) {
        let m = self.spec;
        self.plain("embed_tokens.weight", "embed.weight", &[m.vocab, m.hidden]);
        for i in 0..m.layers {
            self.layer(i, &format!("layers.{i}"));
        }
        self.norm("norm", "final_norm");
        if m.mtp.is_some() {
            self.mtp();
        }
    }

    fn layer(&mut self, i: usize, own: &str) {
        let m = self.spec;
        let (q, kv) = (m.heads * m.head_dim, m.kv_heads * m.head_dim);
        let hf = format!("layers.{i}");
        let h = |s: &str| format!("{hf}.{s}");
        let p = |s: &str| format!("{own}.{s}");
        self.norm(&h("input_layernorm"), &p("attn_norm"));
        if let Some(latent) = m.latent {
            self.latent(&h("self_attn"), &p("attn"), latent);
        } else {
            self.linear(&h("self_attn.q_proj"), &p("attn.q"), q, m.hidden, m.qkv_bias);
            self.linear(&h("self_attn.k_proj"), &p("attn.k"), kv, m.hidden, m.qkv_bias);
            self.linear(&h("self_attn.v_proj"), &p("attn.v"), kv, m.hidden, m.qkv_bias);
        }
        if m.qk_norm {
            self.plain(&h("self_attn.q_norm.weight"), &p("attn.q_norm.weight"), &[m.head_dim]);
            self.plain(&h("self_attn.k_norm.weight"), &p("attn.k_norm.weight"), &[m.head_dim]);
        }
        if m.sinks {
            self.plain(&h("self_attn.sinks"), &p("attn.sinks"), &[m.heads]);
        }
        let out = m.latent.map_or(q, |l| m.heads * l.value_dim);
        self.linear(&h("self_attn.o_proj"), &p("attn.o"), m.hidden, out, m.attn_out_bias);
        self.norm(&h("post_attention_layernorm"), &p("mlp_norm"));
        match m.experts.filter(|_| m.has_experts(i)) {
            Some(experts) => self.experts(&hf, &p("mlp"), experts),
            None => self.mlp(&h("mlp"), ["gate_proj", "up_proj", "down_proj"], &p("mlp"), m.ffn),
        }
    }

    /// The module behind the last layer: one layer more, with copies of the embedding and the head. One matrix projects the
    /// embedding and the hidden state side by side.
    fn mtp(&mut self) {
        let m = self.spec;
        let hf = format!("layers.{}", m.layers);
        let h = |s: &str| format!("{hf}.{s}");
        self.norm(&h("enorm"), "mtp.embed_norm");
        self.norm(&h("hnorm"), "mtp.hidden_norm");
        let half =
            |name: &str| Part { name: format!("mtp.{name}_proj.weight"), shape: vec![m.hidden, m.hidden] };
        self.push(&h("eh_proj.weight"), false, vec![half("embed"), half("hidden")]);
        self.last().beside = true;
        self.layer(m.layers, "mtp");
        self.norm(&h("shared_head.norm"), "mtp.norm");
        for (name, of) in copies(m) {
            self.plain(&name, of, &[m.vocab, m.hidden]);
            self.last().copy = true;
        }
    }

    fn latent(&mut self, hf: &str, own: &str, l: Latent) {
        let (m, queries) = (self.spec, self.spec.heads * l.key_dim());
        let h = |s: &str| format!("{hf}.{s}");
        let p = |s: &str| format!("{own}.{s}");
        match l.query_rank {
            Some(rank) => {
                self.linear(&h("q_a_proj"), &p("q_down"), rank, m.hidden, false);
                self.plain(&h("q_a_layernorm.weight"), &p("q_latent_norm.weight"), &[rank]);
                self.linear(&h("q_b_proj"), &p("q_up"), queries, rank, false);
            }
            None => self.linear(&h("q_proj"), &p("q"), queries, m.hidden, false),
        }
        self.linear(&h("kv_a_proj_with_mqa"), &p("kv_down"), l.kv_rank + l.rope_dim, m.hidden, false);
        self.plain(&h("kv_a_layernorm.weight"), &p("kv_latent_norm.weight"), &[l.kv_rank]);
        let up = m.heads * (l.nope_dim + l.value_dim);
        self.linear(&h("kv_b_proj"), &p("kv_up"), up, l.kv_rank, false);
    }

    fn mlp(&mut self, hf: &str, [gate, up, down]: [&str; 3], own: &str, ffn: usize) {
        let m = self.spec;
        self.linear(&format!("{hf}.{gate}"), &format!("{own}.gate"), ffn, m.hidden, m.mlp_bias);
        self.linear(&format!("{hf}.{up}"), &format!("{own}.up"), ffn, m.hidden, m.mlp_bias);
        self.linear(&format!("{hf}.{down}"), &format!("{own}.down"), m.hidden, ffn, m.mlp_bias);
    }

    /// Mixtral has names of its own for the mixture and its matrices, and GPT-OSS has all experts in one tensor.
    fn experts(&mut self, layer: &str, own: &str, e: Experts) {
        if self.spec.hf_architecture().is_ok_and(|class| class == "GptOssForCausalLM") {
            return self.stacked_experts(&format!("{layer}.mlp"), own, e);
        }
        let mixtral = self.spec.hf_architecture().is_ok_and(|class| class == "MixtralForCausalLM");
        let (block, names) = match mixtral {
            true => ("block_sparse_moe", ["w1", "w3", "w2"]),
            false => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        let hf = format!("{layer}.{block}");
        self.linear(&format!("{hf}.gate"), &format!("{own}.router"), e.count, self.spec.hidden, false);
        if self.spec.hf_architecture().is_ok_and(|class| class == "DeepseekV3ForCausalLM") {
            let bias = format!("{hf}.gate.e_score_correction_bias");
            self.plain(&bias, &format!("{own}.expert_bias"), &[e.count]);
            let zeros = !e.router.expert_bias;
            let last = self.last();
            (last.zeros, last.single) = (zeros, true);
        }
        for i in 0..e.count {
            self.mlp(&format!("{hf}.experts.{i}"), names, &format!("{own}.experts.{i}"), e.ffn);
        }
        if e.shared_ffn > 0 {
            self.mlp(&format!("{hf}.shared_experts"), names, &format!("{own}.shared"), e.shared_ffn);
        }
    }

    fn stacked_experts(&mut self, hf: &str, own: &str, e: Experts) {
        let hidden = self.spec.hidden;
        self.linear(&format!("{hf}.router"), &format!("{own}.router"), e.count, hidden, true);
        let (gate_up, down): (&[&str], &[&str]) = (&["gate", "up"], &["down"]);
        for (name, of, rows, cols) in
            [("gate_up_proj", gate_up, e.ffn, hidden), ("down_proj", down, hidden, e.ffn)]
        {
            for (suffix, what, transposed, shape) in
                [("", "weight", true, vec![rows, cols]), ("_bias", "bias", false, vec![rows])]
            {
                let each = (0..e.count).flat_map(|i| of.iter().map(move |part| (i, part)));
                let parts = each.map(|(i, part)| Part {
                    name: format!("{own}.experts.{i}.{part}.{what}"),
                    shape: shape.clone(),
                });
                self.push(&format!("{hf}.experts.{name}{suffix}"), transposed, parts.collect());
                let last = self.last();
                (last.slabs, last.interleaved) = (Some(e.count), of.len() > 1);
            }
        }
    }

    fn gpt2(&mut self) {
        let m = self.spec;
        let d = m.hidden;
        self.plain("wte.weight", "embed.weight", &[m.vocab, d]);
        if let Position::Learned { max_positions } = m.position {
            self.plain("wpe.weight", "pos_embed.weight", &[max_positions, d]);
        }
        for i in 0..m.layers {
            let h = |s: &str| format!("h.{i}.{s}");
            let p = |s: &str| format!("layers.{i}.{s}");
            self.norm(&h("ln_1"), &p("attn_norm"));
            self.conv(&h("attn.c_attn"), &[p("attn.q"), p("attn.k"), p("attn.v")], d, d);
            self.conv(&h("attn.c_proj"), &[p("attn.o")], d, d);
            self.norm(&h("ln_2"), &p("mlp_norm"));
            self.conv(&h("mlp.c_fc"), &[p("mlp.up")], m.ffn, d);
            self.conv(&h("mlp.c_proj"), &[p("mlp.down")], d, m.ffn);
        }
        self.norm("ln_f", "final_norm");
    }

    fn norm(&mut self, hf: &str, own: &str) {
        let d = self.spec.hidden;
        self.plain(&format!("{hf}.weight"), &format!("{own}.weight"), &[d]);
        if self.spec.norm == NormKind::Layer {
            self.plain(&format!("{hf}.bias"), &format!("{own}.bias"), &[d]);
        }
    }

    fn linear(&mut self, hf: &str, own: &str, out_dim: usize, in_dim: usize, bias: bool) {
        self.plain(&format!("{hf}.weight"), &format!("{own}.weight"), &[out_dim, in_dim]);
        if bias {
            self.plain(&format!("{hf}.bias"), &format!("{own}.bias"), &[out_dim]);
        }
    }

    /// A Conv1D: each of `own` has `out_dim` rows, side by side in the stored columns.
    fn conv(&mut self, hf: &str, own: &[String], out_dim: usize, in_dim: usize) {
        let parts = |what: &str, shape: &[usize]| {
            own.iter().map(|p| Part { name: format!("{p}.{what}"), shape: shape.to_vec() }).collect()
        };
        self.push(&format!("{hf}.weight"), true, parts("weight", &[out_dim, in_dim]));
        self.push(&format!("{hf}.bias"), false, parts("bias", &[out_dim]));
    }
}
