//! Pull requests and discussions: what somebody proposes, and what becomes of it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::reply::{Refusal, Reply, refuse, text};
use super::repo::{Change, Draft, Entry, EntryKind, Refused, To, now};
use super::routes::{USER, Visit};

/// A discussion; a pull request is one that has a ref `refs/pr/<number>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discussion {
    pub title: String,
    pub description: String,
    pub created: String,
    pub status: Status,
    /// Of a pull request: the commit it was made upon.
    pub base: Option<String>,
    /// The commit that merged it.
    pub merged: Option<String>,
    /// What was said and done after that, as the API tells it.
    pub events: Vec<Value>,
}

/// How far a discussion is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Draft,
    Open,
    Closed,
    Merged,
}

impl Discussion {
    pub fn new(title: &str, description: &str, status: Status, base: Option<String>) -> Self {
        Self {
            title: title.into(),
            description: description.into(),
            created: now(),
            status,
            base,
            merged: None,
            events: Vec::new(),
        }
    }

    fn add(&mut self, kind: &str, data: Value) -> Value {
        let id = format!("{:024x}", self.events.len() + 2);
        let event = event(&id, kind, &now(), data);
        self.events.push(event.clone());
        event
    }
}

impl Visit<'_> {
    pub fn discussions(&self) -> Result<Reply, Refusal> {
        let told = self.repo.discussions.iter().rev();
        let told: Vec<Value> = told.map(|(number, it)| self.brief(*number, it)).collect();
        Ok(Reply::json(
            json!({"discussions": told, "count": told.len(), "start": 0}),
        ))
    }

    pub fn discussion(&self, number: &str) -> Result<Reply, Refusal> {
        let (number, it) = self.numbered(number)?;
        let mut told = self.brief(number, it);
        let first = json!({"edited": false, "hidden": false, "latest": {"raw": it.description}});
        let mut events = vec![event(&format!("{:024x}", 1), "comment", &it.created, first)];
        events.extend(it.events.iter().cloned());
        told["events"] = json!(events);
        if it.base.is_some() {
            told["changes"] = json!({"base": "refs/heads/main", "mergeCommitId": it.merged});
            let conflicts = self.conflicts(number, it)?;
            told["filesWithConflicts"] = json!(conflicts);
            told["diff"] = json!("");
        }
        Ok(Reply::json(told))
    }

    pub fn open_discussion(&self) -> Result<Reply, Refusal> {
        let wanted = self.call.json()?;
        let (title, said) = (text(&wanted, "title")?, text(&wanted, "description")?);
        let proposes = wanted["pullRequest"] == true;
        let main = self.hub.store.commit_at(&self.id, "main")?.id;
        let mut number = 0;
        self.hub.store.change(&self.id, |repo| {
            let status = if proposes {
                Status::Draft
            } else {
                Status::Open
            };
            let base = proposes.then(|| main.clone());
            number = repo.discuss(Discussion::new(title, said, status, base));
            if proposes {
                let name = format!("refs/pr/{number}");
                repo.pull_requests.insert(name, main.clone());
            }
            Ok(())
        })?;
        Ok(Reply::json(json!({
            "num": number, "pullRequest": proposes, "url": self.discussion_url(number),
        })))
    }

    pub fn comment(&self, number: &str) -> Result<Reply, Refusal> {
        let wanted = self.call.json()?;
        let data = json!({"edited": false, "hidden": false,
            "latest": {"raw": text(&wanted, "comment")?}});
        self.change_discussion(number, |it| Ok(it.add("comment", data)))
            .map(|event| Reply::json(json!({"newMessage": event})))
    }

    pub fn change_status(&self, number: &str) -> Result<Reply, Refusal> {
        let wanted = self.call.json()?;
        let status = match text(&wanted, "status")? {
            "open" => Status::Open,
            "closed" => Status::Closed,
            other => return refuse(400, format!("A status is open or closed, not {other}")),
        };
        let event = self.change_discussion(number, |it| {
            it.status = status;
            Ok(it.add("status-change", json!({"status": status})))
        })?;
        Ok(Reply::json(json!({"newStatus": event})))
    }

    /// Lands a pull request: on an untouched `main` as it is, else by taking over the files it changed.
    pub fn merge(&self, number: &str) -> Result<Reply, Refusal> {
        let (number, it) = self.numbered(number)?;
        if matches!(it.status, Status::Merged | Status::Closed) || it.base.is_none() {
            return refuse(400, "This is no open pull request");
        }
        let conflicts = self.conflicts(number, it)?;
        if !conflicts.is_empty() {
            return refuse(409, format!("Conflicts in {}", conflicts.join(", ")));
        }
        let main = self.hub.store.commit_at(&self.id, "main")?;
        let mut draft = Draft {
            title: format!("{} (#{number})", it.title),
            parent: Some(main.id),
            ..Draft::default()
        };
        for (path, entry) in self.proposed(number, it)? {
            let to = match entry {
                None => To::NoFile,
                Some(entry) if entry.kind == EntryKind::Lfs => {
                    To::Lfs(entry.sha256, Some(entry.size))
                }
                Some(entry) => {
                    let (file, _) = self.hub.store.content(&entry)?;
                    To::Content(std::fs::read(file).map_err(Refused::Disk)?)
                }
            };
            draft.changes.push(Change { path, to });
        }
        let made = self.hub.store.commit(&self.id, "main", draft)?;
        self.change_discussion(&number.to_string(), |it| {
            it.status = Status::Merged;
            it.merged = Some(made.clone());
            Ok(it.add("status-change", json!({"status": Status::Merged})))
        })?;
        Ok(Reply::done())
    }

    pub fn discussion_url(&self, number: usize) -> String {
        format!("{}/discussions/{number}", self.page())
    }

    fn numbered(&self, number: &str) -> Result<(usize, &Discussion), Refusal> {
        let parsed = number.parse().ok();
        let found = parsed.and_then(|number| Some((number, self.repo.discussions.get(&number)?)));
        found.ok_or_else(|| Refusal::new(404, "No such discussion"))
    }

    fn change_discussion<F>(&self, number: &str, change: F) -> Result<Value, Refusal>
    where
        F: FnOnce(&mut Discussion) -> Result<Value, Refused>,
    {
        let (number, _) = self.numbered(number)?;
        let mut event = Value::Null;
        self.hub.store.change(&self.id, |repo| {
            if let Some(it) = repo.discussions.get_mut(&number) {
                event = change(it)?;
            }
            Ok(())
        })?;
        Ok(event)
    }

    /// What a pull request makes of each path it touches: a file, or none.
    fn proposed(
        &self,
        number: usize,
        it: &Discussion,
    ) -> Result<BTreeMap<String, Option<Entry>>, Refusal> {
        let store = &self.hub.store;
        let before = store.commit_at(&self.id, it.base.as_deref().unwrap_or("main"))?;
        let after = store.commit_at(&self.id, &format!("refs/pr/{number}"))?;
        Ok(before.changed(&after))
    }

    /// The paths that `main` has changed otherwise in the meantime.
    fn conflicts(&self, number: usize, it: &Discussion) -> Result<Vec<String>, Refusal> {
        if it.status == Status::Merged {
            return Ok(Vec::new());
        }
        let store = &self.hub.store;
        let before = store.commit_at(&self.id, it.base.as_deref().unwrap_or("main"))?;
        let since = before.changed(&store.commit_at(&self.id, "main")?);
        let proposed = self.proposed(number, it)?;
        let differs = |(path, entry): (String, Option<Entry>)| {
            let clash = since.get(&path).is_some_and(|there| *there != entry);
            clash.then_some(path)
        };
        Ok(proposed.into_iter().filter_map(differs).collect())
    }

    fn brief(&self, number: usize, it: &Discussion) -> Value {
        let kind = self.id.kind.singular();
        json!({
            "num": number, "title": it.title, "status": it.status, "createdAt": it.created,
            "isPullRequest": it.base.is_some(), "author": {"name": USER},
            "repo": {"name": self.id.to_string(), "type": kind}, "repoOwner": {"name": self.id.owner()},
        })
    }
}

fn event(id: &str, kind: &str, at: &str, data: Value) -> Value {
    json!({"id": id, "type": kind, "createdAt": at, "author": {"name": USER}, "data": data})
}
