//! What a plan costs: operations, memory and disk.

use super::{Action, Plan, PlannedTensor};
use crate::format::{ArtifactLayout, Storing};
use crate::linalg::{Usual, usual_way};

/// What the kernels of a worker lay out for themselves, and what the allocator keeps (glibc 2.36, 2026-11: 8–20 MB).
pub(super) const KERNEL_BYTES: u64 = 8 << 20;

/// Operations for which an element's way costs as much: read, hashed, widened, rounded to M′, hashed and written
/// (Zen 5, 2026-11: 15 ns without M′, 40 ns with it).
const FLOPS_PER_ELEMENT: f64 = 3000.0;

impl PlannedTensor {
    /// What decomposing costs, as floating-point operations of f32 products that take as long.
    ///
    /// With s and l the short and the long side: s²·l for the Gram matrix; 4/3·s³ for its tridiagonal form, half of it
    /// bound by memory and three times as slow as products; 2·q·s² to bring q vectors back from there. Or, for few
    /// triplets, 2·r·s² + 2·r²·s for a Krylov space of r vectors, or 4·r·s·l where the Gram matrix is not formed. Then 2·q·s·l for the long vectors, q²·l to polish
    /// them, and 4·q·s·l for M′, whose product is in f64, where every operation counts for two. And what every element
    /// costs, however many triplets are kept.
    pub fn flops(&self) -> u64 {
        if !self.is_decomposed() {
            return 0;
        }
        let (m, n) = self.sides();
        let q = self.q.unwrap_or(self.q_max) as f64;
        let (s, l) = (m.min(n) as f64, m.max(n) as f64);
        let reduced = s * s * l + 3.0 * 4.0 / 3.0 * s.powi(3) + 2.0 * q * s * s;
        let short = match self.way() {
            Usual::Krylov {
                vectors,
                forms_gram,
            } => {
                let r = vectors as f64;
                let products = match forms_gram {
                    true => s * s * l + 2.0 * r * s * s,
                    false => 4.0 * r * s * l,
                };
                products + 2.0 * r * r * s
            }
            Usual::GramF32 => reduced,
            Usual::GramF64 | Usual::Full => 2.0 * reduced,
        };
        let split = 4.0 * q * s * l + FLOPS_PER_ELEMENT * s * l;
        (short + 2.0 * q * s * l + q * q * l + split) as u64
    }

    /// The way that shape and q foresee; the numbers may force another.
    fn way(&self) -> Usual {
        let (m, n) = self.sides();
        usual_way((m.min(n), m.max(n)), self.q)
    }

    /// What all singular values without their vectors cost, in the same unit: the Gram matrix and its form in f64.
    pub fn spectrum_flops(&self) -> u64 {
        if !self.is_decomposed() {
            return 0;
        }
        let (m, n) = self.sides();
        let (s, l) = (m.min(n) as f64, m.max(n) as f64);
        (2.0 * (s * s * l + 3.0 * 4.0 / 3.0 * s.powi(3))) as u64
    }

    /// Bytes one worker holds at most while it decomposes this tensor, on the route that its shape and q foresee.
    ///
    /// With s and l the short and the long side, one of these moments is the peak:
    ///
    /// - reading: M as stored and in f32;
    /// - solving: M in f32, and what [`solver_bytes`] says of the short side;
    /// - completing: M in f32, the short vectors, the long ones, and half of these again: they are put in order where they are not;
    /// - splitting, for M′ only: M as stored and in f32, M′, both factors, and a tile with its share of them in f64; of
    ///   an f32 weight also the elements that are stored exactly.
    pub(crate) fn worker_bytes(&self, storing: Storing) -> u64 {
        if !self.is_decomposed() {
            return self.bytes;
        }
        let q = self.q.unwrap_or(self.q_max) as u64;
        let (m, n) = self.sides();
        let (m, n) = (m as u64, n as u64);
        let (s, l) = (m.min(n), m.max(n));
        let matrix = 4 * m * n;
        let factors = 4 * q * (m + n);
        let widened = if self.dtype == "F32" { 0 } else { matrix };
        let reading = self.bytes + widened;
        let solving = matrix + solver_bytes(self.way(), s, q);
        let completing = matrix + factors + 2 * q * l;
        let splitting = match storing.layout {
            ArtifactLayout::Residual => {
                let (rows, columns) = (m.min(TILE), n.min(TILE));
                let tile = 8 * (rows * columns + q * (rows + columns));
                // a sixth of the elements: positions in 8 bytes, values in 4
                let exact = if self.dtype == "F32" { 2 * m * n } else { 0 };
                self.bytes + widened + matrix + factors + tile + exact
            }
            ArtifactLayout::Sidecar => 0,
        };
        KERNEL_BYTES + reading.max(solving).max(completing).max(splitting)
    }

