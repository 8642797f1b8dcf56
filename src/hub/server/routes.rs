//! What the Hub answers: from a request with its small body to a reply, without any network.
//!
//! Here: addresses. Who may do what is in `access`, what is told about a repository in `browse`, what changes one in
//! `publish`, large files in `lfs`, pull requests in `discuss`. Addresses, headers and payloads are those of
//! huggingface_hub 2.4, hf-hub 1.0 and huggingface.js. The bytes of LFS objects do not pass here: a reply names the file
//! to send, and `lfs::Receiving` takes what arrives.

use serde_json::{Value, json};

use super::access::{self, Caller, Grant};
use super::lfs;
use super::reply::{Call, Refusal, Reply, refuse, text};
use super::repo::{Refused, Repo, RepoId, RepoKind};
use super::store::Store;
use super::xet::{Cas, Right};
use crate::front_matter;

/// The account behind every token.
pub const USER: &str = "local";

/// What every answer depends on besides the request.
pub struct Hub {
    pub store: Store,
    /// Where Xet clients send and fetch large files, if they may.
    pub cas: Option<Cas>,
    /// See `ServerOptions`, as the following.
    pub grants: Vec<Grant>,
    pub page_entries: usize,
    pub part_bytes: Option<u64>,
    pub login_seconds: u64,
    /// The origin that contents come from; another one than the Hub's, as in the real world.
    pub cdn: String,
    /// Makes the CDN's addresses unguessable.
    pub secret: String,
}

/// A request about a repository that its sender may see.
pub struct Visit<'a> {
    pub hub: &'a Hub,
    pub call: &'a Call,
    pub id: RepoId,
    pub repo: Repo,
    caller: Caller,
}

/// Answers a request to the Hub itself.
pub fn answer(hub: &Hub, call: &Call) -> Reply {
    route(hub, call).unwrap_or_else(|Refusal(reply)| reply)
}

fn route(hub: &Hub, call: &Call) -> Result<Reply, Refusal> {
    let caller = access::caller(hub, call)?;
    let segments: Vec<&str> = call.segments.iter().map(String::as_str).collect();
    let visit = |kind, owner: &str, name: &str| {
        let name = name.strip_suffix(".git").unwrap_or(name);
        visit(hub, call, caller.clone(), RepoId::new(kind, owner, name))
    };
    match (call.method.as_str(), segments.as_slice()) {
        ("GET", ["api", "whoami-v2"]) => access::whoami(&caller),
        ("GET", ["oidc", "token"]) => access::identity(hub, call, &caller),
        ("POST", ["oauth", "token"]) => access::exchange(hub, call),
        ("POST", ["api", "complete_multipart"]) => lfs::complete(hub, call),
        ("POST", ["api", "validate-yaml"]) => validate_card(call),
        ("POST", ["api", "repos", "create"]) => create_repo(hub, call, &caller),
        ("DELETE", ["api", "repos", "delete"]) => {
            let id = named_repo(&call.json()?)?;
            caller.check_writes(&id)?;
            let visit = self::visit(hub, call, caller, Some(id))?;
            hub.store.delete(&visit.id)?;
            Ok(Reply::done())
        }
        ("POST", ["api", "repos", "move"]) => move_repo(hub, call, &caller),
        ("GET", ["api", "models"]) => list_repos(hub, call, &caller, RepoKind::Model),
        ("GET", ["api", "datasets"]) => list_repos(hub, call, &caller, RepoKind::Dataset),
        (
            "GET",
            [
                "api",
                "resolve-cache",
                kind,
                owner,
                name,
                revision,
                path @ ..,
            ],
        ) => {
            let kind = match *kind {
                "datasets" => RepoKind::Dataset,
                _ => RepoKind::Model,
            };
            visit(kind, owner, name)?.resolve(revision, &path.join("/"), true)
        }
        (_, ["api", "models", owner, name, rest @ ..]) => {
            visit(RepoKind::Model, owner, name)?.api(rest)
        }
        (_, ["api", "datasets", owner, name, rest @ ..]) => {
            visit(RepoKind::Dataset, owner, name)?.api(rest)
        }
        (_, ["datasets", owner, name, rest @ ..]) => {
            visit(RepoKind::Dataset, owner, name)?.files(rest)
        }
        (_, [owner, name, rest @ ..]) => visit(RepoKind::Model, owner, name)?.files(rest),
        _ => no_route(call),
    }
}

