//! What a parameter is and where an op belongs, as types: no pass asks a name.

use serde::Serialize;

/// The part of the step that a parameter, a buffer or an op belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Tokens become vectors.
    #[default]
    Embedding,
    /// One layer, counted from 0 over the whole model.
    Layer(usize),
    /// Final norm, output projection and loss.
    Head,
    /// The module behind the last layer that learns to predict one token more ([`spec::Mtp`]).
    Mtp,
    /// Messages between pipeline stages.
    Stage,
    /// What happens once a step: gradients meet, the optimiser updates.
    Step,
}

/// What a parameter is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Token table; the output projection too where tied.
    Embedding,
    /// Table of learned positions.
    Positions,
    /// Norm in front of attention.
    AttentionNorm,
    /// Query, key and value projections, packed.
    QueryKeyValue,
    /// Norm of each query head.
    QueryNorm,
    /// Norm of each key head.
    KeyNorm,
    /// A score for each query head that its softmax sums too.
    Sinks,
    /// Attention's projection back into the residual stream.
    AttentionOut,
    /// Projections into the latents of latent attention.
    LatentDown,
    /// Norm of the queries' latent.
    QueryLatentNorm,
    /// Norm of the latent of keys and values.
    KeyValueLatentNorm,
    /// Queries out of their latent, or of the residual stream where they have none.
    QueryUp,
    /// Keys and values out of their latent.
    KeyValueUp,
    /// Norm in front of the feed-forward half.
    MlpNorm,
    /// Into the feed-forward width: gate and up packed where gated.
    Up,
    /// Back into the residual stream.
    Down,
    /// [`Role::Up`] of the experts that all tokens meet.
    SharedUp,
    /// [`Role::Down`] of the experts that all tokens meet.
    SharedDown,
    /// Scores of the experts.
    Router,
    /// What is added to the scores of experts where the best are chosen.
    ExpertBias,
    /// [`Role::Up`] of routed experts, one under another.
    ExpertUp,
    /// [`Role::Down`] of routed experts, one under another.
    ExpertDown,
    /// Norm of the embedding of the next token.
    MtpEmbeddingNorm,
    /// Norm of the hidden state beside it.
    MtpHiddenNorm,
    /// Projection of the former into the layer that predicts one token more.
    MtpEmbedding,
    /// Projection of the latter.
    MtpHidden,
    /// Norm after that layer.
    MtpNorm,
    /// Norm after the last layer.
    FinalNorm,
    /// Output projection of its own.
    Head,
}

impl Role {
    /// Whether the parameter scales a normalised value: it begins at 1.
    pub fn is_norm(self) -> bool {
        use Role::*;
        matches!(
            self,
            AttentionNorm
                | QueryNorm
                | KeyNorm
                | QueryLatentNorm
                | KeyValueLatentNorm
                | MlpNorm
                | MtpEmbeddingNorm
                | MtpHiddenNorm
                | MtpNorm
                | FinalNorm
        )
    }

    /// Whether the parameter's product is added to the residual stream.
    pub fn is_residual_out(self) -> bool {
        matches!(self, Role::AttentionOut | Role::Down | Role::SharedDown | Role::ExpertDown)
    }

    /// Whether it is a matrix inside a layer, between one vector of activations and another. The router, which chooses,
    /// is none.
    pub fn is_hidden_matrix(self) -> bool {
        use Role::*;
        matches!(
            self,
            QueryKeyValue
                | AttentionOut
                | LatentDown
                | QueryUp
                | KeyValueUp
                | Up
                | Down
                | SharedUp
                | SharedDown
                | ExpertUp
                | ExpertDown
                | MtpEmbedding
                | MtpHidden
        )
    }

    /// Whether it is a matrix of routed experts, which are spread over ranks their own way.
    pub fn is_expert(self) -> bool {
        matches!(self, Role::ExpertUp | Role::ExpertDown)
    }

    /// Whether each tensor-parallel rank uses the whole parameter on its own heads or its own tokens only, so that its
    /// gradient is part of a sum over them.
    pub(crate) fn used_apart(self) -> bool {
        use Role::*;
        matches!(self, QueryNorm | KeyNorm | QueryLatentNorm | KeyValueLatentNorm | Router)
    }
}

/// Which parameter of the model: its place, its role, and whether it is the bias beside the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ParamKey {
    /// Where it is used first.
    pub place: Place,
    /// What it is for.
    pub role: Role,
    /// A vector that is added.
    pub bias: bool,
}
