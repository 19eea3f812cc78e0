"""A small Hub: what huggingface_hub, transformers, datasets and evaluate ask of the real one, over real HTTP.

Repositories of all three types with commits on parents, large-file storage, tags, pull requests and collections; two
accounts and their tokens; faults on request; and a log of every request, with whether a token was where it must not be.
It has no Xet storage, so clients need ``HF_HUB_DISABLE_XET=1``.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_storage import ACCOUNTS, Refused, Storage, entry
from huggingface_hub.utils.sha import git_hash


class Hub(Storage, ThreadingHTTPServer):
    """``with Hub() as hub``: served at ``hub.url`` until the block ends.

    ``faults`` are taken one a matching request: ``(route, action)`` with an action of "503" or another status,
    "lose" (do it, then hang up), "cut" (hang up in the midst of the body), "short" (hang
    up in the midst of the reply), "page" (of a proxy, with 200), "login" (the same, and nothing is done), or a function
    to call before it is served, which may raise `Refused`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        Storage.__init__(self)
        ThreadingHTTPServer.__init__(self, ("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.faults: list[tuple[str, str | Callable[[], Any]]] = []
        self.log: list[tuple[str, str, int]] = []  # route, path, status
        self.leaks: list[str] = []

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no news."""

    def fault(self, route: str) -> str | Callable[[], Any] | None:
        with self.lock:
            for number, (name, _) in enumerate(self.faults):
                if name == route:
                    return self.faults.pop(number)[1]
        return None

    def count(self, route: str) -> int:
        return sum(name == route for name, _, _ in self.log)


DATE = "2026-01-01T00:00:00.000Z"
ROUTES: list[tuple[str, re.Pattern, str, Callable]] = []


def route(methods: str, pattern: str) -> Callable:
    def register(serve: Callable) -> Callable:
        kinds = {"{T}": "(?P<kind>models|datasets|spaces)", "{ID}": "(?P<name>[^/]+/[^/]+?)", "{REV}": "(?P<rev>[^/]+)"}
        full = re.sub(r"\{\w+\}", lambda match: kinds.get(match[0], match[0]), pattern)
        ROUTES.append((methods, re.compile(f"{full}$"), serve.__name__, serve))
        return serve

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def serve(self) -> None:
        split = urlsplit(self.path)
        self.query, self.user = parse_qs(split.query), None
        name, serve, values = "unknown", None, {}
        for methods, pattern, route_name, function in ROUTES:
            if self.command in methods.split("|") and (match := pattern.match(split.path)):
                name, serve = route_name, function
                values = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                break
        fault = self.server.fault(name)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            self.server.log.append((name, self.path, 0))
            return self.hang_up()
        chunks = []
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        self.body = b"".join(chunks) or self.rfile.read(length)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        elsewhere = self.path.encode() + self.body + (given.encode() if name == "store" else b"")
        self.server.leaks += [self.path for token in ACCOUNTS if token.encode() in elsewhere]
        try:
            if fault == "login":
                serve, fault = None, "page"
            if callable(fault):
                fault()
            if given and name != "store":
                self.user = ACCOUNTS.get(given)
                if self.user is None:
                    raise Refused(401, "Invalid credentials in Authorization header")
            if isinstance(fault, str) and fault.isdigit():
                raise Refused(int(fault), "a fault")
            if isinstance(fault, str) and fault.startswith("403 "):
                raise Refused(403, fault[4:])
            if serve is None:
                raise Refused(404, f"no route for {self.command} {split.path}")
            values["kind"] = values.get("kind", "models").rstrip("s")
            with self.server.lock:
                takes = serve.__code__.co_varnames[: serve.__code__.co_argcount]
                status, body, headers = serve(self, **{key: values[key] for key in values if key in takes})
        except Refused as refused:
            status, body = refused.status, {"error": refused.message, **refused.body}
            headers = {
                "X-Error-Code": refused.code,
                "X-Error-Message": refused.message,
                **refused.body.get("headers", {}),
            }
        self.server.log.append((name, self.path, status))
        if fault == "lose":
            return self.hang_up()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        if fault == "page":
            status, content, headers = 200, b"<html>Please log in</html>", {"Content-Type": "text/html"}
        self.send_response(status)
        for key, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "short" else content)
        if fault == "short":
            self.hang_up()
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def needs(self, namespace: str) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if namespace not in (self.user[0], *self.user[2]) or self.user[1] != "write":
            raise Refused(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        name, role, orgs = self.user
        token = {"displayName": "test", "role": role}
        return (
            200,
            {"type": "user", "name": name, "orgs": [{"name": org} for org in orgs], "auth": {"accessToken": token}},
            {},
        )

    @route("POST", "/api/validate-yaml")
    def validate(self):
        content = json.loads(self.body)["content"]
        try:
            fields = yaml.safe_load(content.split("---")[1])
            errors = [] if isinstance(fields, dict) else ["metadata must be an object"]
            if isinstance(fields, dict):
                relation = fields.get("base_model_relation", "finetune")
                errors += [] if relation in ("adapter", "finetune", "merge", "quantized") else ["base_model_relation"]
                short = len(fields.get("short_description", "")) <= 60
                errors += [] if short else ["short_description is too long"]
        except (yaml.YAMLError, IndexError) as error:
            errors = [str(error)]
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}, {}

    @route("POST", "/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        kind, namespace = asked.get("type") or "model", asked.get("organization") or (self.user or [""])[0]
        self.needs(namespace)
        name = f"{namespace}/{asked['name']}"
        if (kind, name) in self.server.repos:
            raise Refused(409, f"You already created this {kind} repo", url=f"{self.server.url}/{name}")
        self.server.create(kind, name, asked.get("visibility") == "private" or bool(asked.get("private")))
        return 200, {"url": f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"}, {}

    @route("PUT", "/api/{T}/{ID}/settings")
    def settings(self, kind, name):
        asked = json.loads(self.body)
        private = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
        self.server.repo(kind, name, self.user, write=True)["private"] = private
        return 200, {}, {}

    @route("GET", "/api/{T}/{ID}(?:/revision/{REV})?")
    def info(self, kind, name, rev="main"):
        repo = self.server.repo(kind, name, self.user)
        sha = self.server.resolve(repo, rev)
        siblings = [{"rfilename": path} for path in repo["commits"][sha]["files"]]
        reply = {"id": name, "sha": sha, "private": repo["private"], "siblings": siblings, "tags": []}
        readme = self.server.files(kind, name, sha).get("README.md", b"").decode()
        if readme.startswith("---"):
            reply["cardData"] = yaml.safe_load(readme.split("---")[1])
        return 200, reply, {"X-Repo-Commit": sha}

    @route("GET", "/api/{T}/{ID}/tree/{REV}(?:/(?P<folder>.+))?")
    def tree(self, kind, name, rev, folder=""):
        repo = self.server.repo(kind, name, self.user)
        files = repo["commits"][self.server.resolve(repo, rev)]["files"]
        rows = {}
        for path, file in files.items():
            parts = path.split("/")
            for depth in range(1, len(parts)):
                above = "/".join(parts[:depth])
                rows[above] = {"type": "directory", "path": above, "oid": "0" * 40, "size": 0}
            rows[path] = entry(path, file)
        within = f"{folder}/" if folder else ""
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        kept = [
            row for path, row in rows.items() if path.startswith(within) and (deep or "/" not in path[len(within) :])
        ]
        if folder and not kept:
            raise Refused(404, f"{folder} does not exist on this revision", "EntryNotFound")
        return 200, kept, {}

    @route("POST", "/api/{T}/{ID}/paths-info/{REV}")
    def paths_info(self, kind, name, rev):
        repo = self.server.repo(kind, name, self.user)
        files = repo["commits"][self.server.resolve(repo, rev)]["files"]
        text = self.body.decode()
        asked = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        rows: list[dict[str, Any]] = [entry(path, files[path]) for path in asked if path in files]
        for path in asked:
            if any(file.startswith(f"{path}/") for file in files):
                rows.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return 200, rows, {}

    @route("GET", "/api/{T}/{ID}/refs")
    def refs(self, kind, name):
        refs = self.server.repo(kind, name, self.user)["refs"]

        def below(prefix: str) -> list[dict[str, str]]:
            named = {ref.removeprefix(prefix): (ref, sha) for ref, sha in refs.items() if ref.startswith(prefix)}
            return [{"name": name, "ref": ref, "targetCommit": sha} for name, (ref, sha) in named.items()]

        return 200, {"branches": below("refs/heads/"), "tags": below("refs/tags/"), "converts": []}, {}

    @route("POST", "/api/{T}/{ID}/tag/{REV}")
    def tag(self, kind, name, rev):
        repo, tag = self.server.repo(kind, name, self.user, write=True), f"refs/tags/{json.loads(self.body)['tag']}"
        if tag in repo["refs"]:
            raise Refused(409, "Reference already exists")
        repo["refs"][tag] = self.server.resolve(repo, rev)
        return 200, {}, {}

    @route("POST|DELETE", "/api/{T}/{ID}/branch/{REV}")
    def branch(self, kind, name, rev):
        repo, branch = self.server.repo(kind, name, self.user, write=True), f"refs/heads/{rev}"
        if self.command == "DELETE":
            if repo["refs"].pop(branch, None) is None:
                raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        elif branch in repo["refs"]:
            raise Refused(409, "Reference already exists")
        else:
            repo["refs"][branch] = self.server.resolve(repo, json.loads(self.body).get("startingPoint", "main"))
        return 200, {}, {}

    @route("GET|POST", "/api/spaces/{ID}/(?:runtime|restart)")
    def runtime(self, name):
        repo = self.server.repo("space", name, self.user, write=self.command == "POST")
        if self.command == "POST":
            repo["stage"] = "BUILDING"
        return 200, {"stage": repo.get("stage", "BUILDING"), "hardware": {"current": None, "requested": None}}, {}

    @route("POST", "/api/{T}/{ID}/preupload/{REV}")
    def preupload(self, kind, name, rev):
        repo = self.server.repo(kind, name, self.user, write="create_pr" not in self.query)
        files = repo["commits"][self.server.resolve(repo, rev)]["files"]
        rows = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith((".safetensors", ".parquet")) else "regular"
            row = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if stored := files.get(file["path"]):
                row["oid"] = stored["sha256"] if stored["lfs"] else stored["oid"]
            rows.append(row)
        return 200, {"files": rows}, {}

    @route("POST", "/(?:(?P<kind>datasets|spaces)/)?{ID}\\.git/info/lfs/objects/batch")
    def lfs_batch(self, name):
        rows = []
        for file in json.loads(self.body)["objects"]:
            missing = file["oid"] not in self.server.blobs
            actions = {"actions": {"upload": {"href": f"{self.server.url}/store/{file['oid']}"}}} if missing else {}
            rows.append({"oid": file["oid"], "size": file["size"], **actions})
        return 200, {"transfer": "basic", "objects": rows}, {}

    @route("PUT", "/store/(?P<oid>[0-9a-f]{64})")
    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content does not match its name")
        self.server.blobs[oid] = self.body
        return 200, {}, {}

    @route("POST", "/api/{T}/{ID}/commit/{REV}")
    def commit(self, kind, name, rev):
        proposes = "create_pr" in self.query
        repo = self.server.repo(kind, name, self.user, write=not (proposes or rev.startswith("refs/pr/")))
        ref = rev if rev.startswith("refs/") else f"refs/heads/{rev}"
        head = self.server.resolve(repo, ref)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo["commits"][head]["files"])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                self.server.leaks += [value["path"] for token in ACCOUNTS if token.encode() in content]
                files[value["path"]] = self.server.regular(content)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refused(400, f"{value['path']}: its content was not uploaded")
                size, pointer = len(self.server.blobs[value["oid"]]), git_hash(value["oid"].encode())
                files[value["path"]] = {"oid": pointer, "sha256": value["oid"], "size": size, "lfs": True}
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        reply: dict[str, Any] = {"commitUrl": f"{self.server.url}/{name}/commit/"}
        if proposes:
            number = len(repo["pulls"]) + 1
            repo["pulls"].append({"num": number, "title": header["summary"]})
            repo["refs"][f"refs/pr/{number}"], ref = head, f"refs/pr/{number}"
            reply["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{number}"
        return 200, reply | {"commitOid": self.server.commit(repo, ref, files, header["summary"])}, {}

    @route("GET", "/api/{T}/{ID}/discussions")
    def discussions(self, kind, name):
        rows = [
            {"status": "open", "isPullRequest": True, "author": {"name": "tester"}, "createdAt": DATE,
             "repo": {"name": name, "type": kind}, **pull}
            for pull in self.server.repo(kind, name, self.user)["pulls"]
        ]  # fmt: skip
        return (
            200,
            {"discussions": rows if self.query.get("p", ["0"]) == ["0"] else [], "count": len(rows), "start": 0},
            {},
        )

    @route("GET|HEAD", "/(?:(?P<kind>datasets|spaces)/)?{ID}/resolve/{REV}/(?P<path>.+)")
    def file(self, kind, name, rev, path):
        repo = self.server.repo(kind, name, self.user)
        sha = self.server.resolve(repo, rev)
        file = repo["commits"][sha]["files"].get(path)
        if file is None:
            raise Refused(404, "Entry not collection", "EntryNotFound", headers={"X-Repo-Commit": sha})
        content, status, etag = self.server.blobs[file["sha256"]], 200, file["sha256"] if file["lfs"] else file["oid"]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        return status, content, headers

    @route("POST", "/api/collections")
    def collections(self):
        asked = json.loads(self.body)
        self.needs(asked["namespace"])
        slug = f"{asked['namespace']}/{re.sub(r'[^a-z0-9]+', '-', asked['title'].lower())}-{'0' * 24}"
        if slug in self.server.collections:
            raise Refused(409, "Collection already exists", slug=slug)
        made = {"slug": slug, "title": asked["title"], "owner": {"name": asked["namespace"]}, "items": [],
                "position": 0, "private": asked.get("private", False), "theme": "blue", "upvotes": 0,
                "lastUpdated": DATE}  # fmt: skip
        self.server.collections[slug] = made
        return 200, made, {}

    @route("GET|POST", "/api/collections/(?P<slug>[^/]+/[^/]+?)(?P<items>/items)?")
    def collection(self, slug, items=""):
        collection = self.server.collections[slug]
        if items:
            item = json.loads(self.body)["item"]
            if any((other["id"], other["type"]) == (item["id"], item["type"]) for other in collection["items"]):
                raise Refused(409, "Item already in collection")
            collection["items"].append(
                {"_id": f"{len(collection['items']):024x}", "position": len(collection["items"]), **item}
            )
        return 200, collection, {}
