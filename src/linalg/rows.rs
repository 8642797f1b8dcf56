//! Lengths of rows, added in double precision: in single, squares overflow and underflow long before numbers do.

use ndarray::{Array2, ArrayView1, ArrayViewMut2};

/// ‖x‖², by several sums side by side, since one alone waits for each addition to end.
pub fn norm_squared(row: ArrayView1<f32>) -> f64 {
    const LANES: usize = 16;
    let square = |&x: &f32| f64::from(x) * f64::from(x);
    let Some(values) = row.as_slice() else {
        return row.iter().map(square).sum();
    };
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut sums = [0f64; LANES];
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += square(x);
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(square).sum::<f64>()
}

/// ‖x‖
pub fn norm(row: ArrayView1<f32>) -> f64 {
    norm_squared(row).sqrt()
}

/// The length of the longest row.
pub fn longest(rows: &Array2<f32>) -> f64 {
    rows.rows().into_iter().map(norm).fold(0.0, f64::max)
}

/// Gives each row unit length, and returns the lengths that they had; zero rows stay.
pub fn to_unit_length(mut rows: ArrayViewMut2<f32>) -> Vec<f64> {
    let unit = |mut row: ndarray::ArrayViewMut1<f32>| {
        let length = norm(row.view());
        if length > 0.0 {
            let factor = 1.0 / length;
            row.mapv_inplace(|x| (f64::from(x) * factor) as f32);
        }
        length
    };
    rows.rows_mut().into_iter().map(unit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;
    use ndarray::s;

    #[test]
    fn rows_of_any_size_get_unit_length() {
        for size in [1e-36, 1e-20, 1.0, 1e20, 1e36] {
            let before = normal(5, 37, 1) * size;
            let mut rows = before.clone();
            rows.row_mut(3).fill(0.0);
            let lengths = to_unit_length(rows.view_mut());
            assert!(rows.row(3).iter().all(|&x| x == 0.0) && lengths[3] == 0.0);
            for i in [0, 1, 2, 4] {
                let wide = |x: &f32| f64::from(*x);
                let length: f64 = before.row(i).iter().map(|x| wide(x).powi(2)).sum();
                // 37 roundings of a double
                assert!((lengths[i] / length.sqrt() - 1.0).abs() < 1e-14);
                for (x, y) in rows.row(i).iter().zip(before.row(i)) {
                    assert!((wide(x) - wide(y) / length.sqrt()).abs() < 6e-8);
                }
            }
            assert_eq!(
                longest(&before),
                before.rows().into_iter().map(norm).fold(0.0, f64::max)
            );
            // the same sum where the row does not lie dense
            let column = before.slice(s![.., 7]);
            let dense = column.to_owned();
            assert!((norm(column) / norm(dense.view()) - 1.0).abs() < 1e-15);
        }
    }
}
