//! What the singular values of a decomposition tell: σ and norms in, facts out; pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::format::ModuleRecord;
use crate::linalg::{Certificate, Route};
use crate::plan::place;

/// The section of `report.json` that holds a [`Spectrum`].
pub const SECTION: &str = "spectrum";

/// The most points that are kept of a curve. All of σ is in the tensors.
pub const POINTS_MAX: usize = 33;

/// Parts of a layer in the order the data takes through them; parts of other names come after these.
const ORDER: [&str; 10] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "lm_head",
];

/// The facts of a whole decomposition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spectrum {
    /// Σσ² of all kept triplets over Σ‖M‖²
    pub captured_energy: f64,
    /// Over the layers: the modules that have the same part in each.
    pub roles: Vec<RoleFacts>,
    /// By layer, then by role; what is in no layer comes last.
    pub modules: Vec<ModuleFacts>,
}

/// The facts of one decomposed weight M (m, n).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModuleFacts {
    pub name: String,
    pub role: String,
    pub layer: Option<u32>,
    pub q: usize,
    /// (m, n) = (out, in)
    pub shape: [usize; 2],
    /// Σσ² of the kept triplets over ‖M‖²
    pub captured_energy: f64,
    /// ‖M‖, Frobenius
    pub norm: f64,
    /// ‖M‖²/σ₁²; none of a zero matrix
    pub stable_rank: Option<f64>,
    /// κ = σ₁/σ_q; none where σ_q is zero
    pub condition: Option<f64>,
    /// Some of 1 … q, both ends among them.
    pub ranks: Vec<usize>,
    /// σ at `ranks`; f32 as in the tensors, widened so that every JSON of it has the same digits.
    pub sigma: Vec<f64>,
    pub route: Route,
    pub certificate: Certificate,
}

/// The facts of all modules of one role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoleFacts {
    pub role: String,
    pub modules: usize,
    pub captured_energy: Spread,
    pub stable_rank: Option<Spread>,
    pub condition: Option<Spread>,
    pub curve: Curve,
}

/// Where a number lies over some modules.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

/// σ_k/σ₁ over the modules of a role, zero matrices aside: four lists of one length.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// k/q
    pub share: Vec<f64>,
    pub min: Vec<f64>,
    pub median: Vec<f64>,
    pub max: Vec<f64>,
}

impl Spectrum {
    /// Gathers the facts of all modules; `sigma` reads the kept singular values of one.
    pub fn of(
        records: &BTreeMap<String, ModuleRecord>,
        mut sigma: impl FnMut(&str) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let (mut kept, mut all) = (0.0, 0.0);
        let mut modules = Vec::new();
        for (name, record) in records {
            let sigma = sigma(name)?;
            let energy = squares(&sigma);
            kept += energy;
            all += energy + record.residual_norm.powi(2);
            modules.push(ModuleFacts::new(name, record, &sigma));
        }
        modules.sort_by(|a, b| order(a).cmp(&order(b)));
        Ok(Self {
            captured_energy: if all > 0.0 { kept / all } else { 1.0 },
            roles: roles(&modules),
            modules,
        })
    }

    /// What a stranger's report says must at least be of these modules, and well-formed.
    pub fn check(&self, records: &BTreeMap<String, ModuleRecord>) -> Result<(), String> {
        if self.modules.len() != records.len() {
            return Err(format!(
                "has {} modules, config.json has {}",
                self.modules.len(),
                records.len()
            ));
        }
        for module in &self.modules {
            let name = &module.name;
            match records.get(name) {
                None => return Err(format!("names the module `{name}`, config.json does not")),
                Some(record) if (record.q, record.shape) != (module.q, module.shape) => {
                    return Err(format!("gives `{name}` another shape than config.json"));
                }
                Some(_) => {}
            }
            let ends = (module.ranks.first(), module.ranks.last());
            let ranks = ends == (Some(&1), Some(&module.q))
                && module.ranks.is_sorted_by(|a, b| a < b)
                && module.ranks.len() == module.sigma.len();
            let sigma = module.sigma.is_sorted_by(|a, b| a >= b)
                && module.sigma.iter().all(|s| s.is_finite() && *s >= 0.0);
            if !ranks || !sigma {
                return Err(format!("gives `{name}` a curve that is none"));
            }
        }
        let even = |c: &Curve| [&c.min, &c.median, &c.max].map(Vec::len) == [c.share.len(); 3];
        match self.roles.iter().find(|role| !even(&role.curve)) {
            Some(role) => Err(format!("gives `{}` a curve that is none", role.role)),
            None => Ok(()),
        }
    }

