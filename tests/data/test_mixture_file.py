"""The mixture file: what is read from it, exactly, and every malformation in one clear line."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytron.data.mixture import MixtureOrder
from tinytron.data.mixture_file import Mixture, Source, Stage, read_mixture
from tinytron.errors import ConfigError

WEB = {"name": "web", "path": "web", "weight": 0.7}
CODE = {"name": "code", "path": "code", "weight": 0.3}
BARE = [{"name": "web", "path": "web"}, {"name": "code", "path": "code"}]


def read(folder: Path, content: Any) -> Mixture:
    path = folder / "mix.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_mixture(path)


def test_a_file_is_read_exactly(tmp_path: Path) -> None:
    sources = [
        {"name": "web", "path": "data/web", "max_epochs": 1.5, "max_tokens": 1e9},
        {"name": "code-2.x_y", "path": "/data/code"},
        {"name": "math", "path": "s3://bucket/math"},
    ]
    stages = [
        {"tokens": 1000000000, "weights": {"web": 0.7, "code-2.x_y": 0.2, "math": 0}},
        {"weights": {"math": 1, "web": 2e0}},
    ]
    found = read(tmp_path, {"sources": sources, "stages": stages})
    assert found.file == str(tmp_path / "mix.json")
    assert found.sources == (
        Source("web", f"{tmp_path}/data/web", Fraction(3, 2), Fraction(10**9)),
        Source("code-2.x_y", "/data/code"),
        Source("math", "s3://bucket/math"),
    )
    assert found.stages == (
        Stage(Fraction(10**9), (Fraction(7, 9), Fraction(2, 9), Fraction(0))),
        Stage(None, (Fraction(2, 3), Fraction(0), Fraction(1, 3)), 1),
    )


@pytest.mark.parametrize("shape", ["linear", "cosine", "sigmoid"])
def test_a_fade_is_made_of_short_stages(tmp_path: Path, shape: str) -> None:
    """From the weights before it to those after it, by the formula; the stage keeps its length."""
    sources = [{"name": "web", "path": "web"}, {"name": "code", "path": "code"}]
    stages = [
        {"tokens": 1000, "weights": {"web": 1}},
        {"tokens": 800, "weights": {"web": 0.25, "code": 0.75}, "fade": {"tokens": 320, "shape": shape}},
        {"weights": {"code": 1}},
    ]
    first, *fade, second, last = read(tmp_path, {"sources": sources, "stages": stages}).stages
    assert (first.number, first.tokens, second.number, second.tokens, last.number) == (0, 1000, 1, 480, 2)
    assert [(stage.number, stage.fading, stage.tokens) for stage in fade] == [(1, True, 20)] * 16

    def share(done: float) -> float:
        if shape == "sigmoid":
            low, high = (1 / (1 + math.exp(-10 * (x - 0.5))) for x in (0, 1))
            return (1 / (1 + math.exp(-10 * (done - 0.5))) - low) / (high - low)
        return done if shape == "linear" else (1 - math.cos(math.pi * done)) / 2

    wanted = [0.75 * share((i + 0.5) / 16) for i in range(16)]
    assert [float(stage.weights[1]) for stage in fade] == pytest.approx(wanted, abs=1e-3)
    assert all(sum(stage.weights) == 1 for stage in fade)


def test_weights_beside_the_sources_are_one_stage_without_end(tmp_path: Path) -> None:
    found = read(tmp_path, {"sources": [WEB, CODE]})
    assert found.stages == (Stage(None, (Fraction(7, 10), Fraction(3, 10))),)


def test_weights_are_the_fractions_of_their_text(tmp_path: Path) -> None:
    """0.1 and 0.2 as binary floats make 0.30000000000000004; over 10^12 samples such things add up."""
    given = (("a", "0.1"), ("b", "2e-1"), ("c", "0.7000000000000000000001"))
    sources = ", ".join(f'{{"name": "{name}", "path": "x", "weight": {weight}}}' for name, weight in given)
    text = f'{{"sources": [{sources}]}}'
    total = Fraction(10**22 + 1, 10**22)
    weights = read(tmp_path, text).stages[0].weights
    assert weights == (
        Fraction(1, 10) / total,
        Fraction(2, 10) / total,
        (Fraction(7, 10) + Fraction(1, 10**22)) / total,
    )


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeff" + json.dumps({"sources": [WEB]})).sources[0].name == "web"


def test_the_smallest_weight(tmp_path: Path) -> None:
    found = read(tmp_path, {"sources": [{**WEB, "weight": 1}, {**CODE, "weight": 4095}]})
    assert MixtureOrder(found, [1, 10], 1, 0).counts(4096 * 3).tolist() == [3, 4095 * 3]


def faded(fade: dict[str, Any]) -> dict[str, Any]:
    """A mixture whose second of three stages has this fade."""
    names = ("a", "b")
    stages: list[dict[str, Any]] = [
        {"tokens": 50, "weights": {"a": 1}},
        {"tokens": 50, "weights": {"b": 1}, "fade": fade},
        {"weights": {"a": 1}},
    ]
    return {"sources": [{"name": name, "path": name} for name in names], "stages": stages}


def source(**changes: Any) -> dict[str, Any]:
    """A file whose second source has other fields (None: left out)."""
    fields = {key: value for key, value in {**CODE, **changes}.items() if value is not None}
    return {"sources": [WEB, fields]}


def staged(*stages: Any) -> dict[str, Any]:
    return {"sources": BARE, "stages": list(stages)}


BOTH = {"web": 1, "code": 1}
NUMBER = r"positive number, 1e-12 to 1e\+15; use"
MALFORMED: dict[str, tuple[Any, str]] = {
    "empty": ("", r'this is not JSON: Expecting value: line 1 column 1 \(char 0\); write {"sources": \[\.\.\.\]}'),
    "cut off": ('{"sources": [', "this is not JSON: Expecting value: line 1 column 14"),
    "too deep": ("[" * 100_000, "this is not JSON: maximum recursion depth"),
    "an exponent beyond all": ('{"sources": 1e99999999999999999999}', "sources is Infinity.*a list"),
    "a list": ([], r'the file is \[\].*object; use {"sources": \[\.\.\.\]}'),
    "a key twice": ('{"sources": [], "sources": []}', "the key 'sources' .*twice.*; give it once"),
    "a fade of the first stage": (
        {"sources": [{"name": "a", "path": "a"}], "stages": [{"weights": {"a": 1}, "fade": {"tokens": 9}}]},
        r"stages\[0\]\.fade: the first stage has nothing to fade from; leave it out",
    ),
    "a fade that is too long": (
        faded({"tokens": 50}),
        r"stages\[1\]\.fade\.tokens 50 must be less than the stage's own 50 tokens; use 25",
    ),
    "an unknown shape": (
        faded({"tokens": 5, "shape": "steep"}),
        r'shape is "steep", but must be one of linear, cosine',
    ),
    "a shape that is a list": (faded({"tokens": 5, "shape": ["cosine"]}), r'shape is \["cosine"\], but must be one of'),
    "a sigmoid that is a step": (
        faded({"tokens": 5, "shape": "sigmoid", "steepness": 2000}),
        r"stages\[1\]\.fade\.steepness 2000 must be at most 100; use 10, or leave it out",
    ),
    "steepness of a line": (
        faded({"tokens": 5, "shape": "linear", "steepness": 5}),
        r"stages\[1\]\.fade\.steepness 5 is for the shape sigmoid; use 10, or leave it out",
    ),
    "a fade without a length": (faded({}), r"stages\[1\]\.fade\.tokens is not given.*use 1e8"),
    "unknown key": ({"source": [WEB]}, r"the file has an unknown key 'source'; did you mean sources\?"),
    "unlike any key": ({"xyz": 1}, "the file has an unknown key 'xyz'; use sources, stages"),
    "no sources": ({}, r'sources is not given.*a list with at least one entry; use \[{"name": "web"'),
    "empty sources": ({"sources": []}, r"sources is \[\].*a list with at least one entry"),
    "sources of another kind": ({"sources": {"web": 1}}, r'sources is {"web": "1"}.*a list'),
    "source of another kind": (
        {"sources": ["web"]},
        r'sources\[0\] is "web".*object; use {"name": "web"',
    ),
    "unknown source key": (source(wieght=1), r"sources\[1\] has an unknown key 'wieght'; did you mean weight\?"),
    "no name": (source(name=None), r'sources\[1\]\.name is not given.*made of letters, .*; use "web"'),
    "a name with a space": (source(name="a b"), r'sources\[1\]\.name is "a b".*made of letters'),
    "a name of another kind": (source(name=3), r"sources\[1\]\.name is 3.*made of letters"),
    "duplicate name": (source(name="web"), r"sources\[1\]\.name 'web' is taken; .*a different name"),
    "no path": (source(path=None), r'sources\[1\]\.path is not given.*token shards; use "data/code"'),
    "empty path": (source(path=""), r'sources\[1\]\.path is "".*token shards'),
    "no weight": (source(weight=None), rf"sources\[1\]\.weight is not given.*{NUMBER} 1$"),
    "zero weight": (source(weight=0), rf"sources\[1\]\.weight is 0.*{NUMBER} 1$"),
    "negative weight": (source(weight=-0.5), rf"sources\[1\]\.weight is -0\.5.*{NUMBER} 1$"),
    "NaN": (source(weight=float("nan")), r"sources\[1\]\.weight is NaN.*a positive number"),
    "infinity": (source(weight=float("inf")), r"sources\[1\]\.weight is Infinity.*a positive number"),
    "text": (source(weight="0.3"), r'sources\[1\]\.weight is "0\.3".*a positive number'),
    "true": (source(weight=True), r"sources\[1\]\.weight is true.*a positive number"),
    "huge": (
        '{"sources": [{"name": "a", "path": "x", "weight": 1e999999999}]}',
        r"sources\[0\]\.weight is 1E\+999999999.*a positive number",
    ),
    "thousands of digits": (
        '{"sources": [{"name": "a", "path": "x", "weight": ' + "1" * 9999 + "}]}",
        r"sources\[0\]\.weight is 1{37}\.\.\..*a positive number",
    ),
    "tiny": (
        source(weight=0.0001),
        r"sources\[1\]\.weight is 0\.000143 .*1/4096; use 0\.000170957 or more",
    ),
    "no epochs": (source(max_epochs=0), rf"sources\[1\]\.max_epochs is 0.*{NUMBER} 2$"),
    "negative tokens": (source(max_tokens=-1), rf"sources\[1\]\.max_tokens is -1.*{NUMBER} 1e9$"),
    "null cap": (
        '{"sources": [{"name": "a", "path": "x", "weight": 1, "max_tokens": null}]}',
        "max_tokens is not given, but must be",
    ),
    "weights twice": (
        {"sources": [WEB], "stages": [{"weights": {"web": 1}}]},
        r"sources\[0\]\.weight .*stages.*; leave one of them out",
    ),
    "no stage": (staged(), r"stages is \[\].*a list with at least one entry"),
    "stage of another kind": (staged(3), r'stages\[0\] is 3.*object; use {"weights": {"web": 1}}'),
    "unknown stage key": (staged({"token": 1, "weights": BOTH}), r"unknown key 'token'; did you mean tokens\?"),
    "no stage weights": (staged({}), r'stages\[0\]\.weights is not given.*object; use {"web": 1}'),
    "unknown source": (
        staged({"weights": {"web": 1, "coed": 1}}),
        r"stages\[0\]\.weights has an unknown source 'coed'; did you mean code\?",
    ),
    "negative stage weight": (
        staged({"weights": {"web": 1, "code": -1}}),
        r"stages\[0\]\.weights\.code is -1.*0 or a positive number, 1e-12 to 1e\+15; use 1",
    ),
    "no source used": (
        staged({"weights": {"web": 0}}),
        r"stages\[0\]\.weights uses no source; .*weight, such as",
    ),
    "tiny in a stage": (
        staged({"tokens": 9, "weights": BOTH}, {"weights": {"web": 5000, "code": 1}}),
        r"stages\[1\]\.weights\.code is 0\.0002 .*1/4096; use 1\.22112 or more",
    ),
    "a source without stage": (
        staged({"weights": {"web": 1, "code": 0}}),
        r"sources\[1\]: 'code' .*no stage; .*take the source out",
    ),
    "no length": (staged({"weights": BOTH}, {"weights": BOTH}), r"stages\[0\]\.tokens is not given.*; use 1e9"),
    "negative length": (
        staged({"tokens": -5, "weights": BOTH}, {"weights": BOTH}),
        r"stages\[0\]\.tokens is -5, but must",
    ),
    "length of the last": (
        staged({"tokens": 5, "weights": BOTH}),
        r"stages\[0\]\.tokens .*last stage.*; leave it out",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformations_are_named(tmp_path: Path, case: str) -> None:
    content, text = MALFORMED[case]
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path))}/mix\.json: .*{text}") as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", [(5000, 1.22112), (0.7, 0.000170957)])
def test_the_advised_weight_works(tmp_path: Path, weights: tuple[float, float]) -> None:
    read(tmp_path, {"sources": [{**WEB, "weight": weights[0]}, {**CODE, "weight": weights[1]}]})


def test_a_zero_with_a_huge_exponent_is_zero(tmp_path: Path) -> None:
    text = json.dumps(staged({"tokens": 9, "weights": BOTH}, {"weights": {"web": 1, "code": "?"}}))
    assert read(tmp_path, text.replace('"?"', "0e999999999")).stages[1].weights == (1, 0)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\); check --dataset_path"):
        read_mixture(tmp_path / "none.json")
    (tmp_path / "mix.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"mix\.json: the mixture file cannot be read \(it is not UTF-8 text\)"):
        read_mixture(tmp_path / "mix.json")


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from(["web", "a"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["sources", "stages", "name", "path", "weight", "weights", "tokens", "max_epochs", "max_tokens", "web"]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=VALUES, place=st.integers(0, 4))
def test_whatever_a_file_holds_is_read_or_refused(tmp_path: Path, value: Any, place: int) -> None:
    """Any JSON value: alone, as a source, as a cap, as the stages, as a weight."""
    files: list[Any] = [
        value,
        {"sources": [value]},
        source(max_epochs=value),
        {"sources": BARE, "stages": value},
        staged({"weights": {"web": 1, "code": value}}),
    ]
    try:
        found = read(tmp_path, files[place])
    except ConfigError as error:
        assert str(error).startswith(f"{tmp_path}/mix.json: ")  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert all(sum(stage.weights) == 1 for stage in found.stages)
