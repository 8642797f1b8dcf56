//! What an export for another program must be.

use std::collections::BTreeMap;
use std::path::Path;

use super::Facts;
use super::sums::Sums;
use crate::error::Result;
use crate::event::Observer;
use crate::kind::Kind;
use crate::kind::SVD_TRAINING_WEIGHTS;
use crate::peft::LORA_WEIGHTS;
use crate::report;
use crate::weights::{Checkpoint, Inventory};

pub fn export(kind: Kind, dir: &Path, observer: &dyn Observer, facts: &mut Facts) -> Result<()> {
    let file = match kind {
        Kind::Lora => LORA_WEIGHTS,
        _ => SVD_TRAINING_WEIGHTS,
    };
    let checkpoint = Checkpoint::single(dir, file)?;
    facts.count(&checkpoint.inventory);
    facts.checks.push("the header agrees with the file".into());
    if kind == Kind::Lora {
        pairs(file, &checkpoint.inventory, facts);
    }
    // a LoRA that was trained as one was never exported
    let exported = report::read(dir)?.contains_key("export");
    let section = if exported { "export" } else { "train" };
    Sums::stated(dir, section)?.compare(dir, &checkpoint, observer, facts)
}

/// B (m, r) and A (r, n) of one module have one r.
fn pairs(file: &str, inventory: &Inventory, facts: &mut Facts) {
    let mut ranks: BTreeMap<&str, [Option<usize>; 2]> = BTreeMap::new();
    for (_, entry) in inventory.entries() {
        for (at, side) in [".lora_A.weight", ".lora_B.weight"].iter().enumerate() {
            if let Some(module) = entry.name.strip_suffix(side) {
                ranks.entry(module).or_default()[at] = entry.shape.get(at).copied();
            }
        }
    }
    for (module, [a, b]) in ranks {
        if a.is_none() || a != b {
            let say = |rank: Option<usize>| rank.map_or("none".into(), |r| r.to_string());
            facts.problem(
                file,
                Some(module),
                "lora_A and lora_B of one rank",
                format!("{} and {}", say(a), say(b)),
            );
        }
    }
    facts.checks.push("every lora_A has its lora_B".into());
}
