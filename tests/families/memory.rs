//! Models that lie in no file.

use std::collections::BTreeMap;

use svdhub::error::{Error, Result};
use svdhub::model::Tensors;
use svdhub::split::{Change, Factors};
use svdhub::weights::Elements;

/// A model in memory, with the spectra that `factors` knows of its linear weights.
pub struct Memory {
    pub tensors: BTreeMap<String, Elements>,
    /// What a linear weight is decomposed into, and Δσ, by module and weight.
    #[allow(clippy::type_complexity)]
    pub factors: Option<Box<dyn Fn(&str, &Elements) -> (Factors, Vec<f32>) + Sync>>,
}

impl Tensors for Memory {
    fn tensor(&self, name: &str) -> Result<Elements> {
        let missing = || Error::TensorMissing {
            tensor: name.into(),
            path: "memory".into(),
        };
        self.tensors.get(name).cloned().ok_or_else(missing)
    }

    fn spectrum(&self, module: &str) -> Result<Option<(Factors, Change)>> {
        let Some(factors) = &self.factors else {
            return Ok(None);
        };
        let stored = self.tensor(&format!("{module}.weight"))?;
        let (factors, delta) = factors(module, &stored);
        Ok(Some((factors, Change::of_sigma(delta))))
    }

    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn path_of(&self, _: &str) -> std::path::PathBuf {
        "memory".into()
    }
}
