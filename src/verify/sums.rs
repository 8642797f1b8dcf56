//! What a directory says of its own bytes, and what they are.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::Facts;
use crate::card::{self, State};
use crate::error::{IoContext, Result};
use crate::event::{Observer, Stage, Unit};
use crate::sum::{sha256_file, sha256_hex};
use crate::weights::Checkpoint;
use crate::{json, report};

/// What `report.json` states of the files that a verb wrote; nothing where no verb of ours did.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Sums {
    sha256: BTreeMap<String, String>,
    tensor_sha256: BTreeMap<String, String>,
    side_sha256: BTreeMap<String, String>,
}

impl Sums {
    pub fn stated(dir: &Path, section: &str) -> Result<Self> {
        match report::read(dir)?.remove(section) {
            Some(facts) => json::interpret(&dir.join(report::FILE), facts),
            None => Ok(Self::default()),
        }
    }

    /// Reads everything: tensors, whole files, the small ones beside them, and the report itself.
    pub fn compare(
        &self,
        dir: &Path,
        checkpoint: &Checkpoint,
        observer: &dyn Observer,
        facts: &mut Facts,
    ) -> Result<()> {
        let inventory = &checkpoint.inventory;
        observer.start(Stage::Verify, facts.bytes, Unit::Bytes);
        for (file, entry) in inventory.entries() {
            let elements = checkpoint.read(&entry.name)?;
            if let Some(expected) = self.tensor_sha256.get(&entry.name) {
                let found = sha256_hex(&elements.bytes);
                compare_sum(&file.name, Some(&entry.name), expected, &found, facts);
            }
            observer.advance(Stage::Verify, entry.bytes, &entry.name);
            if let Some((index, value)) = elements.first_not_finite() {
                let found = format!("{value} at {index:?}");
                facts.problem(&file.name, Some(&entry.name), "finite numbers", found);
            }
        }
        observer.finish(Stage::Verify);
        facts.checks.push("every number is finite".into());
        check_seal(dir, report::FILE, !self.tensor_sha256.is_empty(), facts)?;
        for (file, expected) in self.sha256.iter().chain(&self.side_sha256) {
            compare_file(dir, file, expected, facts)?;
        }
        let mut stated = Vec::new();
        for file in &inventory.files {
            stated.extend(checkpoint.stated_sha256(file).map(|sum| (&file.name, sum)));
        }
        for (file, expected) in &stated {
            compare_file(dir, file, expected, facts)?;
        }
        if !stated.is_empty() {
            let check = "sha256 of every weight file, as the Hub stated it".into();
            facts.checks.push(check);
        }
        if !self.sha256.is_empty() {
            let check = "sha256 of every file and tensor that was written".into();
            facts.checks.push(check);
        }
        Ok(())
    }
}

/// Holds a file against its sum.
pub fn compare_file(dir: &Path, file: &str, expected: &str, facts: &mut Facts) -> Result<()> {
    let path = dir.join(file);
    if path.exists() {
        let found = sha256_file(&path, |_| {})?;
        compare_sum(file, None, expected, &found, facts);
    } else {
        facts.problem(file, None, "the file", "nothing");
    }
    Ok(())
}

/// Holds a card of ours against the sum in it.
pub fn check_card(dir: &Path, facts: &mut Facts) -> Result<()> {
    let path = dir.join("README.md");
    if !path.exists() {
        return Ok(());
    }
    let text = std::fs::read(&path).context("read", &path)?;
    match card::state(&String::from_utf8_lossy(&text)) {
        State::Rendered => facts.checks.push("the card is as it was rendered".into()),
        State::Foreign => facts
            .checks
            .push("not checked: the card, it is not ours".into()),
        State::Changed => {
            let mark = card::MARK.trim_end();
            facts.problem(
                "README.md",
                None,
                "the card as it was rendered",
                format!("another; if the changes are yours, remove its line `{mark}…`"),
            );
        }
    }
    Ok(())
}

/// A file that carries a sum of itself; before some version ours did not.
pub fn check_seal(dir: &Path, file: &str, sealed: bool, facts: &mut Facts) -> Result<()> {
    let path = dir.join(file);
    if !path.exists() {
        return Ok(());
    }
    match json::seal_of(&path)? {
        Some((stated, found)) => compare_sum(file, None, &stated, &found, facts),
        None if sealed => facts.problem(file, None, "a sum of itself", "none"),
        None => {}
    }
    Ok(())
}

pub fn compare_sums(
    expected: &BTreeMap<String, String>,
    found: &BTreeMap<String, String>,
    facts: &mut Facts,
) {
    for (file, sum) in expected {
        match found.get(file) {
            Some(other) => compare_sum(file, None, sum, other, facts),
            None => facts.problem(file, None, "the file", "nothing"),
        }
    }
}

pub fn compare_sum(
    file: &str,
    tensor: Option<&str>,
    expected: &str,
    found: &str,
    facts: &mut Facts,
) {
    if found != expected {
        facts.problem(
            file,
            tensor,
            format!("sha256 {expected}"),
            format!("sha256 {found}"),
        );
    }
}
