//! Sequences side by side in windows of one length.

use std::collections::BTreeSet;

use super::Window;
use super::answers::Sequence;
use crate::model::Segment;

/// How the ids of a corpus divide into windows, and these into sequences.
#[derive(Debug, Clone)]
pub struct Packed {
    /// Of a window.
    length: usize,
    /// For each token of all windows, whether it is learnt.
    learnt: Vec<bool>,
    /// Of each window, the lengths of its sequences; what they leave is padding.
    sequences: Vec<Vec<usize>>,
    /// Rows of which something was longer than a window.
    pub cut: usize,
    /// Rows of which nothing is learnt within a window.
    pub left_out: usize,
}

/// A window's sequences.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub sequences: &'a [usize],
    /// For each token of the window.
    pub learnt: &'a [bool],
}

impl Row<'_> {
    /// Tokens that are learnt. The first of a sequence is not: nothing predicts it.
    pub fn predicted(&self) -> usize {
        let mut left = self.learnt;
        let mut predicted = 0;
        for &length in self.sequences {
            let (sequence, rest) = left.split_at(length);
            predicted += learnt(sequence);
            left = rest;
        }
        predicted
    }

    pub fn segments(&self) -> Vec<Segment> {
        let sequences = self.sequences.iter().map(|&n| Segment::Sequence(n));
        let rest = self.learnt.len() - self.sequences.iter().sum::<usize>();
        let padding = (rest > 0).then_some(Segment::Padding(rest));
        sequences.chain(padding).collect()
    }
}

fn learnt(sequence: &[bool]) -> usize {
    let predicted = sequence.iter().skip(1);
    predicted.filter(|&&learnt| learnt).count()
}

impl Packed {
    /// Windows of at most `window` tokens, and their ids: longer sequences of the rows end there.
    pub fn of(rows: Vec<Vec<Sequence>>, window: usize) -> (Vec<u32>, Self) {
        let (mut cut, mut left_out) = (0, 0);
        let mut sequences = Vec::new();
        for mut row in rows {
            cut += usize::from(row.iter().any(|sequence| sequence.ids.len() > window));
            for sequence in &mut row {
                sequence.ids.truncate(window);
                sequence.learnt.truncate(window);
            }
            row.retain(|sequence| learnt(&sequence.learnt) > 0);
            left_out += usize::from(row.is_empty());
            sequences.extend(row);
        }
        let lengths: Vec<usize> = sequences
            .iter()
            .map(|sequence| sequence.ids.len())
            .collect();
        let windows = fitted(&lengths, window);
        let filled = windows
            .iter()
            .map(|window| window.iter().map(|&at| lengths[at]).sum());
        let length = filled.max().unwrap_or(0);
        let (mut ids, mut learnt) = (Vec::new(), Vec::new());
        for (at, window) in windows.iter().enumerate() {
            for &sequence in window {
                ids.extend_from_slice(&sequences[sequence].ids);
                learnt.extend_from_slice(&sequences[sequence].learnt);
            }
            // nobody sees what these are
            ids.resize((at + 1) * length, 0);
            learnt.resize((at + 1) * length, false);
        }
        let of_windows = windows.iter();
        let lengths = of_windows.map(|window| window.iter().map(|&at| lengths[at]).collect());
        let packed = Self {
            length,
            learnt,
            sequences: lengths.collect(),
            cut,
            left_out,
        };
        (ids, packed)
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    pub fn tokens(&self) -> usize {
        self.sequences.iter().flatten().sum()
    }

    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let learnt = self.learnt.chunks(self.length.max(1));
        let rows = self.sequences.iter().zip(learnt);
        rows.map(|(sequences, learnt)| Row { sequences, learnt })
    }

    pub fn windows<'a>(&'a self, ids: &'a [u32]) -> Vec<Window<'a>> {
        let ids = ids.chunks(self.length.max(1));
        let windows = ids.zip(self.rows());
        windows
            .map(|(ids, row)| Window {
                ids,
                packed: Some(row),
            })
            .collect()
    }
}

/// The places of sequences of so many tokens, at most `window` each, window by window: the longest first, each where it
/// leaves the least room (best fit decreasing, at most 11/9 of the fewest windows; Johnson 1973).
fn fitted(lengths: &[usize], window: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(lengths[at]));
    let mut windows: Vec<Vec<usize>> = Vec::new();
    // what is free in a window, and which it is
    let mut free: BTreeSet<(usize, usize)> = BTreeSet::new();
    for at in order {
        let length = lengths[at];
        let (room, to) = match free.range((length, 0)..).next().copied() {
            Some(fitting) => fitting,
            None => {
                windows.push(Vec::new());
                (window, windows.len() - 1)
            }
        };
        free.remove(&(room, to));
        free.insert((room - length, to));
        windows[to].push(at);
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(ids: &[u32], learnt: &[bool]) -> Sequence {
        Sequence {
            ids: ids.into(),
            learnt: learnt.into(),
        }
    }

    #[test]
    fn each_goes_where_it_leaves_least() {
        assert_eq!(
            fitted(&[5, 3, 6, 4, 2], 8),
            [vec![2, 4], vec![0, 1], vec![3]]
        );
        assert!(fitted(&[], 8).is_empty());
    }

    #[test]
    fn what_teaches_nothing_is_left_out_and_what_is_long_ends() {
        let none = || sequence(&[4, 5], &[true, false]);
        let rows = vec![
            vec![sequence(&[1, 2, 3], &[false, false, true]), none()],
            // nothing predicts a first token
            vec![none()],
            vec![sequence(
                &[6, 7, 8, 9, 10, 11],
                &[false, true, false, false, true, true],
            )],
            // the answer lies behind the end
            vec![sequence(
                &[1, 1, 1, 1, 1, 1],
                &[false, false, false, false, false, true],
            )],
            vec![sequence(&[12, 13], &[true, true])],
            vec![],
        ];
        let (ids, packed) = Packed::of(rows, 5);
        assert_eq!((packed.cut, packed.left_out), (2, 3));
        assert_eq!(ids, [6, 7, 8, 9, 10, 1, 2, 3, 12, 13]);
        let windows = packed.windows(&ids);
        let told: Vec<_> = windows
            .iter()
            .map(|it| (it.tokens(), it.predicted()))
            .collect();
        assert_eq!(told, [(5, 2), (5, 2)]);
        assert_eq!(packed.tokens(), 10);
        let (ids, packed) = Packed::of(vec![vec![sequence(&[1, 2], &[false, true])]], 100);
        assert_eq!((ids.len(), packed.windows(&ids).len()), (2, 1));
    }

    #[test]
    fn windows_are_filled_up_with_what_nobody_sees() {
        let pair = |id| vec![sequence(&[id, id, id], &[false, true, true])];
        let (ids, packed) = Packed::of(vec![pair(1), pair(2), pair(3)], 7);
        assert_eq!(ids, [1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0]);
        let rows: Vec<_> = packed.rows().map(|row| row.segments()).collect();
        let both = vec![Segment::Sequence(3), Segment::Sequence(3)];
        assert_eq!(
            rows,
            [both, vec![Segment::Sequence(3), Segment::Padding(3)]]
        );
    }
}
