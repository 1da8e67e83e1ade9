"""Waiting for the name of the node where all processes meet."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tinytron.errors import ConfigError
from tinytron.utils import launcher


def test_the_name_of_a_node_that_starts_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries: list[str] = []

    def late(host: str, port: Any) -> list[Any]:
        tries.append(host)
        if len(tries) < 3:
            raise socket.gaierror(-2, "Name or service not known")
        return []

    monkeypatch.setattr(socket, "getaddrinfo", late)
    launcher.await_name("node-0", seconds=60, every=0.01)
    assert tries == ["node-0"] * 3
    assert capsys.readouterr().err == "node-0 (--master_addr, MASTER_ADDR) has no address yet; trying for 60 s\n"


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_a_name_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    def never(host: str, port: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", never)
    text = r"node-0 \(--master_addr, MASTER_ADDR\) has no address \(.*not known\); use the name or IP"
    with pytest.raises(ConfigError, match=text):
        launcher.await_name("node-0", seconds=seconds, every=0.01)


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_cannot_be_is_an_error(port: int) -> None:
    with pytest.raises(ConfigError, match=rf"--master_port {port} \(MASTER_PORT\) must be in 1\.\.65535; use 29500"):
        launcher.check_meeting_place("localhost", port, several=False)
    for works in (1, 65535, None):
        launcher.check_meeting_place("[::1]", works, several=False)


def test_names_and_addresses_of_this_machine_are_known_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("localhost", "127.0.0.1", "::1", socket.gethostname()):
        launcher.await_name(host, seconds=0)
    assert capsys.readouterr().err == ""
