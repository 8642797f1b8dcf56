//! What changes a repository: settings, branches and tags, uploads and the commits that name them.

use std::fs;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};

use super::discuss::{Discussion, Status};
use super::reply::{Call, Refusal, Reply, list, refuse, text};
use super::repo::{
    Change, Commit, Draft, EntryKind, Gate, INLINE_BYTES_MAX, Refused, Repo, To, add_ref,
    remove_ref,
};
use super::routes::Visit;

impl Visit<'_> {
    pub fn change_settings(&self) -> Result<Reply, Refusal> {
        let wanted = self.call.json()?;
        let private = wanted["visibility"].as_str().map(|word| word == "private");
        let private = wanted["private"].as_bool().or(private);
        let gated = match &wanted["gated"] {
            Value::Null => self.repo.gated,
            Value::Bool(false) => None,
            word => match Gate::deserialize(word) {
                Ok(gate) => Some(gate),
                Err(_) => return refuse(400, "gated is false, \"auto\" or \"manual\""),
            },
        };
        let repo = self.hub.store.change(&self.id, |repo| {
            repo.private = private.unwrap_or(repo.private);
            repo.gated = gated;
            Ok(())
        })?;
        Ok(Reply::json(
            json!({"private": repo.private, "gated": repo.gated_json()}),
        ))
    }

    pub fn create_branch(&self, name: &str) -> Result<Reply, Refusal> {
        let wanted = self.call.json()?;
        let from = wanted["startingPoint"].as_str().unwrap_or("main");
        let target = self.hub.store.commit_at(&self.id, from)?.id;
        self.change_refs(201, |repo| add_ref(&mut repo.branches, name, target))
    }

    pub fn delete_branch(&self, name: &str) -> Result<Reply, Refusal> {
        if name == "main" {
            return refuse(403, "The main branch cannot be deleted");
        }
        self.change_refs(200, |repo| remove_ref(&mut repo.branches, name))
    }

    pub fn create_tag(&self, revision: &str) -> Result<Reply, Refusal> {
        let wanted = self.call.json()?;
        let name = text(&wanted, "tag")?;
        let target = self.hub.store.commit_at(&self.id, revision)?.id;
        self.change_refs(201, |repo| add_ref(&mut repo.tags, name, target))
    }

    pub fn delete_tag(&self, name: &str) -> Result<Reply, Refusal> {
        self.change_refs(200, |repo| remove_ref(&mut repo.tags, name))
    }

    /// Says for each file which way it must go, and what is there already under its name.
    pub fn preupload(&self, revision: &str) -> Result<Reply, Refusal> {
        let wanted = self.call.json()?;
        let commit = self.hub.store.commit_at(&self.id, revision)?;
        let attributes = match wanted["gitAttributes"].as_str() {
            Some(text) => text.to_owned(),
            None => self.attributes(&commit)?,
        };
        let mut files = Vec::new();
        for file in list(&wanted, "files")? {
            let (path, size) = (text(file, "path")?, file["size"].as_u64().unwrap_or(0));
            let weights = path.ends_with(".safetensors") || path.ends_with(".bin");
            let large = size > INLINE_BYTES_MAX || weights || tracked_by_lfs(&attributes, path);
            // as the public Hub, of an empty file too, which S3 then does not take
            let mode = if large { "lfs" } else { "regular" };
            let mut answer = json!({"path": path, "uploadMode": mode, "shouldIgnore": false});
            if let Some(entry) = commit.tree.get(path) {
                let lfs = entry.kind == EntryKind::Lfs;
                answer["oid"] = json!(if lfs { &entry.sha256 } else { &entry.oid });
            }
            files.push(answer);
        }
        Ok(Reply::json(json!({"files": files, "commitOid": commit.id})))
    }

    pub fn commit(&self, revision: &str) -> Result<Reply, Refusal> {
        let draft = draft(self.call)?;
        let store = &self.hub.store;
        if let Some(cas) = &self.hub.cas {
            for change in &draft.changes {
                if let To::Lfs(sha256, _) = &change.to {
                    cas.deliver(store, sha256)?;
                }
            }
        }
        let (made, number) = if self.call.flag("create_pr") {
            let (title, said) = (draft.title.clone(), draft.message.clone());
            let discussion = |base| Discussion::new(&title, &said, Status::Open, Some(base));
            let (made, number) = store.open_pull_request(&self.id, revision, draft, discussion)?;
            (made, Some(number))
        } else {
            (store.commit(&self.id, revision, draft)?, None)
        };
        let url = format!("{}/commit/{made}", self.page());
        let mut answer = json!({"success": true, "commitOid": made, "commitUrl": url});
        if let Some(number) = number {
            answer["pullRequestUrl"] = json!(self.discussion_url(number));
        }
        Ok(Reply::json(answer))
    }

    fn change_refs<F>(&self, status: u16, change: F) -> Result<Reply, Refusal>
    where
        F: FnOnce(&mut Repo) -> Result<(), Refused>,
    {
        self.hub.store.change(&self.id, change)?;
        Ok(Reply::done().status(status))
    }

    fn attributes(&self, commit: &Commit) -> Result<String, Refusal> {
        let Some(entry) = commit.tree.get(".gitattributes") else {
            return Ok(String::new());
        };
        let (path, _) = self.hub.store.content(entry)?;
        let bytes = fs::read(path).map_err(Refused::Disk)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Reads a commit: one JSON line each for the header and for every file.
fn draft(call: &Call) -> Result<Draft, Refusal> {
    let mut draft = Draft::default();
    for line in call.body.split(|byte| *byte == b'\n') {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let invalid = |error| Refusal::new(400, format!("Invalid line of a commit: {error}"));
        let line: Value = serde_json::from_slice(line).map_err(invalid)?;
        let value = &line["value"];
        let to = match text(&line, "key")? {
            "header" => {
                draft.title = text(value, "summary")?.to_owned();
                draft.message = value["description"].as_str().unwrap_or_default().to_owned();
                draft.parent = value["parentCommit"].as_str().map(str::to_owned);
                continue;
            }
            "file" => To::Content(content(value)?),
            "lfsFile" => To::Lfs(text(value, "oid")?.to_owned(), value["size"].as_u64()),
            "deletedFile" => To::NoFile,
            "deletedFolder" => To::NoFolder,
            other => return refuse(400, format!("Unknown line of a commit: {other}")),
        };
        let path = text(value, "path")?.to_owned();
        draft.changes.push(Change { path, to });
    }
    if draft.title.is_empty() {
        return refuse(400, "A commit needs a header with a summary");
    }
    Ok(draft)
}

fn content(file: &Value) -> Result<Vec<u8>, Refusal> {
    let content = text(file, "content")?;
    if file["encoding"] == "utf-8" {
        return Ok(content.as_bytes().to_vec());
    }
    let invalid =
        |error| Refusal::new(400, format!("Invalid content of {}: {error}", file["path"]));
    BASE64.decode(content).map_err(invalid)
}

/// Whether the last matching line of a `.gitattributes` sends the path to LFS.
fn tracked_by_lfs(attributes: &str, path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let mut tracked = false;
    for line in attributes.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let pattern = words.next().unwrap_or_default();
        let subject = if pattern.contains('/') { path } else { name };
        let pattern = pattern.trim_start_matches('/');
        if matches(pattern.as_bytes(), subject.as_bytes()) {
            let is_filter = |word: &&str| word.trim_start_matches(['-', '!']).starts_with("filter");
            tracked = words
                .rfind(is_filter)
                .map_or(tracked, |word| word == "filter=lfs");
        }
    }
    tracked
}

