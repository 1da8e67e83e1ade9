"""The gated feed-forward layer against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinytron.kernels.swiglu import swiglu
from tinytron.model.modules.mlp import SwiGLU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gate_is_that_of_torch_with_gradients(dtype: torch.dtype) -> None:
    gate_up = torch.randn(3, 5, 24).to(dtype).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    out_grad = torch.randn(3, 5, 12).to(dtype)
    mine, theirs = swiglu(gate_up), F.silu(gate) * up
    assert torch.equal(mine, theirs)
    assert torch.equal(
        torch.autograd.grad(mine, gate_up, out_grad)[0], torch.autograd.grad(theirs, gate_up, out_grad)[0]
    )


def test_the_layer_keeps_no_more_than_its_products_need() -> None:
    """Its input, the outputs of the first product, the input of the second one."""
    layer = SwiGLU(8, 12, bias=False)
    x = torch.randn(5, 8, requires_grad=True)
    kept: dict[int, int] = {}
    weights = {p.data_ptr() for p in layer.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    assert sorted(kept.values()) == [5 * 8, 5 * 12, 5 * 24]


def test_compiled_layers_compute_the_same() -> None:
    layer, x = SwiGLU(8, 12, bias=True), torch.randn(5, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