    /// The modules whose certificates are the largest, the largest first.
    pub fn worst(&self, count: usize) -> Vec<&ModuleFacts> {
        let mut modules: Vec<&ModuleFacts> = self.modules.iter().collect();
        let error = |m: &ModuleFacts| m.certificate.residual.max(m.certificate.orthogonality);
        modules.sort_by(|a, b| error(b).total_cmp(&error(a)));
        modules.truncate(count);
        modules
    }
}

impl ModuleFacts {
    /// `sigma` (q,) is all that was kept.
    fn new(name: &str, record: &ModuleRecord, sigma: &[f32]) -> Self {
        let (layer, role) = place(name);
        let (first, last) = match sigma {
            [first, .., last] => (f64::from(*first), f64::from(*last)),
            [only] => (f64::from(*only), f64::from(*only)),
            [] => (0.0, 0.0),
        };
        // not from the captured share: that says nothing of ‖M‖ where it is 1
        let norm2 = squares(sigma) + record.residual_norm.powi(2);
        let ranks = thinned(sigma.len());
        Self {
            name: name.into(),
            role: role.into(),
            layer,
            q: record.q,
            shape: record.shape,
            captured_energy: record.captured_energy,
            norm: norm2.sqrt(),
            stable_rank: (first > 0.0).then(|| norm2 / first.powi(2)),
            condition: (last > 0.0).then(|| first / last),
            sigma: ranks.iter().map(|k| sigma[k - 1].into()).collect(),
            ranks,
            route: record.route,
            certificate: record.certificate,
        }
    }

    /// σ_k/σ₁ at k = `share`·q, on straight lines between the kept points; none of a zero matrix.
    fn relative(&self, share: f64) -> Option<f64> {
        let first = self.sigma.first().copied()?;
        if first <= 0.0 {
            return None;
        }
        let k = share * self.q as f64;
        let after = self.ranks.partition_point(|&rank| (rank as f64) < k);
        let point = |i: usize| Some((*self.ranks.get(i)? as f64, *self.sigma.get(i)?));
        let sigma = match (after.checked_sub(1).and_then(point), point(after)) {
            (Some((k0, s0)), Some((k1, s1))) => s0 + (s1 - s0) * (k - k0) / (k1 - k0),
            (None, Some((_, s))) | (Some((_, s)), None) => s,
            (None, None) => return None,
        };
        Some(sigma / first)
    }
}

impl Spread {
    fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let half = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[half]
        } else {
            f64::midpoint(values[half - 1], values[half])
        };
        Some(Self { min, median, max })
    }
}

/// Σσ² in f64.
fn squares(sigma: &[f32]) -> f64 {
    sigma.iter().map(|&s| f64::from(s).powi(2)).sum()
}

fn order(module: &ModuleFacts) -> (u32, usize, &str, &str) {
    let role = ORDER.iter().position(|&known| known == module.role);
    (
        module.layer.unwrap_or(u32::MAX),
        role.unwrap_or(ORDER.len()),
        &module.role,
        &module.name,
    )
}

