"""Kernels of other packages: refused in one line where they cannot run, and elsewhere the same functions as ours."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.kernel_packages import install
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, train
from tinytron.errors import ConfigError
from tinytron.kernels.choice import Kernels, check_device
from tinytron.kernels.rms_norm import rms_norm
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.training import Trainer, build
from tinytron.training.dry_run import dry_run
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CHECKS = {
    "use_liger_kernel": ("liger-kernel", "liger_kernel.ops"),
    "use_cut_cross_entropy": ("cut-cross-entropy", "cut_cross_entropy"),
    "use_triton_kernels": ("triton", "triton.language"),
}


def check(flag: str, device: torch.device) -> None:
    check_device(Kernels.from_flags(**{flag: True}), device, torch.bfloat16)  # type: ignore[arg-type]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The stand-ins are installed; how often each was called."""
    return install(monkeypatch)


@pytest.mark.parametrize("flag", CHECKS)
def test_a_run_without_a_gpu_is_refused(calls: Counter[str], flag: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--{flag} runs only on CUDA, not on cpu; drop --{flag}$"):
        check(flag, CPU)
    if flag == "use_triton_kernels":  # has no stand-in: torch itself imports it
        pytest.importorskip("triton")
    check(flag, CUDA)


@pytest.mark.parametrize("flag", CHECKS)
def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    package, module = CHECKS[flag]
    monkeypatch.setitem(sys.modules, module, None)
    text = rf"^--{flag} needs the {package} package \(.*\): pip install {package}; or drop --{flag}$"
    with pytest.raises(ConfigError, match=text):
        check(flag, CUDA)


@pytest.mark.parametrize("flag", CHECKS)
def test_a_package_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    package, module = CHECKS[flag]
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(LigerRMSNormFunction=None))
    text = rf"^--{flag} needs a newer {package}, whose {re.escape(module)} has \w+: pip install --upgrade {package}; or"
    with pytest.raises(ConfigError, match=text):
        check(flag, CUDA)


@pytest.mark.parametrize("flag", CHECKS)
@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "dry_run"])
def test_a_run_is_refused_before_its_first_step(
    ranks: Pools, tmp_path: Path, flag: str, more: tuple[object, ...]
) -> None:
    for error in ranks(1).run(_refusal, tmp_path, f"--{flag}", "--precision", "bf16", *more):
        assert error == f"--{flag} runs only on CUDA, not on cpu; drop --{flag}"
    assert not list(tmp_path.iterdir())


def _refusal(log_dir: Path, *flags: object) -> str:
    try:
        if "--dry_run" in flags:
            dry_run(config_of(*TINY, "--log_dir", log_dir, *flags))
        else:
            train(Trainer, log_dir, *flags)
    except ConfigError as error:
        return str(error)
    return ""


def _sums_and_grads(model: GPT, weights: torch.Tensor | None = None) -> tuple[LossSums, dict[str, torch.Tensor]]:
    ids, labels = torch.randint(0, 61, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = IGNORE_INDEX
    sums = model(ids, labels, weights=weights)
    assert isinstance(sums, LossSums)
    sums.objective.backward()
    return sums, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


SIZES = {"num_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 24}
MODELS = {
    "dense": ({}, {"rms_norm": 5, "swiglu": 2}),
    "qk norms, no swiglu": ({"qk_norm": True, "mlp_type": "gelu"}, {"rms_norm": 9}),
    "layer norms": ({"norm_type": "layer"}, {"swiglu": 2}),
    "experts": (
        {
            "use_moe": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "num_shared_experts": 1,
        },
        {"rms_norm": 5, "swiglu": 4},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_ligers_kernels_is_the_same_function(calls: Counter[str], name: str) -> None:
    options, expected = MODELS[name]
    config = ModelConfig(block_size=12, vocab_size=61, init_std=0.1, **SIZES, **options)  # type: ignore[arg-type]
    liger = Kernels(rms_norm="liger", swiglu="liger")
    plain, other = (GPT(config, dtype=torch.float64, kernels=k) for k in (Kernels(), liger))
    (sums, grads), (other_sums, other_grads) = _sums_and_grads(plain), _sums_and_grads(other)
    assert calls == expected
    torch.testing.assert_close(other_sums.objective, sums.objective, rtol=1e-12, atol=0)
    assert grads.keys() == other_grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(other_grads[key], grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=key: f"{n}: {m}")


def test_ligers_norm_is_rounded_once(calls: Counter[str]) -> None:
    x, weight = torch.randn(64, 24).bfloat16(), torch.randn(24).bfloat16()
    expected = torch.nn.functional.rms_norm(x.double(), (24,), weight.double(), 1e-6)
    error = (rms_norm(x, weight, 1e-6, "liger").double() - expected).abs()
    assert (error <= torch.finfo(torch.bfloat16).eps * expected.abs()).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_model_with_the_cut_loss_has_the_same_sums(calls: Counter[str], weighted: bool) -> None:
    config = ModelConfig(block_size=12, vocab_size=61, init_std=0.1, **SIZES)
    weights = torch.rand(2, 12, generator=torch.Generator().manual_seed(1)) if weighted else None
    chosen = (Kernels(), Kernels(cross_entropy="cut"))
    plain, other = (GPT(config, dtype=torch.float64, kernels=k) for k in chosen)
    (sums, grads), (other_sums, other_grads) = (_sums_and_grads(m, weights) for m in (plain, other))
    assert calls == {"loss": 1}
    assert not other_sums.token.requires_grad
    assert other_sums.per_token is not None
    assert not other_sums.per_token.requires_grad
    for one, two in zip(sums, other_sums, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_cut_loss_sums_in_fp32(calls: Counter[str]) -> None:
    hidden, weight, labels = torch.randn(32, 16).bfloat16(), torch.randn(53, 16).bfloat16(), torch.arange(32)
    with torch.no_grad():
        sums, ours = (
            fused_linear_cross_entropy(hidden, weight, labels, by="cut"),
            fused_linear_cross_entropy(hidden, weight, labels),
        )
    assert sums.objective.dtype == torch.float32
    torch.testing.assert_close(sums.objective, ours.objective, rtol=1e-6, atol=0)


def test_the_cut_loss_has_no_z_loss(calls: Counter[str]) -> None:
    with pytest.raises(ValueError, match=r'z_loss_coef 0.1 does not work with by="cut"; use 0'):
        fused_linear_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.arange(2), z_loss_coef=0.1, by="cut")


def _trained(log_dir: Path, *flags: object) -> tuple[dict[str, int], list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        calls = install(patch)
        patch.setattr(build, "check_device", lambda kernels, device, dtype: None)
        run = train(Trainer, log_dir, "--precision", "bf16", "--max_steps", 2, "--do_val", *flags)
    return dict(calls), [record["loss"] for record in run.records]


def test_the_flags_reach_the_model(ranks: Pools, tmp_path: Path) -> None:
    both = ("--use_liger_kernel", "--use_cut_cross_entropy", "--recompute", "full")
    ((plain_calls, plain),) = ranks(1).run(_trained, tmp_path / "plain")
    ((calls, losses),) = ranks(1).run(_trained, tmp_path / "both", *both)
    assert plain_calls == {}
    assert set(calls) == {"rms_norm", "swiglu", "loss"}
    assert losses == pytest.approx(plain, rel=1e-2)
