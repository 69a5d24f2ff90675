//! Kernels against references in double precision, and against themselves: bits must not depend on threads, on how
//! many rows are computed together, or on the processor.

mod attention;
mod bits;
mod experts;
mod heads;
mod latent;
mod linear;
mod loss;
mod muon;
mod recipes;
mod reference;
mod ring;
mod rows;
mod sees;
