//! Data on the Hub: which files of a dataset are meant, and how they come here.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::cache::Cache;
use super::client::Hub;
use crate::error::{Error, Result};
use crate::event::Observer;
use crate::format::is_repo_id;
use crate::plan::glob;
use crate::text::{Data, Dataset, ENDINGS};

/// How data are named: a file, or files of a dataset on the Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataRef {
    File(PathBuf),
    Dataset {
        /// `org/name`
        id: String,
        revision: String,
        /// A path in the repository, which may hold `*`; without one, what a training set is called.
        path: Option<String>,
    },
}

/// As fsspec, pandas and datasets write it.
const SCHEME: &str = "hf://datasets/";
/// What stands before the id where models have nothing.
const PREFIX: &str = "datasets/";

impl FromStr for DataRef {
    type Err = Error;

    /// A file that exists wins; `org/name` or `org/name@revision` is a dataset, and so is what begins with
    /// `hf://datasets/`, which may go on with a path; anything else must be a file.
    fn from_str(text: &str) -> Result<Self> {
        let path = Path::new(text);
        let Some(named) = text.strip_prefix(SCHEME) else {
            let is_data = extension(text).is_some_and(|it| ENDINGS.contains(&it.as_str()));
            let is_path = path.exists() || text.starts_with(['.', '/', '~']) || is_data;
            return match repository(text).filter(|_| !is_path) {
                Some((id, revision)) => Ok(Self::Dataset {
                    id,
                    revision,
                    path: None,
                }),
                None => Ok(Self::File(path.into())),
            };
        };
        // a revision holds no slash here, but for those of pull requests and of converted copies
        let mut parts = named.splitn(3, '/');
        let repo = [parts.next(), parts.next()].map(Option::unwrap_or_default);
        let (mut repo, mut path) = (repo.join("/"), parts.next().unwrap_or_default());
        if repo.ends_with("@refs")
            && let Some((of, rest)) = path.split_once('/')
        {
            let (number, rest) = rest.split_once('/').unwrap_or((rest, ""));
            repo = format!("{repo}/{of}/{number}");
            path = rest;
        }
        let (id, revision) = repository(&repo).ok_or_else(|| Error::Parse {
            what: "a dataset",
            value: text.into(),
            reason:
                "it is not of the form hf://datasets/org/name, with @revision or /path behind it"
                    .into(),
        })?;
        Ok(Self::Dataset {
            id,
            revision,
            path: (!path.is_empty()).then(|| path.into()),
        })
    }
}

impl fmt::Display for DataRef {
    fn fmt(&self, out: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::File(path) => write!(out, "{}", path.display()),
            Self::Dataset { id, revision, path } => {
                write!(out, "{SCHEME}{id}")?;
                if revision != "main" {
                    write!(out, "@{revision}")?;
                }
                path.iter().try_for_each(|path| write!(out, "/{path}"))
            }
        }
    }
}

fn repository(text: &str) -> Option<(String, String)> {
    let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
    // it becomes a file below the cache's `refs`
    let leads_out = revision
        .split('/')
        .any(|part| matches!(part, "" | "." | ".."));
    (is_repo_id(id) && !leads_out).then(|| (id.into(), revision.into()))
}

fn extension(path: &str) -> Option<String> {
    let extension = Path::new(path).extension()?.to_str()?;
    Some(extension.to_ascii_lowercase())
}

