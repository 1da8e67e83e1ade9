"""Entropy and largest logit of attention, by layer."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn

from tinytron.distributed.collectives import sum_over
from tinytron.distributed.parallel_state import ParallelState
from tinytron.errors import ConfigError
from tinytron.hooks.points import is_recomputing, uncompiled
from tinytron.metrics.step_statistics import Measuring
from tinytron.model.modules.attn import Attention
from tinytron.utils.sequences import Documents

ROWS = 256  # queries of each sequence and head that are measured, at equal distances
_SCORES = 2**22  # scores in memory at a time, about


class AttentionStatistics:
    """Measures the attention weights of a step's training passes in every layer, over all micro-batches and ranks: for up
    to ``ROWS`` queries of each sequence and head, with all keys that they see.

    Compiled blocks run uncompiled in the steps that are measured. Raises: ConfigError for a model without our attention.
    """

    def __init__(self, model: nn.Module, state: ParallelState) -> None:
        self._model, self._state = model, state
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
        if not self._layers:
            raise ConfigError(
                f"--log_attention needs the attention layers of Tinytron's GPT, but this {type(model).__name__} has none; "
                "use --no-log_attention"
            )
        self._measuring = Measuring()

    def begin(self) -> None:
        """Measure the next step."""
        undo = self._measuring.start()
        self._sums = torch.zeros(len(self._layers), 2, dtype=torch.float64, device=self._state.device)  # nats, rows
        self._largest = torch.full_like(self._sums[:, 0], -math.inf)
        undo.enter_context(uncompiled(self._model, list(self._layers)))
        for i, layer in enumerate(self._layers.values()):
            layer.watch = partial(self._measure, i, layer.window)
            undo.callback(delattr, layer, "watch")

    def record(self, step: int) -> dict[str, float]:
        """``attention/<block>/entropy`` in nats, the mean over queries, and ``max_logit``. Collective; the host waits."""
        if not self._measuring.stop():
            return {}
        world = self._state.groups["world"]
        sums = sum_over(self._sums, world)
        dist.all_reduce(self._largest, op=dist.ReduceOp.MAX, group=world)
        found: dict[str, float] = {}
        rows = torch.cat((sums, self._largest[:, None]), 1).tolist()
        for name, (nats, count, largest) in zip(self._layers, rows, strict=True):
            if count:  # else a custom loss never calls this model
                block = name.rpartition(".")[0]
                found |= {f"attention/{block}/entropy": nats / count, f"attention/{block}/max_logit": largest}
        return found

    @torch.no_grad()
    def _measure(self, i: int, window: int, q: torch.Tensor, k: torch.Tensor, documents: Documents | None) -> None:
        if is_recomputing():
            return
        nats, rows, largest = attention_statistics(q, k, documents, window)
        self._sums[i, 0] += nats
        self._sums[i, 1] += rows
        self._largest[i] = torch.maximum(self._largest[i], largest)


def measured_rows(S: int, count: int, device: torch.device) -> torch.Tensor:
    """``count`` positions of a sequence at equal distances, the last one included; all, if there are fewer."""
    count = min(S, count)
    return (torch.arange(1, count + 1, device=device) * S) // count - 1


def attention_statistics(
    q_BSNH: torch.Tensor, k_BSKH: torch.Tensor, documents: Documents | None, window: int, rows: int = ROWS
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """The summed entropy in nats of the attention weights of the ``measured_rows``, their number over all sequences and
    heads, and their largest logit. Arguments as in ``kernels.attention.attend``. Only a tile of scores is in memory."""
    (B, S, N, H), K = q_BSNH.shape, k_BSKH.shape[2]
    compute = torch.promote_types(q_BSNH.dtype, torch.float32)
    row_R = measured_rows(S, rows, q_BSNH.device)
    nats = torch.zeros((), dtype=torch.float64, device=q_BSNH.device)
    largest = torch.full_like(nats, -math.inf)
    k_BKHS = k_BSKH.permute(0, 2, 3, 1).to(compute)
    for row_r in row_R.split(max(1, _SCORES // (B * N * S))):
        q_BKGrH = q_BSNH[:, row_r].unflatten(2, (K, N // K)).permute(0, 2, 3, 1, 4).to(compute)
        scores_BKGrS = torch.einsum("bkgrh,bkhs->bkgrs", q_BKGrH, k_BKHS) * H**-0.5
        scores_BKGrS = scores_BKGrS + _mask(row_r, B, S, documents, window).to(compute)
        largest = torch.maximum(largest, scores_BKGrS.amax().double())
        nats += torch.special.entr(scores_BKGrS.softmax(-1)).sum(dtype=torch.float64)
    return nats, B * N * len(row_R), largest


def _mask(row_r: torch.Tensor, B: int, S: int, documents: Documents | None, window: int) -> torch.Tensor:
    """The mask to add to the scores of the queries ``row_r``: ``[1 or B, 1, 1, r, S]``."""
    if documents is not None and documents.mask is not None:
        return documents.mask[:, :, row_r].unsqueeze(1)
    key_S = torch.arange(S, device=row_r.device)
    seen = key_S <= row_r[:, None]
    if window:
        seen &= key_S > row_r[:, None] - window
    seen_BrS = seen.unsqueeze(0)
    if documents is not None:
        token_BS = torch.arange(B * S, dtype=torch.int32, device=row_r.device).view(B, S)
        document_BS = torch.searchsorted(documents.cu_seqlens, token_BS, right=True)
        seen_BrS = seen_BrS & (document_BS[:, row_r, None] == document_BS[:, None])
    return torch.zeros_like(seen_BrS, dtype=torch.float32).masked_fill(~seen_BrS, -math.inf)[:, None, None]
