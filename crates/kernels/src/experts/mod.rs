//! Mixtures of experts: which experts a token goes to, copies of rows in the order of their experts and back.
//!
//! A token's rows are added in the order of its choices, best first, whoever computed them: no sum depends on where an
//! expert lives.

mod balance;
mod grouped;
mod permute;
mod route;

pub use balance::balance_experts;
pub use grouped::{
    Groups, grouped_bias_grad, grouped_bias_grad_workspace_len, grouped_linear, grouped_linear_dw,
    grouped_linear_dw_workspace_len, grouped_linear_dx, grouped_linear_workspace_len,
};
pub use permute::{permute, permute_dx, unpermute, unpermute_dx};
pub use route::{Router, route, route_dx, route_dx_workspace_len, route_workspace_len};
