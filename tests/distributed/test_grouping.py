"""Which parameters share a flat buffer."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from tinytron.distributed.param_spec import ParamSpec, Shard
from tinytron.distributed.zero1.grouping import group_parameters
from tinytron.errors import ConfigError


def parameters() -> dict[str, nn.Parameter]:
    """By name, in registration order."""
    dtypes = {"wte": torch.bfloat16, "up.0": torch.bfloat16, "norm": torch.float32, "up.1": torch.bfloat16}
    made = {name: nn.Parameter(torch.zeros(4, 2, dtype=dtype)) for name, dtype in dtypes.items()}
    return made | {"frozen": nn.Parameter(torch.zeros(3), requires_grad=False), "head": nn.Parameter(torch.zeros(5, 1))}


def test_one_buffer_for_each_precision_and_set_of_axes() -> None:
    made = parameters()
    names = {id(p): name for name, p in made.items()}
    specs = {
        name: ParamSpec(name, (8, 4, 2), "matrix", (Shard("ep", 0),))
        if name.startswith("up.")
        else ParamSpec(name, (4, 2), "norm")
        for name in made
        if name != "head"
    }
    groups = group_parameters(reversed(made.values()), {"kind": "adamw"}, names, specs)
    found = [(g.axes, g.params[0].dtype, [spec.name for spec in g.specs]) for g in groups]
    assert found == [
        ((), torch.bfloat16, ["wte"]),
        (("ep",), torch.bfloat16, ["up.0", "up.1"]),
        ((), torch.float32, ["norm", "head"]),
    ]
    assert not any(group.whole_tensors for group in groups)
    for group in groups:
        assert [id(p) for p in group.params] == [id(made[spec.name]) for spec in group.specs]
    assert groups[1].specs[0] is specs["up.0"]
    assert groups[2].specs[1] == ParamSpec("head", (5, 1), "matrix")  # nothing was said about it


def test_muon_owns_whole_tensors() -> None:
    made = parameters()
    groups = group_parameters(made.values(), {"kind": "muon"}, {id(p): name for name, p in made.items()}, {})
    assert [group.whole_tensors for group in groups] == [True, True]


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_muon_takes_stacks_that_are_cut_but_no_matrices_that_are(dim: int) -> None:
    parameter = nn.Parameter(torch.zeros(4, 3, 2))
    spec = ParamSpec("up", (8, 6, 4), "matrix", (Shard("tp", dim),))
    given = ([parameter], {"kind": "muon"}, {id(parameter): "up"}, {"up": spec})
    if dim == 0:
        assert group_parameters(*given)[0].axes == ("tp",)
        return
    with pytest.raises(ConfigError, match=rf"dimension {dim} of up is cut over tp; use --optimizer adamw"):
        group_parameters(*given)
