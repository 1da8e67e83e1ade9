"""The mixture file: the sources of a mixture, their proportions, and the length of each stage. This module checks
everything that needs only the file. Numbers become exact fractions of their decimal text, so that 0.1 is a tenth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from tinytron.errors import ConfigError, first_line
from tinytron.utils.flags import nearest
from tinytron.utils.paths import expanded

BLOCK = 4096  # positions; proportions are exact at the end of every block (mixture.py)
FADE_STEPS = 16
_STEEPEST = 100  # the largest steepness of a sigmoid, which then changes in a single step
# The share of the new stage after the fraction ``done`` of a fade.
FADES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda done, steepness: done,
    "cosine": lambda done, steepness: (1 - math.cos(math.pi * done)) / 2,
    "sigmoid": lambda done, steepness: (
        (_sigmoid(steepness * (done - 0.5)) - _sigmoid(-steepness / 2))
        / (_sigmoid(steepness / 2) - _sigmoid(-steepness / 2))
    ),
}
_LARGEST, _SMALLEST = Decimal("1e15"), Decimal("1e-12")
_SOURCE_KEYS = ("name", "path", "weight", "max_epochs", "max_tokens")


@dataclass(frozen=True)
class Source:
    """One dataset of the mixture; ``path`` is a value that ``--dataset_path`` accepts. Caps apply to the whole run."""

    name: str
    path: str
    max_epochs: Fraction | None = None
    max_tokens: Fraction | None = None


@dataclass(frozen=True)
class Stage:
    """A part of the run that lasts ``tokens`` (None: to the end). ``weights`` follow the order of the sources and sum to
    1. ``number`` is its place in the file; a fade is made of several stages with that of the stage it leads to, which are
    ``fading``. ``key`` names its length in errors."""

    tokens: Fraction | None
    weights: tuple[Fraction, ...]
    number: int = 0
    fading: bool = False

    @property
    def key(self) -> str:
        """The key of its length in the file."""
        return f"stages[{self.number}]{'.fade' if self.fading else ''}.tokens"


@dataclass(frozen=True)
class Mixture:
    """A checked mixture file; ``file`` is its name in errors."""

    file: str
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def read_mixture(path: str | Path) -> Mixture:
    """Read and check a mixture file::

        {"sources": [{"name": "web", "path": "data/web", "weight": 0.7, "max_epochs": 2, "max_tokens": 1e9}, ...],
         "stages": [{"tokens": 1e9, "weights": {"web": 0.5, "code": 0.5}}, ...,
                    {"weights": {"code": 1}, "fade": {"tokens": 1e8, "shape": "cosine"}}]}

    Weights are relative. Without ``stages`` every source has a ``weight``. With ``stages`` only the stages have
    weights, and a stage does not use a source that it leaves out or gives 0. Each stage but the last lasts ``tokens``. A
    stage with a ``fade`` begins with these many tokens in which the weights go from those of the stage before to its own,
    in ``FADE_STEPS`` steps.
    Paths are relative to the file. Raises: ConfigError naming file, key, rule and a value that works.
    """
    check = _Checker(str(path))
    top = check.fields(check.read(), "the file", ("sources", "stages"), '{"sources": [...]}')
    entries = check.entries(top.get("sources"), "sources", '[{"name": "web", "path": "data/web", "weight": 1}]')
    has_stages = "stages" in top
    sources: list[Source] = []
    given: dict[str, Fraction] = {}
    for number, entry in enumerate(entries):
        source, weight = _source(check, entry, f"sources[{number}]", has_stages)
        if source.name in given:
            check.fail(f"sources[{number}].name {source.name!r} is taken; give each source a different name")
        sources.append(source)
        given[source.name] = weight
    if has_stages:
        stages = _stages(check, top["stages"], list(given))
    else:
        keys = [f"sources[{number}].weight" for number in range(len(sources))]
        stages = [Stage(None, _normalized(check, list(given.values()), keys))]
    return Mixture(str(path), tuple(sources), tuple(stages))


def _source(check: _Checker, entry: Any, key: str, has_stages: bool) -> tuple[Source, Fraction]:
    """The source and its weight (0 if the stages have the weights)."""
    fields = check.fields(entry, key, _SOURCE_KEYS, '{"name": "web", "path": "data/web", "weight": 1}')
    name, place = fields.get("name"), fields.get("path")
    if isinstance(place, str):
        place = expanded(place)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        check.fail(f'{key}.name is {_shown(name)}, but must be made of letters, digits, ".", "_", "-"; use "web"')
    if not isinstance(place, str) or not place:
        check.fail(f'{key}.path is {_shown(place)}, but must name token shards; use "data/{name}"')
    if has_stages and "weight" in fields:
        check.fail(f"{key}.weight cannot be combined with stages, which have their own weights; leave one of them out")
    weight = Fraction(0) if has_stages else check.number(fields.get("weight"), f"{key}.weight", "1")
    caps = [
        check.number(fields[cap], f"{key}.{cap}", works) if cap in fields else None
        for cap, works in (("max_epochs", "2"), ("max_tokens", "1e9"))
    ]
    here = place if "://" in place else str(Path(check.file).parent / place)
    return Source(name, here, *caps), weight


def _stages(check: _Checker, value: Any, names: list[str]) -> list[Stage]:
    entries = check.entries(value, "stages", '[{"tokens": 1e9, "weights": {...}}, {"weights": {...}}]')
    stages: list[Stage] = []
    for number, entry in enumerate(entries):
        key = f"stages[{number}]"
        last = number == len(entries) - 1
        fields = check.fields(entry, key, ("tokens", "weights", "fade"), f'{{"weights": {{"{names[0]}": 1}}}}')
        if last and "tokens" in fields:
            check.fail(f"{key}.tokens cannot be given for the last stage, which lasts until the run ends; leave it out")
        tokens = None if last else check.number(fields.get("tokens"), f"{key}.tokens", "1e9")
        shares = check.fields(fields.get("weights"), f"{key}.weights", names, f'{{"{names[0]}": 1}}', "source")
        keys = [f"{key}.weights.{name}" for name in names]
        weights = [
            check.number(shares[name], k, "1", zero=True) if name in shares else Fraction(0)
            for name, k in zip(names, keys, strict=True)
        ]
        if not any(weights):
            check.fail(f"{key}.weights uses no source; give one a weight, such as {names[0]!r}: 1")
        stage = Stage(tokens, _normalized(check, weights, keys), number)
        if "fade" in fields:
            fade = _fade(check, fields["fade"], stage, stages[-1] if stages else None)
            stages += fade
            if tokens is not None:
                stage = replace(stage, tokens=tokens - sum((one.tokens for one in fade if one.tokens), Fraction(0)))
        stages.append(stage)
    for number, name in enumerate(names):
        if not any(stage.weights[number] for stage in stages):
            check.fail(f"sources[{number}]: {name!r} has a weight in no stage; give it one, or take the source out")
    return stages


def _fade(check: _Checker, value: Any, stage: Stage, before: Stage | None) -> list[Stage]:
    """The stages of the fade from ``before`` to ``stage``. Raises: ConfigError."""
    key = f"stages[{stage.number}].fade"
    if before is None:
        check.fail(f"{key}: the first stage has nothing to fade from; leave it out")
    fields = check.fields(value, key, ("tokens", "shape", "steepness"), '{"tokens": 1e8, "shape": "cosine"}')
    tokens = check.number(fields.get("tokens"), f"{key}.tokens", "1e8")
    if stage.tokens is not None and tokens >= stage.tokens:
        check.fail(
            f"{key}.tokens {float(tokens):.12g} must be less than the stage's own {float(stage.tokens):.12g} tokens; use "
            f"{float(stage.tokens / 2):.12g}"
        )
    shape = fields.get("shape", "linear")
    if not isinstance(shape, str) or shape not in FADES:
        check.fail(f"{key}.shape is {_shown(shape)}, but must be one of {', '.join(FADES)}; use cosine")
    steepness = float(check.number(fields.get("steepness", Decimal(10)), f"{key}.steepness", "10"))
    if "steepness" in fields and (shape != "sigmoid" or steepness > _STEEPEST):
        rule = f"must be at most {_STEEPEST}" if shape == "sigmoid" else "is for the shape sigmoid"
        check.fail(f"{key}.steepness {steepness:g} {rule}; use 10, or leave it out")
    found = []
    for step in range(FADE_STEPS):
        share = Fraction(round(FADES[shape]((step + 0.5) / FADE_STEPS, steepness) * 2**20), 2**20)
        mixed = [(1 - share) * old + share * new for old, new in zip(before.weights, stage.weights, strict=True)]
        kept = [weight if weight * BLOCK >= 1 else Fraction(0) for weight in mixed]  # a block could lack the source
        found.append(
            Stage(tokens / FADE_STEPS, tuple(weight / sum(kept) for weight in kept), stage.number, fading=True)
        )
    return found


def _normalized(check: _Checker, weights: list[Fraction], keys: list[str]) -> tuple[Fraction, ...]:
    """The weights scaled to sum to 1. Raises: ConfigError for a weight so small that a block could lack the source."""
    total = sum(weights, Fraction(0))
    for weight, key in zip(weights, keys, strict=True):
        if weight and weight * BLOCK < total:
            enough = float((total - weight) / (BLOCK - 1)) * 1.0001
            check.fail(
                f"{key} is {float(weight / total):.3g} of the total weight, below 1/{BLOCK}; use {enough:.6g} or more"
            )
    return tuple(weight / total for weight in weights)


class _Checker:
    """The rules of one mixture file; every error message starts with the file's name."""

    def __init__(self, file: str) -> None:
        self.file = file

    def fail(self, message: str) -> NoReturn:
        """Always raise a ConfigError."""
        raise ConfigError(f"{self.file}: {message}")

    def read(self) -> Any:
        """The JSON value with every number as a Decimal (other types could not hold a very large exponent)."""
        try:
            text = Path(self.file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            self.fail(f"the mixture file cannot be read ({reason}); check --dataset_path")
        try:
            return json.loads(
                text,
                parse_int=_decimal,
                parse_float=_decimal,
                parse_constant=_decimal,
                object_pairs_hook=self._without_duplicates,
            )
        except (ValueError, RecursionError) as error:
            self.fail(f"this is not JSON: {first_line(error)}; write " + '{"sources": [...]}')

    def _without_duplicates(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            self.fail(f"the key {double!r} is given twice in one object; give it once")
        return found

    def fields(self, value: Any, key: str, known: Iterable[str], works: str, what: str = "key") -> dict[str, Any]:
        """``value``, checked to be an object that has only known keys."""
        known = list(known)
        if not isinstance(value, dict):
            self.fail(f"{key} is {_shown(value)}, but must be an object; use {works}")
        for name in value:
            if name not in known:
                advice = nearest(name, known) or f"; use {', '.join(known)}"
                self.fail(f"{key} has an unknown {what} {name!r}{advice}")
        return dict(value)

    def entries(self, value: Any, key: str, works: str) -> list[Any]:
        """``value``, checked to be a list that is not empty."""
        if not isinstance(value, list) or not value:
            self.fail(f"{key} is {_shown(value)}, but must be a list with at least one entry; use {works}")
        return list(value)

    def number(self, value: Any, key: str, works: str, zero: bool = False) -> Fraction:
        """``value`` as an exact fraction, checked to be a positive number (or 0 if ``zero``)."""
        good = isinstance(value, Decimal) and value.is_finite()
        if not good or not (_SMALLEST <= value <= _LARGEST or (zero and value == 0)):
            rule = "must be 0 or a positive number" if zero else "must be a positive number"
            self.fail(f"{key} is {_shown(value)}, but {rule}, {_SMALLEST:e} to {_LARGEST:e}; use {works}")
        return Fraction(value)


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except ArithmeticError:  # for example an exponent of 20 digits
        return Decimal("Infinity")


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    text = str(value) if isinstance(value, Decimal) else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
