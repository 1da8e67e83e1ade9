"""A stand-in for the Hugging Face hub that takes models: what huggingface_hub asks for when it uploads a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from tests.helpers.hub import listening

Answer = tuple[int, Any]


@dataclass
class Repository:
    """Files by branch, and what the commits were called."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: list[tuple[str, str]] = field(default_factory=list)  # branch, title


@dataclass
class ModelHub:
    """``refuse`` decides by method and path with what status to answer instead, ``None``: as usual."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    refuse: Callable[[str, str], int | None] = lambda method, path: None
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        """Status and JSON."""
        if (status := self.refuse(method, path)) is not None:
            return status, {"error": f"refused with {status}"}
        routes: list[tuple[str, str, Callable[..., Answer]]] = [
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", lambda body: (200, {"errors": [], "warnings": []})),
            ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/store/([0-9a-f]{64})", self._store),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        ]
        for wanted, pattern, action in routes:
            if method == wanted and (found := re.fullmatch(pattern, path)):
                return action(*found.groups(), body=body)
        return 404, {"error": f"{method} {path} is not known here"}

    def _create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return 409, url
        self.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        return 200, url

    def _branch(self, name: str, branch: str, body: bytes) -> Answer:
        branches = self.repositories[name].branches
        if branch in branches:
            return 409, {"error": "Reference already exists"}
        branches[branch] = dict(branches["main"])
        return 200, {}

    def _files(self, name: str, branch: str | None) -> dict[str, bytes]:
        return self.repositories[name].branches[branch or "main"]

    def _tree(self, name: str, branch: str, body: bytes) -> Answer:
        files = self._files(name, branch)
        return 200, [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()]

    def _info(self, name: str, branch: str | None, body: bytes) -> Answer:
        files = self._files(name, branch)
        return 200, {"id": name, "sha": "0" * 40, "siblings": [{"rfilename": path} for path in files]}

    def _preupload(self, name: str, branch: str, body: bytes) -> Answer:
        files, asked = self._files(name, branch), json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in asked]
        for answer in modes:
            if (content := files.get(answer["path"])) is not None:
                lfs = answer["uploadMode"] == "lfs"
                answer["oid"] = hashlib.sha256(content).hexdigest() if lfs else _oid(content)
        return 200, {"files": modes}

    def _batch(self, name: str, body: bytes) -> Answer:
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/store/{asked['oid']}"}}
            objects.append({**asked, **({} if asked["oid"] in self.stored else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> Answer:
        assert hashlib.sha256(body).hexdigest() == oid
        self.stored[oid] = body
        return 200, {}

    def _commit(self, name: str, branch: str, body: bytes) -> Answer:
        files, title = dict(self._files(name, branch)), ""
        for line in body.splitlines():
            key, value = (operation := json.loads(line))["key"], operation["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        repository = self.repositories[name]
        repository.branches[branch] = files
        repository.commits.append((branch, title))
        commit = {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 200, commit


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".bin")) else "regular"


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def taking() -> Iterator[ModelHub]:
    """An empty hub on a free port of this machine."""
    hub = ModelHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command != "PUT":  # as to a store of signed addresses
                hub.tokens.add(self.headers.get("Authorization"))
            status, content = hub.answer(self.command, unquote(self.path.partition("?")[0]), body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _answer

    with listening(Handler) as hub.url:
        yield hub