impl Visit<'_> {
    /// `/api/models/<owner>/<name>/…`
    fn api(&self, rest: &[&str]) -> Result<Reply, Refusal> {
        let method = self.call.method.as_str();
        // `paths-info` is a question too long for an address.
        if method != "GET" && rest.first() != Some(&"paths-info") {
            let target = match rest {
                ["preupload" | "commit", rest @ ..] => split_revision(rest),
                _ => None,
            };
            match target {
                Some((revision, _)) => self.check_writes_to(Some(&revision))?,
                None => self.check_writes()?,
            }
        }
        match (method, rest) {
            ("GET", []) => self.info("main"),
            ("GET", ["refs"]) => self.refs(),
            ("GET", ["discussions"]) => self.discussions(),
            ("POST", ["discussions"]) => self.open_discussion(),
            ("GET", ["discussions", number]) => self.discussion(number),
            ("POST", ["discussions", number, "comment"]) => self.comment(number),
            ("POST", ["discussions", number, "status"]) => self.change_status(number),
            ("POST", ["discussions", number, "merge"]) => self.merge(number),
            ("PUT", ["settings"]) => self.change_settings(),
            ("POST", ["branch", name @ ..]) => self.create_branch(&name.join("/")),
            ("DELETE", ["branch", name @ ..]) => self.delete_branch(&name.join("/")),
            ("DELETE", ["tag", name @ ..]) => self.delete_tag(&name.join("/")),
            (_, [verb, rest @ ..]) => {
                let Some((revision, path)) = split_revision(rest) else {
                    return no_route(self.call);
                };
                match (method, *verb) {
                    ("GET", "revision") => self.info(&revision),
                    ("GET", "tree") => self.tree(&revision, &path),
                    ("GET", "commits") => self.commits(&revision),
                    ("GET", "compare") => self.compare(&revision),
                    ("POST", "paths-info") => self.paths_info(&revision),
                    ("POST", "preupload") => self.preupload(&revision),
                    ("POST", "commit") => self.commit(&revision),
                    ("POST", "tag") => self.create_tag(&revision),
                    ("GET", "xet-read-token") => self.xet_token(Right::Read, Some(&revision)),
                    // before a pull request is there, Python's client names no revision
                    ("GET", "xet-write-token") if self.call.flag("create_pr") => {
                        self.xet_token(Right::Write, None)
                    }
                    ("GET", "xet-write-token") => self.xet_token(Right::Write, Some(&revision)),
                    _ => no_route(self.call),
                }
            }
            _ => no_route(self.call),
        }
    }

    /// The address of the repository for a browser.
    pub fn page(&self) -> String {
        format!("{}/{}{}", self.call.base, self.id.kind.prefix(), self.id)
    }

    /// `/<owner>/<name>/resolve/…`, and the LFS addresses below `/<owner>/<name>.git/`.
    fn files(&self, rest: &[&str]) -> Result<Reply, Refusal> {
        match (self.call.method.as_str(), rest) {
            ("GET", ["resolve", rest @ ..]) => {
                self.check_gate()?;
                match split_revision(rest) {
                    Some((revision, path)) => self.resolve(&revision, &path, false),
                    None => no_route(self.call),
                }
            }
            ("GET", ["raw", rest @ ..]) => {
                self.check_gate()?;
                match split_revision(rest) {
                    Some((revision, path)) => self.raw(&revision, &path),
                    None => no_route(self.call),
                }
            }
            ("POST", ["info", "lfs", "objects", "batch"]) => {
                let batch = self.call.json()?;
                if batch["operation"] == "download" {
                    self.check_gate()?;
                } else {
                    self.check_writes_to(batch["ref"]["name"].as_str())?;
                }
                self.lfs_batch(&batch)
            }
            ("POST", ["info", "lfs", "verify"]) => {
                self.check_writes_to(None)?;
                self.lfs_verify()
            }
            _ => no_route(self.call),
        }
    }

    pub fn check_writes(&self) -> Result<(), Refusal> {
        self.caller.check_writes(&self.id)
    }

    /// As [`Visit::check_writes`], of a revision: a pull request, and where none is named yet, asks for less.
    pub fn check_writes_to(&self, revision: Option<&str>) -> Result<(), Refusal> {
        let lands = revision.is_some_and(|name| !name.starts_with("refs/pr/"));
        match lands && !self.call.flag("create_pr") {
            true => self.check_writes(),
            false => self.caller.check_proposes(&self.id),
        }
    }

    pub fn check_gate(&self) -> Result<(), Refusal> {
        if self.repo.gated.is_none() || self.caller.reads(&self.id) {
            return Ok(());
        }
        let status = if self.caller.is_anonymous() { 401 } else { 403 };
        let message = format!("Access to model {} is restricted.", self.id);
        Err(Refusal::new(status, message).code("GatedRepo"))
    }
}

