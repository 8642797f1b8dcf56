//! `inspect`: a decomposition in, the facts of its spectrum out; nothing is computed that the report holds already.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use crate::artifact::Artifact;
use crate::error::{Error, Result};
use crate::event::Observer;
use crate::format::{ArtifactLayout, ModuleTensors, Pin, Rank, SvdSection, parse_section};
use crate::linalg::Route;
use crate::spectrum::{self, Spectrum};
use crate::weights::place::refuse_links_outside;
use crate::weights::{Checkpoint, Layout};
use crate::{json, report};

/// All that inspecting reads of a repository: kilobytes, whatever the size of the model.
pub const FILES: [&str; 2] = ["config.json", report::FILE];

/// The facts of a decomposition.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    pub base: Pin,
    pub layout: ArtifactLayout,
    pub rank: Rank,
    pub linear_layers: usize,
    /// Σσ: numbers that training moves.
    pub sigma: u64,
    /// Modules by the route that decomposed them.
    pub routes: BTreeMap<String, usize>,
    pub source: Source,
    #[serde(flatten)]
    pub spectrum: Spectrum,
}

/// Where the spectrum was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// In `report.json`.
    Report,
    /// In the tensors, because the report is older than its section.
    Tensors,
}

/// Reads the facts of the decomposition in `dir`, of which [`FILES`] are enough if its report holds the spectrum.
///
/// # Errors
/// What lies there is no decomposition; its report is of another one; neither report nor tensors tell the spectrum.
pub fn run(dir: &Path, observer: &dyn Observer) -> Result<Facts> {
    let config_path = dir.join("config.json");
    if !config_path.exists() {
        return Err(Error::NotAModel {
            path: dir.into(),
            missing: "config.json".into(),
        });
    }
    refuse_links_outside(dir)?;
    let config: serde_json::Value = json::read(&config_path)?;
    if config["svd"].is_null() {
        return Err(Error::NotAnArtifact { path: dir.into() });
    }
    let svd = parse_section(&config_path, &config["svd"])?;
    let (spectrum, source) = match report::read(dir)?.remove(spectrum::SECTION) {
        Some(section) => {
            let path = dir.join(report::FILE);
            let spectrum: Spectrum = json::interpret(&path, section)?;
            let refuse = |reason| Error::Report { path, reason };
            spectrum.check(&svd.modules).map_err(refuse)?;
            (spectrum, Source::Report)
        }
        None => (from_tensors(dir, &svd, observer)?, Source::Tensors),
    };
    let mut routes = BTreeMap::new();
    for module in &spectrum.modules {
        *routes.entry(route_name(module.route)).or_insert(0) += 1;
    }
    Ok(Facts {
        linear_layers: svd.modules.len(),
        sigma: svd.modules.values().map(|r| r.q as u64).sum(),
        base: svd.base,
        layout: svd.layout,
        rank: svd.rank,
        routes,
        source,
        spectrum,
    })
}

/// Of a decomposition that was made before reports held the spectrum.
fn from_tensors(dir: &Path, svd: &SvdSection, observer: &dyn Observer) -> Result<Spectrum> {
    let shards = Checkpoint::open(dir, Layout::Decomposition);
    if let Err(Error::NotAModel { .. } | Error::OtherFormat { .. } | Error::ShardMissing { .. }) =
        shards
    {
        return Err(Error::NoSpectrum { path: dir.into() });
    }
    let artifact = Artifact::open(dir, None)?;
    observer.note(format!(
        "{} holds no spectrum, an earlier svdhub wrote it: reading the singular values from the tensors",
        dir.join(report::FILE).display()
    ));
    Spectrum::of(&svd.modules, |module| {
        let tensor = ModuleTensors::of(module).sigma;
        Ok(artifact.checkpoint.read_finite(&tensor)?.to_f32())
    })
}

/// A route as the files name it.
pub fn route_name(route: Route) -> String {
    let name = serde_json::to_value(route).expect("a route serialises");
    name.as_str().unwrap_or_default().into()
}
