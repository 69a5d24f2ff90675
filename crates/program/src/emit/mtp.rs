use spec::DType;

use super::Emitter;
use crate::graph::{Source, ValueId};
use crate::role::{Place, Role};

impl Emitter<'_> {
    /// The module that learns to predict one token more, from `x`, the final norm's output, up to its own last norm.
    ///
    /// `h = norm(x) Wx^T + norm(embed(next token)) We^T`, then a layer like the model's next one (DeepSeek-V3, arXiv
    /// 2412.19437, equations 21 to 23). The projection there is one matrix of twice the width; here its halves are two, so
    /// that nothing is put side by side.
    pub(super) fn mtp(&mut self, x: ValueId) -> ValueId {
        let hidden = self.cx.model.hidden;
        self.g.place = Place::Embedding;
        let table = self.weight(Role::Embedding);
        self.g.place = Place::Mtp;
        let tokens = self.g.value("next_tokens", self.cx.tokens(), 1, DType::U32, Source::NextTokens);
        let tokens = self.g.all(tokens);
        let e = self.embed("mtp.embed", vec![tokens, table], false);
        let e = self.norm(Role::MtpEmbeddingNorm, "mtp.embed_norm", e);
        let x = self.norm(Role::MtpHiddenNorm, "mtp.hidden_norm", x);
        let x = self.linear(Role::MtpHidden, "mtp.hidden_proj", x, hidden);
        let h = self.linear(Role::MtpEmbedding, "mtp.embed_proj", e, hidden);
        self.last().acc = Some(self.g.all(x));
        let y = self.layer_named("mtp", self.cx.model.layers, h);
        self.norm(Role::MtpNorm, "mtp.norm", y)
    }
}
