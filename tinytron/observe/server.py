"""The live page: a small HTTP server that only reads, by default for this machine alone."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from tinytron.errors import ConfigError
from tinytron.observe.run import Run

FIRST_PORT, PORTS = 8265, 20
TICK_SECONDS = 0.2  # between two looks at the clock
SLICE_SECONDS = 0.05  # time slice of reading one log; requests and the other runs come in between
PATIENCE_SECONDS = 1.0  # longest wait for requests before reading continues
STEPS = re.compile(
    r"first=(-?\d{1,20}(?:\.\d{1,20})?)&last=(-?\d{1,20}(?:\.\d{1,20})?)"
)  # the query for a part of a run
PAGE = resources.files("tinytron.observe") / "page"
# The files of the page by address. Nothing else of the disk is served.
ASSETS = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/charts.js": ("charts.js", "text/javascript"),
    "/app.js": ("app.js", "text/javascript"),
    "/vendor/uPlot.iife.min.js": ("vendor/uPlot.iife.min.js", "text/javascript"),
    "/vendor/uPlot.min.css": ("vendor/uPlot.min.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class WatchServer(ThreadingHTTPServer):
    """Serves the page and the ``runs``. ``start_following`` reads them in a thread, again and again."""

    daemon_threads = True

    def __init__(self, runs: Sequence[Run], host: str = "127.0.0.1", port: int | None = None) -> None:
        """Raises: ConfigError if the port is in use, or the host is not of this machine."""
        self.runs, self.host = list(runs), host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._ended = threading.Event()
        self._requests, self._lock = 0, threading.Lock()
        self._bind(port)

    def _bind(self, port: int | None) -> None:
        candidates = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,)
        for candidate in candidates:
            try:
                super().__init__((self.host, candidate), Handler)
            except (OSError, OverflowError) as error:
                reason = error
            else:
                return
        if isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) not in (13, 98, 48):
            raise ConfigError(
                f"--host {self.host} is not an address of this machine ({reason}); use 127.0.0.1"
            ) from reason
        ports = f"the ports {candidates[0]} to {candidates[-1]} are" if port is None else f"--port {port} is"
        raise ConfigError(f"{ports} in use or not allowed; use --port 0 for any free one") from reason

    @property
    def url(self) -> str:
        """The address of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_address[1]}/"

    @property
    def is_private(self) -> bool:
        """True if only programs of this machine can connect."""
        address = ipaddress.ip_address(str(self.server_address[0]))
        return address.is_loopback

    def start_following(self) -> None:
        """Keep the runs up to date until ``stop_following``."""
        threading.Thread(target=self._follow, name="follower", daemon=True).start()

    def stop_following(self) -> None:
        """End the thread of ``start_following``."""
        self._ended.set()

    def _follow(self) -> None:
        due = [0.0] * len(self.runs)  # when to look at a run again
        while not self._ended.is_set():
            for number, run in enumerate(self.runs):
                self._let_requests_pass()
                if time.monotonic() >= due[number] and run.refresh(SLICE_SECONDS):
                    due[number] = time.monotonic() + run.folder.pause
            if all(when > time.monotonic() for when in due):
                self._ended.wait(TICK_SECONDS)

    def _let_requests_pass(self) -> None:
        """Wait while requests are answered, but not for long: a thread that parses a long log would slow them down."""
        until = time.monotonic() + PATIENCE_SECONDS
        while self._requests and time.monotonic() < until:
            time.sleep(0.002)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Context in which a request is answered."""
        with self._lock:
            self._requests += 1
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1

    def is_known(self, host: str) -> bool:
        """True for a ``Host`` header of this server. Another name may be one that a foreign page made to point here, to
        read through the browser what only this machine can read (DNS rebinding); it would not be a plain address."""
        name = host.rsplit(":", 1)[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
        if name.lower() in ("localhost", self.host.lower()):
            return True
        if not self.is_private and name.lower() == socket.gethostname().lower():
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests for the page, for the list of runs, and for one run by its number, or a part of it."""

    server: WatchServer
    server_version, sys_version = "tinytron", ""
    timeout = 30

    def do_GET(self) -> None:
        """Answer one request."""
        if not self.server.is_known(self.headers.get("Host", "")):
            return self._refuse(HTTPStatus.FORBIDDEN, "this name is not one of the server's; use its address")
        with self.server.request():
            path, _, query = self.path.partition("?")
            self._answer_path(path, query)

    def _answer_path(self, path: str, query: str) -> None:
        if path in ASSETS:
            name, kind = ASSETS[path]
            return self._answer((PAGE / name).read_bytes(), kind)
        if path == "/api/runs":
            return self._answer_json(
                {"runs": [{"version": run.version, "summary": run.summary()} for run in self.server.runs]}
            )
        number = path.removeprefix("/api/runs/")
        if number.isascii() and number.isdecimal() and len(number) < 6 and int(number) < len(self.server.runs):
            run = self.server.runs[int(number)]
            if match := STEPS.fullmatch(query):
                return self._answer_json(run.detail(float(match[1]), float(match[2])))
            return self._answer_json(run.payload())
        return self._refuse(HTTPStatus.NOT_FOUND, "not found: the page is at /")

    def _answer_json(self, value: Any) -> None:
        self._answer(json.dumps(value, allow_nan=False, separators=(",", ":")).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._answer(f"{text}\n".encode(), "text/plain", status)

    def _answer(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {
            **HEADERS,
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": len(content),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Requests are not printed."""
