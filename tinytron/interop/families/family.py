"""A family of Hugging Face models: the names of its tensors, and how its config.json is read and written.

A table maps our modules to theirs: ``{i}`` is a layer, ``{e}`` an expert. If several of their tensors make up one of ours,
they are its blocks of rows, in order. Both sides pair rotary elements the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tinytron.distributed.param_spec import ParamSpec
from tinytron.interop.settings import Settings
from tinytron.model.config import ModelConfig

Table = dict[str, tuple[str, ...]]
Options = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    ``read`` returns the options of ``ModelConfig`` that a config.json describes. ``write`` returns the keys of a
    config.json, without what the family cannot express: ``write_architecture`` reads it back and notices.

    ``base`` is the prefix of all tensor names but the head's, and is absent in files of the bare model. ``transposed``
    modules store their weights transposed. ``by_head`` modules order packed rows by head first, then by query, key and
    value. Tensors that match ``ignored`` are tables saved by older versions, not weights.
    """

    model_type: str
    architecture: str
    table: Table
    read: Callable[[Settings], Options]
    write: Callable[[ModelConfig], dict[str, Any]]
    base: str = "model."
    transposed: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()
    ignored: str = r"\.rotary_emb\.inv_freq$"

    def parts(self, spec: ParamSpec, ours: torch.Tensor, config: ModelConfig, first: int = 0) -> Iterator[Part]:
        """Their tensors that make up our parameter ``spec``. ``ours`` is its tensor; for a stacked one (experts) it is this
        rank's part, which begins at index ``first``."""
        if spec.stacked:
            module, suffix = spec.name, ".weight"
        else:
            module, _, kind = spec.name.rpartition(".")
            suffix = f".{kind}"
        layer = re.search(r"\.(\d+)\.", module)
        key = re.sub(r"\.\d+\.", ".{i}.", module, count=1)
        theirs = [name.replace("{i}", layer[1] if layer else "") + suffix for name in self.table[key]]
        if spec.stacked:
            for e, expert in enumerate(ours, start=first):
                yield from _rows([name.replace("{e}", str(e)) for name in theirs], expert, spec.row_blocks)
        elif key in self.by_head:
            head, N = config.resolved_head_dim, config.num_attention_heads
            yield Part(theirs[0], ours.view(3, N, head, *ours.shape[1:]).transpose(0, 1), tuple(ours.shape))
        elif key in self.transposed and ours.ndim == 2:
            yield Part(theirs[0], ours.t(), (ours.shape[1], ours.shape[0]))
        else:
            yield from _rows(theirs, ours, spec.row_blocks)


class Part(NamedTuple):
    """One of their tensors: its ``name`` and ``shape``, and the ``view`` of ours with its elements in its order."""

    name: str
    view: torch.Tensor
    shape: tuple[int, ...]


def _rows(names: list[str], ours: torch.Tensor, blocks: tuple[int, ...]) -> Iterator[Part]:
    views = ours.split(blocks) if len(names) > 1 else (ours,)
    for name, view in zip(names, views, strict=True):
        yield Part(name, view, tuple(view.shape))
