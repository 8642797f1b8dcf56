//! `publish`: renders the card, pushes a directory to the Hub, and makes sure that it arrived.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::adapter::{self, Adapter};
use crate::error::{Error, IoContext, Result};
use crate::event::Observer;
use crate::format::{Sums, is_repo_id};
use crate::hub::{Claims, Hub, PushOptions, Pushed, published_files};
use crate::kind::Kind;
use crate::weights::Layout;
use crate::weights::checkpoint::Index;
use crate::weights::place::refuse_links_outside;
use crate::weights::shard::write_atomically;
use crate::workspace::refuse_unfinished;
use crate::{card, json, report};

/// Writes the card of `dir`, unless somebody wrote one of their own there or changed ours.
pub fn write_card(dir: &Path, repo: &str, observer: &dyn Observer) -> Result<()> {
    if Kind::of(dir) != Kind::Model {
        // before anything of it is read: what is published is the directory, not what links name
        refuse_links_outside(dir)?;
    }
    let path = dir.join("README.md");
    if path.exists() {
        let text = std::fs::read_to_string(&path).context("read", &path)?;
        match card::state(&text) {
            card::State::Rendered => {}
            card::State::Foreign => {
                observer.note(format!("{} is not ours and stays as it is", path.display()));
                return Ok(());
            }
            card::State::Changed => {
                observer.warn(format!(
                    "{} was changed since it was rendered and stays as it is: remove its line `{}…` to say that it is yours, \
                     or the file to have it rendered anew",
                    path.display(),
                    card::MARK.trim_end()
                ));
                return Ok(());
            }
        }
    }
    let report = report::read(dir)?;
    let Some(origin) = card::origin(&report) else {
        observer.note(format!(
            "{} has no report that names its base: no card is written",
            dir.display()
        ));
        return Ok(());
    };
    if origin["base_card"]["license"].is_null() {
        observer.warn("the base's card names no licence: the card will name none either".into());
    }
    let card = card::render(Kind::of(dir), repo, &report)?;
    write_atomically(&path, card.as_bytes()).map(drop)
}

/// Refuses what is not the name of a repository.
pub fn refuse_no_repo(repo: &str) -> Result<()> {
    if is_repo_id(repo) {
        return Ok(());
    }
    Err(Error::Parse {
        what: "a repository",
        value: repo.into(),
        reason: "it is not of the form org/name".into(),
    })
}

/// Publishes `dir` as `repo`.
pub fn run(
    hub: &Hub,
    dir: &Path,
    repo: &str,
    options: &PushOptions,
    observer: &dyn Observer,
) -> Result<Pushed> {
    refuse_unfinished(dir)?;
    refuse_no_repo(repo)?;
    write_card(dir, repo, observer)?;
    let claims = Claims {
        sha256: stated(dir)?,
        needed: needed(dir)?,
        is_weights: weights_like(dir)?,
    };
    hub.push(dir, repo, &claims, options, observer)
}

/// What a model's index names, and the index itself where there are shards.
fn needed(dir: &Path) -> Result<BTreeSet<String>> {
    let index = Layout::Model.index_file();
    let path = dir.join(&index);
    let mut needed = BTreeSet::new();
    // a model in one file is read as that, whatever else lies there
    if Kind::of(dir) != Kind::Model || dir.join(Layout::Model.single_file()).exists() {
        return Ok(needed);
    }
    if path.exists() {
        let bytes = std::fs::read(&path).context("read", &path)?;
        needed.extend(Index::parse(&path, &bytes)?.files());
    } else if published_files(dir)?.iter().any(|name| is_shard(name)) {
        needed.insert(index);
    }
    Ok(needed)
}

fn is_shard(name: &str) -> bool {
    name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors")
}

/// What a loader would take for weights beside those of `dir`: a model in one file hides its successor in shards, and one
/// beside a decomposition is loaded where transformers should stop.
fn weights_like(dir: &Path) -> Result<fn(&str) -> bool> {
    Ok(match Kind::of(dir) {
        Kind::Model => are_weights,
        Kind::Decomposition => {
            let config: Value = json::read(&dir.join("config.json"))?;
            // a sidecar may stand beside its base
            match config["svd"]["layout"] == "sidecar" {
                true => |name| name.starts_with("svd") && are_weights(name),
                false => are_weights,
            }
        }
        // each has names of its own, and one file
        Kind::Adapter | Kind::Lora | Kind::StateDict => |_| false,
    })
}

/// Whether a loader takes a file of that name for weights of a model, or of a decomposition.
pub fn are_weights(name: &str) -> bool {
    const BEGIN: [&str; 3] = ["model", "svd", "pytorch_model"];
    const END: [&str; 4] = [
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".bin.index.json",
    ];
    !name.contains('/')
        && BEGIN.iter().any(|begin| name.starts_with(begin))
        && END.iter().any(|end| name.ends_with(end))
}

/// The sha256 of each file of weights, as the directory says itself: what was damaged since is not published.
fn stated(dir: &Path) -> Result<BTreeMap<String, String>> {
    let of_sections = |sections: &[&str]| -> Result<BTreeMap<String, String>> {
        let mut report = report::read(dir)?;
        let sums = sections.iter().find_map(|section| {
            let sums = report.remove(*section)?.get_mut("sha256")?.take();
            serde_json::from_value(sums).ok()
        });
        Ok(sums.unwrap_or_default())
    };
    match Kind::of(dir) {
        Kind::Decomposition => {
            let path = dir.join(Layout::Decomposition.index_file());
            let mut index: Value = json::read(&path)?;
            let sums: Sums = json::interpret(&path, index["metadata"]["sha256"].take())?;
            Ok(sums.files)
        }
        Kind::Adapter => {
            let stated = Adapter::read(dir)?.config.weights_sha256;
            let sums = stated.map(|sum| (adapter::WEIGHTS_FILE.into(), sum));
            Ok(sums.into_iter().collect())
        }
        Kind::Model => {
            let config = dir.join("config.json");
            if json::read::<Value>(&config).is_ok_and(|config| !config["svd"].is_null()) {
                return Err(Error::Lost {
                    path: dir.join(Layout::Decomposition.index_file()),
                });
            }
            of_sections(&["merge"])
        }
        Kind::Lora | Kind::StateDict => of_sections(&["export", "train"]),
    }
}