fn visit<'a>(
    hub: &'a Hub,
    call: &'a Call,
    caller: Caller,
    id: Option<RepoId>,
) -> Result<Visit<'a>, Refusal> {
    // To a stranger a private repository does not exist; the status asks the anonymous to log in.
    let status = if caller.is_anonymous() { 401 } else { 404 };
    let unseen = || Refusal::new(status, "Repository not found").code("RepoNotFound");
    let id = id.ok_or_else(unseen)?;
    match hub.store.repo(&id) {
        Ok(repo) if repo.private && !caller.reads(&id) => Err(unseen()),
        Ok(repo) => Ok(Visit {
            hub,
            call,
            id,
            repo,
            caller,
        }),
        Err(Refused::NoRepo) => Err(unseen()),
        Err(other) => Err(other.into()),
    }
}

/// Checks the front matter of a card: YAML, and a licence with a name where it is `other`.
fn validate_card(call: &Call) -> Result<Reply, Refusal> {
    let body = call.json()?;
    let (mut errors, mut warnings) = (Vec::new(), Vec::new());
    match front_matter::read(text(&body, "content")?) {
        Ok(Value::Null) => {
            warnings.push("empty or missing yaml metadata in repo card".to_owned());
        }
        Ok(metadata) => {
            if metadata["license"] == "other" && metadata["license_name"].is_null() {
                warnings.push("`license: other` needs a `license_name`".to_owned());
            }
        }
        Err(wrong) => errors.push(wrong),
    }
    let messages = |texts: &[String]| -> Vec<Value> {
        texts.iter().map(|text| json!({"message": text})).collect()
    };
    let status = if errors.is_empty() { 200 } else { 400 };
    let answer = json!({"errors": messages(&errors), "warnings": messages(&warnings)});
    Ok(Reply::json(answer).status(status))
}

fn create_repo(hub: &Hub, call: &Call, caller: &Caller) -> Result<Reply, Refusal> {
    let wanted = call.json()?;
    let id = named_repo(&wanted)?;
    caller.check_writes(&id)?;
    // hf-hub sends `private`, the Python client `visibility`.
    let private = wanted["private"] == true || wanted["visibility"] == "private";
    let name = id.to_string();
    let url = format!("{}/{}{name}", call.base, id.kind.prefix());
    match hub.store.create(&id, private) {
        Ok(()) => Ok(Reply::json(json!({"url": url, "name": name, "id": name}))),
        // The Python client takes the address from this answer too.
        Err(refused @ Refused::RepoExists(_)) => {
            let answer = json!({"error": refused.to_string(), "url": url});
            Ok(Reply::json(answer).status(409))
        }
        Err(refused) => Err(refused.into()),
    }
}

fn move_repo(hub: &Hub, call: &Call, caller: &Caller) -> Result<Reply, Refusal> {
    let wanted = call.json()?;
    let kind = repo_kind(&wanted)?;
    let id = |key| -> Result<RepoId, Refusal> {
        let name = text(&wanted, key)?;
        let id = name
            .split_once('/')
            .and_then(|(owner, name)| RepoId::new(kind, owner, name));
        id.ok_or_else(|| Refusal::new(400, format!("Invalid repo name: {name}")))
    };
    let (from, to) = (id("fromRepo")?, id("toRepo")?);
    caller.check_writes(&from)?;
    caller.check_writes(&to)?;
    hub.store.rename(&from, &to)?;
    Ok(Reply::done())
}

