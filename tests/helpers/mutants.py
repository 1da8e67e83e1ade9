"""Breaking the library on purpose: one piece of one function replaced while a job runs."""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """``old`` replaced by ``new`` in the source of ``target``, written ``module:Class.method``."""

    target: str
    old: str
    new: str


@contextmanager
def mutated(mutant: Mutant) -> Iterator[None]:
    """Inside, the mutant lives. Raises: AssertionError if ``old`` does not stand exactly once in the target: then the
    mutant must be written anew, or it would test nothing."""
    module, path = mutant.target.split(":")
    owner, _, name = path.rpartition(".")
    place = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    original: Callable[..., Any] = place.__dict__[name]
    plain: Any = inspect.unwrap(original)
    source = textwrap.dedent(inspect.getsource(plain))
    count = source.count(mutant.old)
    assert count == 1, f"{mutant.old!r} stands {count} times in {mutant.target}; write this mutant anew"
    made: dict[str, Any] = {}
    code = compile(
        source.replace(mutant.old, mutant.new), f"<mutant of {path}>", "exec", flags=annotations.compiler_flag
    )
    exec(code, plain.__globals__, made)
    # The function's code rather than the name: others may have imported or registered the function.
    healthy, plain.__code__ = plain.__code__, inspect.unwrap(made[name]).__code__
    try:
        yield
    finally:
        plain.__code__ = healthy


def run_mutated(mutant: Mutant, job: Callable[..., Any], *args: Any) -> Any:
    """``job(*args)`` with the mutant alive. A job for the pool."""
    with mutated(mutant):
        return job(*args)
