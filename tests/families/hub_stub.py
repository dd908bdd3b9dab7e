"""A Hub on loopback: the part of its HTTP API that `push_to_hub` and `from_pretrained` use, with files in memory.

Independent of models. As strict as the Hub where a client could be wrong: writing needs a token, large files must have
the announced hash, and a commit may name only large files that were uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


TOKEN = "hf_of_nobody"
LARGE = (".safetensors", ".bin", ".pt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class File:
    """A file of a commit; large files use LFS."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The Hub's identifier of the file: git's hash, or the SHA-256 of a large file."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes = b""


class Refusal(Exception):
    """An error as a reply; clients distinguish errors by the code."""

    def __init__(self, status: int, code: str, **headers: str):
        super().__init__(code)
        self.reply = Reply(status, {"X-Error-Code": code, **headers})


def as_json(value: dict, status: int = 200) -> Reply:
    return Reply(status, {"Content-Type": "application/json"}, json.dumps(value).encode())


@dataclass
class Hub:
    """Repositories and the endpoints on them: one method per endpoint, listed in `ROUTES`.

    Attributes:
        repos: The commits by repository name, oldest first; each maps a hash to the files by path.
        uploads: Large files by hash.
        requests: All requests, as `METHOD path`.
    """

    endpoint: str
    repos: dict[str, dict[str, dict[str, File]]] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def environment(self, home: str) -> dict[str, str]:
        """Environment variables for a client process of this Hub, with caches of its own and without Xet."""
        names = {"HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_TOKEN": TOKEN}
        return names | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def commit_of(self, repo: str, revision: str) -> tuple[str, dict[str, File]]:
        """The hash and the files of a revision, `main` or a commit's hash."""
        if repo not in self.repos:
            raise Refusal(404, "RepoNotFound")
        commit = list(self.repos[repo])[-1] if revision == "main" else revision
        if commit not in self.repos[repo]:
            raise Refusal(404, "RevisionNotFound")
        return commit, self.repos[repo][commit]

    def add_commit(self, repo: str, files: dict[str, File]) -> str:
        commits = self.repos.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        return commit

    def create_repo(self, body: bytes) -> Reply:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        existed = repo in self.repos
        if not existed:
            self.add_commit(repo, {})
        return as_json({"url": f"{self.endpoint}/{repo}"}, 409 if existed else 200)

    def validate_yaml(self, body: bytes) -> Reply:
        return as_json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> Reply:
        """Which files are large, and which already exist."""
        _, files = self.commit_of(repo, revision)
        answers = []
        for path in (one["path"] for one in json.loads(body)["files"]):
            mode, oid = "lfs" if path.endswith(LARGE) else "regular", files[path].oid if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": answers})

    def lfs_batch(self, body: bytes, repo: str) -> Reply:
        """Upload addresses of the large files that do not exist yet."""
        objects = json.loads(body)["objects"]
        for one in objects:
            if one["oid"] not in self.uploads:
                one["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}
        return as_json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> Reply:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "HashMismatch")
        self.uploads[oid] = body
        return Reply(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> Reply:
        files = dict(self.commit_of(repo, revision)[1])
        for line in map(json.loads, body.splitlines()):
            if line["key"] != "header":
                files[line["value"]["path"]] = self.committed(**line)
        commit = self.add_commit(repo, files)
        return as_json({"commitOid": commit, "commitUrl": f"{self.endpoint}/{repo}/commit/{commit}"})

    def committed(self, key: str, value: dict[str, str]) -> File:
        if key == "file":
            return File(base64.b64decode(value["content"]), large=False)
        if key != "lfsFile" or value["oid"] not in self.uploads:
            raise Refusal(400, "BadCommit")
        return File(self.uploads[value["oid"]], large=True)

    def info(self, body: bytes, repo: str, revision: str | None) -> Reply:
        commit, files = self.commit_of(repo, revision or "main")
        return as_json({"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> Reply:
        commit, files = self.commit_of(repo, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", **{"X-Repo-Commit": commit})
        oid, content = files[path].oid, files[path].content
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))} if files[path].large else {}
        return Reply(200, {"X-Repo-Commit": commit, "ETag": f'"{oid}"'} | linked, content)


REPO, REVISION = "(?P<repo>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", Hub.create_repo),
    ("POST", "/api/validate-yaml", Hub.validate_yaml),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", Hub.preupload),
    ("POST", f"/{REPO}\\.git/info/lfs/objects/batch", Hub.lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Hub.upload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", Hub.commit),
    ("GET", f"/api/models/{REPO}(?:/revision/{REVISION})?", Hub.info),
    ("GET", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Hub.resolve),
)
NEED_TOKEN = (Hub.create_repo, Hub.preupload, Hub.lfs_batch, Hub.commit)


class Handler(BaseHTTPRequestHandler):
    """HTTP for the Hub of the server: finds the route, checks the token, writes the reply."""

    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.hub.requests.append(f"{self.command} {path}")
            try:
                reply = self.reply_to("GET" if self.command == "HEAD" else self.command, path, body)
            except Refusal as refusal:
                reply = refusal.reply
        self.write(reply)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def reply_to(self, method: str, path: str, body: bytes) -> Reply:
        for route_method, pattern, answer in ROUTES:
            if method == route_method and (found := re.fullmatch(pattern, path)):
                if answer in NEED_TOKEN and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refusal(401, "Unauthorized")
                return answer(self.server.hub, body, **found.groupdict())
        raise Refusal(404, "NoSuchEndpoint")

    def write(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in (reply.headers | {"Content-Length": str(len(reply.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, *args) -> None:
        """Log nothing to stderr; `Hub.requests` records the requests."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that runs until the block ends."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hub, server.lock = Hub(f"http://127.0.0.1:{server.server_port}"), threading.Lock()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.hub
        finally:
            server.shutdown()
            thread.join()
