"""What the small Hub of the tests keeps: accounts, repositories with commits on parents, and large files."""

import hashlib
import json
import threading
from typing import Any

from huggingface_hub.utils.sha import git_hash

WRITE, READ, OTHER = (f"hf_{kind}" + "x" * 31 for kind in ("write", "read", "other"))  # as long as real ones
ACCOUNTS = {WRITE: ("tester", "write", ["org"]), READ: ("tester", "read", ["org"]), OTHER: ("mallory", "write", [])}


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


class Storage:
    """Repositories by type and name, the content of all files by its SHA-256, and collections."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.lock = threading.RLock()

    def repo(self, kind: str, name: str, user: tuple | None = None, write: bool = False) -> dict[str, Any]:
        repo = self.repos.get((kind, name))
        member = user is not None and name.split("/")[0] in (user[0], *user[2])
        if repo is None or (repo["private"] and not member):
            raise Refused(404 if user else 401, "Repository not repo", "RepoNotFound")
        if write and not (member and user and user[1] == "write"):
            raise Refused(403, "You don't have the rights to write here")
        return repo

    def create(self, kind: str, name: str, private: bool) -> dict[str, Any]:
        repo: dict[str, Any] = {"private": private, "commits": {}, "refs": {}, "pulls": []}
        self.repos[kind, name] = repo
        files = {".gitattributes": self.regular(b"*.safetensors filter=lfs\n*.parquet filter=lfs\n")}
        if kind == "space":
            files["README.md"] = self.regular(b"---\nsdk: static\n---\n")
        self.commit(repo, "refs/heads/main", files, "initial commit")
        return repo

    def commit(self, repo: dict[str, Any], ref: str, files: dict[str, Any], title: str) -> str:
        parent = repo["refs"].get(ref) or repo["refs"].get("refs/heads/main")
        content = json.dumps([parent, title, sorted((path, file["oid"]) for path, file in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        repo["commits"][sha] = {"parent": parent, "title": title, "files": files}
        repo["refs"][ref] = sha
        return sha

    def push(self, kind: str, name: str, path: str, content: bytes) -> str:
        """A commit by somebody else."""
        repo = self.repos[kind, name]
        files = dict(repo["commits"][repo["refs"]["refs/heads/main"]]["files"])
        return self.commit(repo, "refs/heads/main", files | {path: self.regular(content)}, "by somebody else")

    def regular(self, content: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        return {"oid": git_hash(content), "sha256": sha256, "size": len(content), "lfs": False}

    def resolve(self, repo: dict[str, Any], revision: str) -> str:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in repo["refs"]:
                return repo["refs"][name]
        if revision in repo["commits"]:
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, kind: str, name: str) -> list[str]:
        """Titles of main's commits, the newest first."""
        repo = self.repos[kind, name]
        sha, titles = repo["refs"]["refs/heads/main"], []
        while sha:
            titles.append(repo["commits"][sha]["title"])
            sha = repo["commits"][sha]["parent"]
        return titles

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[kind, name]
        files = repo["commits"][self.resolve(repo, revision)]["files"]
        return {path: self.blobs[file["sha256"]] for path, file in files.items()}


def entry(path: str, file: dict[str, Any]) -> dict[str, Any]:
    row = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
    return row | ({"lfs": {"oid": file["sha256"], "size": file["size"], "pointerSize": 130}} if file["lfs"] else {})
