//! What the Hub tells about a repository: its facts, refs, trees, history and files.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::lfs::object_url;
use super::reply::{Refusal, Reply, encode, refuse};
use super::repo::{Commit, Entry, EntryKind, git_id, lfs_pointer};
use super::routes::{Hub, USER, Visit};
use super::xet::xet_hash;

impl Visit<'_> {
    pub fn info(&self, revision: &str) -> Result<Reply, Refusal> {
        self.summary(revision).map(Reply::json)
    }

    /// The facts of the repository at a revision.
    pub fn summary(&self, revision: &str) -> Result<Value, Refusal> {
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
        Ok(json!({
            "_id": &git_id("repo", name.as_bytes())[..24], "id": name, "modelId": name,
            "author": self.id.owner(), "sha": commit.id,
            "private": self.repo.private, "gated": self.repo.gated_json(), "disabled": false,
            "downloads": 0, "likes": 0, "tags": [],
            "lastModified": commit.date, "createdAt": self.repo.created,
            "siblings": commit.tree.iter().map(sibling).collect::<Vec<_>>(),
        }))
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
            entries.insert(path, file_json(self.hub, path, entry));
        }
        // The cursor is the last path of the page before: it stays right when the branch moves meanwhile.
        let cursor = self.call.parameter("cursor").unwrap_or_default();
        let limit = self.call.limit(self.hub.page_entries);
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
            let file = commit.tree.get(path);
            let file = file.map(|entry| file_json(self.hub, path, entry));
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
        let pages = history.chunks(self.call.limit(self.hub.page_entries));
        let more = pages.len() > page.saturating_add(1);
        let shown: Vec<Value> = pages.skip(page).take(1).flatten().map(entry).collect();
        let reply = Reply::json(shown.into()).header("x-total-count", history.len().to_string());
        Ok(match more {
            true => reply.header("link", self.call.next_page("p", &(page + 1).to_string())),
            false => reply,
        })
    }

    /// What differs between two commits, `<from>..<to>`, as `git diff --raw` tells it.
    pub fn compare(&self, range: &str) -> Result<Reply, Refusal> {
        let Some((from, to)) = range.split_once("..") else {
            return refuse(400, "Expected <from>..<to>");
        };
        let before = self.hub.store.commit_at(&self.id, from)?;
        let after = self
            .hub
            .store
            .commit_at(&self.id, to.trim_start_matches('.'))?;
        let side = |entry: Option<&Entry>| match entry {
            Some(entry) => ("100644", entry.oid.clone()),
            None => ("000000", "0".repeat(40)),
        };
        let line = |(path, entry): (&String, &Option<Entry>)| {
            let (old_mode, old) = side(before.tree.get(path));
            let (mode, new) = side(entry.as_ref());
            let letter = match (old_mode, mode) {
                ("000000", _) => 'A',
                (_, "000000") => 'D',
                _ => 'M',
            };
            format!(":{old_mode} {mode} {old} {new} {letter}\t{path}\n")
        };
        let lines: String = before.changed(&after).iter().map(line).collect();
        Ok(Reply::text(lines))
    }

    /// A file as git holds it: of an LFS object, the pointer.
    pub fn raw(&self, revision: &str, path: &str) -> Result<Reply, Refusal> {
        let commit = self.hub.store.commit_at(&self.id, revision)?;
        let entry = commit
            .tree
            .get(path)
            .ok_or_else(|| no_entry(&commit, path))?;
        let reply = match entry.kind {
            EntryKind::Lfs => Reply::text(lfs_pointer(&entry.sha256, entry.size)),
            EntryKind::Regular => {
                let (file, size) = self.hub.store.content(entry)?;
                Reply::file(file, size, &entry.oid, self.call)
            }
        };
        Ok(reply.header("x-repo-commit", &commit.id))
    }

    /// Small files of public repositories come from a cache on this origin, of others from here; LFS objects by a redirect
    /// to the other origin.
    pub fn resolve(&self, revision: &str, path: &str, cached: bool) -> Result<Reply, Refusal> {
        let commit = self.hub.store.commit_at(&self.id, revision)?;
        let missing = || no_entry(&commit, path);
        let entry = commit.tree.get(path).ok_or_else(missing)?;
        let (file, size) = self.hub.store.content(entry)?;
        let tag = format!("\"{}\"", entry.sha256);
        let mut reply = match entry.kind {
            EntryKind::Regular if !cached && !self.repo.private && self.repo.gated.is_none() => {
                let kind = self.id.kind.plural();
                let path: Vec<String> = path.split('/').map(encode).collect();
                let path = path.join("/");
                // relative, as the public Hub's is
                let location =
                    format!("/api/resolve-cache/{kind}/{}/{}/{path}", self.id, commit.id);
                Reply::empty(307)
                    .header("location", location)
                    .header("etag", format!("\"{}\"", entry.oid))
            }
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
        if let Some(hash) = xet_hash(self.hub, entry) {
            reply = self.with_chunks(reply, &hash, &commit.id);
        }
        Ok(reply.header("x-repo-commit", &commit.id))
    }
}

fn file_json(hub: &Hub, path: &str, entry: &Entry) -> Value {
    let mut value = json!({"type": "file", "oid": entry.oid, "size": entry.size, "path": path});
    if entry.kind == EntryKind::Lfs {
        value["lfs"] = lfs_json("oid", entry);
    }
    if let Some(hash) = xet_hash(hub, entry) {
        value["xetHash"] = json!(hash);
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
