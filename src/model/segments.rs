//! How the rows of a batch divide into sequences: packed one after the other, and padded to one length.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

/// One run of tokens in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    /// A sequence of this many tokens: its positions count from 0, and it sees no other.
    Sequence(usize),
    /// This many tokens that nobody sees and that predict nothing.
    Padding(usize),
}

/// The segments of every row of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segments {
    /// For each token, row by row, where in its row its sequence starts: a token of padding is alone.
    starts: Vec<usize>,
    /// Tokens in a row.
    length: usize,
    /// Whether each token is to be predicted; if nothing is said, all are that have one before them.
    learnt: Option<Vec<bool>>,
}

impl Segments {
    /// Every one of `rows` rows is one sequence of `length` tokens.
    pub fn whole(rows: usize, length: usize) -> Self {
        Self {
            starts: vec![0; rows * length],
            length,
            learnt: None,
        }
    }

    /// Rows as they are described, from left to right.
    ///
    /// # Panics
    /// If the rows are not of one length.
    pub fn new(rows: Vec<Vec<Segment>>) -> Self {
        let mut starts = Vec::new();
        let mut length = None;
        for row in rows {
            let mut at = 0;
            for segment in row {
                match segment {
                    Segment::Sequence(tokens) => {
                        starts.extend(std::iter::repeat_n(at, tokens));
                        at += tokens;
                    }
                    Segment::Padding(tokens) => {
                        starts.extend(at..at + tokens);
                        at += tokens;
                    }
                }
            }
            let length = *length.get_or_insert(at);
            assert_eq!(at, length, "the rows of a batch are of one length");
        }
        Self {
            starts,
            length: length.unwrap_or(0),
            learnt: None,
        }
    }

    /// The same, of which only these tokens count in the loss, row by row.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn learning(mut self, learnt: Vec<bool>) -> Self {
        assert_eq!(
            learnt.len(),
            self.starts.len(),
            "each token is learnt or not"
        );
        self.learnt = Some(learnt);
        self
    }

    /// Whether every row is one sequence.
    pub fn is_whole(&self) -> bool {
        self.starts.iter().all(|&start| start == 0)
    }

    /// Whether every row is one sequence, and all of it counts in the loss.
    pub(super) fn counts_whole(&self) -> bool {
        self.learnt.is_none() && self.is_whole()
    }

    /// Each token's place in its row, and where its sequence starts.
    fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let starts = self.starts.iter().enumerate();
        starts.map(|(token, &start)| (token % self.length, start))
    }

    /// Each token's position in its sequence, and the shape of the list: (t) where all rows share it, else (b, t).
    pub(super) fn positions(&self) -> (Vec<usize>, Vec<usize>) {
        if self.is_whole() {
            return ((0..self.length).collect(), vec![self.length]);
        }
        let positions = self.places().map(|(at, start)| at - start).collect();
        let rows = self.starts.len() / self.length;
        (positions, vec![rows, self.length])
    }

    /// What attention sees that reaches `window` positions back.
    pub(super) fn sight(&self, window: Option<usize>, device: &Device) -> Result<Sight> {
        let t = self.length;
        let seen = self
            .places()
            .map(|(at, start)| start.max(reach(at, window))..at + 1);
        if self.is_whole() {
            Sight::new(seen.take(t).collect(), t, t, device)
        } else {
            Sight::new(seen.collect(), t, t, device)
        }
    }

    /// The tokens that have a next one in their sequence, which is learnt, counted through all rows.
    pub(super) fn predicting(&self) -> Vec<u32> {
        let is_learnt = |token: usize| self.learnt.as_ref().is_none_or(|learnt| learnt[token]);
        let follows = |token: usize, at: usize, start: usize| {
            at + 1 < self.length && self.starts[token + 1] == start && is_learnt(token + 1)
        };
        let tokens = self.places().enumerate();
        tokens
            .filter(|&(token, (at, start))| follows(token, at, start))
            .map(|(token, _)| token as u32)
            .collect()
    }
}

/// The first position that one at `at` sees through a window.
pub(super) fn reach(at: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (at + 1).saturating_sub(window))
}

/// The run of keys that each query sees: no t × s of a mask is held.
#[derive(Debug, Clone)]
pub struct Sight {
    /// Of t queries where all rows share them, else of b·t. None is empty.
    runs: Arc<[Range<usize>]>,
    queries: usize,
    keys: usize,
    /// Where the runs begin and end, u32, on a GPU.
    bounds: Option<[Tensor; 2]>,
}

