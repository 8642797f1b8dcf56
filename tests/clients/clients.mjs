// The JavaScript client against a Hub: what it pushes, pulls and is told. Prints one line of JSON.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { mkdir, readFile, readdir, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join, relative } from "node:path";
import { pathToFileURL } from "node:url";

// the package lies where it was installed, not beside this file
const require = createRequire(pathToFileURL(join(process.env.SVDHUB_JS, "package.json")));
const hub = require("@huggingface/hub");

const hubUrl = process.env.HF_ENDPOINT;
const accessToken = process.env.HF_TOKEN;
const options = { hubUrl, accessToken };
const useXet = process.env.SVDHUB_XET === "1";

async function filesOf(folder) {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true });
  const files = entries.filter((entry) => entry.isFile());
  return files.map((entry) => relative(folder, join(entry.parentPath ?? entry.path, entry.name))).sort();
}

async function push(repo, folder) {
  await hub.createRepo({ ...options, repo });
  const names = await filesOf(folder);
  const files = await Promise.all(
    names.map(async (path) => ({ path, content: new Blob([await readFile(join(folder, path))]) })),
  );
  const made = await hub.uploadFiles({ ...options, repo, files, useXet });
  return { commit: made.commit.oid };
}

async function pull(repo, folder) {
  const sums = {};
  for await (const file of hub.listFiles({ ...options, repo, recursive: true })) {
    if (file.type !== "file" || file.path === ".gitattributes") continue;
    const content = await hub.downloadFile({ ...options, repo, path: file.path, xet: useXet });
    const bytes = Buffer.from(await content.arrayBuffer());
    await mkdir(dirname(join(folder, file.path)), { recursive: true });
    await writeFile(join(folder, file.path), bytes);
    sums[file.path] = createHash("sha256").update(bytes).digest("hex");
    if (file.lfs) assert.equal(file.lfs.oid, sums[file.path]);
  }
  return { sums };
}

async function refused(call) {
  try {
    await call();
  } catch (error) {
    return error.statusCode;
  }
  assert.fail("it was not refused");
}

async function operations(repo, folder) {
  assert.equal((await hub.whoAmI(options)).name, "local");
  await push(repo, folder);
  assert.equal(await refused(() => hub.createRepo({ ...options, repo })), 409);
  await hub.uploadFile({ ...options, repo, file: { path: "a b/ü.txt", content: new Blob(["new"]) } });
  assert.ok(await hub.fileExists({ ...options, repo, path: "a b/ü.txt" }));
  const [info] = await hub.pathsInfo({ ...options, repo, paths: ["a b/ü.txt"] });
  assert.equal(info.size, 3);
  await hub.createBranch({ ...options, repo, branch: "dev" });
  await hub.uploadFile({ ...options, repo, branch: "dev", file: { path: "dev.txt", content: new Blob(["dev"]) } });
  assert.ok(!(await hub.fileExists({ ...options, repo, path: "dev.txt" })));
  const pull = { title: "a proposal", isPullRequest: true };
  const proposed = await hub.commit({
    ...options,
    ...pull,
    repo,
    operations: [{ operation: "addOrUpdate", path: "pr.txt", content: new Blob(["proposed"]) }],
  });
  assert.match(proposed.pullRequestUrl, /\/discussions\/1$/);
  await hub.deleteFiles({ ...options, repo, paths: ["a b/ü.txt"] });
  assert.ok(!(await hub.fileExists({ ...options, repo, path: "a b/ü.txt" })));
  const commits = [];
  for await (const commit of hub.listCommits({ ...options, repo })) commits.push(commit.title);
  assert.ok(commits.length >= 4);
  const metadata = await hub.parseSafetensorsMetadata({ ...options, repo });
  assert.ok(metadata.header || metadata.headers);
  await hub.checkRepoAccess({ ...options, repo });
  const none = repo + "-none";
  assert.equal(await refused(() => hub.checkRepoAccess({ ...options, repo: none })), 404);
  assert.equal(await hub.downloadFile({ ...options, repo, path: "none" }), null);
  const stranger = { hubUrl, accessToken: "hf_read_stranger" };
  const change = () => hub.uploadFile({ ...stranger, repo, file: { path: "x", content: new Blob(["x"]) } });
  assert.equal(await refused(change), 403);
  await hub.deleteBranch({ ...options, repo, branch: "dev" });
  await hub.deleteRepo({ ...options, repo });
  assert.equal(await refused(() => hub.checkRepoAccess({ ...options, repo })), 404);
  return {};
}

const [verb, repo, folder] = process.argv.slice(2);
console.log(JSON.stringify(await { push, pull, operations }[verb](repo, folder)));
