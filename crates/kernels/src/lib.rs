//! What an op does to bytes, on the CPU.
//!
//! Every function here takes plain slices and shapes; none knows what a layer or a layout is. Matrices are
//! row-major and dense unless a leading dimension is given.
//!
//! # Bits
//!
//! A result is a function of its inputs alone. It does not change with the number of threads, with how many
//! rows are computed in one call, or with the processor:
//!
//! - an element of a matrix product is one chain of fused multiply-adds over the inner dimension, in order;
//!   work is split over outputs, never inside a chain;
//! - reductions over a row run in 16 virtual lanes that are added in one fixed tree, whatever the width of the
//!   processor's registers;
//! - `exp`, `tanh` and `erf` are polynomials of this crate, evaluated in the same order everywhere;
//! - gradients of weights are chains over the rows of a *leaf* (one sequence), and leaves are added in a tree
//!   that the caller states (see [`Merge`] and [`linear_dw`]).
//!
//! # Memory
//!
//! Nothing is allocated after [`Pool::new`]. A function that needs scratch space takes `ws`, and its
//! `*_workspace_len` says how many `f32` that must hold.
//!
//! Lengths are asserted at entry: shapes come from a checked program, so a mismatch is a bug, not an input error.
//!
//! # Example
//!
//! A linear layer of 2 inputs and 3 outputs on 4 rows, and the gradient of its weight with each pair of rows a leaf:
//!
//! ```
//! use kernels::*;
//!
//! let pool = Pool::new(2);
//! let (rows, ins, outs, tree) = (4, 2, 3, [2]);
//! let x = [1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 0.0];
//! let w = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
//! let mut y = [0.0f32; 12];
//! let len = linear_workspace_len(rows, ins, outs, pool.threads());
//! linear(&pool, &x, &w, None, Acc::None, &mut y, rows, ins, outs, &mut vec![0.0; len]);
//! assert_eq!(y, [1.0, 3.0, 5.0, 2.0, 4.0, 6.0, 3.0, 7.0, 11.0, 2.0, 6.0, 10.0]);
//!
//! let dy = [1.0f32; 12];
//! let mut dw = [0.0f32; 6];
//! let len = linear_dw_workspace_len(rows, ins, outs, &tree, pool.threads());
//! let merge = Merge { merge: 0, store: 0 };
//! linear_dw(&pool, &dy, &x, &mut dw, rows, ins, outs, &tree, merge, &mut vec![0.0; len]);
//! assert_eq!(dw, [4.0, 2.0, 4.0, 2.0, 4.0, 2.0]);
//! ```

pub use crate::act::{Gelu, Glu, add, gelu, gelu_dx, glu, glu_dx};
pub use crate::attention::{
    Attention, AttentionDropout, Sees, Sight, Softmax, attention, attention_decode,
    attention_decode_workspace_len, attention_dx, attention_dx_workspace_len, attention_maxima,
    attention_part, attention_part_dx, attention_parts, attention_parts_dx, attention_sinks_dw,
    attention_sinks_dw_workspace_len, attention_workspace_len, join_heads, pack_kv, split_heads,
};
pub use crate::average::{average, average_share, swap};
pub use crate::convert::{copy, fill, from_f32, to_f32};
pub use crate::dropout::{Dropout, dropout};
pub use crate::embed::{
    Places, embed, embed_grad, embed_grad_workspace_len, pos_grad, pos_grad_workspace_len,
};
pub use crate::experts::{
    Groups, Router, balance_experts, grouped_bias_grad, grouped_bias_grad_workspace_len, grouped_linear,
    grouped_linear_dw, grouped_linear_dw_workspace_len, grouped_linear_dx, grouped_linear_workspace_len,
    permute, permute_dx, route, route_dx, route_dx_workspace_len, route_workspace_len, unpermute,
    unpermute_dx,
};
pub use crate::head_norm::{qk_norm, qk_norm_dw, qk_norm_dw_workspace_len, qk_norm_dx};
pub use crate::latent::{
    LatentHeads, Latents, latent_norm, latent_norm_dw, latent_norm_dw_workspace_len, latent_norm_dx,
    latent_rope, latent_rope_dx, rotate_pairs,
};
pub use crate::latent_decode::{LatentCache, latent_decode, latent_decode_workspace_len};
pub use crate::linear::{
    bias_grad, bias_grad_workspace_len, linear, linear_dw, linear_dw_workspace_len, linear_dx,
    linear_dx_workspace_len, linear_strided, linear_workspace_len,
};
pub use crate::muon::{
    MatrixName, MatrixOp, MatrixStep, POLYNOMIALS, Polynomial, SMALLEST_NORM, muon, muon_bf16, muon_momentum,
    newton_schulz, orthogonalise, orthogonalise_workspace_len,
};
pub use crate::norm::{
    layer_norm, layer_norm_dw, layer_norm_dx, norm_dw_workspace_len, rms_norm, rms_norm_dw, rms_norm_dx,
};
pub use crate::optim::{AdamW, AdamWScalars, adamw, adamw_bf16, sum_squares};
pub use crate::peak::{fma_peak_gflops, gemm_peak_gflops};
pub use crate::pool::{Pool, together};
pub use crate::qk_clip::{head_maxima, scale};
pub use crate::rope::rope;
pub use crate::rows::{row_fn, row_fn_dx, row_fn_workspace_len};
pub use crate::simd::{Backend, backend, force_backend};
pub use crate::storage::{Acc, Storage};
pub use crate::sums::{add_bias, add_levels, add_roots, add_to};
pub use crate::tree::{Merge, Step, step as tree_step};
pub use crate::xent::{LossTerms, soft_cap, xent_combine, xent_dlogits, xent_fused, xent_stats};

mod pool;
mod simd;
mod storage;
mod tree;

mod gemm;
mod linear;

mod attention;

mod act;
mod convert;
mod dropout;
mod embed;
mod experts;
mod head_norm;
mod latent;
mod latent_decode;
mod math;
mod norm;
mod rope;
mod rows;
mod sums;
mod xent;

mod average;
mod muon;
mod optim;
mod peak;
mod qk_clip;