impl Hub {
    /// Brings the files of a dataset, or those that the cache has where the Hub cannot be reached.
    ///
    /// # Errors
    /// A dataset without such files, or with files of several kinds, of which one has to be named.
    pub fn data(
        &self,
        id: &str,
        revision: &str,
        path: Option<&str>,
        observer: &dyn Observer,
    ) -> Result<Data> {
        let repo = format!("{PREFIX}{id}");
        let listed = match self.paths(&repo, revision) {
            Err(error @ (Error::Offline { .. } | Error::HubUnreachable { .. })) => {
                let cache = Cache::of(&self.options.cache, &repo);
                cache.paths(revision).ok_or(error)?
            }
            listed => listed?,
        };
        let files = chosen(&repo, listed, path)?;
        let names: Vec<&str> = files.iter().map(String::as_str).collect();
        let snapshot = self.snapshot_of(&repo, revision, &names, observer)?;
        Ok(Data {
            name: match (path, &files[..]) {
                (_, [one]) => format!("{id}/{one}"),
                (Some(pattern), _) => format!("{id}/{pattern}"),
                (None, files) => {
                    let first = files.first().map(|file| kind(file).0);
                    format!("{id}/{}", first.unwrap_or_default())
                }
            },
            files: files.iter().map(|file| snapshot.dir.join(file)).collect(),
            dataset: Some(Dataset {
                repo: id.into(),
                revision: snapshot.commit.unwrap_or_default(),
            }),
        })
    }

    fn paths(&self, repo: &str, revision: &str) -> Result<Vec<String>> {
        let commit = self.commit_of(repo, revision)?;
        let files = self.files(repo, &commit)?;
        Ok(files.into_iter().map(|file| file.path).collect())
    }
}

/// Of a dataset's files, those at `path`, or those of its training set: as for Hugging Face's datasets, what says `train` in
/// its name, or all where no name says what it is for.
fn chosen(repo: &str, listed: Vec<String>, path: Option<&str>) -> Result<Vec<String>> {
    let readable = |path: &str| {
        let hidden = path.split('/').any(|part| part.starts_with('.'));
        let name = path.rsplit('/').next().unwrap_or(path);
        let about = [
            "dataset_infos.json",
            "dataset_info.json",
            "dataset_dict.json",
            "state.json",
        ];
        let is_data = extension(path).is_some_and(|it| ENDINGS.contains(&it.as_str()));
        is_data && !hidden && !about.contains(&name) && !is_requirements(name)
    };
    let mut files: Vec<String> = listed;
    files.sort();
    match path {
        Some(path) => {
            let found: Vec<String> = files
                .iter()
                .filter(|file| glob(path, file))
                .cloned()
                .collect();
            if found.is_empty() {
                files.retain(|file| readable(file));
                return Err(Error::NoSuchData {
                    repo: repo.into(),
                    path: path.into(),
                    files,
                });
            }
            files = found;
        }
        None => {
            files.retain(|file| readable(file));
            let says = |file: &str, words: &[&str]| {
                let mut parts = file.split(|c: char| !c.is_ascii_alphabetic());
                parts.any(|part| words.contains(&part))
            };
            if files.iter().any(|file| says(file, &TRAIN)) {
                files.retain(|file| says(file, &TRAIN));
            } else {
                files.retain(|file| !says(file, &OTHERS));
            }
            let mut kinds: Vec<_> = files.iter().map(|file| kind(file)).collect();
            kinds.dedup();
            if kinds.len() != 1 {
                return Err(Error::WhichData {
                    repo: repo.into(),
                    files,
                });
            }
        }
    }
    Ok(files)
}

const TRAIN: [&str; 2] = ["train", "training"];
const OTHERS: [&str; 8] = [
    "test",
    "testing",
    "eval",
    "evaluation",
    "validation",
    "valid",
    "val",
    "dev",
];

fn is_requirements(name: &str) -> bool {
    [
        "requirements.txt",
        "license.txt",
        "licence.txt",
        "readme.txt",
    ]
    .iter()
    .any(|it| name.eq_ignore_ascii_case(it))
}

