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

pub use crate::act::{Gelu, add, gelu, gelu_dx, swiglu, swiglu_dx};
pub use crate::attention::{
    attention, attention_decode, attention_decode_workspace_len, attention_dx, attention_dx_workspace_len,
    attention_workspace_len,
};
pub use crate::convert::{copy, fill, from_f32, to_f32};
pub use crate::embed::{embed, embed_grad, embed_grad_workspace_len, pos_grad, pos_grad_workspace_len};
pub use crate::head_norm::{qk_norm, qk_norm_dw, qk_norm_dw_workspace_len, qk_norm_dx};
pub use crate::linear::{
    bias_grad, bias_grad_workspace_len, linear, linear_dw, linear_dw_workspace_len, linear_dx,
    linear_dx_workspace_len, linear_strided, linear_workspace_len,
};
pub use crate::norm::{
    layer_norm, layer_norm_dw, layer_norm_dx, norm_dw_workspace_len, rms_norm, rms_norm_dw, rms_norm_dx,
};
pub use crate::optim::{AdamW, adamw, adamw_bf16, sum_squares};
pub use crate::peak::{fma_peak_gflops, gemm_peak_gflops};
pub use crate::pool::Pool;
pub use crate::rope::rope;
pub use crate::simd::{Backend, backend, force_backend};
pub use crate::storage::{Acc, Storage};
pub use crate::tree::Merge;
pub use crate::xent::{xent_combine, xent_dlogits, xent_fused, xent_stats};

mod pool;
mod simd;
mod storage;
mod tree;

mod gemm;
mod linear;

mod attention;

mod act;
mod convert;
mod embed;
mod head_norm;
mod math;
mod norm;
mod rope;
mod xent;

mod optim;
mod peak;
