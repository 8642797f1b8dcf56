//! What the Hub tells about a repository: its facts, refs, trees, history and files.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::reply::{Refusal, Reply};
use super::repo::{Commit, Entry, EntryKind, git_id};
use super::routes::{USER, Visit, object_url};

/// The most entries of one page, as on the public Hub.
const PAGE_ENTRIES_MAX: usize = 1000;

impl Visit<'_> {
    pub fn info(&self, revision: &str) -> Result<Reply, Refusal> {
        let commit = self.hub.store.commit_at(&self.id, revision)?;
        let with_sizes = self.call.flag("blobs");
        let sibling = |(path, entry): (&String, &Entry)| {
            let mut sibling = json!({"rfilename": path});
            if with_sizes {
                sibling["size"] = json!(entry.size);
                sibling["blobId"] = json!(entry.oid);
            }
            if with_sizes && entry.kind == EntryKind::Lfs {
                sibling["lfs"] = lfs_json("sha256", entry);
            }
            sibling
        };
        let name = self.id.to_string();
        Ok(Reply::json(json!({
            "_id": &git_id("repo", name.as_bytes())[..24], "id": name, "modelId": name,
            "author": self.id.owner(), "sha": commit.id,
            "private": self.repo.private, "gated": self.repo.gated_json(), "disabled": false,
            "downloads": 0, "likes": 0, "tags": [],
            "lastModified": commit.date, "createdAt": self.repo.created,
            "siblings": commit.tree.iter().map(sibling).collect::<Vec<_>>(),
        })))
    }

    pub fn refs(&self) -> Result<Reply, Refusal> {
        let list = |kind: &str, names: &BTreeMap<String, String>| -> Vec<Value> {
            let entry = |(name, id)| {
                let whole = format!("{kind}{name}");
                json!({"name": name, "ref": whole, "targetCommit": id})
            };
            names.iter().map(entry).collect()
        };
        Ok(Reply::json(json!({
            "branches": list("refs/heads/", &self.repo.branches),
            "tags": list("refs/tags/", &self.repo.tags),
            "pullRequests": list("", &self.repo.pull_requests),
            "converts": [],
        })))
    }

    pub fn tree(&self, revision: &str, folder: &str) -> Result<Reply, Refusal> {
        let commit = self.hub.store.commit_at(&self.id, revision)?;
        let folders = commit.folders();
        if !folders.contains_key(folder) {
            return Err(no_entry(&commit, folder));
        }
        let prefix = if folder.is_empty() {
            String::new()
        } else {
            format!("{folder}/")
        };
        let recursive = self.call.flag("recursive");
        let listed = |path: &str| {
            let rest = path.strip_prefix(&prefix).unwrap_or_default();
            !rest.is_empty() && (recursive || !rest.contains('/'))
        };
        let mut entries = BTreeMap::new();
        for (path, id) in folders.iter().filter(|(path, _)| listed(path)) {
            entries.insert(*path, folder_json(path, id));
        }
        for (path, entry) in commit.tree.iter().filter(|(path, _)| listed(path)) {
            entries.insert(path, file_json(path, entry));
        }
        // The cursor is the last path of the page before: it stays right when the branch moves meanwhile.
        let cursor = self.call.parameter("cursor").unwrap_or_default();
        let limit = self.call.limit(PAGE_ENTRIES_MAX);
        let mut rest = entries.into_iter().filter(|(path, _)| *path > cursor);
        let (paths, page): (Vec<&str>, Vec<Value>) = rest.by_ref().take(limit).unzip();
        let mut reply = Reply::json(page.into()).header("x-repo-commit", &commit.id);
        if let (Some(_), Some(last)) = (rest.next(), paths.last()) {
            reply = reply.header("link", self.call.next_page("cursor", last));
        }
        Ok(reply)
    }

    pub fn paths_info(&self, revision: &str) -> Result<Reply, Refusal> {
        let commit = self.hub.store.commit_at(&self.id, revision)?;
        let folders = commit.folders();
        let found = |path: &String| {
            let file = commit.tree.get(path).map(|entry| file_json(path, entry));
            file.or_else(|| Some(folder_json(path, folders.get(path.as_str())?)))
        };
        let entries: Vec<Value> = self.call.paths()?.iter().filter_map(found).collect();
        Ok(Reply::json(entries.into()).header("x-repo-commit", &commit.id))
    }

    pub fn commits(&self, revision: &str) -> Result<Reply, Refusal> {
        let history = self.hub.store.history(&self.id, revision)?;
        let entry = |commit: &Commit| {
            json!({
                "id": commit.id, "title": commit.title, "message": commit.message,
                "date": commit.date, "authors": [{"user": USER, "avatar": ""}],
                "parents": Vec::from_iter(&commit.parent),
            })
        };
        let page = self.call.parameter("p").and_then(|page| page.parse().ok());
        let page: usize = page.unwrap_or(0);
        let pages = history.chunks(self.call.limit(PAGE_ENTRIES_MAX));
        let more = pages.len() > page.saturating_add(1);
        let shown: Vec<Value> = pages.skip(page).take(1).flatten().map(entry).collect();
        let reply = Reply::json(shown.into()).header("x-total-count", history.len().to_string());
        Ok(match more {
            true => reply.header("link", self.call.next_page("p", &(page + 1).to_string())),
            false => reply,
        })
    }

    /// Small files come from here, LFS objects by a redirect to the other origin.
    pub fn resolve(&self, revision: &str, path: &str) -> Result<Reply, Refusal> {
        let commit = self.hub.store.commit_at(&self.id, revision)?;
        let missing = || no_entry(&commit, path);
        let entry = commit.tree.get(path).ok_or_else(missing)?;
        let (file, size) = self.hub.store.content(entry)?;
        let tag = format!("\"{}\"", entry.sha256);
        let reply = match entry.kind {
            EntryKind::Regular => Reply::file(file, size, &entry.oid, self.call),
            EntryKind::Lfs if self.call.knows(&entry.sha256) => {
                Reply::empty(304).header("etag", tag)
            }
            EntryKind::Lfs => Reply::empty(302)
                .header("location", object_url(self.hub, "download", &entry.sha256))
                .header("x-linked-etag", tag)
                .header("x-linked-size", entry.size.to_string())
                .header("accept-ranges", "bytes"),
        };
        Ok(reply.header("x-repo-commit", &commit.id))
    }
}

fn file_json(path: &str, entry: &Entry) -> Value {
    let mut value = json!({"type": "file", "oid": entry.oid, "size": entry.size, "path": path});
    if entry.kind == EntryKind::Lfs {
        value["lfs"] = lfs_json("oid", entry);
    }
    value
}

fn folder_json(path: &str, id: &str) -> Value {
    json!({"type": "directory", "oid": id, "size": 0, "path": path})
}

/// The sha256 has two names on the Hub.
fn lfs_json(sha256: &str, entry: &Entry) -> Value {
    json!({sha256: entry.sha256, "size": entry.size, "pointerSize": entry.pointer_bytes()})
}

fn no_entry(commit: &Commit, path: &str) -> Refusal {
    let message = format!("Entry not found: {path}");
    Refusal::new(404, message)
        .code("EntryNotFound")
        .commit(&commit.id)
}
