"""The settings file: every key, and one clear error for each mistake, which never repeats a secret."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.dispatch.settings_table import PAGE, updated
from tests.helpers.runs import ROOT
from tinytron.dispatch.checks import mebibytes
from tinytron.dispatch.credentials import secrets_of
from tinytron.dispatch.reading import read_settings, settings_of
from tinytron.dispatch.settings import HOST_TYPES, Cluster, Partition, Plain, Secret, Settings, Slurm
from tinytron.errors import ConfigError
from tinytron.utils.flags import config_fields

LAB: dict[str, Any] = {"root": "/r", "work": "~/w"}


def _settings(cluster: dict[str, Any] | None = None, host: dict[str, Any] | None = None, **top: Any) -> Settings:
    hosts = {"box": {"type": "plain", "cluster": "lab", **(host or {})}}
    return settings_of({"clusters": {"lab": {**LAB, **(cluster or {})}}, "hosts": hosts, **top})


def test_the_example_is_valid() -> None:
    found = read_settings(str(ROOT / "examples" / "dispatch.yaml"))
    assert found.in_order() == ["box", "university", "cloud"]
    university = found.hosts["university"]
    assert isinstance(university, Slurm)
    assert university.partitions is not None
    assert university.partitions[1] == Partition(name="preemptible", constraint="h100")
    assert found.clusters["hpc"].wandb == Secret(env="WANDB_API_KEY")
    assert found.cluster_of("cloud").mount == "redis://redis.example.com:6379/0"


def test_defaults_and_what_follows_from_them() -> None:
    found = _settings(mount="redis://h/0")
    cluster = found.clusters["lab"]
    assert cluster.mount == "redis://h/0"
    assert [cluster.folder(name) for name in ("share", "log", "status")] == ["~/w", "~/w/logs", "~/w/status"]
    assert _settings({"share": "/s/", "log": "/l"}).clusters["lab"].folder("status") == "/s/status"
    assert _settings({"mount": "sqlite3:///x"}, mount="redis://h/0").clusters["lab"].mount == "sqlite3:///x"
    assert found.hosts["box"] == Plain(cluster="lab")
    assert _settings(host={"type": "slurm", "partitions": ["gpu"]}, cluster={"log": "/l"}).hosts["box"] == Slurm(
        cluster="lab", partitions=(Partition(name="gpu"),)
    )
    assert mebibytes("100G", "x") == 102400
    assert mebibytes("512", "x") == 512


@pytest.mark.parametrize("kind", HOST_TYPES)
def test_every_kind_of_host_is_read_from_the_values_that_its_help_proposes(kind: str) -> None:
    import yaml

    content = {
        info.name: yaml.safe_load(f"x: {info.flag.works}")["x"] if isinstance(info.flag.works, str) else info.flag.works
        for info in config_fields(HOST_TYPES[kind])
    }
    folders = {name: f"/data/{name}" for name in ("root", "work", "log")}  # on the claim of the pods
    found = _settings(host={**content, "type": kind, "cluster": "lab"}, cluster=folders).hosts["box"]
    assert type(found) is HOST_TYPES[kind]
    for info in config_fields(HOST_TYPES[kind]):
        assert getattr(found, info.name) is not None


def test_every_setting_of_a_cluster_is_read_from_the_value_that_its_help_proposes() -> None:
    import yaml

    content = {i.name: yaml.safe_load(f"x: {i.flag.works}")["x"] for i in config_fields(Cluster)}
    content["all_squash"] = "1000:1000"  # a number of base 60 to this loader
    found = _settings(content).clusters["lab"]
    assert all(getattr(found, field.name) is not None for field in dataclasses.fields(found))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"cluster": {}}, r"cluster is not a setting; did you mean clusters\?; use one of clusters, hosts, priority"),
        ([], r"the file must be a mapping of settings; write clusters: \{\.\.\.\} and hosts: \{\.\.\.\}"),
        ({"clusters": 3}, r"clusters must be a mapping of settings; write lab: \{root: /data/out, work: /data/work\}"),
        ({"clusters": {"lab": {"root": "/r"}}, "hosts": {}}, r"clusters\.lab\.work is required: .*; write work: /scratch"),
        ({"clusters": {"lab": {**LAB, "rot": 1}}}, r"clusters\.lab\.rot is not a setting; did you mean root\?"),
        ({"clusters": {"lab": {**LAB, "root": []}}}, r"clusters\.lab\.root=\[\] must be text; use /data/tinytron"),
        ({"clusters": {"lab": {**LAB, "root": "r"}}}, r"clusters\.lab\.root r must be an absolute path or begin with ~/"),
        ({"clusters": {"lab": {**LAB, "root": "/a\nb"}}}, r"clusters\.lab\.root '/a\\nb' must not be empty"),
        ({"clusters": {"lab": {**LAB, "cache_size": "big"}}}, r"cache_size big must be a number with M, G or T; use 100G"),
        ({"clusters": {"lab": {**LAB, "all_squash": "me"}}}, r"all_squash me must be UID:GID, as 1000:1000"),
        ({"clusters": {"lab": {**LAB, "cache_size": "0G"}}}, r"cache_size 0G must be a number with M, G or T; use 100G"),
        ({"clusters": {"lab": {**LAB, "all_squash": "60010"}}}, r"all_squash 60010 must be UID:GID, as 1000:1000"),
        ({"clusters": {"lab": {**LAB, "python": "python3"}}}, r"python python3 must be an absolute path or begin with ~/"),
        ({"clusters": {"lab": {**LAB, "wandb": {"file": "key"}}}}, r"WANDB_API_KEY key must be an absolute path or begin"),
        ({"clusters": {"a\nb": LAB}}, r"clusters: the name 'a\\nb' must be letters, digits and any of"),
        ({"clusters": {"lab": LAB}, "hosts": {None: {}}}, r"hosts: the name None must be letters, digits and any of"),
        ({"clusters": {"lab": LAB}, "hosts": {"b": {"type": ["plain"]}}}, r"hosts\.b\.type \['plain'\] must be one of"),
        ({"clusters": {"lab": {**LAB, "env": {"HF_TOKEN": "s3cret"}}}},
         r"lab\.env: HF_TOKEN looks like a secret, .* as secrets: \{HF_TOKEN: \{env: HF_TOKEN\}\}"),
        ({"clusters": {"lab": {**LAB, "env": {"A-B": "1"}}}}, r"clusters\.lab\.env: 'A-B' must be letters, digits and _"),
        ({"clusters": {"lab": {**LAB, "env": {"A": "\0"}}}}, r"clusters\.lab\.env\.A must not have the character 0"),
        ({"clusters": {"lab": LAB}, "hosts": {"b": {"type": "slrum"}}}, r"hosts\.b\.type slrum must be one of .*slurm\?"),
        ({"clusters": {"lab": LAB}, "hosts": {"b": {"type": "plain", "cluster": "lap"}}},
         r"hosts\.b\.cluster lap is not in clusters; did you mean lab\?"),
        ({"clusters": {"lab": LAB}, "hosts": {"b": {"type": "slurm", "cluster": "lab"}}},
         r"the log folder ~/w/logs must be an absolute path without a backslash for the SLURM host"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_error(content: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings_of(content)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ({"ssh": "-oProxyCommand=x"}, r"hosts\.box\.ssh '-oProxyCommand=x' must be a host as ssh takes it"),
        ({"ssh": "a b"}, r"without spaces and a leading -; use me@box"),
        ({"chips": {"h100": "many"}}, r"hosts\.box\.chips\.h100=many must be a whole number; use 8"),
        ({"chips": {"h100": -1}}, r"hosts\.box\.chips\.h100 -1 must be at least 0; use 8"),
        ({"chips": 8}, r"hosts\.box\.chips must be a mapping of settings; write \{h100: 8\}"),
        ({"uv_groups": "cuda12"}, r"hosts\.box\.uv_groups must be a list; write \[cuda12\]"),
        ({"chips": {None: 3}}, r"hosts\.box\.chips: the name None must be letters, digits"),
        ({"type": "slurm", "time": "banana"}, r"box\.time banana must be minutes, H:MM:SS or D-HH:MM:SS; use 24:00:00"),
        ({"type": "slurm", "mem": "1.5G"}, r"box\.mem 1\.5G must be a whole number with K, M, G or T; use 64G"),
        ({"type": "slurm", "time": "4"}, r"box\.time 4 leaves no time to train before the signal 300 s before it"),
        ({"type": "slurm", "time": "5:00"}, r"time 5:00 leaves no time"),
        (
            {"type": "slurm", "annotations": {"output": "/x"}},
            r"annotations\.output: tinytron sets this option of sbatch",
        ),
        ({"type": "slurm", "annotations": {"open_mode": "x"}}, r"annotations\.open_mode: tinytron sets this option"),
        ({"type": "slurm", "signal_seconds": 0}, r"hosts\.box\.signal_seconds 0 must be at least 1; use 300"),
        (
            {"type": "slurm", "partitions": [{"nam": "x"}]},
            r"hosts\.box\.partitions\[0\]\.nam is not a setting; did you",
        ),
    ],
)
def test_a_mistake_in_a_host_is_one_error(host: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        _settings({"log": "/l"}, host)


def test_priority_names_hosts_and_proxy_is_a_host() -> None:
    assert _settings(priority=["box"], proxy="gate").proxy == "gate"
    with pytest.raises(
        ConfigError, match=r"priority: there is no host bx; did you mean box\?; name hosts of this file"
    ):
        _settings(priority=["bx"])
    with pytest.raises(ConfigError, match="proxy '-x' must be a host as ssh takes it"):
        _settings(proxy="-x")


@pytest.mark.parametrize(
    "value", ["s3cret", {"value": "s3cret"}, {"env": "A", "file": "s3cret"}, {"env": "s3cret s3cret"}, 3]
)
def test_a_secret_by_value_is_refused_and_not_repeated(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"clusters\.lab\.wandb.* write \{env: WANDB_API_KEY\}") as error:
        _settings({"wandb": value})
    assert "s3cret" not in str(error.value)
    assert error.value.__cause__ is None


def test_switches_sizes_and_engines_as_others_write_them() -> None:
    host = _settings({"log": "/l"}, {"type": "slurm", "rank_logs": "Yes", "mem": "64gb", "time": "0"}).hosts["box"]
    assert host == Slurm(cluster="lab", rank_logs=True, mem="64gb", time="0")
    assert _settings({"mount": "sqlite3:///data/me@lab/meta.db", "env": {"DISABLE_IMPLICIT_TOKEN": 1}}).hosts


@pytest.mark.parametrize("time", ["6", "0:06:00", "1-00", "1-0:30", "INFINITE", "00:05:01", None])
def test_time_limits_as_slurm_writes_them(time: str | None) -> None:
    assert _settings({"log": "/l"}, {"type": "slurm", "time": time}).hosts["box"] == Slurm(cluster="lab", time=time)


@pytest.mark.parametrize(
    "mount",
    [
        "redis://:s3/cret@h:6379/0",
        "postgres://u@h/db?password=s3cret",
        "redis:///:s3cret@h",
        ":s3cret@h:6379/0",
        ["redis://:s3cret@h/0"],
        "redis://:s3cret@h/0\nx",
    ],
)
def test_a_password_that_is_not_understood_is_refused_and_not_repeated(mount: Any) -> None:
    for cluster, top in (({"mount": mount}, {}), ({}, {"mount": mount})):
        with pytest.raises(ConfigError, match="mount") as error:
            _settings(cluster, **top)
        assert "cret" not in str(error.value)


def test_values_are_the_text_that_was_written(tmp_path: Path) -> None:
    """YAML would make numbers of base 60 and 8, rounded ones, and true of them."""
    file = tmp_path / "settings.yaml"
    file.write_text(
        "clusters: {lab: {root: /r, work: /w, all_squash: 1000:10, env: {A: 010, B: 0.10, C: yes, D: 1_000}}}\n"
        "hosts: {hpc: {type: slurm, cluster: lab, time: 24:00:00, cpus: 16, rank_logs: true, chips: {h100: 8}, ssh:}}\n"
    )
    settings = read_settings(str(file))
    cluster, host = settings.clusters["lab"], settings.hosts["hpc"]
    assert cluster.all_squash == "1000:10"
    assert cluster.env == {"A": "010", "B": "0.10", "C": "yes", "D": "1_000"}
    assert isinstance(host, Slurm)
    assert (host.time, host.cpus, host.rank_logs, host.chips, host.ssh) == ("24:00:00", 16, True, {"h100": 8}, None)


def test_secrets_of_any_name_travel(tmp_path: Path) -> None:
    settings = _settings({"secrets": {"MY_API_KEY": {"env": "MINE"}}, "wandb": {"env": "W"}})
    assert secrets_of(settings.clusters["lab"]) == {"WANDB_API_KEY": Secret(env="W"), "MY_API_KEY": Secret(env="MINE")}
    with pytest.raises(ConfigError, match=r"lab\.secrets\.KEY must say where the secret is") as error:
        _settings({"secrets": {"KEY": "s3cret"}})
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("clusters: {a: {}, a: {}}", r"settings\.yaml: a stands twice \(line 1\); remove one of them"),
        ("? [a]\n: 1", r"is not valid YAML \(line 1\)"),
        (None, r"does not exist; copy examples/dispatch\.yaml to ~/\.tinytron\.yaml and edit it"),
        ("a: [s3cret", r"is not valid YAML \(line 1\); compare with examples/dispatch\.yaml"),
        ("a: 1", r"settings\.yaml: a is not a setting"),
        (b"\xff\xfe", r"settings\.yaml cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(tmp_path: Path, text: str | bytes | None, says: str) -> None:
    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=says) as error:
        read_settings(str(file))
    assert "s3cret" not in str(error.value)


def test_the_page_has_every_setting() -> None:
    text = PAGE.read_text()
    assert updated(text) == text, "run: python -m tests.dispatch.settings_table"
