//! Sizes and counts as people write them.

use std::num::NonZeroUsize;

use svdhub::{Error, Result};

/// `5GB`, `300 MB`, `1000000`: powers of 1000.
pub fn size(text: &str) -> Result<u64> {
    let refuse = || Error::Parse {
        what: "a size",
        value: text.into(),
        reason: "expected a number with B, kB, MB, GB or TB".into(),
    };
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        _ => return Err(refuse()),
    };
    let bytes = number.parse::<f64>().map_err(|_| refuse())? * factor;
    if bytes >= 1.0 {
        Ok(bytes as u64)
    } else {
        Err(refuse())
    }
}

/// A count of what takes memory by the piece.
pub fn count(text: &str) -> Result<NonZeroUsize> {
    const MOST: usize = 1_000_000;
    let count = text.parse::<NonZeroUsize>().ok();
    count
        .filter(|count| count.get() <= MOST)
        .ok_or_else(|| Error::Parse {
            what: "a count",
            value: text.into(),
            reason: format!("expected a whole number from 1 to {MOST}"),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_unit() {
        assert_eq!(size("5GB").expect("reads"), 5_000_000_000);
        assert_eq!(size("1.5 mb").expect("reads"), 1_500_000);
        assert_eq!(size("42").expect("reads"), 42);
        for bad in ["", "GB", "5 apples", "-3", "0"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
