"""Key-value cache: with the keys and values of earlier tokens stored, each new token costs one token's work.

Rows of different lengths end in the same *column*: shorter prompts are padded on the left, so column c of a row is its
token c - padding. Letters as in model/modules/attn.py; s new columns, C slots of a layer, T columns attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tinytron.model import ModelConfig


@dataclass
class _Plan:
    """How the layers with one window size handle new columns: where they are written, and which columns attend to which."""

    slots: int
    index: slice | torch.Tensor = field(default_factory=lambda: slice(0))  # slots of the last ``written`` columns
    written: int = 0
    held: int = 0  # slots in use: before the new columns if they are ``joined``, else including them
    joined: bool = False  # writing the new columns first would overwrite ones that the first of them still attends to
    mask: torch.Tensor | None = None  # added to the scores, [B, 1, s, T]
    causal: bool = False


class KVCache:
    """Keys and values of every layer, ``[B, C, K, H]``, allocated once; ``layers`` is what ``GPT.hidden_states`` takes.

    C is ``capacity`` in columns; a layer with a sliding window has no more slots than its window, and column c is in slot
    c mod C. ``padding`` is the number of padding columns on the left of every row. Inference only: no gradients.
    """

    def __init__(
        self,
        config: ModelConfig,
        padding: Sequence[int],
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.length, self.capacity = 0, capacity
        self._dtype = dtype
        self._padding_B, self._max_padding = torch.tensor(padding, device=device), max(padding)
        windows = [config.window(layer) for layer in range(config.num_layer)]
        self._plans = {w: _Plan(min(capacity, w) if w else capacity) for w in windows}
        self.layers = [
            LayerKV(
                self._plans[window],
                torch.zeros(
                    (2, len(padding), self._plans[window].slots, config.num_key_value_heads, config.resolved_head_dim),
                    dtype=dtype,
                    device=device,
                ),
            )
            for window in windows
        ]

    def extend(self, count: int) -> torch.Tensor:
        """Make room for ``count`` more columns in every row, which the next pass through the model must provide; returns
        their positions ``[B, count]``, 0 in the padding."""
        first, self.length = self.length, self.length + count
        assert self.length <= self.capacity, f"{self.length} columns in a cache of {self.capacity}"
        for window, plan in self._plans.items():
            self._plan(plan, window, first, count)
        column = torch.arange(first, self.length, device=self._padding_B.device)
        return (column - self._padding_B.unsqueeze(1)).clamp(min=0)

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with ``rows``, in this order; a row may be repeated."""
        index = torch.tensor(rows, device=self._padding_B.device)
        self._padding_B = self._padding_B[index]
        for layer in self.layers:
            layer.kept = layer.kept[:, index]

    def _plan(self, plan: _Plan, window: int, first: int, count: int) -> None:
        device, end = self._padding_B.device, first + count
        plan.joined = first == 0 or (count > 1 and end > plan.slots)
        plan.held = min(first if plan.joined else end, plan.slots)
        plan.written = min(count, plan.slots)
        start = (end - plan.written) % plan.slots
        if start + plan.written <= plan.slots:
            plan.index = slice(start, start + plan.written)
        else:
            plan.index = torch.arange(end - plan.written, end, device=device) % plan.slots
        plan.mask, plan.causal = None, False
        if count == 1 and max(0, end - plan.slots) >= self._max_padding:
            return  # every slot in use is within the window and contains no row's padding
        if first == 0 and self._max_padding == 0 and (window == 0 or count <= window):
            plan.causal = True
            return
        newest = (first if plan.joined else end) - 1
        slot = torch.arange(plan.held, device=device)
        columns = newest - (newest - slot) % plan.slots
        queries = torch.arange(first, end, device=device)
        column_T = torch.cat((columns, queries)) if plan.joined else columns
        plan.mask = self._mask(queries.unsqueeze(1), column_T, window)

    def _mask(self, query_s1: torch.Tensor, column_T: torch.Tensor, window: int) -> torch.Tensor:
        seen_sT = column_T <= query_s1
        if window:
            seen_sT &= column_T > query_s1 - window
        # Padding attends to itself: a fully masked softmax row is NaN and would spread.
        seen_BsT = seen_sT & (column_T >= self._padding_B.view(-1, 1, 1)) | (column_T == query_s1)
        mask_BsT = torch.full(seen_BsT.shape, float("-inf"), dtype=self._dtype, device=column_T.device)
        return mask_BsT.masked_fill_(seen_BsT, 0.0).unsqueeze(1)


class LayerKV:
    """One layer's keys and values, ``kept`` ``[2, B, C, K, H]``. A ``LayerCache``."""

    def __init__(self, plan: _Plan, kept: torch.Tensor) -> None:
        self.plan, self.kept = plan, kept

    def attend(self, q_BsNH: torch.Tensor, k_BsKH: torch.Tensor, v_BsKH: torch.Tensor) -> torch.Tensor:
        """See ``LayerCache``; the columns are those that ``KVCache.extend`` made room for."""
        plan = self.plan
        if plan.joined:
            k, v = (
                torch.cat((old[:, : plan.held], new), dim=1)
                for old, new in zip(self.kept, (k_BsKH, v_BsKH), strict=True)
            )
            self._write(k_BsKH, v_BsKH)
        else:
            self._write(k_BsKH, v_BsKH)
            k, v = self.kept[:, :, : plan.held]
        B, s, N, H = q_BsNH.shape
        K = k.shape[2]
        if s == 1:  # treat the queries of one key's group as a sequence: no key is repeated
            q_BKGH, k_BKTH, v_BKTH = q_BsNH.view(B, K, N // K, H), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q_BKGH, k_BKTH, v_BKTH, attn_mask=plan.mask).reshape(B, 1, N, H)
        out_BNsH = F.scaled_dot_product_attention(
            q_BsNH.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=plan.mask,
            is_causal=plan.causal,
            enable_gqa=N != K,
        )
        return out_BNsH.transpose(1, 2)

    def _write(self, k_BsKH: torch.Tensor, v_BsKH: torch.Tensor) -> None:
        for kept, new in zip(self.kept, (k_BsKH, v_BsKH), strict=True):
            kept[:, self.plan.index] = new[:, -self.plan.written :]
