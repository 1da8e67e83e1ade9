"""The record of a checkpoint: what is stored, and that records of other versions can be read."""

from __future__ import annotations

from dataclasses import replace

from tinytron.checkpoint.meta import FORMAT_VERSION, CheckpointMeta

# As stored since format 2.
KEYS = [
    "format",
    "run",
    "identity",
    "data",
    "data_position",
    "skips",
    "val_loss",
    "best_metric",
    "guard",
    "step",
    "optimizer",
    "counters",
]
KEYS += ["parameters", "files", "rng"]


def test_the_stored_form_keeps_its_keys() -> None:
    meta = CheckpointMeta(format=FORMAT_VERSION, data="mock", val_loss=2.5)
    meta = replace(meta, step=7, counters={"step": 7}, parameters={"w": [2, 3]})
    stored = replace(meta, files={"00007_model.pt": {"bytes": 1}}, rng=[{}]).as_dict()
    assert list(stored) == KEYS
    assert (stored["format"], stored["step"], stored["val_loss"]) == (2, 7, 2.5)
    assert CheckpointMeta.from_dict(stored).as_dict() == stored


def test_what_an_older_record_lacks_has_its_default_and_what_a_later_one_adds_is_left_out() -> None:
    old = CheckpointMeta.from_dict({"format": 2, "step": 3, "identity": {}, "data": "x", "counters": {}, "rng": []})
    assert (old.guard, old.files, old.val_loss) == ({}, {}, None)
    assert CheckpointMeta.from_dict({"format": 2, "of a later version": 1}) == CheckpointMeta(format=2)


def test_a_file_that_is_no_record_has_no_format() -> None:
    assert CheckpointMeta.from_dict({"wte.weight": 1}) == CheckpointMeta()
    assert CheckpointMeta().format is None
