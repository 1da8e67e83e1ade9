"""A stand-in for the Hugging Face hub: what huggingface_hub asks for when it fetches data sets and models."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that has gone is no error here."""


class Hub:
    """Serves ``files``: content by ``<owner>/<repository>/<path>``. ``requests`` keeps what was asked for; a file whose
    name is in ``cut`` ends after that many bytes, once."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cut: dict[str, int] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.url = ""

    def fetched(self) -> list[str]:
        """The files that were fetched, sorted."""
        return sorted(
            path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/resolve/" in path
        )


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a server on a free port of this machine that answers by ``handler``."""
    server = _Quiet(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub(files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path, asked = unquote(self.path.partition("?")[0]), self.headers.get("Range")
            hub.requests.append((self.command, path, asked))
            json_type = {"Content-Type": "application/json"}
            if found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", path):
                self._send(200, _tree(hub.files, found[1], found[2] or ""), json_type, with_body)
            elif (found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/[^/]+", path)) and any(
                name.startswith(f"{found[1]}/") for name in hub.files
            ):
                self._send(200, json.dumps({"id": found[1], "sha": COMMIT}).encode(), json_type, with_body)
            elif (found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)) and (
                content := hub.files.get("/".join(found.groups()))
            ) is not None:
                self._send_file("/".join(found.groups()), content, asked, with_body)
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body)

        def _send_file(self, name: str, content: bytes, asked: str | None, with_body: bool) -> None:
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            headers["Accept-Ranges"] = "bytes"
            if asked is None:
                body, status = content, 200
            else:
                first = int(asked.removeprefix("bytes=").split("-")[0])
                body, status = content[first:], 206
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(status, body, headers, with_body, hub.cut.pop(name, None) if with_body else None)

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], with_body: bool, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    with listening(Handler) as hub.url:
        yield hub


def _tree(files: dict[str, bytes], repo: str, folder: str) -> bytes:
    prefix = f"{repo}/{folder}/" if folder else f"{repo}/"
    return json.dumps(
        [
            {"type": "file", "path": name.removeprefix(f"{repo}/"), "size": len(content), "oid": "0" * 40}
            for name, content in files.items()
            if name.startswith(prefix)
        ]
    ).encode()
