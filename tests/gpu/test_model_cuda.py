"""The model and its loss on a GPU, against the same on the CPU in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.device import DEVICE, GPU_TEST, no_host_waits, only_a_gpu_shows, relative_error, sized
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.utils.profile import peak_flops

pytestmark = GPU_TEST

CONFIG = ModelConfig(
    block_size=sized(256, 32),
    vocab_size=sized(1000, 61),
    num_layer=2,
    num_attention_heads=sized(8, 4),
    num_key_value_heads=2,
    hidden_size=sized(256, 32),
    intermediate_size=sized(512, 48),
)
CONFIGS = {
    "dense": CONFIG,
    "options": replace(CONFIG, qk_norm=True, sliding_window=9, bias=True, norm_type="layer", tied_lm_head=False),
    "experts": replace(
        CONFIG, use_moe=True, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, num_shared_experts=1
    ),
}
B, S = 2, CONFIG.block_size


def losses_and_gradients(
    config: ModelConfig, device: torch.device | str, dtype: torch.dtype
) -> tuple[LossSums, dict[str, torch.Tensor]]:
    """Loss sums and gradients of random tokens."""
    model = GPT(config, dtype=dtype, device=torch.device(device))
    tokens = torch.randint(config.vocab_size, (B, S + 1), generator=torch.Generator().manual_seed(0)).to(device)
    sums = model(tokens[:, :-1], tokens[:, 1:])
    assert isinstance(sums, LossSums)
    sums.objective.backward()  # a sum: not so small that fp16 loses it
    return sums, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_cuda_equals_cpu_in_fp64(name: str) -> None:
    (mine, grads), (cpu, exact) = (losses_and_gradients(CONFIGS[name], d, torch.float64) for d in (DEVICE, "cpu"))
    assert relative_error(mine.objective, cpu.objective) < 1e-10
    assert relative_error(mine.token, cpu.token) < 1e-10
    assert grads.keys() == exact.keys()
    for key, grad in exact.items():
        assert relative_error(grads[key], grad) < 1e-8, key


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_sixteen_bits_are_close_to_fp64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Experts' gradients by the loss alone: a token that goes to another expert changes many."""
    (mine, grads), (cpu, exact) = (
        losses_and_gradients(CONFIGS[name], DEVICE, dtype),
        losses_and_gradients(CONFIGS[name], "cpu", torch.float64),
    )
    assert relative_error(mine.token, cpu.token) < 2e-3
    for key, grad in exact.items():
        assert torch.isfinite(grads[key]).all(), key
        assert relative_error(grads[key], grad) < (tolerance if name != "experts" else 0.5), key


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_waits_for_nothing(weighted: bool) -> None:
    hidden = torch.randn(512, 64, device=DEVICE, requires_grad=True)
    weight = torch.randn(1000, 64, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 1000, (512,), device=DEVICE)
    weights = torch.rand(512, device=DEVICE) if weighted else None
    with no_host_waits():
        fused_linear_cross_entropy(hidden, weight, labels, weights_T=weights, chunk_tokens=100).objective.backward()


def test_peak_is_known_or_measured() -> None:
    peak, source = peak_flops(DEVICE, sized(torch.bfloat16, torch.float32))
    assert source in ("data sheet", "measured")
    only_a_gpu_shows("its rate")
    assert peak > 1e12
