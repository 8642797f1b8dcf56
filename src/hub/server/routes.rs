//! What the Hub answers: from a request with its small body to a reply, without any network.
//!
//! Here: addresses, and who may do what. What is told about a repository is in `browse`, what changes one in
//! `publish`. Addresses, headers and payloads are those of huggingface_hub 2.4, hf-hub 1.0 and huggingface.js.
//! The bytes of LFS objects do not pass here: a reply names the file to send, and `upload_target` says whether
//! an upload may be received.

use axum::http::header;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::reply::{Call, Refusal, Reply, refuse, text};
use super::repo::{Refused, Repo, RepoId, RepoKind, hex};
use super::store::Store;

/// The account behind every token.
pub const USER: &str = "local";

/// What every answer depends on besides the request.
pub struct Hub {
    pub store: Store,
    /// See `ServerOptions::token`.
    pub token: Option<String>,
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
    role: Role,
}

/// Who asks; each may do what those before may do.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Role {
    Anonymous,
    /// An account without rights here: what is private or gated stays closed.
    Stranger,
    Reader,
    Writer,
}

/// Answers a request to the Hub itself.
pub fn answer(hub: &Hub, call: &Call) -> Reply {
    route(hub, call).unwrap_or_else(|Refusal(reply)| reply)
}

/// Answers a download from the CDN, which knows no accounts: the signed address is the permission.
pub fn download(hub: &Hub, call: &Call) -> Reply {
    let oid = match signed_object(hub, call, "download") {
        Ok(oid) => oid,
        Err(Refusal(reply)) => return reply,
    };
    match hub.store.object(oid) {
        Some((path, size)) => Reply::file(path, size, oid, call),
        None => Refusal::new(404, "No such object").0,
    }
}

/// The sha256 that an upload to the CDN promises, if its address was given out by this Hub.
pub fn upload_target<'a>(hub: &Hub, call: &'a Call) -> Result<&'a str, Refusal> {
    signed_object(hub, call, "upload")
}

/// The address on the CDN that permits one thing with one object.
pub fn object_url(hub: &Hub, verb: &str, oid: &str) -> String {
    let signature = signature(hub, verb, oid);
    format!("{}/objects/{oid}?signature={signature}", hub.cdn)
}

fn route(hub: &Hub, call: &Call) -> Result<Reply, Refusal> {
    let role = role(hub, call)?;
    let segments: Vec<&str> = call.segments.iter().map(String::as_str).collect();
    let visit = |kind, owner: &str, name: &str| {
        let name = name.strip_suffix(".git").unwrap_or(name);
        visit(hub, call, role, RepoId::new(kind, owner, name))
    };
    match (call.method.as_str(), segments.as_slice()) {
        ("GET", ["api", "whoami-v2"]) => whoami(role),
        ("POST", ["api", "validate-yaml"]) => validate_card(call),
        ("POST", ["api", "repos", "create"]) => {
            check_writer(role)?;
            create_repo(hub, call)
        }
        ("DELETE", ["api", "repos", "delete"]) => {
            check_writer(role)?;
            let visit = self::visit(hub, call, role, Some(named_repo(&call.json()?)?))?;
            hub.store.delete(&visit.id)?;
            Ok(Reply::done())
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
            check_writer(self.role)?;
        }
        match (method, rest) {
            ("GET", []) => self.info("main"),
            ("GET", ["refs"]) => self.refs(),
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
                    ("POST", "paths-info") => self.paths_info(&revision),
                    ("POST", "preupload") => self.preupload(&revision),
                    ("POST", "commit") => self.commit(&revision),
                    ("POST", "tag") => self.create_tag(&revision),
                    ("GET", "xet-read-token" | "xet-write-token") => {
                        refuse(404, "This Hub has no Xet storage")
                    }
                    _ => no_route(self.call),
                }
            }
            _ => no_route(self.call),
        }
    }

    /// `/<owner>/<name>/resolve/…`, and the LFS addresses below `/<owner>/<name>.git/`.
    fn files(&self, rest: &[&str]) -> Result<Reply, Refusal> {
        match (self.call.method.as_str(), rest) {
            ("GET", ["resolve", rest @ ..]) => {
                self.check_gate()?;
                match split_revision(rest) {
                    Some((revision, path)) => self.resolve(&revision, &path),
                    None => no_route(self.call),
                }
            }
            ("POST", ["info", "lfs", "objects", "batch"]) => {
                let batch = self.call.json()?;
                if batch["operation"] == "download" {
                    self.check_gate()?;
                } else {
                    check_writer(self.role)?;
                }
                self.lfs_batch(&batch)
            }
            ("POST", ["info", "lfs", "verify"]) => {
                check_writer(self.role)?;
                self.lfs_verify()
            }
            _ => no_route(self.call),
        }
    }

    fn check_gate(&self) -> Result<(), Refusal> {
        if self.repo.gated.is_none() || self.role >= Role::Reader {
            return Ok(());
        }
        let status = if self.role == Role::Anonymous {
            401
        } else {
            403
        };
        let message = format!("Access to model {} is restricted.", self.id);
        Err(Refusal::new(status, message).code("GatedRepo"))
    }
}

fn role(hub: &Hub, call: &Call) -> Result<Role, Refusal> {
    let Some(authorization) = call.headers.get(header::AUTHORIZATION) else {
        return Ok(Role::Anonymous);
    };
    let words = authorization.to_str().unwrap_or_default();
    let token = words.strip_prefix("Bearer ").unwrap_or_default();
    match &hub.token {
        Some(expected) if token == expected => Ok(Role::Writer),
        Some(_) if token.starts_with("hf_read") => Ok(Role::Stranger),
        None if token.starts_with("hf_read") => Ok(Role::Reader),
        None if token.starts_with("hf_") => Ok(Role::Writer),
        // The Python client reads this very sentence to tell a bad token from a missing repository.
        _ => refuse(401, "Invalid credentials in Authorization header"),
    }
}