fn list_repos(hub: &Hub, call: &Call, caller: &Caller, kind: RepoKind) -> Result<Reply, Refusal> {
    let (author, search) = (
        call.parameter("author"),
        call.parameter("search").unwrap_or(""),
    );
    let mut found = Vec::new();
    for id in hub.store.repos(kind)? {
        let wanted =
            author.is_none_or(|author| id.owner() == author) && id.to_string().contains(search);
        // one that is being deleted at this moment is gone
        let Ok(visit) = visit(hub, call, caller.clone(), Some(id)) else {
            continue;
        };
        if wanted && found.len() < call.limit(hub.page_entries) {
            found.push(visit.summary("main")?);
        }
    }
    Ok(Reply::json(found.into()))
}

/// The repository that a body means with `name`, `organization` and `type`.
fn named_repo(body: &Value) -> Result<RepoId, Refusal> {
    let kind = repo_kind(body)?;
    let name = text(body, "name")?;
    let organization = body["organization"].as_str().unwrap_or(USER);
    let (owner, name) = name.split_once('/').unwrap_or((organization, name));
    let invalid = || Refusal::new(400, format!("Invalid repo name: {owner}/{name}"));
    RepoId::new(kind, owner, name).ok_or_else(invalid)
}

fn repo_kind(body: &Value) -> Result<RepoKind, Refusal> {
    match body["type"].as_str() {
        None | Some("model") => Ok(RepoKind::Model),
        Some("dataset") => Ok(RepoKind::Dataset),
        Some(other) => refuse(400, format!("This Hub has no repositories of type {other}")),
    }
}

/// A revision is one segment with its slashes encoded; `refs/pr/1` may come with plain slashes too.
fn split_revision(segments: &[&str]) -> Option<(String, String)> {
    let plain = segments.len() >= 3 && segments[0] == "refs";
    let (revision, path) = segments.split_at_checked(if plain { 3 } else { 1 })?;
    Some((revision.join("/"), path.join("/")))
}

fn no_route(call: &Call) -> Result<Reply, Refusal> {
    let path = call.segments.join("/");
    refuse(404, format!("This Hub has no {} /{path}", call.method))
}
#[cfg(test)]
mod tests {
    use super::super::reply::Content;
    use super::super::repo::{INLINE_BYTES_MAX, git_id};
    use super::*;
    use axum::body::Bytes;
    use axum::http::Request;
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;

    const REPO: &str = "/api/models/ada/engine";

