//! What the peers' linear algebra listens to.

/// Environment variables that make numpy's and scipy's OpenBLAS slower than it need be: removed for the peers.
pub const HARMFUL: [&str; 2] = ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"];
