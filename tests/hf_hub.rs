//! The embedded Hub, judged by a client we did not write: hf-hub.

use hf_hub::repository::{CommitOperation, RepoTreeEntry};
use hf_hub::{HFClient, HFClientSync, HFError, RepoTypeModel};
use svdhub::hub::server::{Server, ServerOptions};

fn client(server: &Server, cache: &std::path::Path, token: &str) -> HFClientSync {
    HFClient::builder()
        .endpoint(server.endpoint())
        .token(token)
        .cache_dir(cache)
        .retry_max_attempts(1)
        .build_sync()
        .expect("the client builds")
}

#[test]
fn hf_hub_creates_commits_lists_and_reads() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let server =
        Server::start(&dir.path().join("hub"), &ServerOptions::default()).expect("the Hub starts");
    let client = client(&server, &dir.path().join("cache"), "hf_test");
    assert_eq!(client.whoami().send().expect("whoami").username, "local");

    let create = || {
        client
            .create_repository()
            .repo_id("org/model")
            .repo_type(RepoTypeModel)
            .exist_ok(true)
            .send()
    };
    create().expect("creates");
    create().expect("exists already, which is fine");
    let model = client.model("org", "model");
    let head = model.info().send().expect("info").sha.expect("a commit");
    assert_eq!(head.len(), 40);

    // preupload and commit, with the parent named
    let text = "{\"model_type\": \"llama\"}\n";
    let commit = |content: &str, parent: &str| {
        model
            .create_commit()
            .operations(vec![CommitOperation::add_bytes(
                "config.json",
                content.as_bytes().to_vec(),
            )])
            .commit_message("a config")
            .parent_commit(parent)
            .send()
    };
    commit(text, &head).expect("commits");
    let stale = commit("other", &head).expect_err("the branch has moved");
    assert!(
        matches!(stale, HFError::Http { .. } | HFError::Conflict { .. }),
        "{stale}"
    );

    // info, tree, ranges and files
    let now = model.info().send().expect("info").sha.expect("a commit");
    assert_ne!(now, head);
    let tree = model.list_tree().recursive(true).send().expect("tree");
    let size = tree.iter().find_map(|entry| match entry {
        RepoTreeEntry::File { path, size, .. } if path == "config.json" => Some(*size),
        _ => None,
    });
    assert_eq!(size, Some(text.len() as u64));
    let bytes = |range: std::ops::Range<u64>| {
        model
            .download_file_to_bytes()
            .filename("config.json")
            .range(range)
            .send()
            .expect("a range")
    };
    assert_eq!(&bytes(2..12)[..], &text.as_bytes()[2..12]);
    let path = model
        .download_file()
        .filename("config.json")
        .send()
        .expect("downloads");
    assert_eq!(std::fs::read_to_string(path).expect("reads"), text);
    let snapshot = model.snapshot_download().send().expect("snapshot");
    assert!(snapshot.join("config.json").exists() && snapshot.ends_with(&now));

    // refs, and what is not there
    model.create_branch().branch("dev").send().expect("branch");
    model.create_tag().tag("v1").send().expect("tag");
    let refs = model.list_refs().send().expect("refs");
    assert!(
        refs.branches.iter().any(|b| b.name == "dev") && refs.tags.iter().any(|t| t.name == "v1")
    );
    let missing = client
        .model("org", "nothing")
        .list_tree()
        .send()
        .expect_err("no such repository");
    assert!(missing.to_string().contains("RepoNotFound"), "{missing}");
}

#[test]
fn hf_hub_is_refused_where_it_must_be() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let options = ServerOptions {
        grants: vec!["hf_right".parse().expect("a token")],
        ..ServerOptions::default()
    };
    let server = Server::start(&dir.path().join("hub"), &options).expect("the Hub starts");
    let cache = dir.path().join("cache");
    let create = |token: &str| {
        client(&server, &cache, token)
            .create_repository()
            .repo_id("org/x")
            .repo_type(RepoTypeModel)
            .send()
    };
    assert!(matches!(
        create("hf_wrong"),
        Err(HFError::AuthRequired { .. })
    ));
    assert!(matches!(create("hf_read"), Err(HFError::Forbidden { .. })));
    create("hf_right").expect("creates");
}
