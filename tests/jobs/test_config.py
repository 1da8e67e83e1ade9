"""``tinytron.config``: options declared by classes, one tree of them, and instances with its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
import torch.nn as nn

from tinytron.config import build, configuration, configure, field
from tinytron.errors import ConfigError


@dataclass
class Base:
    lr: float = field("optimization/lr", default=1e-3)
    steps: int = field("training/steps")


@dataclass
class Mine(Base):
    weight: float = field("training/my_loss_weight", default=0.1, help="weight of my loss")
    names: list[str] = field("training/names", default_factory=list)


class Block(nn.Module):
    width: int = field("model/width", default=8)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)


class Model(nn.Module):
    depth: int = field("model/depth", default=2)

    @classmethod
    def components(cls) -> list[type]:
        return [Block]

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(configure(Block) for _ in range(depth))


def test_build_collects_inherited_fields_and_components() -> None:
    tree = build(Mine, Model)
    assert tree.training.my_loss_weight == 0.1
    assert tree.training.names == []
    assert tree.optimization.lr == 1e-3
    assert (tree.model.depth, tree.model.width) == (2, 8)
    with pytest.raises(Exception, match="steps"):
        _ = tree.training.steps  # required
    with pytest.raises(Exception, match="typo"):
        tree.training.typo = 1


def test_configure_reads_the_active_tree_anywhere() -> None:
    tree = build(Mine, Model)
    tree.training.steps = 5
    tree.training.my_loss_weight = "1e-2"  # as YAML reads it
    tree.model.width = 4
    with configuration(tree):
        assert configure(Mine) == Mine(lr=1e-3, steps=5, weight=0.01, names=[])
        model = configure(Model)
    assert [block.layer.in_features for block in model.blocks] == [4, 4]
    with configuration({"training": {"steps": 1}}):  # nested dictionaries do, too
        assert configure(Mine).weight == 0.1
        assert configure(Mine, weight=3.0).weight == 3.0


def test_configure_outside_and_missing_values() -> None:
    with pytest.raises(ConfigError, match=r"configure\(Mine\) needs a configuration"):
        configure(Mine)
    for tree in (build(Mine), {}, {"training": None}, {"training": {"steps": "???"}}):
        with configuration(tree), pytest.raises(ConfigError, match=r"training\.steps is required by Mine"):
            configure(Mine)


def test_two_defaults_are_an_error_that_names_both() -> None:
    @dataclass
    class Other:
        rate: float = field("optimization/lr", default=2e-3)

    with pytest.raises(ConfigError, match=r"optimization\.lr has two defaults: 0\.001 in Mine and 0\.002 in Other"):
        build(Mine, Other)


@dataclass
class Kinds:
    flag: bool = field("kinds/flag", default=False)
    count: int | None = field("kinds/count", default=None)
    kind: Literal["a", "b"] = field("kinds/kind", default="a")
    pair: tuple[int, int] = field("kinds/pair", default=(1, 2))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("flag", 1, "kinds.flag=1 must be true or false"),
        ("count", "many", "kinds.count=many must be a whole number or null"),
        ("count", True, "kinds.count=True must be a whole number or null"),
        ("count", 1.5, "kinds.count=1.5 must be a whole number"),
        ("kind", "c", "kinds.kind=c must be one of a, b"),
        ("pair", "12", "kinds.pair=12 must be"),
    ],
)
def test_values_of_the_wrong_type(name: str, value: object, says: str) -> None:
    with configuration({"kinds": {name: value}}), pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        configure(Kinds)


def test_values_that_fit() -> None:
    with configuration({"kinds": {"flag": True, "count": 1e3, "pair": [3, 4]}}):
        assert configure(Kinds) == Kinds(flag=True, count=1000, kind="a", pair=(3, 4))


@pytest.mark.parametrize("path", ["weight", "a b/c", "/x", "a/1"])
def test_a_path_is_a_section_and_a_name(path: str) -> None:
    with pytest.raises(TypeError, match="needs a section and a name"):
        field(path, default=1)


@pytest.mark.parametrize("default", [[1], {"a": 1}, {1}, object()])
def test_defaults_that_instances_would_share_or_files_cannot_hold(default: object) -> None:
    with pytest.raises(TypeError, match=r"field\('a/b'\) (needs default_factory|has the default)"):
        field("a/b", default=default)


def test_a_required_option_takes_the_default_of_another_class() -> None:
    @dataclass
    class Reads:
        rate: float = field("optimization/lr")

    for classes in ((Base, Reads), (Reads, Base)):
        assert build(*classes).optimization.lr == 1e-3


@dataclass
class Nested:
    count: int = field("n/count", default=1)
    counts: list[int] = field("n/counts", default_factory=list)
    pair: tuple[int, int] | None = field("n/pair", default=None)
    either: int | str = field("n/either", default="auto")
    rates: tuple[float | None, ...] = field("n/rates", default=())
    table: dict[str, int] = field("n/table", default_factory=dict)


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("count", "2**10", 1024),  # text to YAML
        ("counts", ["1e3", 2], [1000, 2]),
        ("pair", [1, "2"], (1, 2)),
        ("either", "3", "3"),
        ("either", 3, 3),
        ("rates", [1, None, "1e-3"], (1.0, None, 1e-3)),
        ("table", {"a": 1}, {"a": 1}),
    ],
)
def test_items_and_numbers_in_text_are_converted(name: str, given: object, value: object) -> None:
    with configuration({"n": {name: given}}):
        found = getattr(configure(Nested), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("counts", ["x"], r"n.counts=\['x'\] must be a list \(each a whole number\)"),
        ("pair", [1, 2, 3], r"must be a list \(2 items, each a whole number\) or null"),
        ("rates", [True], r"must be a list \(each a number or null\)"),
        ("count", None, "n.count=null must be a whole number"),
        ("table", 3, "n.table=3 must be"),
    ],
)
def test_items_of_the_wrong_type(name: str, given: object, says: str) -> None:
    with configuration({"n": {name: given}}), pytest.raises(ConfigError, match=says):
        configure(Nested)
