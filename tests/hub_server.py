"""A small hub on 127.0.0.1 that speaks the endpoints which slimvit uses, through the hub's own client, and keeps what it is given.

Small files are committed as they are; *.onnx go the way of large ones, by git-lfs, as at the real hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_" + "of-these-tests"
POLL_S = 0.01
"""How soon a server notices that it is to end; each test with a hub waits for that."""


@dataclass
class Repository:
    """Branches of files; every commit is known by a number. A hidden one is private to somebody else than the token's owner."""

    private: bool = False
    hidden: bool = False
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"*.onnx lfs\n"}})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, bytes] | None:
        """Those of a branch, or of a commit."""
        named = {self.sha(name): files for name, files in self.branches.items()} | self.branches
        return named.get(revision)

    def sha(self, branch: str) -> str:
        """Of what a branch holds now."""
        listing = sorted((path, hashlib.sha1(content).hexdigest()) for path, content in self.branches[branch].items())
        return hashlib.sha1(json.dumps(listing).encode()).hexdigest()


@dataclass
class Hub:
    """What the server knows; `status` other than 0 is answered to every request of the API, and once closed nothing is."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: int = 0
    may_write: bool = True
    close: Callable[[], None] = lambda: None


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    hub.close = close
    try:
        yield hub
    finally:
        close()


@contextmanager
def visited(monkeypatch: pytest.MonkeyPatch, cache: Path, **further: object) -> Iterator[Hub]:
    """A hub on this machine that the hub's own client talks to, with a token and a cache of its own, in a block.

    Further settings are of the client, which reads its environment once.
    """
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as hub:
        settings = {
            "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url),
            "ENDPOINT": hub.url,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # large files go by git-lfs, which this hub speaks
            **further,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):  # every method of HTTP
            return self._handle
        raise AttributeError(name)

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.hub.status:
            return self._error(self.hub.status, "")
        if token not in ("", TOKEN):
            return self._error(401, "", "Invalid credentials in Authorization header")
        if self.command == "PUT":
            self.hub.uploads[path.rpartition("/")[2]] = body
            return self._json({})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._large(json.loads(body))
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/?(.*))?", path):
            return self._api(found[1], found[2] or "revision", found[3] or "", body, token)
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._file(found[1], found[2], found[3], token)
        return self._error(404, "")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _seen(self, name: str, token: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        if repository is None or repository.hidden:
            return None
        return repository if token or not repository.private else None

    def _create(self, asked: dict[str, object], token: str) -> None:
        if not token:
            return self._error(401, "")
        if not self.hub.may_write:
            return self._error(403, "", "You don't have the rights to create a model under the namespace")
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("private") is True or asked.get("visibility") == "private"
        if name in self.hub.repositories:
            return self._error(409, "", "You already created this model repo")
        self.hub.repositories[name] = Repository(private=private)
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _api(self, name: str, what: str, rest: str, body: bytes, token: str) -> None:
        repository = self._seen(name, token)
        if repository is None:
            return self._error(401 if not token else 404, "RepoNotFound", "Repository not found")
        if repository.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        if what == "branch":
            repository.branches.setdefault(rest, dict(repository.branches["main"]))
            return self._json({})
        revision = rest.partition("/")[0] or "main"
        files = repository.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "revision":
            branch = revision if revision in repository.branches else "main"
            return self._json(
                {
                    "id": name,
                    "modelId": name,
                    "private": repository.private,
                    "sha": repository.sha(branch),
                    "siblings": [{"rfilename": path} for path in files],
                }
            )
        if what == "tree":
            return self._json([_entry(path, content) for path, content in sorted(files.items())])
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".onnx") else "regular",
                    "shouldIgnore": False,
                }
                for each in asked
            ]
            return self._json({"files": modes})
        if what == "commit":
            return self._commit(name, repository, revision, body)
        return self._error(404, "")

    def _commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        if not self.hub.may_write:
            return self._error(403, "", "Forbidden")
        files = repository.branches[branch]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                if value.get("parentCommit") not in (None, repository.sha(branch)):
                    return self._error(412, "", "A commit has happened since")
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        return self._json(
            {
                "success": True,
                "commitOid": repository.sha(branch),
                "commitUrl": f"{self.hub.url}/{name}/commit/{repository.sha(branch)}",
            }
        )

    def _large(self, asked: dict[str, list[dict[str, object]]]) -> None:
        objects = [
            {
                **each,
                "actions": {"upload": {"href": f"{self.hub.url}/uploads/{each['oid']}", "header": {}}},
            }
            for each in asked["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _file(self, name: str, revision: str, path: str, token: str) -> None:
        repository = self._seen(name, token)
        if repository is None:
            return self._error(401 if not token else 404, "RepoNotFound", "Repository not found")
        files = repository.files(revision)
        if files is None:
            return self._error(404, "RevisionNotFound", "Revision not found")
        if path not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        content = files[path]
        commit = repository.sha(revision) if revision in repository.branches else revision
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self._answer(200, content, headers)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        self._answer(status, json.dumps({"error": message}).encode(), {**headers, "X-Error-Message": message})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(path: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if path.endswith(".onnx"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
