//! Every family against others' decoders, and its gradients against autograd and finite differences.

mod candle;
mod differences;
mod generation;
mod gpu;
mod memory;
mod refused;
mod round_trip;
mod transformers;