    /// The most bytes that the tensor takes in the artifact, whatever its rank turns out to be: of a dense one. Each zero is
    /// stored exactly too, so that a pruned f32 weight takes up to twice as much.
    pub fn artifact_bytes_max(&self, storing: Storing) -> u64 {
        self.artifact_bytes(storing, self.q.unwrap_or(self.q_max))
    }

    /// Bytes the tensor takes in the artifact, with `q` triplets if it is decomposed.
    pub(super) fn artifact_bytes(&self, storing: Storing, q: usize) -> u64 {
        match (self.action, storing.layout) {
            (Action::Copy, ArtifactLayout::Residual) => self.bytes,
            (Action::Copy, ArtifactLayout::Sidecar) => 0,
            (Action::Decompose, _) => {
                let (m, n) = self.sides();
                let factors = storing.factors.bytes() * (q * (m + n)) as u64 + 4 * q as u64;
                // of an f32 weight, 14–19 % of the elements are stored exactly, in 8 bytes each; of 16 bits, almost none
                let exact = if self.dtype == "F32" { 5 } else { 4 };
                match storing.layout {
                    ArtifactLayout::Residual => factors + exact * (m * n) as u64,
                    ArtifactLayout::Sidecar => factors,
                }
            }
        }
    }
}

impl Plan {
    /// The least the artifact can take, whatever the ranks turn out to be.
    pub fn disk_bytes_min(&self) -> u64 {
        self.tensors
            .iter()
            .map(|t| t.artifact_bytes(self.storing, t.q.unwrap_or(1)))
            .sum()
    }

    /// The most disk that decomposing takes at any moment.
    ///
    /// A matrix waits in its file until the shard with its last tensor is whole: beside everything there may be that
    /// shard, which is larger than its limit where one tensor is, and what earlier shards hold of the same matrix.
    pub fn disk_bytes_peak(&self, shard_bytes_max: u64) -> u64 {
        let bytes = |t: &PlannedTensor| t.artifact_bytes_max(self.storing);
        let largest = self.tensors.iter().map(bytes).max().unwrap_or(0);
        let twice = shard_bytes_max.max(largest).saturating_add(largest);
        self.disk_bytes + self.disk_bytes / 50 + self.disk_bytes.min(twice)
    }

    /// The disk that decomposing needs where shards do not stay: a shard, and the largest matrix beside it, which lies across
    /// its end or is the next that is waited for. A file system that gives back no stretch of a file may hold one more.
    pub fn disk_bytes_passing(&self, shard_bytes_max: u64) -> u64 {
        let bytes = |t: &PlannedTensor| t.artifact_bytes_max(self.storing);
        let largest = self.decomposed().map(bytes).max().unwrap_or(0);
        let shard = shard_bytes_max.max(self.carried_bytes_max());
        let passing = shard.saturating_add(largest);
        passing.min(self.disk_bytes_peak(shard_bytes_max))
    }

    /// Of that, what copied tensors of a shard may take.
    pub fn disk_bytes_carried(&self, shard_bytes_max: u64) -> u64 {
        let most = shard_bytes_max.max(self.carried_bytes_max());
        self.disk_bytes_copied().min(most)
    }

    fn carried_bytes_max(&self) -> u64 {
        let copied = self.tensors.iter().filter(|t| !t.is_decomposed());
        let bytes = copied.map(|t| t.artifact_bytes_max(self.storing));
        bytes.max().unwrap_or(0)
    }

    /// The most disk that some finished matrices take.
    pub fn disk_bytes_of(&self, tensors: &[&PlannedTensor]) -> u64 {
        let bytes = tensors.iter().map(|t| t.artifact_bytes_max(self.storing));
        let bytes: u64 = bytes.sum();
        bytes + bytes / 50
    }

    /// The disk that what is copied takes.
    pub fn disk_bytes_copied(&self) -> u64 {
        let copied = self.tensors.iter().filter(|t| !t.is_decomposed());
        copied.map(|t| t.artifact_bytes_max(self.storing)).sum()
    }
}

/// The tiles that M′ is computed by (split).
const TILE: u64 = 1024;

/// Bytes of what solves the eigenproblem of a short side s, at its peak, without M.
///
/// - Gram: s² for the matrix, and half of that for its reflectors; then these, and q·s for the wanted eigenvectors. In f64
///   twice as many bytes.
/// - A Krylov space of r vectors: s² for the Gram matrix, where it is formed, r·s for the basis, 1.25·r² for the projection,
///   and 1.5·r² to solve that.
/// - All by LAPACK: four matrices of the short side in f64, at most.
fn solver_bytes(way: Usual, s: u64, q: u64) -> u64 {
    match way {
        Usual::Krylov {
            vectors,
            forms_gram,
        } => {
            let r = vectors as u64;
            4 * (u64::from(forms_gram) * s * s + r * s) + 11 * r * r
        }
        Usual::GramF32 => 6 * s * s,
        Usual::GramF64 => 12 * s * s,
        Usual::Full => 8 * (s + q + q.min(512)) * s,
    }
}
