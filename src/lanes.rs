//! Loops over numbers in the widest vectors of the processor: the one door to `pulp`.

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
