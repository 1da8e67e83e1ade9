"""P12: without any one scaling factor or reduction the parity checks fail, so they would see it go missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed.mutants import CASES, MUTANTS
from tests.helpers.mutants import Mutant, run_mutated
from tests.helpers.parity import Case, differences, run_case
from tests.helpers.ranks import Ranks

Pools = Callable[[int], Ranks]


def _job(mutant: Mutant, case: Case, folder: Path) -> object:
    """The run's results, or what it ended in: a mutant may be so wrong that it cannot run."""
    try:
        return run_mutated(mutant, run_case, case, folder)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.sample(20)
def test_parity_sees_the_mutant(ranks: Pools, tmp_path: Path, name: str) -> None:
    mutant, case = MUTANTS[name]
    results = ranks(case.world).run(_job, mutant, case, tmp_path)
    assert not any(isinstance(result, str) for result in results), f"{name} cannot run: {results[0]}"
    assert differences(case, results), f"{name}: the parity checks do not see it"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(4)
def test_parity_holds_without_mutants(ranks: Pools, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    found = differences(case, ranks(case.world).run(run_case, case, tmp_path))
    assert not found, found


# Parameters that arrive as late as they may: the gather starts only when it is waited for. (On this machine gathers are
# so fast that a forward which does not wait would find its parameters nevertheless.)
LATE = Mutant(
    "tinytron.distributed.collectives:start_all_gather",
    "return _exchange([(r, own, part) for r, part in parts if r != dist.get_rank(group)], group)",
    'return type("Late", (), {"wait": lambda self: _all_gather(whole, own, group=group)})()',
)
GATE = Mutant("tinytron.training.build:param_wait_hook", "optimizer.finish_gather(owned[id(module)])", "None")


@pytest.mark.parametrize("name", ["dense", "sep", "experts", "muon"])
@pytest.mark.sample(2)
def test_the_forward_waits_for_the_parameters_it_needs(ranks: Pools, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    results = ranks(case.world).run(run_mutated, LATE, run_case, case, tmp_path / "late")
    assert not differences(case, results)
    results = ranks(case.world).run(run_mutated, LATE, run_mutated, GATE, run_case, case, tmp_path / "no gate")
    assert differences(case, results)


def test_every_mutant_has_a_case_that_holds_without_it() -> None:
    assert {case for _, case in MUTANTS.values()} == set(CASES.values())


def test_a_mutant_that_does_not_apply_is_an_error(tmp_path: Path) -> None:
    mutant, case = next(iter(MUTANTS.values()))
    with pytest.raises(AssertionError, match=r"stands 0 times in .*; write this mutant anew"):
        run_mutated(replace(mutant, old="not in the source"), run_case, case, tmp_path)
