"""Remote storage for tests: an S3 server of their own, and a folder of it (or of the disk, where moto is not installed)."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec
import pytest

from tinytron.utils import remote

HAS_S3 = all(importlib.util.find_spec(name) for name in ("moto", "flask", "s3fs"))
SECRET = "not-to-be-logged"


class S3Server:
    """An S3 service on a free port of this machine. Its buckets outlive ``stop``: they belong to the process."""

    def __init__(self, port: int = 0) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        self._server.start()
        self.port: int = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    if not HAS_S3:
        pytest.skip("needs pip install s3fs 'moto[server]'")
    server = S3Server()
    yield server
    server.stop()


def point_to(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the variables by which S3 clients find ``server``, here and in processes started from now on."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # or a missing key is looked for on the network
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # they have read the environment


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a new bucket."""
    point_to(s3_server, monkeypatch)
    bucket = f"b{abs(hash(tmp_path))}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty remote folder; staging is below ``tmp_path / "cache"``, and nobody pauses before trying again."""
    monkeypatch.setenv("TINYTRON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    if HAS_S3:
        return f"{request.getfixturevalue('s3')}/folder"
    return f"local://{tmp_path}/remote"


def write(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Write texts by name; returns the names."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return list(files)
