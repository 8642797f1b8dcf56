//! Attention on the CPU in f32, some queries at a time: no t × s of scores is ever held, and what nobody sees is not
//! computed.
//!
//! As in [`super::fused`], `None` is the answer where it does not apply; the tests hold it against tensor operations.

use std::ops::Range;

use candle_core::{Result, Tensor};
use ndarray::{ArrayView2, ArrayViewMut2, ShapeBuilder, s};
use rayon::prelude::*;

use super::family::Scores;
use super::fused::{applies, softmax, through_softmax, with_slices};
use super::segments::Sight;
use crate::linalg::multiply;

/// Queries whose scores are alive at once: with some hundred keys, what a core's cache holds.
const QUERIES: usize = 64;

/// Sides of q (b, t, h, d), and of k and v (b, s, kv, d).
#[derive(Debug, Clone, Copy)]
struct Sides {
    b: usize,
    h: usize,
    kv: usize,
    t: usize,
    s: usize,
    d: usize,
}

impl Sides {
    fn of(q: &Tensor, k: &Tensor) -> Result<Self> {
        let (b, t, h, d) = q.dims4()?;
        let (_, s, kv, _) = k.dims4()?;
        Ok(Self { b, h, kv, t, s, d })
    }

    /// The queries (t, d) of a head, or what has their shape; heads are counted through the batch.
    fn queries<'a>(&self, values: &'a [f32], head: usize) -> ArrayView2<'a, f32> {
        let (batch, head) = (head / self.h, head % self.h);
        self.strided(values, self.t, batch, head, self.h)
    }

    /// The keys or values (s, d) that a head shares with others.
    fn shared<'a>(&self, values: &'a [f32], head: usize) -> ArrayView2<'a, f32> {
        let (batch, head) = (head / self.h, head % self.h);
        self.strided(values, self.s, batch, head / (self.h / self.kv), self.kv)
    }

    /// Head `head` of `heads` in a row (n, heads, d) of the batch, as (n, d).
    fn strided<'a>(
        &self,
        values: &'a [f32],
        n: usize,
        batch: usize,
        head: usize,
        heads: usize,
    ) -> ArrayView2<'a, f32> {
        let row = &values[batch * n * heads * self.d..][..n * heads * self.d];
        let shape = (n, self.d).strides((heads * self.d, 1));
        ArrayView2::from_shape(shape, &row[head * self.d..]).expect("a head lies in its row")
    }

    /// The run of keys that each query of a head sees; what all rows of the batch share has t rows.
    fn seen<'a>(&self, seen: &'a [Range<usize>], head: usize) -> &'a [Range<usize>] {
        let at = head / self.h * self.t % seen.len();
        &seen[at..at + self.t]
    }

    /// From each head's own (n, d) to (b, n, heads, d), where heads that share are added, in their order.
    fn gathered(&self, values: &[f32], n: usize, heads: usize) -> Vec<f32> {
        let (d, shared) = (self.d, self.h / heads);
        let mut gathered = vec![0f32; self.b * n * heads * d];
        gathered
            .par_chunks_mut(heads * d)
            .enumerate()
            .for_each(|(place, row)| {
                let (batch, at) = (place / n, place % n);
                for (head, sum) in row.chunks_exact_mut(d).enumerate() {
                    for head in head * shared..(head + 1) * shared {
                        let from = &values[((batch * self.h + head) * n + at) * d..][..d];
                        for (sum, x) in sum.iter_mut().zip(from) {
                            *sum += x;
                        }
                    }
                }
            });
        gathered
    }
}

fn matrix_mut(values: &mut [f32], columns: usize) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape((values.len() / columns, columns), values)
        .expect("rows of so many columns")
}

/// Some queries of one head, the run of keys that they see between them, and room for their scores.
struct Block<'a> {
    queries: Range<usize>,
    keys: Range<usize>,
    seen: &'a [Range<usize>],
}

impl<'a> Block<'a> {
    fn all(seen: &'a [Range<usize>]) -> impl Iterator<Item = Self> {
        (0..seen.len()).step_by(QUERIES).map(move |start| {
            let queries = start..(start + QUERIES).min(seen.len());
            let seen = &seen[queries.clone()];
            let first = seen.iter().map(|keys| keys.start).min().unwrap_or(0);
            let end = seen.iter().map(|keys| keys.end).max().unwrap_or(0);
            Self {
                queries,
                keys: first..end,
                seen,
            }
        })
    }

    /// softmax(scores) of each query, 0 where it does not see; with a cap its slope in `slope`.
    fn probabilities(
        &self,
        q: ArrayView2<f32>,
        k: ArrayView2<f32>,
        scores: Scores,
        p: &mut ArrayViewMut2<f32>,
        mut slope: Option<&mut ArrayViewMut2<f32>>,
    ) {
        let k = k.slice(s![self.keys.clone(), ..]);
        multiply(
            p,
            0.0,
            q.slice(s![self.queries.clone(), ..]),
            scores.scale as f32,
            k.t(),
        );
        if let Some(cap) = scores.cap {
            let cap = cap as f32;
            p.mapv_inplace(|x| (x / cap).tanh());
            if let Some(slope) = &mut slope {
                slope.zip_mut_with(p, |slope, &bent| *slope = 1.0 - bent * bent);
            }
            p.mapv_inplace(|bent| bent * cap);
        }
        for (mut row, seen) in p.rows_mut().into_iter().zip(self.seen) {
            let row = row.as_slice_mut().expect("a row is dense");
            let (first, end) = (seen.start - self.keys.start, seen.end - self.keys.start);
            row[..first].fill(0.0);
            row[end..].fill(0.0);
            softmax(&mut row[first..end]);
        }
    }

