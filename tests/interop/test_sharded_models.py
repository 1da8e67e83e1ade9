"""Weights into a model of which this rank holds a part, whatever dimensions are cut over whatever axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tests.interop.families import save
from tinytron.checkpoint.load import load_weights
from tinytron.distributed import ParallelLayout, ParamSpec
from tinytron.distributed.param_spec import Shard
from tinytron.distributed.sharding import box_of
from tinytron.errors import CheckpointError
from tinytron.interop.load import architecture_of, load_pretrained
from tinytron.model import GPT, ModelConfig

AXES = ("ep", "tp")


@dataclass(frozen=True)
class CrossedLayout(ParallelLayout):
    """Experts, too, have ranks that share each matrix."""

    tp: int = 1
    meshes: ClassVar[Mapping[str, tuple[str, ...]]] = {"dense": ("dp", "sep", "tp"), "expert": ("edp", "ep", "tp")}


def cut_spec(spec: ParamSpec) -> ParamSpec:
    """Experts stay spread; the vocabulary is cut by rows, all else that has two dimensions by columns."""
    if spec.kind in ("embedding", "head"):
        return dataclasses.replace(spec, shards=(Shard("tp", 0),))
    more = (Shard("tp", len(spec.shape) - 1),) if len(spec.shape) > 1 else ()
    return dataclasses.replace(spec, shards=(*spec.shards, *more))


def part_of(config: ModelConfig, rank: int) -> GPT:
    """What ``rank`` of four holds, with arbitrary values. It only has weights: it cannot run."""
    state: Any = SimpleNamespace(layout=CrossedLayout(4, ep=2, tp=2), rank=rank)
    model = GPT(config, dtype=torch.float64, seed=None)
    specs = [cut_spec(spec) for spec in model.param_specs()]
    model.state, model.param_specs = state, lambda: specs  # type: ignore[method-assign]
    for spec in specs:
        parameter = model.get_parameter(spec.name)
        parameter.data = torch.full(box_of(spec, state).size, 9.0, dtype=torch.float64)
    return model


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("name", ["mixtral", "llama tied biased", "gpt2"])
def test_every_rank_gets_its_part(tmp_path: Path, name: str, rank: int) -> None:
    save(name, tmp_path)
    config = dataclasses.replace(architecture_of(str(tmp_path)), vocab_size=64)  # with rows of padding
    whole = GPT(config, dtype=torch.float64, seed=None)
    load_pretrained(whole, str(tmp_path))
    theirs, ours = part_of(config, rank), part_of(config, rank)
    load_pretrained(theirs, str(tmp_path))
    load_weights(ours, whole.state_dict(), "a file", ours.state)
    for model in (theirs, ours):
        for spec in model.param_specs():
            expected = box_of(spec, model.state).cut(whole.get_parameter(spec.name))
            assert torch.equal(model.get_parameter(spec.name), expected), spec.name


def test_the_whole_shape_must_fit(tmp_path: Path) -> None:
    small = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    config = ModelConfig(num_layer=1, hidden_size=16, vocab_size=64, use_moe=True, num_experts=4, **small)
    weights = GPT(dataclasses.replace(config, num_experts=8), dtype=torch.float64, seed=None).state_dict()
    model = part_of(config, 1)
    with pytest.raises(CheckpointError, match=r"experts.down_proj is \[8, .*, but \[4, .* in this model"):
        load_weights(model, weights, "a file", model.state)