/// `*` stands for any bytes. Whatever lies between two stars is best found where it comes first: no way back is needed.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let mut pieces = pattern.split(|&byte| byte == b'*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut text) = text.strip_prefix(first) else {
        return false;
    };
    let Some(last) = pieces.next_back() else {
        return text.is_empty();
    };
    for piece in pieces.filter(|piece| !piece.is_empty()) {
        match text.windows(piece.len()).position(|found| found == piece) {
            Some(at) => text = &text[at + piece.len()..],
            None => return false,
        }
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_matching_line_of_gitattributes_decides() {
        let attributes = "*.safetensors filter=lfs -text\n/top.txt filter=lfs\n*small* -filter\n";
        let tracked = |path| tracked_by_lfs(attributes, path);
        assert!(tracked("a/b.safetensors") && tracked("top.txt"));
        assert!(!tracked("a/top.txt") && !tracked("small.safetensors") && !tracked("b.json"));
    }

    #[test]
    fn stars_stand_for_any_bytes_and_cost_no_patience() {
        let text = "a".repeat(10_000);
        for (pattern, text, fits) in [
            ("", "", true),
            ("*", "", true),
            ("a*", "a", true),
            ("a*a", "a", false),
            ("a*a", "aa", true),
            ("*ab*b", "aabb", true),
            ("*ab*b", "aab", false),
            ("a", "ab", false),
            // tried from every place, these would outlast everybody
            (&"*a".repeat(200), text.as_str(), true),
            (&("*a".repeat(200) + "b"), text.as_str(), false),
        ] {
            assert_eq!(
                matches(pattern.as_bytes(), text.as_bytes()),
                fits,
                "{pattern}"
            );
        }
    }
}