impl Sight {
    pub(super) fn new(
        runs: Vec<Range<usize>>,
        queries: usize,
        keys: usize,
        device: &Device,
    ) -> Result<Self> {
        let bound = |of: fn(&Range<usize>) -> usize| {
            let bounds: Vec<u32> = runs.iter().map(|run| of(run) as u32).collect();
            Tensor::new(bounds, device)
        };
        let bounds = match device.is_cuda() {
            true => Some([bound(|run| run.start)?, bound(|run| run.end)?]),
            false => None,
        };
        Ok(Self {
            runs: runs.into(),
            queries,
            keys,
            bounds,
        })
    }

    pub fn runs(&self) -> &[Range<usize>] {
        &self.runs
    }

    pub(super) fn bounds(&self) -> Option<&[Tensor; 2]> {
        self.bounds.as_ref()
    }

    /// 0 where a query sees a key, −∞ elsewhere, as `like` is: (t, s) where all rows share it, else (b, 1, t, s).
    pub(super) fn mask(&self, like: &Tensor) -> Result<Tensor> {
        let mut values = vec![f32::NEG_INFINITY; self.runs.len() * self.keys];
        for (row, seen) in values.chunks_mut(self.keys.max(1)).zip(self.runs.iter()) {
            row[seen.clone()].fill(0.0);
        }
        let rows = self.runs.len() / self.queries.max(1);
        let shape = match rows {
            1 => vec![self.queries, self.keys],
            rows => vec![rows, 1, self.queries, self.keys],
        };
        Tensor::from_vec(values, shape, like.device())?.to_dtype(like.dtype())
    }
}

#[cfg(test)]
mod tests {
    use super::Segment::{Padding, Sequence};
    use super::*;

    /// Rows of `x` where a query sees a key.
    fn drawn(segments: &Segments, window: Option<usize>) -> Vec<String> {
        let sight = segments.sight(window, &Device::Cpu).expect("a sight");
        let like = Tensor::new(&[0f32], &Device::Cpu).expect("a number");
        let mask = sight.mask(&like).expect("a mask");
        let keys = mask.dims()[mask.rank() - 1];
        let values: Vec<f32> = mask
            .flatten_all()
            .and_then(|m| m.to_vec1())
            .expect("values");
        let draw = |row: &[f32]| {
            row.iter()
                .map(|&x| if x == 0.0 { 'x' } else { '.' })
                .collect()
        };
        values.chunks(keys).map(draw).collect()
    }

    #[test]
    fn whole_rows_share_positions_and_mask() {
        let whole = Segments::whole(2, 4);
        assert_eq!(whole.positions(), (vec![0, 1, 2, 3], vec![4]));
        assert_eq!(drawn(&whole, None), ["x...", "xx..", "xxx.", "xxxx"]);
        assert_eq!(drawn(&whole, Some(2)), ["x...", "xx..", ".xx.", "..xx"]);
        assert_eq!(whole.predicting(), [0, 1, 2, 4, 5, 6]);
        assert_eq!(
            Segments::new(vec![vec![Sequence(4)], vec![Sequence(4)]]),
            whole
        );
    }

    #[test]
    fn packed_sequences_are_blind_to_each_other_and_padding_to_all() {
        let segments = Segments::new(vec![
            vec![Sequence(3), Sequence(2)],
            vec![Padding(2), Sequence(2), Padding(1)],
        ]);
        assert!(!segments.is_whole());
        let positions = vec![0, 1, 2, 0, 1, 0, 0, 0, 1, 0];
        assert_eq!(segments.positions(), (positions, vec![2, 5]));
        let first = ["x....", "xx...", "xxx..", "...x.", "...xx"];
        let second = ["x....", ".x...", "..x..", "..xx.", "....x"];
        assert_eq!(drawn(&segments, None), [first, second].concat());
        assert_eq!(drawn(&segments, Some(2))[2], ".xx..");
        assert_eq!(segments.predicting(), [0, 1, 3, 7]);
        let learnt = [true, false, true, true, false, true, true, true, true, true];
        assert_eq!(segments.learning(learnt.into()).predicting(), [1, 7]);
    }
}
