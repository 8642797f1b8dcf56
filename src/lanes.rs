//! Loops over numbers in the widest vectors of the processor: the one door to `pulp`.

pub use pulp::{Simd, WithSimd};

/// Runs what is written in vectors, [`Vectors`], with the widest that the processor has.
pub fn widest_of<F: WithSimd>(f: F) -> F::Output {
    pulp::Arch::new().dispatch(f)
}

/// Numbers by the vector: for loops of which the compiler does not make vectors by itself. Sums depend on their width.
pub trait Vectors: Copy {
    type Vector<S: Simd>: Copy;

    /// The whole vectors in `x`, and what is left.
    fn vectors<S: Simd>(x: &[Self]) -> (&[Self::Vector<S>], &[Self]);
    fn vectors_mut<S: Simd>(x: &mut [Self]) -> (&mut [Self::Vector<S>], &mut [Self]);
    /// The same number everywhere.
    fn all<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// a·b + c, rounded once where the processor can.
    fn add_product<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// The sum of a vector's numbers.
    fn total<S: Simd>(simd: S, x: Self::Vector<S>) -> Self;
    /// Less than a vector, filled up with zeros.
    fn part<S: Simd>(simd: S, x: &[Self]) -> Self::Vector<S>;
    fn store_part<S: Simd>(simd: S, to: &mut [Self], x: Self::Vector<S>);
    /// x with zeros for its first `count` numbers.
    fn behind<S: Simd>(simd: S, x: Self::Vector<S>, count: usize) -> Self::Vector<S>;

    /// Numbers in a vector.
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::Vector<S>>() / size_of::<Self>()
    }
}

macro_rules! vectors {
    ($t:ty, $vector:ident, $split:ident, $split_mut:ident, $all:ident, $fma:ident, $total:ident, $load:ident, $store:ident, $less:ident, $select:ident) => {
        impl Vectors for $t {
            type Vector<S: Simd> = S::$vector;
            #[inline(always)]
            fn vectors<S: Simd>(x: &[Self]) -> (&[S::$vector], &[Self]) {
                S::$split(x)
            }
            #[inline(always)]
            fn vectors_mut<S: Simd>(x: &mut [Self]) -> (&mut [S::$vector], &mut [Self]) {
                S::$split_mut(x)
            }
            #[inline(always)]
            fn all<S: Simd>(simd: S, x: Self) -> S::$vector {
                simd.$all(x)
            }
            #[inline(always)]
            fn add_product<S: Simd>(
                simd: S,
                a: S::$vector,
                b: S::$vector,
                c: S::$vector,
            ) -> S::$vector {
                simd.$fma(a, b, c)
            }
            #[inline(always)]
            fn total<S: Simd>(simd: S, x: S::$vector) -> Self {
                simd.$total(x)
            }
            #[inline(always)]
            fn part<S: Simd>(simd: S, x: &[Self]) -> S::$vector {
                simd.$load(x)
            }
            #[inline(always)]
            fn store_part<S: Simd>(simd: S, to: &mut [Self], x: S::$vector) {
                simd.$store(to, x)
            }
            #[inline(always)]
            fn behind<S: Simd>(simd: S, x: S::$vector, count: usize) -> S::$vector {
                const PLACES: [$t; 16] = {
                    let mut places = [0.0; 16];
                    let mut i = 1;
                    while i < 16 {
                        places[i] = i as $t;
                        i += 1;
                    }
                    places
                };
                let first = simd.$less(S::$split(&PLACES).0[0], simd.$all(count as $t));
                simd.$select(first, simd.$all(0.0), x)
            }
        }
    };
}
vectors!(
    f32,
    f32s,
    as_simd_f32s,
    as_mut_simd_f32s,
    splat_f32s,
    mul_add_e_f32s,
    reduce_sum_f32s,
    partial_load_f32s,
    partial_store_f32s,
    less_than_f32s,
    select_f32s
);
vectors!(
    f64,
    f64s,
    as_simd_f64s,
    as_mut_simd_f64s,
    splat_f64s,
    mul_add_e_f64s,
    reduce_sum_f64s,
    partial_load_f64s,
    partial_store_f64s,
    less_than_f64s,
    select_f64s
);

/// Runs loops with the widest vectors the processor has: what is inlined into `f` is compiled once for each width. Sums go
/// by [`LANES`], so that their bits are the same in all of them.
#[inline(always)]
pub fn widest<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// Partial sums that are kept beside each other: f32 in the widest vectors there are.
pub const LANES: usize = 16;

/// Calls `f` with every number and the lane it falls into.
#[inline(always)]
pub fn by_lane<T, L>(values: &mut [T], lanes: &mut [L; LANES], f: impl Fn(&mut T, &mut L)) {
    let mut groups = values.chunks_exact_mut(LANES);
    for group in &mut groups {
        for (x, lane) in group.iter_mut().zip(lanes.iter_mut()) {
            f(x, lane);
        }
    }
    for (x, lane) in groups.into_remainder().iter_mut().zip(lanes.iter_mut()) {
        f(x, lane);
    }
}

/// Σ aᵢ·bᵢ
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in (&mut a).zip(&mut b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += a * b;
        }
    }
    for (lane, (a, b)) in lanes
        .iter_mut()
        .zip(a.remainder().iter().zip(b.remainder()))
    {
        *lane += a * b;
    }
    lanes.iter().sum()
}
