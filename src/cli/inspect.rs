//! `svdhub inspect`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use svdhub::card::thousands;
use svdhub::error::IoContext;
use svdhub::hub::ModelRef;
use svdhub::inspect::{self, Facts, route_name};
use svdhub::plot::{self, figure, percent};
use svdhub::spectrum::{ModuleFacts, Spread};
use svdhub::{Result, html, page};

use super::output::Table;
use super::session::{Session, shown};

/// How many certificates are named.
const WORST: usize = 3;

/// Show the spectrum of a decomposition: what was kept, and of what.
///
/// Reads the report; of a Hub repository, a few small files and no weights. A page or pictures already there are drawn
/// again if svdhub drew them, and left alone if not.
#[derive(Args)]
pub struct Command {
    /// A decomposition: a Hub id or a directory
    decomposition: ModelRef,
    /// Draw it as one page of HTML
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Draw it as SVG files in this directory
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// List every module, not one line per role
    #[arg(long)]
    all: bool,
}

impl Command {
    pub fn run(&self, session: &Session) -> Result<ExitCode> {
        let found = session.locate_files(&self.decomposition, &inspect::FILES)?;
        let facts = inspect::run(&found.dir, session.observer())?;
        let name = self.name();
        let mut written = Vec::new();
        if let Some(path) = &self.html {
            page::write(path, &html::page(&name, &facts)?)?;
            written.push(shown(path));
        }
        if let Some(dir) = &self.svg {
            std::fs::create_dir_all(dir).context("create", dir)?;
            for (file, picture) in pictures(&facts) {
                let path = dir.join(file);
                page::write(&path, &picture)?;
                written.push(shown(&path));
            }
        }
        session.print(&facts, || {
            let mut text = header(&name, &facts);
            text.push_str(&if self.all {
                every(&facts)
            } else {
                by_role(&facts)
            });
            text.push_str(&worst(&facts));
            if !written.is_empty() {
                text.push_str(&format!("\n{}\n", written.join("\n")));
            }
            text
        })
    }

    /// What the decomposition is called: its Hub id, or the last part of its path.
    fn name(&self) -> String {
        match &self.decomposition {
            ModelRef::Directory(dir) => {
                let whole = dir.canonicalize().unwrap_or_else(|_| dir.clone());
                let last = whole.file_name().map(Path::new);
                last.unwrap_or(&whole).display().to_string()
            }
            repo => repo.to_string(),
        }
    }
}

fn pictures(facts: &Facts) -> [(&'static str, String); 3] {
    let spectrum = &facts.spectrum;
    [
        ("curves.svg", plot::curves(spectrum)),
        ("energy.svg", plot::energy(spectrum)),
        ("stable_rank.svg", plot::stable_rank(spectrum)),
    ]
}

fn header(name: &str, facts: &Facts) -> String {
    let layout = format!("{:?}", facts.layout).to_lowercase();
    let routes: Vec<String> = facts
        .routes
        .iter()
        .map(|(route, count)| format!("{route} {count}"))
        .collect();
    format!(
        "{name}: {} of {}, {layout} layout\n\
         {} linear layers · {} singular values · {} of the energy · routes: {}\n\n",
        facts.rank,
        facts.base.describe(),
        thousands(facts.linear_layers as u64),
        thousands(facts.sigma),
        percent(facts.spectrum.captured_energy),
        routes.join(", ")
    )
}

/// Min, median and max under one head.
fn spread(spread: Option<&Spread>, unit: fn(f64) -> String) -> String {
    let cells = match spread {
        Some(s) => [s.min, s.median, s.max].map(unit),
        None => ["–".to_string(), "–".to_string(), "–".to_string()],
    };
    let cells = cells.map(|cell| format!("{cell:>6}"));
    cells.join(" ")
}

fn by_role(facts: &Facts) -> String {
    let mut table = Table::new([
        "role".into(),
        "modules".into(),
        columns("energy, %"),
        columns("stable rank"),
        columns("κ = σ₁/σ_q"),
    ]);
    let share = |x: f64| format!("{:.1}", 100.0 * x);
    for role in &facts.spectrum.roles {
        table.row([
            role.role.clone(),
            role.modules.to_string(),
            spread(Some(&role.captured_energy), share),
            spread(role.stable_rank.as_ref(), figure),
            spread(role.condition.as_ref(), figure),
        ]);
    }
    table.render() + "\neach: min, median and max over the modules of a role\n"
}

fn columns(head: &str) -> String {
    format!("{head:>20}")
}

fn every(facts: &Facts) -> String {
    let heads = [
        "module",
        "shape",
        "q",
        "energy",
        "stable rank",
        "κ",
        "σ₁",
        "route",
    ];
    let mut table = Table::new(heads);
    let or_none = |x: Option<f64>| x.map_or("–".into(), figure);
    for m in &facts.spectrum.modules {
        table.row([
            m.name.clone(),
            format!("{} × {}", m.shape[0], m.shape[1]),
            m.q.to_string(),
            percent(m.captured_energy),
            or_none(m.stable_rank),
            or_none(m.condition),
            or_none(m.sigma.first().copied()),
            route_name(m.route),
        ]);
    }
    table.render()
}

fn worst(facts: &Facts) -> String {
    let mut table = Table::new(["largest certificates", "residual", "orthogonality", "route"]);
    for m in facts.spectrum.worst(WORST) {
        let ModuleFacts { certificate, .. } = m;
        table.row([
            m.name.clone(),
            format!("{:.1e}", certificate.residual),
            format!("{:.1e}", certificate.orthogonality),
            route_name(m.route),
        ]);
    }
    format!("\n{}", table.render())
}