fn check_writer(role: Role) -> Result<(), Refusal> {
    match role {
        Role::Anonymous => refuse(401, "Invalid username or password."),
        Role::Writer => Ok(()),
        _ => refuse(403, "Forbidden: your token has no write permission"),
    }
}

fn visit<'a>(
    hub: &'a Hub,
    call: &'a Call,
    role: Role,
    id: Option<RepoId>,
) -> Result<Visit<'a>, Refusal> {
    // To a stranger a private repository does not exist; the status asks the anonymous to log in.
    let status = if role == Role::Anonymous { 401 } else { 404 };
    let unseen = || Refusal::new(status, "Repository not found").code("RepoNotFound");
    let id = id.ok_or_else(unseen)?;
    match hub.store.repo(&id) {
        Ok(repo) if repo.private && role < Role::Reader => Err(unseen()),
        Ok(repo) => Ok(Visit {
            hub,
            call,
            id,
            repo,
            role,
        }),
        Err(Refused::NoRepo) => Err(unseen()),
        Err(other) => Err(other.into()),
    }
}

fn whoami(role: Role) -> Result<Reply, Refusal> {
    if role == Role::Anonymous {
        return refuse(401, "Invalid username or password.");
    }
    let access = if role == Role::Writer {
        "write"
    } else {
        "read"
    };
    let since = "2026-01-01T00:00:00.000Z";
    let token = json!({"displayName": "token", "role": access, "createdAt": since});
    Ok(Reply::json(json!({
        "type": "user", "id": "1", "name": USER, "fullname": USER, "email": null,
        "isPro": false, "canPay": false, "periodEnd": null, "avatarUrl": "", "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    })))
}

fn validate_card(call: &Call) -> Result<Reply, Refusal> {
    let body = call.json()?;
    let mut lines = text(&body, "content")?.lines();
    let is_fence = |line: &str| line.trim_end() == "---";
    let (status, errors, warnings) = if !lines.next().is_some_and(is_fence) {
        let warning = json!({"message": "empty or missing yaml metadata in repo card"});
        (200, vec![], vec![warning])
    } else if !lines.any(is_fence) {
        let error = json!({"message": "the yaml metadata does not end with a line `---`"});
        (400, vec![error], vec![])
    } else {
        (200, vec![], vec![])
    };
    Ok(Reply::json(json!({"errors": errors, "warnings": warnings})).status(status))
}

fn create_repo(hub: &Hub, call: &Call) -> Result<Reply, Refusal> {
    let wanted = call.json()?;
    let id = named_repo(&wanted)?;
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

/// The repository that a body means with `name`, `organization` and `type`.
fn named_repo(body: &Value) -> Result<RepoId, Refusal> {
    let kind = match body["type"].as_str() {
        None | Some("model") => RepoKind::Model,
        Some("dataset") => RepoKind::Dataset,
        Some(other) => return refuse(400, format!("This Hub has no repositories of type {other}")),
    };
    let name = text(body, "name")?;
    let organization = body["organization"].as_str().unwrap_or(USER);
    let (owner, name) = name.split_once('/').unwrap_or((organization, name));
    let invalid = || Refusal::new(400, format!("Invalid repo name: {owner}/{name}"));
    RepoId::new(kind, owner, name).ok_or_else(invalid)
}

/// A revision is one segment with its slashes encoded; `refs/pr/1` may come with plain slashes too.
fn split_revision(segments: &[&str]) -> Option<(String, String)> {
    let plain = segments.len() >= 3 && segments[0] == "refs";
    let (revision, path) = segments.split_at_checked(if plain { 3 } else { 1 })?;
    Some((revision.join("/"), path.join("/")))
}

fn signature(hub: &Hub, verb: &str, oid: &str) -> String {
    hex(&Sha256::digest(format!("{} {verb} {oid}", hub.secret))[..16])
}

fn signed_object<'a>(hub: &Hub, call: &'a Call, verb: &str) -> Result<&'a str, Refusal> {
    let given = call.parameter("signature").unwrap_or_default();
    match call.segments.as_slice() {
        [folder, oid] if folder == "objects" && given == signature(hub, verb, oid) => Ok(oid),
        _ => refuse(403, "The signature of this address is wrong"),
    }
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
        let token = token.map(str::to_owned);
        (
            folder,
            Hub {
                store,
                token,
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
            let reply = ask(
                &hub,
                "",
                &format!("GET /ada/engine/resolve/{revision}/d/f"),
                "",
            );
            assert_eq!((reply.status, reply.bytes()), (200, 3), "{revision}");
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
        assert_eq!(modes, ["lfs", "regular", "lfs", "regular"]);
        assert_eq!(files[3]["oid"], git_id("blob", b"c.json"));
    }

    #[test]
    fn cards_need_a_closed_front_matter() {
        let (_folder, hub) = hub(None);
        let status = |content: &str| {
            let body = json!({"content": content}).to_string();
            ask(&hub, "", "POST /api/validate-yaml", &body).status
        };
        assert_eq!(status("---\nlicense: mit\n---\n# Card"), 200);
        assert_eq!(status("# No front matter"), 200);
        assert_eq!(status("---\nlicense: mit\n# Card"), 400);
    }
}
