"""The watchdog by a clock of our own: when it speaks, how often, and what it says. With real ranks: test_stop."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tinytron.distributed import collectives
from tinytron.utils.watchdog import Watchdog, locate_frame


class Clocked(Watchdog):
    """At second ``time``."""

    def __init__(self, path: Path) -> None:
        self.time = 0.0
        super().__init__(10, path, rank=3, now=lambda: self.time)

    def look_at(self, time: float) -> bool:
        """Whether it has anything to say then."""
        self.time = time
        before = self.path.read_text() if self.path.exists() else ""
        self.look(threading.get_ident())
        return (self.path.read_text() if self.path.exists() else "") != before


def test_once_per_stall_and_not_before_the_first_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dog = Clocked(tmp_path / "stacks.txt")
    assert not dog.look_at(1e6)  # the first step may compile
    dog.beat(7)
    assert [dog.look_at(1e6 + t) for t in (9.9, 12.5, 13, 100)] == [False, True, False, False]
    place = r"is at tinytron/utils/watchdog.py"
    said = capsys.readouterr().err
    assert said.startswith(f"rank 3: no step completed for 12.5 s, after step 7; {place}:")
    assert said.endswith(f"; stacks: {dog.path}\n")
    text = dog.path.read_text()
    assert "test_once_per_stall_and_not_before_the_first_step" in text  # this function is on the stack
    dog.beat(8)  # it completed after all
    assert [dog.look_at(dog.time + t) for t in (9, 11, 11)] == [False, True, False]
    assert "after step 8" in capsys.readouterr().err


def test_pauses_do_not_count(tmp_path: Path) -> None:
    dog = Clocked(tmp_path / "stacks.txt")
    dog.beat(1)
    with dog.paused():
        with dog.paused():
            assert not dog.look_at(50)
        assert not dog.look_at(100)
    assert [dog.look_at(t) for t in (109, 111)] == [False, True]
    with dog.paused():
        pass
    assert not dog.look_at(500)  # reported already: not again because of a pause


def test_a_folder_that_is_gone_does_not_silence_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dog = Clocked(tmp_path / "gone" / "stacks.txt")
    dog.beat(1)
    dog.look_at(11)
    assert "stacks could not be written" in capsys.readouterr().err


def test_off_starts_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watchdog(0, tmp_path / "stacks.txt", 0).watching():
        assert threading.active_count() == before


class HereError(Exception):
    """Carries what ``locate_frame`` says of the place it is raised from."""

    def __init__(self) -> None:
        super().__init__(locate_frame(sys._getframe(2)))


def _raise(*_: object) -> None:
    raise HereError


class Stuck:
    """A Work; the real one's ``wait`` is C++ and has no frame."""

    wait = _raise


def test_it_names_the_collective_and_our_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist.distributed_c10d, "_check_single_tensor", _raise)  # what all_reduce begins with
    with pytest.raises(HereError) as caught:
        collectives.sum_over(torch.ones(1), Any)  # type: ignore[arg-type]
    place = r"tinytron/distributed/collectives.py:\d+ \(sum_over\)"
    assert re.fullmatch(f"waits in all_reduce, called at {place}", str(caught.value))


def test_it_names_the_wait() -> None:
    with pytest.raises(HereError) as caught:
        collectives._WorkGroup([Stuck()]).wait()
    place = r"tinytron/distributed/collectives.py:\d+ \(wait\)"
    assert re.fullmatch(f"waits in Work.wait, called at {place}", str(caught.value))


def test_it_says_when_it_is_elsewhere() -> None:
    assert locate_frame(None) == locate_frame(sys._getframe()) == "is outside of Tinytron"
