//! Which way to the triplets is the cheapest, from the shape and q alone.

use super::algorithm::Algorithm;
use super::krylov::Growth;

/// Where one way becomes cheaper, or safer, than another. Tests lower them.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// Up to this short side, the full decomposition costs no more.
    pub full_side: usize,
    /// Up to this short side, double precision costs nothing worth saving.
    pub f64_side: usize,
    /// Above this share of the full rank σ_q is small and single precision never passes.
    pub f64_share: f64,
    /// From this short side, a Krylov space is tried …
    pub krylov_side: usize,
    /// … for up to this share of the full rank.
    pub krylov_share: f64,
    /// From this short side the Gram matrix outgrows the caches, and reducing it waits for memory: there, a Krylov space
    /// is tried …
    pub large_side: usize,
    /// … for up to this share.
    pub large_share: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            full_side: 24,
            f64_side: 96,
            f64_share: 0.9,
            krylov_side: 640,
            krylov_share: 0.115,
            large_side: 2560,
            large_share: 0.18,
        }
    }
}

impl Thresholds {
    pub fn needs_double(&self, side: usize, q: usize) -> bool {
        side <= self.f64_side || q as f64 >= self.f64_share * side as f64
    }

    fn suits_krylov(&self, side: usize, q: usize) -> bool {
        let share = if side < self.large_side {
            self.krylov_share
        } else {
            self.large_share
        };
        side >= self.krylov_side && q as f64 <= share * side as f64
    }

    /// How a Krylov space for q pairs of the Gram matrix of M (s, l) should grow, where one is worth it.
    pub fn growth(
        &self,
        (side, length): (usize, usize),
        q: usize,
        algorithm: &Algorithm,
    ) -> Option<Growth> {
        if q == 0 || !(algorithm.fast || self.suits_krylov(side, q)) {
            return None;
        }
        // degree against width: a larger block feeds the kernels better and needs more vectors
        let blocks = if algorithm.fast { 32 } else { 44 };
        let power_of_two = 1 << (side / blocks).max(1).ilog2();
        let block = power_of_two.clamp(32, 256).min(side / 4);
        let whole = |vectors: f64| (vectors as usize).next_multiple_of(block);
        let (s, vectors) = (side as f64, q as f64);
        if algorithm.fast {
            let first = whole(2.0 * vectors + block as f64);
            // where it would take most of the side, the exact way costs no more
            return (first as f64 <= FAST_SHARE * s).then_some(Growth {
                block,
                first,
                last: first,
                residual: None,
            });
        }
        // the longer M is, the closer its values are, and the less a vector more costs beside the Gram matrix
        let least = if length < 2 * side { 0.19 } else { 0.25 };
        Some(Growth {
            block,
            first: whole((least * s + 2.8 * vectors).min(0.58 * s)),
            last: whole(0.74 * s).min(side),
            residual: Some(algorithm.residual()),
        })
    }
}

/// The largest share of the side that the space of [`Algorithm::fast`] may take.
const FAST_SHARE: f64 = 0.6;

/// The way that a matrix usually takes, for plans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usual {
    /// Of so many vectors, with the Gram matrix or without it.
    Krylov {
        vectors: usize,
        forms_gram: bool,
    },
    GramF32,
    GramF64,
    Full,
}

/// The way of a matrix with the sides (s, l), s ≤ l, in which nothing dwarfs the rest.
///
/// Without q, all values are computed before q is known.
pub fn usual_way((side, length): (usize, usize), q: Option<usize>) -> Usual {
    let thresholds = Thresholds::default();
    let Some(q) = q else {
        return Usual::GramF64;
    };
    if side <= thresholds.full_side {
        return Usual::Full;
    }
    if thresholds.needs_double(side, q) {
        return Usual::GramF64;
    }
    match thresholds.growth((side, length), q, &Algorithm::default()) {
        Some(growth) => Usual::Krylov {
            // a flat spectrum takes some more than the first look finds
            vectors: (growth.first + growth.first / 12).min(growth.last),
            forms_gram: !growth.is_cheaper_without_gram((side, length)),
        },
        None => Usual::GramF32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_way_follows_from_shape_and_rank() {
        let krylov = |vectors, forms_gram| Usual::Krylov {
            vectors,
            forms_gram,
        };
        for (sides, q, way) in [
            ((20, 30), Some(4), Usual::Full),
            ((80, 90), Some(4), Usual::GramF64),
            ((2048, 2048), Some(1900), Usual::GramF64),
            ((2048, 2048), None, Usual::GramF64),
            ((576, 1536), Some(57), Usual::GramF32),
            ((2048, 2048), Some(409), Usual::GramF32),
            // 0.19·s + 2.8·q = 960, 30 blocks of 32; a twelfth more where the spectrum is flat
            ((2048, 2048), Some(204), krylov(1040, true)),
            // 0.25·s of a long one: 1088
            ((2048, 8192), Some(204), krylov(1178, true)),
            // so few that two products with M cost less: 0.19·s + 2.8·q = 1349, 22 blocks of 64
            ((4096, 4096), Some(204), krylov(1525, false)),
            // where the Gram matrix outgrows the caches, up to 0.18
            ((4096, 4096), Some(700), krylov(2634, true)),
            ((4096, 4096), Some(800), Usual::GramF32),
        ] {
            assert_eq!(usual_way(sides, q), way, "{q:?} of {sides:?}");
        }
    }
}
