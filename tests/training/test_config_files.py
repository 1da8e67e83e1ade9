"""``--config FILE`` and ``--print_config``: what a file says is what flags would say."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, train
from tinytron.cli.main import main
from tinytron.errors import ConfigError
from tinytron.training import Trainer, build_config, parse_args
from tinytron.training.config_files import as_json, as_yaml
from tinytron.utils.flags import Flag

Pools = Callable[[int], Ranks]


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(("name", "text"), [
    ("sections.json", '{"train": {"seq_len": 64, "do_val": true}, "optim": {"max_lr": 0.5, "muon_ns_steps": 7}}'),
    ("flat.json", '{"seq_len": 64.0, "do_val": true, "max_lr": 0.5, "muon_ns_steps": 7}'),
    ("flat.yaml", "seq_len: 2**6\ndo_val: yes\nmax_lr: 5e-1\nmuon_ns_steps: 7.0 # why\n"),
    ("sections.yml", "train: {seq_len: 64, do_val: on}\noptim:\n  max_lr: .5\n  muon_ns_steps: 7\n"),
    ("mixed", "train: {seq_len: 64, do_val: 'true'}\nmax_lr: '0.5'\nmuon_ns_steps: 7\n"),
])  # fmt: skip
def test_a_file_says_what_flags_say(tmp_path: Path, name: str, text: str) -> None:
    if not name.endswith("json"):
        pytest.importorskip("yaml")
    flags = ("--total_batch_size", 128, "--batch_size", 1)
    expected = config_of("--seq_len", 64, "--do_val", "--max_lr", 0.5, "--muon_ns_steps", 7, *flags)
    assert config_of("--config", write(tmp_path / name, text), *flags) == expected
    assert config_of(*flags, f"--config={tmp_path / name}") == expected  # wherever it stands


def test_a_section_without_options_is_allowed(tmp_path: Path) -> None:
    """As in YAML where every line of a section is a comment."""
    assert config_of("--config", write(tmp_path / "a.json", {"model": None, "optim": {}, "max_lr": 0.5})) == config_of(
        "--max_lr", 0.5
    )


def test_a_preset_inside_a_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset is not an option of model; put it outside the sections"):
        config_of("--config", write(tmp_path / "a.json", {"model": {"preset": "tiny"}}))


def test_flags_win_over_files_and_later_files_over_earlier_ones(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", {"max_lr": 0.1, "min_lr": 0.01, "max_steps": 7, "steps_to_profile": [3, 4]})
    second = write(tmp_path / "b.json", {"max_lr": 0.2, "max_steps": None, "eval_tasks": []})
    config = config_of("--config", first, "--min_lr", 0.05, "--config", second)
    assert (config.optim.max_lr, config.optim.min_lr, config.train.max_steps) == (0.2, 0.05, None)
    assert (config.train.steps_to_profile, config.train.eval_tasks) == ((3, 4), ())
    assert config_of("--config", first, "--config", second, "--config", first).optim.max_lr == 0.1


@dataclass(frozen=True)
class _Own:
    """Of a subclass."""

    strength: Annotated[float, Flag("of something", at_least=0)] = 1.0


@pytest.mark.parametrize("written", [as_json, as_yaml])
def test_a_printed_configuration_is_read_back(tmp_path: Path, written: Callable[[Any], str]) -> None:
    pytest.importorskip("yaml")
    flags = [*TINY, "--max_steps", 9, "--adam_eps", 1e-12, "--grad_clip_value", "inf", "--exp_name", "a: b # c"]
    flags += [
        "--strength",
        2,
        "--eval_tasks",
        "x.jsonl",
        "y.jsonl",
        "--use_moe",
        "--dense_layers",
        1,
        "--log_dir",
        "-x",
    ]
    flags = [str(flag) for flag in flags]
    flags[-2:] = ["--log_dir=-x"]
    config = build_config(parse_args(flags, {"own": _Own}))
    path = write(tmp_path / "c.yaml", written(config))
    assert build_config(parse_args(["--config", str(path)], {"own": _Own})) == config
    longer = build_config(parse_args(["--config", str(path), "--seq_len", "24"], {"own": _Own}))
    assert longer.model.block_size == 24  # as without the file


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_the_command_prints_what_the_command_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    pytest.importorskip("yaml")
    assert main(["pretrain", "--print_config", form, "--num_layer", "3"]) == 0
    path = write(tmp_path / "c", capsys.readouterr().out)
    assert main(["pretrain", "--config", str(path), "--print_config"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["model"]["num_layer"], again["logging"]["print_config"]) == (3, "no")
    assert again["config_hash"] == config_of("--num_layer", 3).config_hash()


def test_a_runs_own_file_continues_the_run(ranks: Pools, tmp_path: Path) -> None:
    """One of an earlier version, too, which knew --print_config as a switch."""
    first = ranks(1).run(train, Trainer, tmp_path, "--max_steps", 2)[0]
    content = json.loads((first.folder / "config.json").read_text())
    content["config"]["logging"]["print_config"] = False
    path = write(tmp_path / "c.json", content)
    again = ranks(1).run(_train_from, path, "--max_steps", 4)[0]
    assert again == (first.folder, 4)


def _train_from(path: Path, *flags: object) -> tuple[Path, int]:
    trainer = Trainer(config_of("--config", path, *flags))
    trainer.train()
    return trainer.log_dir, trainer.step


WRONG: list[tuple[Any, str]] = [
    ({"max_lrr": 1}, "there is no option max_lrr; did you mean max_lr?"),
    ({"learning_rate": 1}, "there is no option learning_rate; it is --max_lr here"),
    ({"train": {"sec_len": 1}}, "there is no option sec_len in train; did you mean seq_len?"),
    ({"train": {"max_lr": 1}}, "max_lr is not an option of train; it belongs to optim"),
    ({"trian": {"seq_len": 1}}, "there is no section trian; did you mean train?"),
    ({"seq_len": True}, "seq_len must not be true; its default is 4096"),
    ({"seq_len": None}, "seq_len must not be empty; its default is 4096"),
    ({"seq_len": {"a": 1}}, 'seq_len must be a single value or a list of them, not {"a": 1}'),
    ({"eval_tasks": [["a"]]}, 'eval_tasks must be a single value or a list of them, not [["a"]]'),
    ({"max_lr": "x"}, "argument --max_lr: invalid float value: 'x'"),
    ({"steps_to_profile": [1]}, "argument --steps_to_profile: expected 2 arguments"),
    ({"precision": "fp8"}, "argument --precision: invalid choice: 'fp8'"),
    ({"config": {"train": {"seq_len": 1.5}}}, "argument --seq_len: '1.5' is not a whole number"),
    ("[1]", "has no options; write lines such as max_lr: 0.001"),
    ("", "is not valid .json ("),
    ("{", "is not valid .json ("),
]  # fmt: skip


@pytest.mark.parametrize(("content", "text"), WRONG)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path: Path, content: Any, text: str) -> None:
    path = write(tmp_path / "c.json", content)
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", str(path)])
    assert str(caught.value).startswith((f"--config {path}: {text}", f"--config {path} {text}"))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--config .*none.yaml cannot be read \(.*\); give a JSON or YAML file"):
        parse_args(["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "latin").write_bytes(b"exp_name: \xe9")
    with pytest.raises(ConfigError, match=r"--config .*latin cannot be read"):
        parse_args(["--config", str(tmp_path / "latin")])
    (tmp_path / "tab.yaml").write_text("a:\n\t- b")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match=r'package yaml is needed .*pip install "tinytron\[config\]"'):
        parse_args(["--config", str(tmp_path / "tab.yaml")])
    monkeypatch.undo()
    pytest.importorskip("yaml")
    with pytest.raises(ConfigError, match=r"--config .*tab.yaml is not valid .yaml \(while scanning"):
        parse_args(["--config", str(tmp_path / "tab.yaml")])
