//! The findings as aligned text.

use crate::measure::Accuracy;
use crate::spread::Spread;
use crate::targets::Verdict;
use crate::{Case, Who, model};

/// All rank fractions of one matrix.
pub fn matrix(cases: &[Case]) -> String {
    let Some(first) = cases.first() else {
        return String::new();
    };
    let [m, n] = first.shape;
    let matrix = first
        .name
        .rsplit_once("-f")
        .map_or(&*first.name, |(matrix, _)| matrix);
    let mut text = format!("{matrix} · {m} × {n} · true values: {}\n", first.reference);
    let header = [
        "f",
        "q",
        "κ",
        "who",
        "",
        "seconds",
        "(min–max)",
        "ours/theirs",
        "(min–max)",
        "fast/theirs",
        "(min–max)",
        "GEMMs",
        "needed",
        "σ error",
        "left",
        "orth u",
        "orth v",
    ];
    let mut rows = vec![header.map(String::from)];
    for case in cases {
        let gemm = case.gemm_seconds.median;
        for (index, row) in case.rows.iter().enumerate() {
            let once = |value: String| if index == 0 { value } else { String::new() };
            let is_ours = row.who == Who::Ours;
            rows.push([
                once(format!("{:?}", case.f)),
                once(case.q.to_string()),
                once(digits(case.kappa)),
                row.who.to_string(),
                row.remark.clone(),
                digits(row.seconds.median),
                range(&row.seconds),
                row.ratio
                    .as_ref()
                    .map(|r| digits(r.median))
                    .unwrap_or_default(),
                row.ratio.as_ref().map(range).unwrap_or_default(),
                row.fast_ratio
                    .as_ref()
                    .map(|r| digits(r.median))
                    .unwrap_or_default(),
                row.fast_ratio.as_ref().map(range).unwrap_or_default(),
                format!("{:.1}", row.seconds.median / gemm),
                if is_ours {
                    format!("{:.2}", case.gemms_needed)
                } else {
                    String::new()
                },
                format!("{:.0e}", row.accuracy.sigma_worst),
                left(&row.accuracy),
                format!("{:.0e}", row.accuracy.orthogonality_u),
                format!("{:.0e}", row.accuracy.orthogonality_v),
            ]);
        }
        rows.push(Default::default());
        if let Some(last) = rows.last_mut() {
            last[3] = "one GEMM M·Mᵀ".into();
            last[5] = digits(gemm);
            last[6] = range(&case.gemm_seconds);
            last[11] = "1.0".into();
        }
    }
    text.push_str(&aligned(&rows));
    text
}

/// The whole model at all its rank fractions.
pub fn models(cases: &[model::Case]) -> String {
    let how = cases.iter().find_map(|case| case.theirs.as_ref());
    let mut text = format!(
        "whole model {}, compute without the final write · theirs: {} ({} matrices with the head; ours {})\n",
        model::NAME,
        how.map_or("did not run", |theirs| &theirs.how),
        how.map_or(0, |theirs| theirs.linear_layers),
        cases.first().map_or(0, |case| case.linear_layers),
    );
    text.push_str(
        "ours: the decompose stage (M′ proved exact, one file per matrix written); theirs writes nothing and proves nothing\n",
    );
    let mut rows = vec![
        [
            "f",
            "who",
            "seconds",
            "(min–max)",
            "ours/theirs",
            "(min–max)",
        ]
        .map(String::from),
    ];
    for case in cases {
        let mut push = |f: String, who: &str, seconds: &Spread, ratio: Option<&Spread>| {
            rows.push([
                f,
                who.into(),
                digits(seconds.median),
                range(seconds),
                ratio.map(|r| digits(r.median)).unwrap_or_default(),
                ratio.map(range).unwrap_or_default(),
            ]);
        };
        push(case.f.to_string(), "svdhub", &case.ours, None);
        push(
            String::new(),
            "svdhub with hashing and the final join",
            &case.ours_total,
            None,
        );
        if let Some(fast) = &case.ours_fast {
            push(String::new(), "svdhub, fast", fast, None);
        }
        if let Some(theirs) = &case.theirs {
            push(
                String::new(),
                "svd-training, the same matrices",
                &theirs.same_matrices,
                Some(&theirs.ratio),
            );
            push(
                String::new(),
                "svd-training, all it does",
                &theirs.total,
                Some(&theirs.ratio_of_total),
            );
        }
    }
    text.push_str(&aligned(&rows));
    text
}

pub fn verdicts(verdicts: &[Verdict]) -> String {
    let mut rows = vec![["", "case", "wanted", "at most", "found"].map(String::from)];
    for verdict in verdicts {
        rows.push([
            if verdict.met { "holds" } else { "MISSED" }.into(),
            verdict.case.clone(),
            verdict.wanted.clone(),
            digits(verdict.at_most),
            verdict.found.map_or("not measured".into(), digits),
        ]);
    }
    aligned(&rows)
}

fn left(accuracy: &Accuracy) -> String {
    if accuracy.left_of_whole {
        format!("{:.0e}·‖M‖", accuracy.left)
    } else {
        format!("{:.6}", accuracy.left)
    }
}

/// Three significant digits.
fn digits(x: f64) -> String {
    if x == 0.0 || !x.is_finite() {
        return x.to_string();
    }
    let before_point = x.abs().log10().floor() as i32 + 1;
    match before_point {
        ..=-3 => format!("{x:.1e}"),
        _ => format!("{x:.*}", (3 - before_point).max(0) as usize),
    }
}

fn range(spread: &Spread) -> String {
    if spread.rounds.len() < 2 {
        return String::new();
    }
    format!("({}–{})", digits(spread.min), digits(spread.max))
}

/// Columns as wide as their widest cell, words to the left, numbers to the right; no column for nothing.
fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let is_number = |column: usize| {
        rows.iter().skip(1).all(|row| {
            let start = row[column].trim_start_matches('(').chars().next();
            start.is_none_or(|c| c.is_ascii_digit())
        })
    };
    let is_used = |&column: &usize| rows.iter().skip(1).any(|row| !row[column].is_empty());
    let columns: Vec<(usize, usize, bool)> = (0..N)
        .filter(is_used)
        .map(|column| (column, width(column), is_number(column)))
        .collect();
    let line = |row: &[String; N]| {
        let cells: Vec<String> = columns
            .iter()
            .map(|&(column, width, to_the_right)| {
                let cell = &row[column];
                if to_the_right {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            })
            .collect();
        cells.join("  ").trim_end().to_string() + "\n"
    };
    rows.iter().map(line).collect()
}
