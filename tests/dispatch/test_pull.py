"""Pulling several runs at once, for one table of a sweep."""

from __future__ import annotations

from pathlib import Path

from tests.dispatch.conftest import Place
from tests.dispatch.test_submit import Said, _until, _write, said  # noqa: F401
from tinytron.utils.texts import next_command, watch_command


def test_a_sweep_is_pulled_with_a_pattern_and_compared(place: Place, said: Said) -> None:  # noqa: F811
    _write(place, {"box": {"type": "plain"}})
    for name in ("lr-1", "lr-2", "lr-3", "other"):
        assert said("submit", name, "run.yaml", "--load", "module_with_jobs", "-n", "0")[0] == 0
        _until(said, name, "finished (0)")
        run = place.home / f"root/checkpoints/general/default/{name}/{name}_12345678"
        if name != "lr-3":
            run.mkdir(parents=True)
            (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    status, out, err = said("pull", "lr-?", "lr-1", "general/*/other")
    assert status == 1
    assert err.startswith("general/default/lr-3 was not copied: this machine: ")
    assert err.endswith("does not exist yet; there is nothing to pull\n")
    places = [f"pulled/checkpoints/general/default/{name}/{name}_12345678" for name in ("lr-1", "lr-2", "other")]
    assert out.splitlines() == [
        *(f"copied to {Path(folder).parent}, without checkpoints" for folder in places),
        watch_command(*places),
        next_command("compare", *places),
    ]
    assert said("pull", "lr-1", "other", "--out", "here")[0] == 0
    status, out, err = said("compare", *(Path("here", *Path(folder).parts[1:-1]) for folder in places[::2]))
    assert (status, err) == (0, "")
    assert "lr-1_12345678" in out
    assert "other_12345678" in out
    status, _, err = said("pull", "rl-*")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("error: nothing was submitted whose name matches rl-*; tinytron status lists what was")
