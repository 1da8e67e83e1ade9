"""``--attn_backend varlen``: torch's function for documents, on the CPU over stand-ins for its kernels, and on fake CUDA
tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.varlen import varlen_on_cpu
from tests.model import test_options, test_packed
from tests.model.test_attn import HEADS, LENGTHS, gradients, make_qkv, of_lengths
from tests.model.test_gpt import SIZES, CountOps, make_batch, make_model, sums
from tinytron.errors import ConfigError
from tinytron.kernels.attention import attend
from tinytron.kernels.choice import Kernels, check_device
from tinytron.utils.sequences import Documents

VARLEN = "--attn_backend varlen"


@pytest.mark.parametrize("window", [0, 1, 3, 7, 20])
@pytest.mark.parametrize("lengths", [None, LENGTHS, [1] * 14, [7, 7]])
@pytest.mark.parametrize(("N", "K"), HEADS)
def test_equals_plain_attention(N: int, K: int, lengths: list[int] | None, window: int) -> None:
    qkv = make_qkv(N, K)
    documents = None if lengths is None else of_lengths(lengths)
    expected = attend(*qkv, backend="math", documents=documents, window=window)
    with varlen_on_cpu():
        out = attend(*qkv, backend="varlen", documents=documents, window=window)
        mine = gradients(out, qkv)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mine, gradients(expected, qkv), rtol=1e-10, atol=1e-12)


class Calls(TorchDispatchMode):
    """Arguments of the calls of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.torch_attn._varlen_attn.default:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("window", "given"), [(0, [-1, 0]), (1, [0, 0]), (16, [15, 0])])
@pytest.mark.parametrize("packed", [False, True])
def test_shapes_and_arguments_on_cuda(packed: bool, window: int, given: list[int]) -> None:
    with torch.no_grad(), FakeTensorMode(), Calls() as calls:
        # As they come out of the packed projection: neither is contiguous.
        qkv = torch.empty(2, 32, 8, 64, device="cuda", dtype=torch.bfloat16)
        q, k, v = qkv.split((4, 2, 2), dim=2)
        documents = None
        if packed:
            documents = Documents(torch.empty(4, device="cuda", dtype=torch.int32), 32)
        out = attend(q, k, v, backend="varlen", documents=documents, window=window)
    assert (out.shape, out.dtype, out.device.type) == ((2, 32, 4, 64), torch.bfloat16, "cuda")
    ((q_TNH, k_TKH, v_TKH, cu_q, cu_k, *rest),) = calls.seen
    assert [tuple(t.shape) for t in (q_TNH, k_TKH, v_TKH)] == [(64, 4, 64), (64, 2, 64), (64, 2, 64)]
    assert all(t.stride(-1) == 1 for t in (q_TNH, k_TKH, v_TKH))
    for cu in (cu_q, cu_k):
        assert (tuple(cu.shape), cu.dtype, cu.device.type) == ((4 if packed else 3,), torch.int32, "cuda")
    is_causal = window == 0
    assert rest[:5] == [32, 32, is_causal, None, given]


def test_shared_heads_are_announced_where_torch_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[set[str]] = []

    def recorded(q: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        given.append(set(options))
        return q

    takes = "enable_gqa" in (varlen.varlen_attn.__kwdefaults__ or {})
    monkeypatch.setattr(varlen, "varlen_attn", recorded)
    for N, K in ((4, 4), (4, 2)):
        attend(*make_qkv(N, K), backend="varlen")
    assert given == [{"window_size"}, {"window_size", "enable_gqa"} if takes else {"window_size"}]


# What it cannot do.


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_a_gpu_and_sixteen_bits_are_needed(device: str, dtype: torch.dtype) -> None:
    text = rf"{VARLEN} runs only on CUDA in bf16 or fp16, not on {device} in {dtype}; use sdpa"
    with pytest.raises(ConfigError, match=text):
        check_device(Kernels(attention="varlen"), torch.device(device), dtype)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    text = rf"{VARLEN} needs a GPU of compute capability 8.0 \(Ampere\) or newer, but this is Tesla T4; use sdpa"
    with pytest.raises(ConfigError, match=text):
        check_device(Kernels(attention="varlen"), torch.device("cuda"), torch.float16)
    capability = (8, 0)
    check_device(Kernels(attention="varlen"), torch.device("cuda"), torch.float16)


def test_dropout_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=rf"--dropout 0.1 does not work with {VARLEN}, which has no dropout; use --dropout 0"
    ):
        attend(*make_qkv(4, 2), backend="varlen", dropout=0.1)


# In the model.


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("kind", ["gqa", "qk_norm", "moe_all"])
def test_each_document_is_as_if_it_were_alone(kind: str, recompute: Any) -> None:
    model = test_packed.make_model(kind, kernels=Kernels(attention="varlen"), recompute=recompute)
    with varlen_on_cpu(), CountOps() as ops:
        test_packed.check_against_alone(model, 1e-10)
    assert "tril_" not in ops.calls  # no masks


@pytest.mark.parametrize("variant", ["window", "some windows", "neox in turn"])
@pytest.mark.parametrize("packed", [False, True])
def test_windows_equal_the_twin(variant: str, packed: bool) -> None:
    lengths = (test_options.PACKED,) if packed else ()
    with varlen_on_cpu():
        test_options.check(test_options.make_model(variant, kernels=Kernels(attention="varlen")), variant, *lengths)


def test_selective_recomputation_keeps_its_output() -> None:
    ids, labels = make_batch()
    calls: dict[str, int] = {}
    for recompute in ("none", "full", "selective"):
        model = make_model(kernels=Kernels(attention="varlen"), recompute=recompute)
        with varlen_on_cpu(), CountOps() as ops:
            sums(model, ids, labels).objective.backward()
        calls[recompute] = ops.calls["_varlen_attn"]
    layers = SIZES["num_layer"]
    assert calls == {"none": layers, "full": 2 * layers, "selective": layers}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks(recompute: Any) -> None:
    """Whole graphs: the second one serves any number of documents of any length."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    ids, labels, _ = test_packed.make_batch()
    plain = test_packed.make_model("gqa", torch.float32)
    model = test_packed.make_model("gqa", torch.float32, kernels=Kernels(attention="varlen"), recompute=recompute)
    model.compile_blocks()
    graphs = []
    with varlen_on_cpu():
        for rows in (test_packed.ROWS, [[3, 9], [4, 8], [6, 6], [2, 10]], [[5, 7]] * 4, [[2] * 6] * 4, [[12]] * 4):
            positions = test_packed.make_positions(rows)
            documents = test_packed.documents_of(positions)
            mine = sums(model, ids, labels, positions, documents).objective
            mine.backward()
            expected = sums(plain, ids, labels, positions, documents).objective
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
            graphs.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert graphs[1:] == [graphs[1]] * 4
