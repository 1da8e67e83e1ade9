"""Attention backends against loops over batch, head and query."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.rope import frequencies
from tinytron.errors import ConfigError
from tinytron.kernels.attention import attend, one_per_query_head
from tinytron.kernels.choice import Backend, Kernels, check_device
from tinytron.model.config import ModelConfig
from tinytron.model.modules.attn import Attention
from tinytron.model.modules.emb import RotaryEmbedding
from tinytron.utils.sequences import Documents, documents_of

B, S, H = 2, 7, 4
HEADS = [(4, 4), (4, 2), (4, 1), (6, 3)]  # MHA, GQA, MQA
CPU_BACKENDS: list[Backend] = ["sdpa", "math"]
# Documents of the flattened batch, 7 + 7 tokens; the second begins and ends inside the first row.
LENGTHS = [2, 4, 1, 3, 4]


def make_qkv(N: int, K: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(N * 10 + K)
    return [
        torch.randn(B, S, heads, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (N, K, K)
    ]


def of_lengths(lengths: list[int]) -> Documents:
    return Documents(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int] | None = None) -> torch.Tensor:
    """One query of one head at a time, over the keys of its own document that are not later."""
    N, K = q.shape[2], k.shape[2]
    document = [d for d, length in enumerate(lengths or [S] * B) for _ in range(length)]
    rows = []
    for b in range(B):
        for t in range(S):
            for n in range(N):
                kv = n * K // N  # queries n of a group share one key/value head
                seen = [u for u in range(t + 1) if document[b * S + u] == document[b * S + t]]
                weights = torch.stack([(q[b, t, n] * k[b, u, kv]).sum() / H**0.5 for u in seen]).exp()
                values = torch.stack([v[b, u, kv] for u in seen])
                rows.append((weights[:, None] * values).sum(0) / weights.sum())
    return torch.stack(rows).view(B, S, N, H)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("lengths", [None, LENGTHS, [1] * 14, [7, 7]])
@pytest.mark.parametrize(("N", "K"), HEADS)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equals_naive_attention(backend: Backend, N: int, K: int, lengths: list[int] | None) -> None:
    qkv = make_qkv(N, K)
    documents = None if lengths is None else of_lengths(lengths)
    out, expected = attend(*qkv, backend=backend, documents=documents), naive(*qkv, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(out, qkv), gradients(expected, qkv), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_lower_precision_is_near(
    backend: Backend, lengths: list[int] | None, dtype: torch.dtype, tolerance: float
) -> None:
    qkv = make_qkv(4, 2, dtype)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    out = attend(*qkv, backend=backend, documents=None if lengths is None else of_lengths(lengths))
    expected = naive(*exact, lengths)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(gradients(out, qkv), gradients(expected, exact), strict=True):
        assert (mine.double() - theirs).norm() < tolerance * theirs.norm()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_each_document_is_as_if_it_were_alone(backend: Backend) -> None:
    qkv = make_qkv(4, 2)
    out = attend(*qkv, backend=backend, documents=of_lengths(LENGTHS))
    flat = [t.flatten(0, 1) for t in qkv]
    alone, start = [], 0
    for length in LENGTHS:
        alone.append(attend(*(t[start : start + length].unsqueeze(0) for t in flat), backend=backend)[0])
        start += length
    expected = torch.cat(alone).view_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(out, qkv), gradients(expected, qkv), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_future_is_not_seen(backend: Backend) -> None:
    qkv = make_qkv(4, 2)
    out = attend(*qkv, backend=backend)
    for grad in torch.autograd.grad(out[:, :3].sum(), qkv):
        assert not grad[:, 3:].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_dropout_keeps_the_mean_and_is_random(backend: Backend) -> None:
    q, k, v = (t.detach().float() for t in make_qkv(4, 2))
    torch.manual_seed(0)
    samples = torch.stack([attend(q, k, v, backend=backend, dropout=0.3) for _ in range(400)])
    expected = attend(q, k, v, backend=backend)
    error = samples.std(0) / 400**0.5
    assert ((samples.mean(0) - expected).abs() < 5 * error + 1e-6).all()
    assert (samples.std(0) > 0).all()


def test_flash_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--attn_backend flash needs the flash-attn package: pip install flash-attn"):
        check_device(Kernels(attention="flash"), torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_flash_needs_a_gpu_and_sixteen_bits(monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    text = rf"--attn_backend flash runs only on CUDA in bf16 or fp16, not on {device} in {dtype}; use sdpa"
    with pytest.raises(ConfigError, match=text):
        check_device(Kernels(attention="flash"), torch.device(device), dtype)


def test_flash_is_refused_on_this_cpu() -> None:
    with pytest.raises(ConfigError, match=r"--attn_backend flash .* sdpa"):
        check_device(Kernels(attention="flash"), torch.device("cpu"), torch.bfloat16)


def test_available_backends_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in CPU_BACKENDS:
        check_device(Kernels(attention=backend), torch.device("cpu"), torch.float64)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    check_device(Kernels(attention="flash"), torch.device("cuda", 1), torch.float16)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_flash_is_called_in_its_own_layout(monkeypatch: pytest.MonkeyPatch, lengths: list[int] | None) -> None:
    """With a stand-in for the package, which has the two functions' signatures and the naive arithmetic."""
    q, k, v = make_qkv(4, 2)

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_p: float, causal: bool) -> object:
        assert (dropout_p, causal) == (0.0, True)
        return naive(q, k, v)

    def flash_attn_varlen_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, *, dropout_p: float, causal: bool,
    ) -> object:  # fmt: skip
        assert (dropout_p, causal, max_seqlen_q, max_seqlen_k) == (0.0, True, max(LENGTHS), max(LENGTHS))
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.dtype == torch.int32
        found = cu_seqlens_q.diff().tolist()
        return naive(*(t.view(B, S, -1, H) for t in (q, k, v)), found).flatten(0, 1)

    package = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    out = attend(q, k, v, backend="flash", documents=None if lengths is None else of_lengths(lengths))
    torch.testing.assert_close(out, naive(q, k, v, lengths), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_attention_weights_are_dropped_in_training_only(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    used: list[float] = []
    torch_sdpa = F.scaled_dot_product_attention

    def recorded(*args: torch.Tensor, dropout_p: float, **options: object) -> torch.Tensor:
        used.append(dropout_p)
        return torch_sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    config = ModelConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, dropout=0.25)
    layer = Attention(config).train(training)
    layer(torch.randn(B, S, 16), RotaryEmbedding(frequencies(4, 1e4), S, torch.float32)(0, S))
    assert used == [0.25 if training else 0.0]


# Documents.


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    """Lengths of the documents of some rows, and the rows' length."""
    length, rows = draw(st.integers(1, 12)), []
    for _ in range(draw(st.integers(1, 4))):
        cuts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
        rows.append([b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)])
    return rows, length