/// At most [`POINTS_MAX`] of the ranks 1 … q: half of them denser towards 1, where outliers are, half evenly spaced, for
/// the body and the fall at its end.
fn thinned(q: usize) -> Vec<usize> {
    if q <= POINTS_MAX {
        return (1..=q).collect();
    }
    let steps = POINTS_MAX / 2;
    let share = |i: usize, of: usize| i as f64 / of as f64;
    let dense = (0..=steps).map(|i| (q as f64).powf(share(i, steps)));
    let even = (1..=steps).map(|i| 1.0 + (q - 1) as f64 * share(i, steps + 1));
    let mut ranks: Vec<usize> = dense.chain(even).map(|k| k.round() as usize).collect();
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

/// In the order in which roles first appear, which is that of a layer.
fn roles(modules: &[ModuleFacts]) -> Vec<RoleFacts> {
    let mut groups: Vec<(&str, Vec<&ModuleFacts>)> = Vec::new();
    let mut places: BTreeMap<&str, usize> = BTreeMap::new();
    for module in modules {
        let at = *places.entry(&module.role).or_insert_with(|| {
            groups.push((&module.role, Vec::new()));
            groups.len() - 1
        });
        groups[at].1.push(module);
    }
    let facts = |(role, members): &(&str, Vec<&ModuleFacts>)| RoleFacts {
        role: (*role).into(),
        modules: members.len(),
        captured_energy: Spread::of(members.iter().map(|m| m.captured_energy))
            .expect("a role is there because a module has it"),
        stable_rank: Spread::of(members.iter().filter_map(|m| m.stable_rank)),
        condition: Spread::of(members.iter().filter_map(|m| m.condition)),
        curve: curve(members),
    };
    groups.iter().map(facts).collect()
}

/// At the points of the module that has most; the others are read off between theirs.
fn curve(members: &[&ModuleFacts]) -> Curve {
    let mut curve = Curve::default();
    let Some(grid) = members.iter().max_by_key(|m| m.q) else {
        return curve;
    };
    for &rank in &grid.ranks {
        let share = rank as f64 / grid.q as f64;
        if let Some(spread) = Spread::of(members.iter().filter_map(|m| m.relative(share))) {
            curve.share.push(share);
            curve.min.push(spread.min);
            curve.median.push(spread.median);
            curve.max.push(spread.max);
        }
    }
    curve
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The record of a matrix of which `sigma` is kept and `left` (σ too) is not.
    fn record(sigma: &[f32], left: &[f32]) -> ModuleRecord {
        let (kept, rest) = (squares(sigma), squares(left));
        ModuleRecord {
            q: sigma.len(),
            shape: [sigma.len() + left.len(), 5000],
            dtype: "F32".into(),
            bias: false,
            tied_to: None,
            captured_energy: if kept + rest > 0.0 {
                kept / (kept + rest)
            } else {
                1.0
            },
            residual_norm: rest.sqrt(),
            sigma_max: sigma[0],
            sigma_min: sigma[sigma.len() - 1],
            route: Route::GramF32,
            certificate: Certificate {
                link: None,
                tail: None,
                residual: 1e-6 * f64::from(sigma[0]),
                orthogonality: 1e-7,
            },
            exceptions: 0,
            sha256: String::new(),
        }
    }

    /// Of matrices by name, with what is kept and what is left of σ.
    pub fn spectrum(modules: &[(&str, &[f32], &[f32])]) -> Spectrum {
        let records = modules
            .iter()
            .map(|(name, sigma, left)| (name.to_string(), record(sigma, left)))
            .collect();
        let sigma = |name: &str| {
            let (_, sigma, _) = modules.iter().find(|m| m.0 == name).expect("its module");
            Ok(sigma.to_vec())
        };
        let spectrum = Spectrum::of(&records, sigma).expect("reads");
        spectrum.check(&records).expect("is well-formed");
        spectrum
    }

    #[test]
    fn the_facts_of_a_known_spectrum_are_its_own() {
        // Σσ² = 16 + 4 + 4 kept, 1 left
        let of = spectrum(&[("model.layers.7.mlp.up_proj", &[4.0, 2.0, 2.0], &[1.0])]);
        let m = &of.modules[0];
        assert_eq!((m.role.as_str(), m.layer, m.q), ("up_proj", Some(7), 3));
        assert!((m.captured_energy - 24.0 / 25.0).abs() < 1e-15);
        assert!((m.norm - 5.0).abs() < 1e-15);
        assert!((m.stable_rank.expect("not zero") - 25.0 / 16.0).abs() < 1e-15);
        assert_eq!(m.condition, Some(2.0));
        assert_eq!(
            (m.ranks.as_slice(), m.sigma.as_slice()),
            (&[1, 2, 3][..], &[4.0, 2.0, 2.0][..])
        );
        assert!((of.captured_energy - 24.0 / 25.0).abs() < 1e-15);
    }

    #[test]
    fn a_module_kept_whole_still_weighs_in_the_total() {
        let of = spectrum(&[("a.q_proj", &[3.0, 1.0], &[]), ("b.q_proj", &[1.0], &[3.0])]);
        assert!((of.captured_energy - 11.0 / 20.0).abs() < 1e-15);
        let whole = &of.modules[0];
        assert_eq!((whole.captured_energy, whole.norm), (1.0, 10f64.sqrt()));
        assert_eq!(whole.stable_rank, Some(10.0 / 9.0));
    }

    #[test]
    fn zeros_have_no_rank_and_no_condition_but_all_their_energy() {
        let of = spectrum(&[
            ("layers.0.q_proj", &[0.0, 0.0], &[0.0]),
            ("layers.1.q_proj", &[2.0, 0.0], &[0.0]),
        ]);
        let (zero, thin) = (&of.modules[0], &of.modules[1]);
        assert_eq!(
            (zero.stable_rank, zero.condition, zero.norm),
            (None, None, 0.0)
        );
        assert_eq!((thin.stable_rank, thin.condition), (Some(1.0), None));
        assert_eq!(of.captured_energy, 1.0);
        assert_eq!(
            of.roles[0].curve.median,
            [1.0, 0.0],
            "the zero matrix has no curve"
        );
        assert_eq!(spectrum(&[("x", &[0.0], &[])]).captured_energy, 1.0);
        let json = serde_json::to_string(&of).expect("serialises");
        let back: Spectrum = serde_json::from_str(&json).expect("parses");
        assert_eq!(back, of, "no number is lost in JSON");
    }

    #[test]
    fn curves_are_thinned_between_their_ends() {
        for q in [1, 2, 33, 34, 100, 307, 3072, 32_064] {
            let ranks = thinned(q);
            assert!(
                ranks.len() <= POINTS_MAX && ranks.is_sorted_by(|a, b| a < b),
                "{q}"
            );
            assert_eq!((ranks[0], ranks[ranks.len() - 1]), (1, q));
        }
        assert_eq!(thinned(33).len(), 33);
        assert_eq!(thinned(3072)[..3], [1, 2, 3], "outliers are seen");
    }

    #[test]
    fn roles_are_gathered_over_layers_in_the_order_of_a_layer() {
        let of = spectrum(&[
            ("lm_head", &[1.0], &[1.0]),
            ("layers.10.down_proj", &[2.0, 1.0], &[1.0]),
            ("layers.10.q_proj", &[4.0, 1.0], &[1.0]),
            ("layers.2.q_proj", &[4.0, 3.0], &[0.0]),
            ("layers.0.q_proj", &[4.0, 2.0], &[2.0]),
        ]);
        let names: Vec<&str> = of.modules.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "layers.0.q_proj",
                "layers.2.q_proj",
                "layers.10.q_proj",
                "layers.10.down_proj",
                "lm_head"
            ]
        );
        let roles: Vec<(&str, usize)> = of
            .roles
            .iter()
            .map(|r| (r.role.as_str(), r.modules))
            .collect();
        assert_eq!(roles, [("q_proj", 3), ("down_proj", 1), ("lm_head", 1)]);
        let q_proj = &of.roles[0];
        assert_eq!(
            q_proj.condition,
            Some(Spread {
                min: 4.0 / 3.0,
                median: 2.0,
                max: 4.0
            })
        );
        assert_eq!(q_proj.curve.share, [0.5, 1.0]);
        assert_eq!(q_proj.curve.median, [1.0, 0.5]);
        assert_eq!((q_proj.curve.min[1], q_proj.curve.max[1]), (0.25, 0.75));
    }

    #[test]
    fn modules_of_different_rank_share_one_curve() {
        let of = spectrum(&[
            ("layers.0.q_proj", &[8.0, 4.0], &[]),
            ("layers.1.q_proj", &[8.0, 6.0, 4.0, 2.0], &[]),
        ]);
        let curve = &of.roles[0].curve;
        assert_eq!(curve.share, [0.25, 0.5, 0.75, 1.0]);
        // of the shorter one: before its first point, at it, halfway, at its last
        assert_eq!(curve.max, [1.0, 1.0, 0.75, 0.5]);
        assert_eq!(curve.min, [1.0, 0.75, 0.5, 0.25]);
    }

    #[test]
    fn a_report_of_something_else_is_refused() {
        let of = spectrum(&[("layers.0.q_proj", &[8.0, 4.0], &[])]);
        let records: BTreeMap<String, ModuleRecord> =
            [("layers.0.q_proj".to_string(), record(&[8.0, 4.0], &[]))].into();
        let other: BTreeMap<String, ModuleRecord> =
            [("layers.0.k_proj".to_string(), record(&[8.0, 4.0], &[]))].into();
        assert!(
            of.check(&other)
                .expect_err("another name")
                .contains("q_proj")
        );
        let mut broken = of.clone();
        broken.modules[0].sigma = vec![f64::INFINITY, 4.0];
        assert!(broken.check(&records).is_err());
        let mut broken = of.clone();
        broken.modules[0].ranks = vec![0, 2];
        assert!(broken.check(&records).is_err());
        let mut broken = of.clone();
        broken.roles[0].curve.median.pop();
        assert!(broken.check(&records).is_err());
    }

    #[test]
    fn the_worst_certificate_comes_first() {
        let of = spectrum(&[("a", &[1.0], &[]), ("b", &[9.0], &[]), ("c", &[4.0], &[])]);
        let worst: Vec<&str> = of.worst(2).iter().map(|m| m.name.as_str()).collect();
        assert_eq!(worst, ["b", "c"]);
    }
}
