"""Python's clients against a Hub: what they push, pull and are told. Prints one line of JSON."""

import hashlib
import json
import os
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, ModelCard, errors

api = HfApi()


def sums(folder):
    """The sha256 of every file by its path, our own and the Hub's housekeeping aside."""
    folder = Path(folder)
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    names.pop(".gitattributes", None)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(names.items())}


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def push(repo, folder):
    api.create_repo(repo, exist_ok=True)
    commit = api.upload_folder(repo_id=repo, folder_path=folder)
    return {"commit": commit.oid}


def pull(repo, folder):
    """Into a folder and into the cache: both the same."""
    api.snapshot_download(repo, local_dir=folder)
    cached = api.snapshot_download(repo)
    assert sums(cached) == sums(folder)
    offline = api.snapshot_download(repo, local_files_only=True)
    assert sums(offline) == sums(folder)
    return {"sums": sums(folder), "cached": cached}


def operations(repo, folder):
    """Everything else that a publisher does."""
    user = api.whoami()
    assert user["name"] == "local" and user["auth"]["accessToken"]["role"] == "write", user
    api.create_repo(repo)
    refused(errors.HfHubHTTPError, lambda: api.create_repo(repo))
    api.create_repo(repo, exist_ok=True)
    first = api.upload_folder(repo_id=repo, folder_path=folder)
    again = api.upload_folder(repo_id=repo, folder_path=folder)
    assert again.oid == first.oid, "nothing changed: no commit"
    api.upload_file(repo_id=repo, path_or_fileobj=b"new", path_in_repo="a b/ü.txt", commit_message="one more")
    assert api.file_exists(repo, "a b/ü.txt") and not api.file_exists(repo, "none")
    assert api.revision_exists(repo, "main") and not api.revision_exists(repo, "none")
    assert [commit.title for commit in api.list_repo_commits(repo)][0] == "one more"
    # the tree, page by page, and the same by names
    there = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True, expand=True)}
    for name, digest in sums(folder).items():
        lfs = there[name].lfs
        assert lfs is None or lfs.sha256 == digest, name
    asked = api.get_paths_info(repo, ["a b", "a b/ü.txt", "none"])
    assert {entry.path for entry in asked} == {"a b", "a b/ü.txt"}
    # branches and tags
    api.create_branch(repo, branch="dev/x")
    refused(errors.HfHubHTTPError, lambda: api.create_branch(repo, branch="dev/x"))
    api.create_branch(repo, branch="dev/x", exist_ok=True)
    api.upload_file(repo_id=repo, path_or_fileobj=b"dev", path_in_repo="dev.txt", revision="dev/x")
    assert api.file_exists(repo, "dev.txt", revision="dev/x") and not api.file_exists(repo, "dev.txt")
    api.create_tag(repo, tag="v1", revision=first.oid)
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert {branch.name for branch in refs.branches} == {"main", "dev/x"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first.oid)]
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="dev/x")
    # pull requests: opened with a commit, opened empty and filled, merged, closed
    proposed = api.create_commit(
        repo_id=repo,
        operations=[huggingface_hub.CommitOperationAdd("pr.txt", b"proposed")],
        commit_message="a proposal",
        create_pr=True,
    )
    assert proposed.pr_num == 1 and proposed.pr_revision == "refs/pr/1", proposed
    api.upload_file(repo_id=repo, path_or_fileobj=b"more", path_in_repo="more.txt", revision="refs/pr/1")
    api.comment_discussion(repo, 1, comment="good")
    details = api.get_discussion_details(repo, 1)
    assert details.is_pull_request and details.status == "open" and not details.conflicting_files
    api.merge_pull_request(repo, 1)
    assert api.get_discussion_details(repo, 1).status == "merged"
    assert api.file_exists(repo, "pr.txt") and api.file_exists(repo, "more.txt")
    draft = api.create_pull_request(repo, title="a draft")
    api.change_discussion_status(repo, draft.num, "closed")
    assert [(it.num, it.status) for it in api.get_repo_discussions(repo)] == [(2, "closed"), (1, "merged")]
    # a commit on what has moved
    stale = lambda: api.create_commit(
        repo_id=repo,
        operations=[huggingface_hub.CommitOperationAdd("late.txt", b"late")],
        commit_message="late",
        parent_commit=first.oid,
    )
    assert refused(errors.HfHubHTTPError, stale).response.status_code == 412
    # weights by byte range, and what the Hub says of them by hash
    metadata = api.get_safetensors_metadata(repo)
    assert sum(metadata.parameter_count.values()) > 0
    if hasattr(api, "verify_repo_checksums"):
        local = api.snapshot_download(repo, local_dir=folder + "-verified")
        checked = api.verify_repo_checksums(repo, local_dir=local)
        assert not checked.mismatches and checked.checked_count > 0, checked
    # cards are read before they are taken
    card = ModelCard("---\nlicense: mit\n---\n# A card\n")
    if not os.environ.get("SVDHUB_CARDS_GO_ELSEWHERE"):
        card.push_to_hub(repo)
        assert ModelCard.load(repo).data.license == "mit"
    # deletions, settings, names
    api.delete_file("a b/ü.txt", repo)
    api.upload_file(repo_id=repo, path_or_fileobj=b"x", path_in_repo="gone/x.txt")
    api.delete_folder("gone", repo)
    assert not api.file_exists(repo, "gone/x.txt")
    api.update_repo_settings(repo, gated="auto", private=True)
    assert api.model_info(repo).private and api.model_info(repo).gated == "auto"
    stranger = HfApi(token="hf_read_stranger")
    refused(errors.RepositoryNotFoundError, lambda: stranger.model_info(repo))
    api.update_repo_settings(repo, private=False)
    gated = lambda: stranger.hf_hub_download(repo, "config.json", local_dir=folder + "-gated")
    refused(errors.GatedRepoError, gated)
    refused(errors.HfHubHTTPError, lambda: stranger.upload_file(repo_id=repo, path_or_fileobj=b"", path_in_repo="x"))
    refused(errors.HfHubHTTPError, lambda: HfApi(token="hf_wrong").whoami())
    api.update_repo_settings(repo, gated=False)
    # what is not there
    into = folder + "-none"
    refused(errors.RepositoryNotFoundError, lambda: api.model_info(repo + "-none"))
    refused(errors.RevisionNotFoundError, lambda: api.hf_hub_download(repo, "x", revision="none", local_dir=into))
    refused(errors.EntryNotFoundError, lambda: api.hf_hub_download(repo, "none", local_dir=into))
    api.move_repo(repo, repo + "-moved")
    assert repo + "-moved" in [model.id for model in api.list_models(author=repo.split("/")[0])]
    api.delete_repo(repo + "-moved")
    refused(errors.RepositoryNotFoundError, lambda: api.delete_repo(repo + "-moved"))
    api.delete_repo(repo + "-moved", missing_ok=True)
    return {"version": huggingface_hub.__version__}


def keyless(repo, folder):
    """A job logs in by its identity alone."""
    del os.environ["HF_TOKEN"]
    commit = HfApi().upload_file(repo_id=repo, path_or_fileobj=b"by a job", path_in_repo="job.txt")
    elsewhere = lambda: HfApi().create_repo(repo + "-other")
    refused(errors.HfHubHTTPError, elsewhere)
    return {"commit": commit.oid}


def transformers(repo, folder):
    """From the Hub by name, as everybody does."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(repo)
    tokenizer = AutoTokenizer.from_pretrained(repo)
    ids = tokenizer("In eighty days")["input_ids"]
    facts = {"model_type": config.model_type, "ids": ids, "loaded": False}
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return facts
    model = AutoModelForCausalLM.from_pretrained(repo)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert torch.isfinite(logits).all()
    return facts | {"loaded": True}


if __name__ == "__main__":
    verb, repo, folder = sys.argv[1:]
    print(json.dumps(globals()[verb](repo, folder)))
