"""The server of the live page: what it serves, to whom, and what it refuses."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import pytest

from tests.helpers.run_folders import HOSTILE, lines, make_run, records
from tests.helpers.runs import ROOT
from tinytron.errors import ConfigError
from tinytron.observe import server as module
from tinytron.observe.folder import LocalFolder, open_folder
from tinytron.observe.run import Run
from tinytron.observe.server import ASSETS, PAGE, WatchServer


def runs_of(*folders: Path) -> list[Run]:
    return [Run(open_folder(str(folder)), folder.name) for folder in folders]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WatchServer]:
    """A server of two runs, the second of which is hostile."""
    monkeypatch.setattr(LocalFolder, "pause", 0.05)
    entries = records(30)
    entries[0] |= {HOSTILE: 1.0, "sample": HOSTILE}
    with WatchServer(
        runs_of(make_run(tmp_path / "one", records(20)), make_run(tmp_path / "two", entries)), port=0
    ) as made:
        made.start_following()
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield made
        made.stop_following()
        made.shutdown()


def get(
    server: WatchServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def no_constant(text: str) -> NoReturn:
    raise AssertionError(f"{text} is not JSON")


def get_json(server: WatchServer, path: str) -> Any:
    status, headers, content = get(server, path)
    assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    return json.loads(content, parse_constant=no_constant)


def until_read(server: WatchServer, number: int, step: int) -> dict[str, Any]:
    for _ in range(500):
        run: dict[str, Any] = get_json(server, f"/api/runs/{number}")
        if run["summary"]["step"] >= step:
            return run
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not arrive: {run['summary']}")


def test_runs_are_served_and_followed(server: WatchServer, tmp_path: Path) -> None:
    first = until_read(server, 0, 20)
    assert (first["name"], first["path"]) == ("one", str(tmp_path / "one"))
    versions = [run["version"] for run in get_json(server, "/api/runs")["runs"]]
    assert versions[0] == first["version"]
    with open(tmp_path / "one" / "log.jsonl", "a") as file:
        file.write(lines(records(10, first=21)))
    later = until_read(server, 0, 30)
    assert later["version"] != first["version"]
    (loss,) = (c for c in later["curves"] if (c["stage"], c["chart"]) == ("train", "loss"))
    assert loss["x"] == list(range(1, 31))


def test_hostile_names_and_texts_stay_text(server: WatchServer) -> None:
    shown = until_read(server, 1, 30)
    first, *inner = HOSTILE.split("/")  # a slash has its usual meaning
    assert (f"{first}/{inner[-1]}", "/".join(inner[:-1])) in {(c["chart"], c["series"]) for c in shown["curves"]}
    assert shown["texts"] == [{"step": 1, "name": "sample", "text": HOSTILE}]


@pytest.mark.parametrize("path", ASSETS)
def test_the_page_has_its_parts_and_may_load_nothing_else(path: str, server: WatchServer) -> None:
    status, headers, content = get(server, path)
    assert (status, content) == (200, (PAGE / ASSETS[path][0]).read_bytes())
    assert headers["Content-Type"] == f"{ASSETS[path][1]}; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")
    assert "http" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_all_links_of_the_page_are_served() -> None:
    text = (PAGE / "index.html").read_text(encoding="utf-8")
    linked = re.findall(r'(?:src|href)="(?!#|data:)([^"]+)"', text)
    assert sorted(f"/{name}" for name in linked) == sorted(set(ASSETS) - {"/"})


def test_a_part_of_a_long_run_has_all_of_its_steps(server: WatchServer, tmp_path: Path) -> None:
    with open(tmp_path / "one" / "log.jsonl", "a") as file:
        file.write(lines(records(9980, first=21)))
    whole = until_read(server, 0, 10_000)
    for path in (
        "/api/runs/0?first=5000.5&last=5100.000",
        "/api/runs/0?first=5000.5&last=1e9",
        "/api/runs/0?first=nan",
    ):
        (loss,) = (c for c in get_json(server, path)["curves"] if (c["stage"], c["chart"]) == ("train", "loss"))
        if path.endswith("5100.000"):
            assert loss["x"] == list(range(5000, 5102))
        else:  # not understood
            assert len(loss["x"]) <= 2002
            assert loss["x"][-1] == 10_000
    assert len(whole["curves"][0]["x"]) <= 2002


def test_an_installed_package_has_the_page() -> None:
    (listed,) = re.findall(r'^"tinytron.observe" = \[(.*?)\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    patterns = re.findall(r'"([^"]+)"', listed)
    for file in (path for path in Path(str(PAGE)).rglob("*") if path.is_file()):
        name = PurePosixPath("page") / file.relative_to(str(PAGE)).as_posix()
        assert any(len(name.parts) == len(Path(p).parts) and name.match(p) for p in patterns), name
    assert (Path(str(PAGE)) / "vendor" / "uPlot.LICENSE").read_text().startswith("The MIT License")


@pytest.mark.parametrize(
    "path",
    [
        *("/../setup.py", "/%2e%2e/setup.py", "/vendor/../../server.py", "//etc/passwd", "/etc/passwd", "/api/runs/2"),
        *("/api/runs/-1", "/api/runs/0/../1", "/api/runs/", "/api/runs/x", "/api/runs/²", "/index.html", "/log.jsonl"),
        "/api/runs/99999999999999999999",
    ],
)
def test_nothing_else_is_served(path: str, server: WatchServer) -> None:
    status, _, content = get(server, path.replace("²", "%C2%B2"))
    assert (status, content) == (404, b"not found: the page is at /\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_only_get_is_answered(method: str, server: WatchServer) -> None:
    assert get(server, "/", method)[0] == 501


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8265", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_a_foreign_name_is_refused(host: str, server: WatchServer) -> None:
    """Or a page of another site could read the runs through the browser, by a name that it points to this machine."""
    status, _, content = get(server, "/api/runs", Host=host)
    assert (status, content) == (403, b"this name is not one of the server's; use its address\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST", "[::1]:8265", "[::1]", "192.168.1.7:80"])
def test_addresses_are_no_foreign_names(host: str, server: WatchServer) -> None:
    assert get(server, "/api/runs", Host=host)[0] == 200


def test_the_first_free_port_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = runs_of(make_run(tmp_path / "one", records(2)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(module, "FIRST_PORT", port)
        with WatchServer(runs) as server:
            assert port < server.server_address[1] < port + module.PORTS
            assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"
            assert server.is_private
        with pytest.raises(
            ConfigError, match=rf"^--port {port} is in use or not allowed; use --port 0 for any free one$"
        ):
            WatchServer(runs, port=port)
        monkeypatch.setattr(module, "PORTS", 1)
        with pytest.raises(ConfigError, match=rf"^the ports {port} to {port} are in use or not allowed; use --port 0"):
            WatchServer(runs)


def test_a_host_of_another_machine_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"^--host 203\.0\.113\.7 is not an address of this machine .*; use 127\.0\.0\.1$"
    ):
        WatchServer([], "203.0.113.7", 0)


def test_all_interfaces_are_not_private() -> None:
    with WatchServer([], "0.0.0.0", 0) as server:
        assert not server.is_private
        assert server.is_known(f"{socket.gethostname()}:80")
        assert not server.is_known("evil.example")
