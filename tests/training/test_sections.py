"""Sections of one's own: flags, saved form, identity, tables and rules, without a line in the library."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import pytest

import tinytron
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY
from tinytron.cli.config_tables import tables
from tinytron.errors import ConfigError
from tinytron.training import Config, Trainer, build_config, parse_args
from tinytron.training.config import SECTIONS, all_sections
from tinytron.training.config_files import as_json
from tinytron.utils.flags import Flag

Pools = Callable[[int], Ranks]
KINDS = {"sigmoid": 1, "hinge": 2}


@dataclass(frozen=True, kw_only=True)
class DpoConfig:
    """Preferences."""

    beta: Annotated[float, Flag("how far the policy may go", above=0, at_most=1, works=0.1)] = 0.1
    loss_kind: Annotated[str, Flag("shape of the loss", choices=tuple(KINDS))] = "sigmoid"
    reference: Annotated[str | None, Flag("a frozen model", identity=False)] = None


class DpoTrainer(Trainer):
    """A trainer with options of its own."""

    sections: ClassVar[Mapping[str, type]] = {"dpo": DpoConfig}


def build(*flags: str) -> Config:
    return build_config(parse_args(flags, DpoTrainer.sections))


def test_flags_reach_the_section() -> None:
    config = build("--beta", "0.5", "--loss_kind", "hinge", "--seed", "7")
    assert config["dpo"] == DpoConfig(beta=0.5, loss_kind="hinge")
    assert config.dpo.beta == 0.5  # type: ignore[attr-defined]
    assert (config.seed.seed, config["seed"]) == (7, config.seed)
    with pytest.raises(ConfigError, match="unknown argument --betta; did you mean --beta"):
        build("--betta", "1")
    with pytest.raises(ConfigError, match="unknown argument --beta"):
        parse_args(["--beta", "0.5"])  # not an option of every run
    with pytest.raises(ConfigError, match="argument --loss_kind: invalid choice: 'exp'"):
        build("--loss_kind", "exp")


def test_bounds_and_choices_hold_however_it_is_built() -> None:
    with pytest.raises(ConfigError, match=r"^--beta 0.0 must be in \(0, 1\]; use 0.1$"):
        build("--beta", "0")
    with pytest.raises(ConfigError, match=r"^--loss_kind exp must be one of sigmoid, hinge$"):
        Config(further={"dpo": DpoConfig(loss_kind="exp")})


def test_the_saved_form_and_the_identity_have_it() -> None:
    config = build("--beta", "0.5", "--reference", "log/run")
    assert config.as_dict()["dpo"] == {"beta": 0.5, "loss_kind": "sigmoid", "reference": "log/run"}
    assert list(config.as_dict()) == [*Config().as_dict(), "dpo"]
    assert json.loads(as_json(config))["dpo"]["beta"] == 0.5
    assert config.identity()["dpo.beta"] == 0.5
    assert "dpo.reference" not in config.identity()
    assert build().config_hash() == Config().config_hash()
    assert build("--reference", "x").config_hash() == Config().config_hash()
    assert build("--beta", "0.5").config_hash() != Config().config_hash()
    replaced = dataclasses.replace(config, seed=Config().seed)
    assert replaced["dpo"] is config["dpo"]


def test_help_and_tables_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build("--help")
    assert "how far the policy may go (default: 0.1)" in " ".join(capsys.readouterr().out.split())
    assert "| `--loss_kind`\\* | `sigmoid` | shape of the loss (sigmoid, hinge) |" in tables(DpoTrainer.sections)
    assert "dpo" not in tables()


def _of_a_plain_config(log_dir: Path) -> tuple[float, str]:
    trainer = DpoTrainer(build_config(parse_args([str(flag) for flag in (*TINY, "--log_dir", log_dir)])))
    return trainer.config["dpo"].beta, (trainer.log_dir / "config.json").read_text()


def test_a_trainer_completes_a_configuration_with_its_defaults(ranks: Pools, tmp_path: Path) -> None:
    ((beta, description),) = ranks(1).run(_of_a_plain_config, tmp_path)
    assert beta == 0.1
    assert json.loads(description)["config"]["dpo"]["loss_kind"] == "sigmoid"


@dataclass(frozen=True)
class Clash:
    """Takes the name of a built-in flag."""

    seed: Annotated[int, Flag("a number")] = 0


@dataclass(frozen=True)
class Taken:
    """Takes a name of the parser's."""

    given: Annotated[int, Flag("a number")] = 0


@dataclass(frozen=True)
class Needed:
    """Has no default."""

    beta: Annotated[float, Flag("a number")]


def test_every_option_has_a_default() -> None:
    with pytest.raises(TypeError, match=r"Needed\.beta needs a default"):
        parse_args([], {"mine": Needed})


def test_names_must_be_new() -> None:
    with pytest.raises(TypeError, match="a section train exists already; give DpoConfig another name"):
        all_sections({"train": DpoConfig})
    with pytest.raises(TypeError, match="--seed is already an option of seed; rename it in mine"):
        all_sections({"mine": Clash})
    for name in ("identity", "as_dict", "further"):
        with pytest.raises(TypeError, match=f"a section {name} exists already"):
            Config(further={name: DpoConfig()})
    with pytest.raises(TypeError, match="--given is reserved for the parser; rename it in mine"):
        all_sections({"mine": Taken})
    assert all_sections({}) == SECTIONS


def test_a_configuration_needs_nothing_above_the_model() -> None:
    """Imports from config.py on, followed through all files: no data, checkpoints, conversions or trainer."""
    root = Path(tinytron.__file__).parents[1]
    seen: set[str] = set()
    waiting = ["tinytron.training.config"]
    while waiting:
        module = waiting.pop()
        path = root.joinpath(*module.split("."))
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if module in seen or not file.exists():
            continue
        seen.add(module)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinytron"):
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    above = {name.split(".")[1] for name in seen if "." in name} - {
        "errors",
        "utils",
        "distributed",
        "kernels",
        "model",
        "hooks",
        "optim",
        "metrics",  # the names of loggers
    }
    assert above == {"training"}
    assert {name for name in seen if name.startswith("tinytron.training")} == {
        f"tinytron.training.{name}"
        for name in ("config", "checks", "sections", "lora_section", "optim_section", "train_section")
    }
