//! The page of a spectrum: facts in, one file of HTML out, which loads nothing and runs nothing. Nothing is computed here.

use minijinja::{Environment, Value as Shown};
use serde_json::json;

use crate::card::thousands;
use crate::error::Result;
use crate::inspect::{Facts, Source};
use crate::json::Tool;
use crate::plot::{self, MARK, figure, percent};

const TEMPLATE: &str = include_str!("../templates/spectrum.html");

/// How many certificates the page names.
const WORST: usize = 5;

/// Renders the page of a decomposition that is called `name`.
pub fn page(name: &str, facts: &Facts) -> Result<String> {
    let mut environment = Environment::new();
    environment.add_filter("thousands", |n: u64| thousands(n));
    environment.add_filter("percent", |share: f64| percent(share));
    environment.add_filter("figure", |x: Option<f64>| x.map_or("–".into(), figure));
    // the ending of the template's name turns escaping on
    environment.add_template("spectrum.html", TEMPLATE)?;
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
    let shown: Shown = serde_json::from_value(shown).expect("any JSON is a template value");
    Ok(environment.get_template("spectrum.html")?.render(shown)?)
}
