"""Causal attention on CPUs, built from batched matrix products over tiles of the score matrix.

torch's fused CPU kernel multiplies tiles one by one, at a tenth of the rate of ``bmm``. Here a tile consists of a few rows
of queries, for all heads that share a key head, and all keys up to their position. So the products are large, scores above
the diagonal are skipped tile by tile, and a tile stays in the cache. As in FlashAttention (arXiv:2205.14135, section 3.1)
the scores are never in memory as a whole, and the backward pass recomputes them. docs/performance.md has measurements.

Letters: B batch, S sequence, N query heads, K key/value heads, H head dimension; U = B * K pairs of a row and a key head,
G = N / K query heads of a pair; M tiles of r tokens each, R = G * r rows of a tile; n pairs and t keys of one product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tinytron.utils.matmul import onednn

SHORTEST, LONGEST = 32, 2048  # tokens; outside this range torch's kernel is as fast
_SCORES = 2**19  # approximate number of scores in a tile: 2 MiB in fp32


def can_tile(q_BSNH: torch.Tensor, dropout: float) -> bool:
    """True if ``tiled_attention`` supports these queries and is faster than torch's kernel."""
    fits = SHORTEST <= q_BSNH.shape[1] <= LONGEST and q_BSNH.dtype != torch.float16
    on_cpu = q_BSNH.device.type == "cpu" and not q_BSNH.is_cuda  # the memory planner fakes is_cuda
    return on_cpu and dropout == 0 and fits


