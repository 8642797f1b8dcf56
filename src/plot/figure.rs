//! Numbers as a person would write them.

use crate::card::thousands;

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A number in three digits, as a person would write it.
pub fn figure(x: f64) -> String {
    let size = x.abs();
    let digits = match size {
        0.0 => return "0".into(),
        _ if !(1e-3..1e7).contains(&size) => {
            let exponent = size.log10().floor();
            return format!(
                "{:.1}·10{}",
                x / 10f64.powf(exponent),
                raised(exponent as i32)
            );
        }
        _ if size >= 999.5 => {
            let sign = if x < 0.0 { "−" } else { "" };
            return format!("{sign}{}", thousands(size.round() as u64));
        }
        _ => (2 - size.log10().floor() as i32).clamp(0, 5) as usize,
    };
    format!("{x:.digits$}")
}

pub fn raised(exponent: i32) -> String {
    let digit = |c: char| match c {
        '-' => '⁻',
        '1' => '¹',
        '2' => '²',
        '3' => '³',
        // the other digits follow each other
        c => char::from_u32('⁰' as u32 + c.to_digit(10).unwrap_or(0)).unwrap_or(c),
    };
    exponent.to_string().chars().map(digit).collect()
}

/// 0.05, 2, 5,000: a tick's value without needless zeros.
pub fn figure_of_tick(v: f64) -> String {
    if v >= 1.0 {
        thousands(v.round() as u64)
    } else {
        let text = format!("{v:.3}");
        text.trim_end_matches('0').to_string()
    }
}