    /// A (queries, keys) matrix in `room`, which grows to the largest.
    fn room<'r>(&self, room: &'r mut Vec<f32>) -> ArrayViewMut2<'r, f32> {
        let n = self.queries.len() * self.keys.len();
        if room.len() < n {
            room.resize(n, 0.0);
        }
        matrix_mut(&mut room[..n], self.keys.len())
    }
}

/// softmax(scores)·v: q (b, t, h, d), k and v (b, s, kv, d) → (b, t, h, d).
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sight: &Sight,
    scores: Scores,
) -> Result<Option<Tensor>> {
    if !applies(&[q, k, v]) {
        return Ok(None);
    }
    let sides = Sides::of(q, k)?;
    let seen = sight.runs();
    let y = with_slices([q, k, v], |[q, k, v]| {
        let mut y = vec![0f32; q.len()];
        y.par_chunks_mut(sides.t * sides.d)
            .enumerate()
            .for_each_init(Vec::new, |room, (head, y)| {
                let q = sides.queries(q, head);
                let (k, v) = (sides.shared(k, head), sides.shared(v, head));
                let mut y = matrix_mut(y, sides.d);
                for block in Block::all(sides.seen(seen, head)) {
                    let mut p = block.room(room);
                    block.probabilities(q, k, scores, &mut p, None);
                    let mut y = y.slice_mut(s![block.queries.clone(), ..]);
                    let v = v.slice(s![block.keys.clone(), ..]);
                    multiply(&mut y, 0.0, p.view(), 1.0, v);
                }
            });
        Ok(sides.gathered(&y, sides.t, sides.h))
    })?;
    Ok(Some(Tensor::from_vec(y, q.shape(), q.device())?))
}

/// (dq, dk, dv) from the gradient of [`forward`]'s output; the probabilities are computed again.
pub fn gradients(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    sight: &Sight,
    scores: Scores,
    g: &Tensor,
) -> Result<Option<[Tensor; 3]>> {
    if !applies(&[q, k, v, g]) {
        return Ok(None);
    }
    let sides = Sides::of(q, k)?;
    let (t, s, d) = (sides.t, sides.s, sides.d);
    let seen = sight.runs();
    let (dq, dk, dv) = with_slices([q, k, v, g], |[q, k, v, g]| {
        let heads = sides.b * sides.h;
        let mut dq = vec![0f32; heads * t * d];
        let (mut dk, mut dv) = (vec![0f32; heads * s * d], vec![0f32; heads * s * d]);
        dq.par_chunks_mut(t * d)
            .zip(dk.par_chunks_mut(s * d).zip(dv.par_chunks_mut(s * d)))
            .enumerate()
            .for_each_init(Rooms::default, |rooms, (head, (dq, (dk, dv)))| {
                let (q, g) = (sides.queries(q, head), sides.queries(g, head));
                let (k, v) = (sides.shared(k, head), sides.shared(v, head));
                let mut dq = matrix_mut(dq, d);
                let (mut dk, mut dv) = (matrix_mut(dk, d), matrix_mut(dv, d));
                for block in Block::all(sides.seen(seen, head)) {
                    let rows = s![block.queries.clone(), ..];
                    let columns = s![block.keys.clone(), ..];
                    let mut p = block.room(&mut rooms.p);
                    let mut ds = block.room(&mut rooms.ds);
                    let mut slope = block.room(&mut rooms.slope);
                    block.probabilities(q, k, scores, &mut p, Some(&mut slope));
                    let g = g.slice(rows);
                    multiply(&mut dv.slice_mut(columns), 1.0, p.t(), 1.0, g);
                    multiply(&mut ds, 0.0, g, 1.0, v.slice(columns).t());
                    for (p, mut ds) in p.rows().into_iter().zip(ds.rows_mut()) {
                        let (Some(p), Some(ds)) = (p.as_slice(), ds.as_slice_mut()) else {
                            unreachable!("rows are dense");
                        };
                        through_softmax(p, ds);
                    }
                    if scores.cap.is_some() {
                        ds *= &slope;
                    }
                    let scale = scores.scale as f32;
                    let mut dq = dq.slice_mut(rows);
                    multiply(&mut dq, 0.0, ds.view(), scale, k.slice(columns));
                    let mut dk = dk.slice_mut(columns);
                    multiply(&mut dk, 1.0, ds.t(), scale, q.slice(rows));
                }
            });
        Ok((
            sides.gathered(&dq, t, sides.h),
            sides.gathered(&dk, s, sides.kv),
            sides.gathered(&dv, s, sides.kv),
        ))
    })?;
    let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
    Ok(Some([tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?]))
}

/// What one thread works in.
#[derive(Default)]
struct Rooms {
    p: Vec<f32>,
    ds: Vec<f32>,
    slope: Vec<f32>,
}
