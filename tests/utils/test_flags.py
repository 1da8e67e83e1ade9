"""What a configuration field says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from tinytron.utils.flags import Flag, Parser, add_flag, config_fields, nearest


@dataclass(frozen=True)
class Example:
    size: Annotated[int, Flag("how large", "tokens", identity=False)] = 3
    limit: Annotated[float | None, Flag("how far")] = None
    name: Annotated[str | None, Flag("what it is called")] = "x"
    kind: Annotated[Literal["a", "b"], Flag("which")] = "a"
    pair: Annotated[tuple[int, int], Flag("from and to")] = (1, 2)


@dataclass(frozen=True)
class Forgotten:
    size: int = 3


@dataclass(frozen=True)
class WrongNote:
    size: Annotated[int, "how large"] = 3


def test_fields_come_in_order_with_bare_types_and_defaults() -> None:
    infos = config_fields(Example)
    assert [(i.name, i.type, i.optional, i.default) for i in infos] == [
        ("size", int, False, 3),
        ("limit", float, True, None),
        ("name", str, True, "x"),
        ("kind", Literal["a", "b"], False, "a"),
        ("pair", tuple[int, int], False, (1, 2)),
    ]


def test_choices_are_those_of_a_literal() -> None:
    assert [i.choices for i in config_fields(Example)] == [None, None, None, ("a", "b"), None]


def test_text_has_the_unit_and_identity_is_the_rule() -> None:
    size, limit, *_ = config_fields(Example)
    assert (size.flag.text, size.flag.identity) == ("how large [tokens]", False)
    assert (limit.flag.text, limit.flag.identity) == ("how far", True)


@pytest.mark.parametrize("cls", [Forgotten, WrongNote])
def test_a_field_without_a_flag_is_refused(cls: type) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}\.size needs an Annotated\[\.\.\., Flag\(\.\.\.\)\] type"):
        config_fields(cls)


def test_the_nearest_name_is_proposed_if_there_is_one() -> None:
    known = ["--num_layer", "--num_experts", "--seed"]
    assert nearest("--num-layers", known) == "; did you mean --num_layer?"
    assert nearest("--zzz", known) == ""
    assert nearest("--seed", []) == ""


@dataclass(frozen=True)
class Listed:
    layers: Annotated[tuple[int, ...], Flag("which layers")] = ()


def test_a_list_has_any_length() -> None:
    parser = Parser()
    add_flag(parser, config_fields(Listed)[0])
    for words, value in (([], ()), (["--layers"], []), (["--layers", "3"], [3]), (["--layers", "3", "0"], [3, 0])):
        assert parser.parse_args(words).layers == value
