//! The page of a spectrum: facts in, one file of HTML out, which loads nothing and runs nothing. Nothing is computed here.

use serde_json::json;

use crate::card::thousands;
use crate::error::Result;
use crate::inspect::{Facts, Source};
use crate::json::Tool;
use crate::page::MARK;
use crate::plot::{self, figure, percent};
use crate::template;

const TEMPLATE: &str = include_str!("../templates/spectrum.html");

/// How many certificates the page names.
const WORST: usize = 5;

/// Renders the page of a decomposition that is called `name`.
pub fn page(name: &str, facts: &Facts) -> Result<String> {
    let spectrum = &facts.spectrum;
    let shown = json!({
        "name": name,
        "mark": MARK,
        "tool": Tool::this(),
        "base": facts.base.describe(),
        "rank": facts.rank.to_string(),
        "facts": facts,
        "from_tensors": facts.source == Source::Tensors,
        "worst": spectrum.worst(WORST),
        "curves": plot::curves(spectrum),
        "energy": plot::energy(spectrum),
        "stable_rank": plot::stable_rank(spectrum),
    });
    template::page("spectrum.html", TEMPLATE, &shown, |page| {
        page.add_filter("thousands", |n: u64| thousands(n));
        page.add_filter("percent", |share: f64| percent(share));
        page.add_filter("figure", |x: Option<f64>| x.map_or("–".into(), figure));
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::format::{ArtifactLayout, Pin, Rank};
    use crate::spectrum::tests::spectrum;

    #[test]
    fn a_page_is_whole_and_strangers_names_stay_text() {
        let hostile = "layers.0.\"><script>alert(1)</script>";
        let facts = Facts {
            base: Pin {
                repo: None,
                revision: None,
                sha256: BTreeMap::new(),
            },
            layout: ArtifactLayout::Sidecar,
            rank: Rank::Fraction(0.1),
            linear_layers: 2,
            sigma: 12_345,
            routes: BTreeMap::from([("<b>".to_string(), 2)]),
            source: Source::Report,
            spectrum: spectrum(&[(hostile, &[4.0, 2.0], &[1.0]), ("lm_head", &[0.0], &[])]),
        };
        let page = page("a & b <svd>", &facts).expect("renders");
        assert!(page.find(MARK).is_some_and(|at| at < 100));
        assert!(!page.contains("<script") && !page.contains("<b>"));
        assert!(page.contains("a &amp; b &lt;svd&gt;"));
        // nothing is loaded: no address but the name of SVG itself
        let addresses = page.matches("//").count();
        assert_eq!(
            addresses,
            page.matches("http://www.w3.org/2000/svg").count()
        );
        assert!(!page.contains("src=") && !page.contains("href=") && !page.contains("url("));
        for fact in [
            "12,345",
            "95.2 %",
            "1.31",
            "<td>–</td>",
            "sidecar",
            "fraction 0.1",
        ] {
            assert!(page.contains(fact), "{fact} is missing from\n{page}");
        }
    }
}
