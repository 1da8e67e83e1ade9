"""Notices that the machine will be taken away: files and metadata services, with stand-ins on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tinytron.utils.preemption import Preemption, is_notice

AZURE = '{{"DocumentIncarnation": 1, "Events": [{{"EventId": "a", "EventType": "{}"}}]}}'


@pytest.mark.parametrize(
    ("text", "notice"),
    [
        ("TRUE", True), ("FALSE\n", False), ("", False), ("NONE", False), ("TERMINATE_ON_HOST_MAINTENANCE", True),
        ('{"action": "terminate", "time": "2026-01-01T00:00:00Z"}', True),
        (AZURE.format("Preempt"), True), (AZURE.format("Reboot"), False), ('{"Events": []}', False),
    ],
)  # fmt: skip
def test_answers(text: str, notice: bool) -> None:
    assert is_notice(text) == notice


class _Service(BaseHTTPRequestHandler):
    """A metadata service. ``answers`` are given one after the other, the last one for ever; with ``token``, as Amazon's."""

    answers: ClassVar[list[tuple[int, str]]] = []
    token: ClassVar[bool] = False
    asked: ClassVar[list[dict[str, str]]] = []

    def do_GET(self) -> None:
        cls = type(self)
        cls.asked.append(dict(self.headers.items()))
        if cls.token and self.headers.get("X-aws-ec2-metadata-token") != "secret":
            self._send(401, "")
            return
        self._send(*(cls.answers.pop(0) if len(cls.answers) > 1 else cls.answers[0]))

    def do_PUT(self) -> None:
        ok = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self._send(200 if ok else 400, "secret")

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[tuple[type[_Service], str]]:
    class Own(_Service):
        asked: ClassVar[list[dict[str, str]]] = []

    server = HTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Own, f"http://127.0.0.1:{server.server_port}/latest/notice"
    server.shutdown()
    thread.join()
    server.server_close()


def _watch(file: str | None, url: str | None, seconds: float = 5.0) -> tuple[list[str], list[str]]:
    """Where notices were seen within ``seconds``, and the messages."""
    told: list[str] = []
    said: list[str] = []
    seen = threading.Event()

    def notify(where: str) -> None:
        told.append(where)
        seen.set()

    with Preemption(file, url, notify, every=0.02, say=said.append).watching():
        seen.wait(seconds)
    return told, said


def test_a_file_that_appears_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "notice"
    assert _watch(str(path), None, 0.2) == ([], [])
    threading.Timer(0.2, path.touch).start()
    assert _watch(str(path), None) == ([str(path)], [])


@pytest.mark.parametrize("token", [False, True])
def test_a_service_that_has_nothing_and_then_a_notice(service: tuple[type[_Service], str], token: bool) -> None:
    own, url = service
    own.answers, own.token = [(404, "no"), (200, "FALSE"), (503, "busy"), (503, "busy"), (200, "TRUE")], token
    told, said = _watch(None, url)
    assert told == [url]
    (line,) = said
    assert line.startswith(f"--preempt_url {url} cannot be read (HTTP Error 503")
    assert all(headers["Metadata-Flavor"] == "Google" and headers["Metadata"] == "true" for headers in own.asked)


def test_a_service_that_is_not_there_is_said_once_and_nothing_waits_for_it() -> None:
    began = time.monotonic()
    told, said = _watch(None, "http://127.0.0.1:9/notice", 0.5)
    assert (told, len(said)) == ([], 1)
    assert time.monotonic() - began < 2


def test_without_a_place_there_is_no_thread() -> None:
    before = threading.active_count()
    with Preemption(None, None, lambda where: None).watching():
        assert threading.active_count() == before
