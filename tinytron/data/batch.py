"""The micro-batch, and the objects that can be converted into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tinytron.errors import DataError
from tinytron.utils.sequences import IGNORE_INDEX, Documents

# The per-token fields of a sample, and their types in a batch.
FIELDS = {
    "input_ids": torch.int64,
    "labels": torch.int64,
    "weights": torch.float32,
    "positions": torch.int64,
    "padding": torch.bool,
}
REQUIRED = ("input_ids", "labels")
_OURS = ("documents", "sources", "extras", "filling", "routing_scale")  # fields of a batch that samples must not have
_NONE: Mapping[str, torch.Tensor] = {}  # not a MappingProxyType: loader processes pickle batches


class Batch(NamedTuple):
    """One micro-batch: token ids and already shifted labels, int64 ``[B, S]``, and optional fields:

    ``weights``: how much each label counts, float32 ``[B, S]``, not negative; the loss is the weighted mean.
    ``positions``: int64 ``[B, S]``, counting from 0 at the start of every document (and row). If they are given, tokens
    attend only to their own document. ``documents``: the same information for whole rows in another form; it is computed
    from the positions when a batch is used.
    ``sources``: the index of the mixture source of each row, int64 ``[B]``.
    ``extras``: all other fields of the samples, by name, ``[B, ...]``, for a custom ``_loss``. Under sequence parallelism
    extras of shape ``[B, S, ...]`` are split like the ids; the others are whole on every rank.
    ``filling``: number of rows that are copies without labels, which fill up the last validation batch.
    ``padding``: true for tokens that only fill up a row, bool ``[B, S]``; a label of -100 does not make a token padding.
    ``routing_scale``: the factor for the routers' losses, which are sums over tokens, in the step's objective.
    The last two are for models with experts, and ``None`` for others.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    documents: Documents | None = None
    sources: torch.Tensor | None = None
    extras: Mapping[str, torch.Tensor] = _NONE
    filling: int = 0
    padding: torch.Tensor | None = None
    routing_scale: torch.Tensor | None = None

    @classmethod
    def of(cls, fields: Mapping[str, torch.Tensor]) -> Batch:
        """A batch from tensors by name: names in ``FIELDS`` are converted to their types, all others become ``extras``."""
        known: dict[str, Any] = {name: fields[name].to(dtype) for name, dtype in FIELDS.items() if name in fields}
        return cls(**known, extras={name: tensor for name, tensor in fields.items() if name not in FIELDS})

    def to(self, device: torch.device) -> Batch:
        """Move the batch to ``device``; copies from pinned memory are asynchronous."""
        documents = self.documents
        if documents is not None:
            documents = documents._replace(cu_seqlens=documents.cu_seqlens.to(device, non_blocking=True))
        tensors: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in self._asdict().items() if torch.is_tensor(v)
        }
        extras = {name: tensor.to(device, non_blocking=True) for name, tensor in self.extras.items()}
        return self._replace(**tensors, documents=documents, extras=extras)

    def targets(self) -> torch.Tensor:
        """Number of valid labels, int64 scalar."""
        return (self.labels != IGNORE_INDEX).sum()

    def counted_targets(self) -> torch.Tensor:
        """Number of valid labels with a weight above 0, int64 scalar."""
        return counted(self.labels, self.weights).sum()

    def target_weight(self) -> torch.Tensor:
        """Sum of the valid labels' weights, float64 scalar; without weights, the number of valid labels."""
        valid = self.labels != IGNORE_INDEX
        return (valid if self.weights is None else self.weights * valid).sum(dtype=torch.float64)

    def tokens(self) -> torch.Tensor:
        """Number of tokens that are not padding, int64 scalar."""
        if self.padding is None:
            return torch.full((), self.input_ids.numel(), device=self.input_ids.device)
        return (~self.padding).sum()

    def model_inputs(self) -> dict[str, Any]:
        """The model's arguments in addition to ``input_ids`` and ``labels``: all fields that are set, without
        ``extras``."""
        names = ("positions", "documents", "weights", "padding", "routing_scale")
        optional = {name: getattr(self, name) for name in names}
        return {name: value for name, value in optional.items() if value is not None}

    def as_inputs(self) -> dict[str, Any]:
        """The batch by name, with extra keys of the data; ``labels`` are already shifted."""
        return {"input_ids": self.input_ids, "labels": self.labels, **self.model_inputs(), **self.extras}