/// What the shards of one table share: the name with its number left out, and the ending.
fn kind(path: &str) -> (String, Option<String>) {
    let ending = extension(path);
    let stem = match &ending {
        Some(ending) => &path[..path.len() - ending.len() - 1],
        None => path,
    };
    let unnumbered = |stem: &str| {
        let (rest, of) = stem.rsplit_once("-of-")?;
        let (rest, number) = rest.rsplit_once('-')?;
        let all_digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        (all_digits(of) && all_digits(number)).then(|| rest.to_string())
    };
    (unnumbered(stem).unwrap_or_else(|| stem.into()), ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(id: &str, revision: &str, path: Option<&str>) -> DataRef {
        DataRef::Dataset {
            id: id.into(),
            revision: revision.into(),
            path: path.map(Into::into),
        }
    }

    #[test]
    fn data_are_named_by_file_or_dataset() {
        for (text, expected) in [
            ("org/name", dataset("org/name", "main", None)),
            ("org/name@v1", dataset("org/name", "v1", None)),
            ("hf://datasets/org/name", dataset("org/name", "main", None)),
            (
                "hf://datasets/org/name@v1/data/a.jsonl",
                dataset("org/name", "v1", Some("data/a.jsonl")),
            ),
            (
                "hf://datasets/org/name@refs/convert/parquet/default/train/0000.parquet",
                dataset(
                    "org/name",
                    "refs/convert/parquet",
                    Some("default/train/0000.parquet"),
                ),
            ),
        ] {
            assert_eq!(text.parse::<DataRef>().expect("is one"), expected, "{text}");
        }
        for text in [
            "hf://datasets/org/name@v1/a/*.json",
            "hf://datasets/org/name",
        ] {
            assert_eq!(text.parse::<DataRef>().expect("is one").to_string(), text);
        }
        for path in [
            "data/train.jsonl",
            "train.txt",
            "./org/name",
            "/x",
            "a/b/c",
            "src/lib.rs",
            "org/name@../x",
        ] {
            let found = path.parse::<DataRef>().expect("a path");
            assert_eq!(found, DataRef::File(path.into()), "{path}");
        }
        for bad in [
            "hf://datasets/org",
            "hf://datasets/",
            "hf://datasets/org/..",
            "hf://datasets/org/name@/x",
        ] {
            assert!(bad.parse::<DataRef>().is_err(), "{bad}");
        }
    }

    fn found(listed: &[&str], path: Option<&str>) -> Result<Vec<String>> {
        let listed = listed.iter().map(ToString::to_string).collect();
        chosen("datasets/org/name", listed, path)
    }

    #[test]
    fn the_training_set_is_found_by_its_name() {
        let beside = [
            "README.md",
            ".gitattributes",
            "dataset_infos.json",
            "requirements.txt",
        ];
        for (files, expected) in [
            (&["chats.jsonl"][..], &["chats.jsonl"][..]),
            (
                &[
                    "data/train-00001-of-00002.parquet",
                    "data/test-00000-of-00001.parquet",
                    "data/train-00000-of-00002.parquet",
                ],
                &[
                    "data/train-00000-of-00002.parquet",
                    "data/train-00001-of-00002.parquet",
                ],
            ),
            (&["name_train.json", "name_dev.json"], &["name_train.json"]),
            (&["all.json", "validation.json"], &["all.json"]),
            (&["restrained.txt"], &["restrained.txt"]),
        ] {
            let listed = [&beside, files].concat();
            assert_eq!(
                found(&listed, None).expect("is found"),
                expected,
                "{files:?}"
            );
        }
        for unclear in [
            &["a/train.json", "b/train.json"][..],
            &["train.json", "train.parquet"],
            &["test.json"],
            &[],
        ] {
            let error = found(unclear, None).expect_err("is not clear");
            assert!(matches!(error, Error::WhichData { .. }), "{error}");
        }
    }

    #[test]
    fn files_are_found_by_path_and_pattern() {
        let listed = ["data/a-1.parquet", "data/a-2.parquet", "data/b.parquet"];
        assert_eq!(found(&listed, Some("data/a-*")).expect("some"), listed[..2]);
        assert_eq!(
            found(&listed, Some("data/b.parquet")).expect("one"),
            listed[2..]
        );
        let error = found(&listed, Some("data/c"))
            .expect_err("none")
            .to_string();
        assert!(
            error.contains("data/c") && error.contains("data/b.parquet"),
            "{error}"
        );
    }
}
