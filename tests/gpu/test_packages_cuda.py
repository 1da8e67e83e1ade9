"""Optional kernels of other packages on a CUDA device; run with ``pytest -m gpu`` on a machine that has one, after
``pip install liger-kernel cut-cross-entropy``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.test_cuda import TINY
from tinytron.kernels import liger
from tinytron.kernels.liger import check_liger
from tinytron.model.modules.cut_loss import check_cut_cross_entropy, cut_linear_cross_entropy
from tinytron.model.modules.loss import fused_linear_cross_entropy
from tinytron.utils.sequences import IGNORE_INDEX

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = torch.device("cuda")


def _near(mine: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert (mine.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("shape", [(4, 33, 256), (2, 16, 8, 64)])  # of a block, and of heads
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("liger_kernel")
    check_liger(DEVICE)
    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, dtype=dtype).transpose(0, 1).requires_grad_()  # not contiguous, as heads are
    weight = torch.randn(shape[-1], device=DEVICE, dtype=dtype, requires_grad=True)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    out, exact = liger.rms_norm(x, weight, 1e-6), F.rms_norm(x64, weight64.shape, weight64, 1e-6)
    grad = torch.randn_like(out)
    kept = grad.clone()
    _near(out, exact, tolerance)
    mine = torch.autograd.grad(out, (x, weight), grad)
    for one, other in zip(mine, torch.autograd.grad(exact, (x64, weight64), grad.double()), strict=True):
        _near(one, other, tolerance)
    assert torch.equal(grad, kept)  # not in place


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("rows", [130, 1, 0])  # experts may get none
def test_swiglu(rows: int, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    gate_up = torch.randn(rows, 2 * 96, device=DEVICE, dtype=dtype, requires_grad=True)
    exact_input = gate_up.detach().double().requires_grad_()
    gate, up = exact_input.chunk(2, dim=-1)
    out, exact = liger.swiglu(gate_up), F.silu(gate) * up
    assert out.shape == (rows, 96)
    grad = torch.randn_like(out)
    (mine,), (expected,) = (
        torch.autograd.grad(out, gate_up, grad),
        torch.autograd.grad(exact, exact_input, grad.double()),
    )
    if rows:
        _near(out, exact, tolerance)
        _near(mine, expected, tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("labelled", ["all", "some", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_cut_cross_entropy(dtype: torch.dtype, labelled: str, weighted: bool) -> None:
    pytest.importorskip("cut_cross_entropy")
    check_cut_cross_entropy(DEVICE)
    torch.manual_seed(0)
    hidden = (torch.randn(300, 128, device=DEVICE) / 128**0.5).to(dtype).requires_grad_()
    weight = torch.randn(1000, 128, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(0, 1000, (300,), device=DEVICE)
    labels[{"all": slice(0), "some": slice(0, 300, 3), "none": slice(None)}[labelled]] = IGNORE_INDEX
    weights = torch.rand(300, device=DEVICE) if weighted else None
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    mine = cut_linear_cross_entropy(hidden, weight, labels, weights_T=weights)
    ours = fused_linear_cross_entropy(exact[0], exact[1], labels, weights_T=weights)
    torch.testing.assert_close(mine.objective.double(), ours.objective, rtol=2e-3, atol=1e-6)
    assert mine.per_token is not None
    assert torch.equal(mine.per_token == 0, labels == IGNORE_INDEX)
    grads, expected = torch.autograd.grad(mine.objective, (hidden, weight)), torch.autograd.grad(ours.objective, exact)
    for one, other in zip(grads, expected, strict=True):
        if labelled == "none":
            assert not one.any()
        else:
            _near(one, other, 2e-2)  # small gradients are left out


OPTIONAL = ("--use_liger_kernel", "--use_cut_cross_entropy")
MOE = "--use_moe --num_experts 8 --num_experts_per_tok 2 --moe_intermediate_size 128"


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("liger_kernel", "--use_liger_kernel"),
        ("liger_kernel", f"--use_liger_kernel --qk_norm --recompute selective {MOE}"),
        ("cut_cross_entropy", "--use_cut_cross_entropy"),
        ("cut_cross_entropy", "--use_cut_cross_entropy --precision fp16 --use_compile"),
    ],
)
def test_training_with_them_gives_the_same_losses(module: str, flags: str, tmp_path: Path) -> None:
    pytest.importorskip(module)
    losses = []
    for name in ("with", "without"):
        given = [flag for flag in flags.split() if name == "with" or flag not in OPTIONAL]
        command = [sys.executable, "pretrain_debug.py", *TINY, "--log_dir", str(tmp_path / name), "--max_steps", "8"]
        subprocess.run([*command, *given], check=True, timeout=300)
        (log,) = (tmp_path / name).glob("*/log.jsonl")
        losses.append([json.loads(line)["loss"] for line in log.read_text().splitlines()])
    assert len(losses[0]) == 8
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