    /// A Hub with `ada/engine`, without a network.
    fn hub(token: Option<&str>) -> (tempfile::TempDir, Hub) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let id = RepoId::new(RepoKind::Model, "ada", "engine").unwrap();
        store.create(&id, false).unwrap();
        let (cdn, secret) = ("http://cdn".to_owned(), "secret".to_owned());
        let grants = token.map(|token| token.parse().unwrap());
        (
            folder,
            Hub {
                cas: None,
                store,
                grants: Vec::from_iter(grants),
                page_entries: 1000,
                part_bytes: None,
                login_seconds: 3600,
                cdn,
                secret,
            },
        )
    }

    /// `line` is `METHOD /path`; an empty token is none.
    fn ask(hub: &Hub, token: &str, line: &str, body: &str) -> Reply {
        let (method, path) = line.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path);
        request = request.header("host", "hub");
        if !token.is_empty() {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let body = Bytes::from(body.to_owned());
        answer(hub, &Call::new(&parts, body, "http://hub"))
    }

    fn json_of(reply: &Reply) -> Value {
        match &reply.content {
            Content::Bytes(bytes) => serde_json::from_slice(bytes).unwrap(),
            Content::File(..) => panic!("a file"),
        }
    }

    fn header_of<'a>(reply: &'a Reply, name: &str) -> Option<&'a str> {
        let header = reply.headers.iter().find(|(known, _)| *known == name);
        header.map(|(_, value)| value.as_str())
    }

    /// A commit of files that hold their own names.
    fn commit(hub: &Hub, at: &str, paths: &[&str]) -> Value {
        let mut body = json!({"key": "header", "value": {"summary": "files"}}).to_string();
        for path in paths {
            let file = json!({"path": path, "content": BASE64.encode(path), "encoding": "base64"});
            body += &format!("\n{}", json!({"key": "file", "value": file}));
        }
        let reply = ask(hub, "hf_w", &format!("POST {REPO}/commit/{at}"), &body);
        assert_eq!(reply.status, 200);
        json_of(&reply)
    }

    #[test]
    fn pages_of_a_tree_hold_every_entry_once() {
        let (_folder, hub) = hub(None);
        commit(&hub, "main", &["a/1", "a/2", "a b/ü", "c"]);
        let mut next = Some(format!("{REPO}/tree/main?recursive=true&limit=2"));
        let mut seen = Vec::new();
        while let Some(path) = next {
            let reply = ask(&hub, "", &format!("GET {path}"), "");
            let page = json_of(&reply);
            let page = page.as_array().unwrap();
            assert!(page.len() <= 2);
            seen.extend(
                page.iter()
                    .map(|entry| entry["path"].as_str().unwrap().to_owned()),
            );
            let link = header_of(&reply, "link").and_then(|link| link.split(['<', '>']).nth(1));
            next = link.map(|link| link.replace("http://hub", ""));
        }
        let all = [".gitattributes", "a", "a b", "a b/ü", "a/1", "a/2", "c"];
        assert_eq!(seen, all);
        let flat = ask(&hub, "", &format!("GET {REPO}/tree/main/a"), "");
        assert_eq!(json_of(&flat).as_array().unwrap().len(), 2);
    }

    #[test]
    fn revisions_are_one_encoded_segment_or_a_plain_pull_request() {
        let (_folder, hub) = hub(None);
        let branch = format!("POST {REPO}/branch/dev%2Fx");
        assert_eq!(ask(&hub, "hf_w", &branch, "").status, 201);
        assert_eq!(ask(&hub, "hf_w", &branch, "").status, 409);
        let opened = commit(&hub, "main?create_pr=1", &["d/f"]);
        assert_eq!(
            opened["pullRequestUrl"],
            "http://hub/ada/engine/discussions/1"
        );
        for revision in ["refs%2Fpr%2F1", "refs/pr/1"] {
            let line = format!("GET /ada/engine/resolve/{revision}/d/f");
            let moved = ask(&hub, "", &line, "");
            let cache = header_of(&moved, "location").unwrap();
            assert!(
                moved.status == 307 && cache.starts_with("/api/resolve-cache/models/ada/engine/")
            );
            let reply = ask(&hub, "", &format!("GET {cache}"), "");
            assert_eq!((reply.status, reply.bytes()), (200, 3), "{revision}");
            for name in ["etag", "x-repo-commit"] {
                assert_eq!(header_of(&moved, name), header_of(&reply, name), "{name}");
            }
        }
        let missing = ask(&hub, "", "GET /ada/engine/resolve/dev%2Fx/d/f", "");
        assert_eq!(missing.status, 404);
        assert_eq!(header_of(&missing, "x-error-code"), Some("EntryNotFound"));
        assert!(header_of(&missing, "x-repo-commit").is_some());
    }

    #[test]
    fn errors_say_who_may_not_do_what() {
        let (_folder, hub) = hub(Some("hf_mine"));
        let check = |token: &str, line: &str, status: u16, code: Option<&str>| {
            let reply = ask(&hub, token, &line.replace("REPO", REPO), "");
            assert_eq!(
                (reply.status, header_of(&reply, "x-error-code")),
                (status, code),
                "{token} {line}"
            );
        };
        let set = |settings: &str| {
            let reply = ask(&hub, "hf_mine", &format!("PUT {REPO}/settings"), settings);
            assert_eq!(reply.status, 200);
        };
        let (no_repo, gated) = (Some("RepoNotFound"), Some("GatedRepo"));
        check("", "GET /api/models/ada/none", 401, no_repo);
        check("hf_mine", "GET /api/models/ada/none", 404, no_repo);
        check("", "GET REPO/revision/none", 404, Some("RevisionNotFound"));
        check("hf_other", "GET REPO", 401, None);
        check("", "POST REPO/branch/b", 401, None);
        check("hf_read", "POST REPO/branch/b", 403, None);
        check("hf_mine", "POST REPO/branch/b", 201, None);
        set(r#"{"gated": "auto"}"#);
        check(
            "",
            "GET /ada/engine/resolve/main/.gitattributes",
            401,
            gated,
        );
        check(
            "hf_read",
            "GET /ada/engine/resolve/main/.gitattributes",
            403,
            gated,
        );
        check(
            "hf_mine",
            "GET /ada/engine/resolve/main/.gitattributes",
            200,
            None,
        );
        set(r#"{"gated": false, "visibility": "private"}"#);
        check("", "GET REPO", 401, no_repo);
        check("hf_read", "GET REPO", 404, no_repo);
        check("hf_mine", "GET REPO", 200, None);
    }

    #[test]
    fn a_token_for_one_repository_opens_no_other() {
        let (_folder, mut hub) = hub(Some("hf_mine"));
        for grant in ["hf_one=ada/engine", "hf_all=read"] {
            hub.grants.push(grant.parse().unwrap());
        }
        let create = r#"{"name": "other", "organization": "ada", "private": true}"#;
        let status = |token: &str, line: &str, body: &str| ask(&hub, token, line, body).status;
        assert_eq!(status("hf_one", "POST /api/repos/create", create), 403);
        assert_eq!(status("hf_mine", "POST /api/repos/create", create), 200);
        assert_eq!(status("hf_one", "GET /api/models/ada/other", ""), 404);
        assert_eq!(status("hf_all", "GET /api/models/ada/other", ""), 200);
        assert_eq!(status("hf_one", &format!("POST {REPO}/branch/b"), ""), 201);
        assert_eq!(status("hf_all", &format!("POST {REPO}/branch/c"), ""), 403);
        let role = |token: &str| {
            let told = json_of(&ask(&hub, token, "GET /api/whoami-v2", ""));
            told["auth"]["accessToken"]["role"].clone()
        };
        assert_eq!(role("hf_mine"), "write");
        assert_eq!(role("hf_one"), "fineGrained");
        assert_eq!(role("hf_all"), "read");
        let listed = |token: &str| {
            let told = json_of(&ask(&hub, token, "GET /api/models?author=ada", ""));
            told.as_array().unwrap().len()
        };
        assert_eq!((listed("hf_mine"), listed("hf_one"), listed("")), (2, 1, 1));
    }

    #[test]
    fn who_proposes_writes_to_pull_requests_alone() {
        let (_folder, mut hub) = hub(Some("hf_mine"));
        hub.grants.push("hf_guest=propose".parse().unwrap());
        let status = |line: &str, body: &str| ask(&hub, "hf_guest", line, body).status;
        let file = json!({"path": "a", "content": "YQ==", "encoding": "base64"});
        let draft = json!({"key": "header", "value": {"summary": "a"}}).to_string()
            + "\n"
            + &json!({"key": "file", "value": file}).to_string();
        let commit = |at: &str| status(&format!("POST {REPO}/commit/{at}"), &draft);
        assert_eq!(commit("main"), 403);
        assert_eq!(commit("main?create_pr=1"), 200);
        assert_eq!(commit("refs%2Fpr%2F1"), 200);
        assert_eq!(status(&format!("POST {REPO}/branch/b"), ""), 403);
        let lfs = "POST /ada/engine.git/info/lfs/objects/batch";
        let batch = |target: Value| {
            let mut asked = json!({"operation": "upload", "objects": []});
            if !target.is_null() {
                asked["ref"] = json!({"name": target});
            }
            status(lfs, &asked.to_string())
        };
        assert_eq!(batch(json!("refs/heads/main")), 403);
        assert_eq!(batch(json!("refs/pr/1")), 200);
        assert_eq!(batch(Value::Null), 200);
    }

    #[test]
    fn a_jobs_identity_is_exchanged_for_a_token_of_one_repository() {
        let (_folder, mut hub) = hub(Some("hf_runner"));
        let identity = |token: &str, audience: &str| {
            let line = format!("GET /oidc/token?job=1&audience={audience}");
            let reply = ask(&hub, token, &line, "");
            (
                reply.status,
                json_of(&reply)["value"].as_str().map(str::to_owned),
            )
        };
        assert_eq!(identity("", "http%3A%2F%2Fhub").0, 401);
        let (ours, theirs) = (
            identity("hf_runner", "http%3A%2F%2Fhub").1.unwrap(),
            identity("hf_runner", "http%3A%2F%2Felsewhere").1.unwrap(),
        );
        let exchange = |hub: &Hub, identity: &str, resource: &str| {
            let asked = json!({
                "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
                "subject_token_type": "urn:ietf:params:oauth:token-type:id_token",
                "subject_token": identity, "resource": resource,
            });
            let reply = ask(hub, "", "POST /oauth/token", &asked.to_string());
            (reply.status, json_of(&reply))
        };
        let forged = ours.replace('.', "A.");
        for (identity, resource) in [
            (theirs.as_str(), "ada/engine"),
            (forged.as_str(), "ada/engine"),
            ("a.b", "ada/engine"),
            (ours.as_str(), "ada/none"),
            (ours.as_str(), "datasets/ada/engine"),
        ] {
            let (status, told) = exchange(&hub, identity, resource);
            assert_eq!((status, &told["error"]), (400, &json!("invalid_grant")));
        }
        let (status, told) = exchange(&hub, &ours, "ada/engine");
        assert_eq!((status, &told["expires_in"]), (200, &json!(3600)));
        let token = told["access_token"].as_str().unwrap().to_owned();
        assert!(token.starts_with("hf_jwt_"));
        assert_eq!(
            ask(&hub, &token, &format!("POST {REPO}/branch/b"), "").status,
            201
        );
        let other = ask(&hub, &token, "POST /api/repos/create", r#"{"name": "x"}"#);
        assert_eq!(other.status, 403);
        // an account reads what is gated, and writes nothing
        let reads = exchange(&hub, &ours, "ada").1["access_token"].clone();
        let reads = reads.as_str().unwrap();
        assert_eq!(
            ask(&hub, reads, &format!("POST {REPO}/branch/c"), "").status,
            403
        );
        // and nothing of it holds for ever
        hub.login_seconds = 0;
        let over = exchange(&hub, &ours, "ada/engine").1["access_token"].clone();
        let refused = ask(&hub, over.as_str().unwrap(), &format!("GET {REPO}"), "");
        assert_eq!(refused.status, 401);
    }

    #[test]
    fn a_pull_request_is_opened_talked_about_and_merged() {
        let (_folder, hub) = hub(None);
        commit(&hub, "main", &["kept", "gone"]);
        let post = |path: &str, body: Value| {
            let reply = ask(
                &hub,
                "hf_w",
                &format!("POST {REPO}/{path}"),
                &body.to_string(),
            );
            (reply.status, json_of(&reply))
        };
        let opened = post(
            "discussions",
            json!({"title": "change", "description": "why", "pullRequest": true}),
        );
        assert_eq!((opened.0, &opened.1["num"]), (200, &json!(1)));
        commit(&hub, "refs%2Fpr%2F1", &["added"]);
        let delete = json!({"key": "header", "value": {"summary": "delete"}}).to_string()
            + "\n"
            + &json!({"key": "deletedFile", "value": {"path": "gone"}}).to_string();
        let line = format!("POST {REPO}/commit/refs%2Fpr%2F1");
        assert_eq!(ask(&hub, "hf_w", &line, &delete).status, 200);
        commit(&hub, "main", &["meanwhile"]);
        assert_eq!(
            post("discussions/1/comment", json!({"comment": "good"})).0,
            200
        );
        let details = |number: usize| {
            json_of(&ask(
                &hub,
                "",
                &format!("GET {REPO}/discussions/{number}?diff=1"),
                "",
            ))
        };
        assert_eq!(details(1)["filesWithConflicts"], json!([]));
        assert_eq!(post("discussions/1/merge", json!({})).0, 200);
        assert_eq!(details(1)["status"], "merged");
        let tree = json_of(&ask(&hub, "", &format!("GET {REPO}/tree/main"), ""));
        let paths = tree
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| entry["path"].as_str().unwrap());
        let expected = [".gitattributes", "added", "kept", "meanwhile"];
        assert_eq!(paths.collect::<Vec<_>>(), expected);

        // the next one touches what main changes too
        let second = commit(&hub, "main?create_pr=1", &["both"]);
        assert_eq!(
            second["pullRequestUrl"],
            "http://hub/ada/engine/discussions/2"
        );
        let theirs = json!({"path": "both", "content": "dGhlaXJz", "encoding": "base64"});
        let theirs = json!({"key": "header", "value": {"summary": "theirs"}}).to_string()
            + "\n"
            + &json!({"key": "file", "value": theirs}).to_string();
        assert_eq!(
            ask(&hub, "hf_w", &format!("POST {REPO}/commit/main"), &theirs).status,
            200
        );
        assert_eq!(details(2)["filesWithConflicts"], json!(["both"]));
        assert_eq!(post("discussions/2/merge", json!({})).0, 409);
        assert_eq!(
            post("discussions/2/status", json!({"status": "closed"})).0,
            200
        );
        let listed = json_of(&ask(&hub, "", &format!("GET {REPO}/discussions?p=0"), ""));
        assert_eq!(
            (&listed["count"], &listed["discussions"][0]["status"]),
            (&json!(2), &json!("closed"))
        );
    }

    #[test]
    fn a_repository_moves_with_all_it_holds() {
        let (_folder, hub) = hub(None);
        let made = commit(&hub, "main", &["a"]);
        let asked = r#"{"fromRepo": "ada/engine", "toRepo": "eve/motor", "type": "model"}"#;
        let moved = || ask(&hub, "hf_w", "POST /api/repos/move", asked).status;
        assert_eq!((moved(), moved()), (200, 409));
        let told = json_of(&ask(&hub, "", "GET /api/models/eve/motor", ""));
        assert_eq!(told["sha"], made["commitOid"]);
        assert_eq!(ask(&hub, "hf_w", &format!("GET {REPO}"), "").status, 404);
    }

    #[test]
    fn raw_files_are_what_git_holds() {
        let (_folder, hub) = hub(None);
        commit(&hub, "main", &["a b/c"]);
        let sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let mut incoming = hub.store.receive().unwrap();
        incoming.write(b"hello").unwrap();
        incoming.finish(Some(sha256)).unwrap();
        let pointer = json!({"path": "w.bin", "algo": "sha256", "oid": sha256, "size": 5});
        let body = json!({"key": "header", "value": {"summary": "weights"}}).to_string()
            + "\n"
            + &json!({"key": "lfsFile", "value": pointer}).to_string();
        assert_eq!(
            ask(&hub, "hf_w", &format!("POST {REPO}/commit/main"), &body).status,
            200
        );
        let plain = ask(&hub, "", "GET /ada/engine/raw/main/a%20b/c", "");
        assert_eq!((plain.status, plain.bytes()), (200, 5));
        let large = ask(&hub, "", "GET /ada/engine/raw/main/w.bin", "");
        let Content::Bytes(text) = &large.content else {
            panic!("a file")
        };
        let expected =
            format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 5\n");
        assert_eq!(String::from_utf8_lossy(text), expected);
    }

    #[test]
    fn two_commits_are_compared_file_by_file() {
        let (_folder, hub) = hub(None);
        let from = commit(&hub, "main", &["a"])["commitOid"].clone();
        commit(&hub, "main", &["b"]);
        let line = format!("GET {REPO}/compare/{}..main", from.as_str().unwrap());
        let reply = ask(&hub, "", &line, "");
        let Content::Bytes(text) = &reply.content else {
            panic!("a file")
        };
        let (zero, one) = ("0".repeat(40), git_id("blob", b"b"));
        let expected = format!(":000000 100644 {zero} {one} A\tb\n");
        assert_eq!(String::from_utf8_lossy(text), expected);
    }

    #[test]
    fn large_files_and_weights_go_to_lfs() {
        let (_folder, hub) = hub(None);
        commit(&hub, "main", &["c.json"]);
        let files = json!({"files": [
            {"path": "w.safetensors", "size": 9}, {"path": "empty.bin", "size": 0},
            {"path": "big.json", "size": INLINE_BYTES_MAX + 1}, {"path": "c.json", "size": 6},
        ]});
        let line = format!("POST {REPO}/preupload/main");
        let answer = json_of(&ask(&hub, "hf_w", &line, &files.to_string()));
        let files = answer["files"].as_array().unwrap();
        let modes: Vec<_> = files.iter().map(|file| &file["uploadMode"]).collect();
        assert_eq!(modes, ["lfs", "lfs", "lfs", "regular"]);
        assert_eq!(files[3]["oid"], git_id("blob", b"c.json"));
    }

    #[test]
    fn a_card_needs_a_front_matter_that_can_be_read() {
        let (_folder, hub) = hub(None);
        let status = |content: &str| {
            let body = json!({"content": content}).to_string();
            ask(&hub, "", "POST /api/validate-yaml", &body).status
        };
        assert_eq!(status("---\nlicense: mit\n---\n# Card"), 200);
        assert_eq!(status("# No front matter"), 200);
        assert_eq!(status("---\nlicense: mit\n# Card"), 400);
        assert_eq!(
            status("---\ntags:\n- a\nlicense: mit\nlicense: mit\n---\n"),
            400
        );
        assert_eq!(status("---\nlicense: \"mit\n---\n"), 400);
        assert_eq!(status("---\ntags:\n\t- a\n---\n"), 400);
        assert_eq!(status("---\njust words\n---\n"), 400);
    }
}