def counted(labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """True for the labels that count in the loss, bool, in their shape."""
    valid = labels != IGNORE_INDEX
    return valid if weights is None else valid & (weights > 0)


def as_batch(item: Any) -> Batch:
    """Convert an item of a custom loader into a ``Batch``. The item is a ``Batch``, a dict with ``input_ids`` and
    ``labels`` (and optionally ``weights``, ``positions``, ``padding`` and extras), or a pair ``(input_ids, labels)``.
    Raises: DataError for anything else."""
    if isinstance(item, Batch):
        return item
    extras: dict[str, torch.Tensor] = {}
    if isinstance(item, dict):
        given = {name: item[name] for name in FIELDS if item.get(name) is not None}
        extras = _extras(item) if given.keys() >= set(REQUIRED) else {}
    else:
        is_pair = isinstance(item, (list, tuple)) and len(item) == len(REQUIRED)
        given = dict(zip(REQUIRED, item, strict=True)) if is_pair else {}
    shapes = {tuple(t.shape) if torch.is_tensor(t) else None for t in given.values()}
    if not given.keys() >= set(REQUIRED) or len(shapes) != 1 or len(next(iter(shapes)) or ()) != 2:
        raise DataError(
            "a loader must give input_ids and labels, integer tensors [B, S]: a dict, a pair, or a data.Batch (a dict may "
            "also have weights, positions and padding, of the same shape)"
        )
    rows = len(given["input_ids"])
    if uneven := [name for name, tensor in extras.items() if not tensor.ndim or len(tensor) != rows]:
        shape = list(extras[uneven[0]].shape)
        raise DataError(
            f"a loader gave {uneven[0]} of shape {shape} with {rows} sequences; give one row for each, or leave it out"
        )
    return Batch.of({**given, **extras})


def _extras(item: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The entries of ``item`` that are not in ``FIELDS``, as tensors; ``None`` counts as not given. Raises: DataError for
    a reserved name or a value that is not a tensor."""
    extras = {}
    for name, value in item.items():
        if name in FIELDS or value is None:
            continue
        if name in _OURS:
            raise DataError(f"the data has a key {name}, which means something else in a batch; rename it")
        try:
            extras[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the data has a key {name} whose value ({type(value).__name__}) is not a tensor; give numbers, or leave "
                "it out"
            ) from error
    return extras


def as_sample(item: Any) -> dict[str, torch.Tensor]:
    """Convert a dataset item into a dict of rows. The item is such a dict, or ``seq_len + 1`` contiguous token ids. Raises:
    DataError."""
    if isinstance(item, dict):
        if missing := set(REQUIRED) - item.keys():
            raise DataError(f"a dataset item has keys {sorted(item)} but lacks {sorted(missing)}")
        known = {name: torch.as_tensor(item[name]) for name in FIELDS if item.get(name) is not None}
        return {**known, **_extras(item)}
    tokens = torch.as_tensor(item)
    if tokens.ndim != 1:
        raise DataError(
            f"a dataset item must be a dict or a row of seq_len + 1 token ids, not shape {list(tokens.shape)}"
        )
    return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def collate(items: Batch | Sequence[Any]) -> Batch:
    """Stack samples into a batch; a dataset with ``__getitems__`` may already have done so. Raises: DataError if the
    samples' lengths or fields differ."""
    if isinstance(items, Batch):
        return items
    samples = [as_sample(item) for item in items]
    lengths = {len(tensor) for sample in samples for name, tensor in sample.items() if name in FIELDS}
    if len(lengths) != 1:
        raise DataError(
            f"the input_ids and labels of a micro-batch have different lengths {sorted(lengths)}; cut or pad them alike"
        )
    if len(fields := {tuple(sorted(sample)) for sample in samples}) != 1:
        raise DataError(
            f"the samples of a micro-batch have different keys: {sorted(map(list, fields))}; give all the same"
        )
    for name in samples[0]:
        if len(shapes := {tuple(sample[name].shape) for sample in samples}) != 1:
            raise DataError(
                f"the samples of a micro-batch have {name} of different shapes {sorted(map(list, shapes))}; pad them alike"
            )
    return Batch.of({name: torch.stack([sample[name] for sample in samples]) for name in samples[0]})


def masked(batch: Batch, rows: Sequence[int]) -> Batch:
    """The batch with ``rows`` turned into filling: all their labels are ignored, and all their tokens are padding."""
    if not rows:
        return batch
    labels = batch.labels.clone()
    padding = torch.zeros_like(labels, dtype=torch.bool) if batch.padding is None else batch.padding.clone()
    labels[list(rows)] = IGNORE_INDEX
    padding[list(rows)] = True
    return batch._replace(labels=labels, padding=padding, filling=len(rows))


def split_rows(batch: Batch, length: int) -> Batch:
    """The batch with every row cut into rows of ``length`` tokens, which divides that of the rows. Positions count from 0
    at the start of each new row, so tokens no longer attend to the rows before it."""
    B, S = batch.input_ids.shape
    parts = S // length

    def split(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[:2] == (B, S):
            return tensor.reshape(B * parts, length, *tensor.shape[2:])
        return tensor.repeat_interleave(parts, 0)  # one value for each row

    positions = batch.positions
    if positions is not None:
        positions = split(positions)
        continues = (positions == 0).cumsum(1) == 0  # a document that began in an earlier row
        positions = positions - torch.where(continues, positions[:, :1], 0)
    fields: dict[str, Any] = {
        name: split(value)
        for name, value in batch._asdict().items()
        if torch.is_tensor(value) and value.ndim and name != "positions"
    }
    extras = {name: split(value) for name, value in batch.extras.items()}
    return batch._replace(**fields, positions=positions, extras=extras, filling=batch.filling * parts)