def tiled_attention(
    q_BSNH: torch.Tensor, k_BSKH: torch.Tensor, v_BSKH: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal softmax attention: ``[B, S, N, H] -> [B, S, N, H]``; ``N`` is a multiple of ``K``.

    ``mask`` ``[1 or B, 1, S, S]`` (constant) is added to the scores instead of the causal mask; it must be -inf above the
    diagonal. Scores, softmax and sums over tiles are in fp32 (fp64 for fp64 inputs). Products of weights or their gradients
    with values are in the inputs' precision, as in fused kernels. For ``torch.compile`` this is a single operation.
    """
    out: torch.Tensor = _forward(q_BSNH, k_BSKH, v_BSKH, mask)
    return out


def _tile_length(S: int) -> int:
    """A divisor of ``S`` between 64 and 256, about an eighth of it; ``S`` itself if it has no suitable divisor."""
    wanted = max(64, min(256, S // 8))
    return next((S // M for M in range(-(-S // wanted), S // 16 + 1) if S % M == 0), S)


class _Tile(NamedTuple):
    """One tile: the pairs ``pairs``, row block ``number`` of each, and the first ``t`` keys. ``shape`` is the shape of its
    scores: n, G, r, t."""

    pairs: slice
    number: int
    shape: tuple[int, int, int, int]

    @property
    def rows(self) -> tuple[int, slice]:
        """The tile's index into ``[M, U, R, H]``, which selects ``[n, R, H]``."""
        return self.number, self.pairs

    @property
    def keys(self) -> tuple[slice, slice]:
        """The tile's index into ``[U, S, H]``, which selects ``[n, t, H]``."""
        return self.pairs, slice(0, self.shape[3])

    def scores(self, buffer: torch.Tensor) -> torch.Tensor:
        """A view ``[n, R, t]`` of the beginning of a flat buffer."""
        n, G, r, t = self.shape
        return buffer[: n * G * r * t].view(n, G * r, t)


class _Scores:
    """Computes softmax weights tile by tile, in buffers that all tiles share, because on a CPU touching fresh memory takes
    longer than the arithmetic on it."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> None:
        (self.B, S, N, H), self.K = q.shape, k.shape[2]
        self.G = N // self.K
        self.r = _tile_length(S)
        U = self.B * self.K
        self.dtype = q.dtype
        self.scale = H**-0.5
        self.mask = mask
        self.compute = torch.promote_types(self.dtype, torch.float32)
        self.q_MURH, self.k_USH, self.v_USH = self.by_tile(q), self.by_pair(k), self.by_pair(v)
        self._wide_q, self._wide_k = self.q_MURH.to(self.compute), self.k_USH.to(self.compute)
        self._n = min(U, max(1, _SCORES // (self.G * self.r * S)))
        size = self._n * self.G * self.r * S
        self._products, self._weights = (torch.empty(size, dtype=self.compute) for _ in range(2))
        self._low = torch.empty(size, dtype=self.dtype) if self.dtype != self.compute else None
        self._future = torch.full((self.r, self.r), float("-inf"), dtype=self.compute).triu_(1)

    def by_tile(self, x_BSNH: torch.Tensor) -> torch.Tensor:
        """``[B, S, N, H] -> [M, U, R, H]``, contiguous, so that each tile is contiguous and oneDNN does not copy it."""
        B, S, _, H = x_BSNH.shape
        x_BMrKGH = x_BSNH.reshape(B, S // self.r, self.r, self.K, self.G, H)
        x_MURH = x_BMrKGH.permute(1, 0, 3, 4, 2, 5).reshape(S // self.r, B * self.K, self.G * self.r, H)
        return x_MURH.contiguous()

    def from_tiles(self, x_MURH: torch.Tensor) -> torch.Tensor:
        """The inverse of ``by_tile``, contiguous."""
        M, _, _, H = x_MURH.shape
        x_MBKGrH = x_MURH.view(M, self.B, self.K, self.G, self.r, H)
        return x_MBKGrH.permute(1, 0, 4, 2, 3, 5).reshape(self.B, M * self.r, self.K * self.G, H).contiguous()

    def by_pair(self, x_BSKH: torch.Tensor) -> torch.Tensor:
        """``[B, S, K, H] -> [U, S, H]``, contiguous."""
        return x_BSKH.transpose(1, 2).flatten(0, 1).contiguous()

    def from_pairs(self, x_USH: torch.Tensor) -> torch.Tensor:
        """The inverse of ``by_pair``, contiguous."""
        return x_USH.unflatten(0, (self.B, self.K)).transpose(1, 2).contiguous()

    def tiles(self) -> Iterator[_Tile]:
        M, U = self.q_MURH.shape[:2]
        for pair in range(0, U, self._n):
            pairs = slice(pair, min(U, pair + self._n))
            for number in range(M):
                yield _Tile(pairs, number, (pairs.stop - pair, self.G, self.r, (number + 1) * self.r))

    def multiply(self, left: torch.Tensor, right: torch.Tensor, tile: _Tile, scale: float = 1.0) -> torch.Tensor:
        """``scale * left @ right^T``, ``[n, R, t]``, in the softmax precision; valid until the next product."""
        out = tile.scores(self._products)
        with onednn() if self.dtype == torch.bfloat16 else contextlib.nullcontext():
            return torch.baddbmm(out, left, right.mT, beta=0, alpha=scale, out=out)

    def weights(self, tile: _Tile) -> torch.Tensor:
        """The softmax over a tile's keys, ``[n, R, t]``; valid until the next tile."""
        scores = self.multiply(self._wide_q[tile.rows], self._wide_k[tile.keys], tile, self.scale)
        first = tile.number * self.r
        t = tile.shape[3]
        if self.mask is None:
            scores.view(tile.shape)[..., first:].add_(self._future)
        else:
            row = torch.arange(tile.pairs.start, tile.pairs.stop) // self.K if len(self.mask) > 1 else slice(None)
            scores.view(tile.shape).add_(self.mask[row, :, first:t, :t])
        return torch.ops.aten._softmax.out(scores, -1, False, out=tile.scores(self._weights))

    def low(self, x: torch.Tensor, tile: _Tile) -> torch.Tensor:
        """``x`` in the inputs' precision; valid until the next call."""
        return x if self._low is None else tile.scores(self._low).copy_(x)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = _Scores(q, k, v, mask)
    out_MURH = torch.empty_like(scores.q_MURH)
    for tile in scores.tiles():
        out_MURH[tile.rows] = torch.bmm(scores.low(scores.weights(tile), tile), scores.v_USH[tile.keys])
    return scores.from_tiles(out_MURH)


def _attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = _Scores(q, k, v, mask)
    compute = scores.compute
    grad_MURH = scores.by_tile(grad)
    wide_grad, wide_v = grad_MURH.to(compute), scores.v_USH.to(compute)
    dq_MURH = torch.empty_like(scores.q_MURH)
    dk_USH, dv_USH = (torch.zeros(scores.k_USH.shape, dtype=compute) for _ in range(2))
    for tile in scores.tiles():
        weights = scores.weights(tile)
        dv_USH[tile.keys] += torch.bmm(scores.low(weights, tile).mT, grad_MURH[tile.rows])
        d_weights = scores.multiply(wide_grad[tile.rows], wide_v[tile.keys], tile)
        torch.ops.aten._softmax_backward_data.out(d_weights, weights, -1, compute, grad_input=d_weights)
        d_scores = scores.low(d_weights, tile)
        dk_USH[tile.keys] += torch.bmm(d_scores.mT, scores.q_MURH[tile.rows])
        dq_MURH[tile.rows] = torch.bmm(d_scores, scores.k_USH[tile.keys])
    dk_USH *= scores.scale
    dq = scores.from_tiles(dq_MURH.mul_(scores.scale))
    return dq, scores.from_pairs(dk_USH.to(k.dtype)), scores.from_pairs(dv_USH.to(v.dtype))


_forward = torch.library.custom_op("tinytron::tiled_attention", _attend, mutates_args=())
_backward = torch.library.custom_op("tinytron::tiled_attention_backward", _attend_backward, mutates_args=())
PARTS: dict[Any, Callable[..., Any]] = {  # the implementation of each operation, for the memory planner
    torch.ops.tinytron.tiled_attention.default: _attend,
    torch.ops.tinytron.tiled_attention_backward.default: _attend_backward,
}


@_forward.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return q.new_empty(q.shape)


@_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    q, k, v, mask = ctx.saved_tensors
    return *_backward(grad, q, k, v, mask), None


_forward.register_autograd(_differentiate, setup_context=_save)