@settings(max_examples=100, deadline=None)
@given(packed=packed_rows(), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_documents_begin_where_positions_do(packed: tuple[list[list[int]], int], dtype: torch.dtype) -> None:
    rows, length = packed
    positions = torch.tensor([[i for n in row for i in range(n)] for row in rows], dtype=dtype)
    documents = documents_of(positions)
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.tolist()[-1] == len(rows) * length
    assert documents.cu_seqlens.diff().tolist() == [n for row in rows for n in row]
    assert documents.max_len == max(n for row in rows for n in row)
    assert documents.mask is None


def test_a_row_that_goes_on_is_no_row_of_documents() -> None:
    with pytest.raises(AssertionError, match="positions must begin at 0 in every row"):
        documents_of(torch.tensor([[0, 1, 0], [2, 3, 0]]))


def test_the_mask_lets_a_query_see_its_documents_past() -> None:
    mask = of_lengths([2, 1, 3]).with_mask(2, 3, torch.bfloat16).mask
    assert mask is not None
    assert mask.dtype == torch.bfloat16
    no = float("-inf")
    first, second = [[0, no, no], [0, 0, no], [no, no, 0]], [[0, no, no], [0, 0, no], [0, 0, 0]]
    assert mask.tolist() == [[first], [second]]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_mask_that_is_there_is_used(backend: Backend) -> None:
    qkv = make_qkv(4, 2)
    whole = of_lengths([S, S]).with_mask(B, S, torch.float64).mask
    out = attend(*qkv, backend=backend, documents=of_lengths(LENGTHS)._replace(mask=whole))
    torch.testing.assert_close(out, naive(*qkv), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("N", "K"), [(4, 2), (6, 1), (4, 4)])
def test_a_key_for_every_query_head_changes_nothing(N: int, K: int) -> None:
    """What masked attention does on CUDA."""
    q, k, v = make_qkv(N, K)
    documents = of_lengths([S, 3, S - 3])
    shared = attend(q, k, v, documents=documents)
    alone = attend(q, one_per_query_head(k, N), one_per_query_head(v, N), documents=documents)
    torch.testing.assert_close(alone, shared, rtol=1e-10, atol=1e-10)
