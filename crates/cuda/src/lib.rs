//! NVIDIA GPUs as a device of the executor.
//!
//! The driver, NVRTC, cuBLASLt and NCCL are looked up when a GPU is asked for; nothing of CUDA is needed to build. Kernels are
//! in `kernels/`, one source for the GPU and for the fibers of `emulator/`, where stand-ins for the libraries let the
//! whole device run on a machine without a GPU.

mod libs;
mod driver;
mod cards;
mod compile;
mod module;
mod gemm;
mod device;
mod table;
mod tensor_map;
mod grad_weight;
mod row_products;
mod products;
mod update;
mod muon;
mod experts;
mod columns;
mod latent;
mod attention;
mod contexts;
mod rows;
mod numbers;
mod host_messages;
mod agreement;
mod events;
mod lookout;
mod meeting;
mod nccl;
mod share_out;
mod waits;
mod ways;

pub use cards::{Card, Census, Counted, Found, census, has_driver};
pub use device::{Cuda, LOSS};
pub use libs::Library;
pub use meeting::STAGING_BYTES;
pub use table::workspace_len;
