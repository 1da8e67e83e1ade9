"""Tensor files in the safetensors format, memory-mapped for reading and written one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, begin and end of its
bytes), and the bytes of all tensors without gaps. Format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from tinytron.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as in the format's own library


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type and shape, and the offset of its data from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """A file whose header has been read and checked: ``entries`` by name; ``get`` maps the data without reading it.

    Raises: CheckpointError if the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                size = path.stat().st_size
                header, start = _read_header(file, size)
                self.entries = {n: _entry(n, v, start, size) for n, v in header.items() if n != "__metadata__"}
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a complete safetensors file ({error})") from error

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name``, a view of the file; writing to it changes a private copy of the page."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(self._bytes, dtype=entry.dtype, count=count, offset=entry.offset)
        return flat.view(entry.shape)


def _read_header(file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LARGEST_HEADER):
        raise ValueError(f"its header of {length:,} bytes does not fit into its {size:,} bytes")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    return header, 8 + length


def _entry(name: str, facts: Any, start: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = facts["dtype"], facts["shape"], facts["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"its header does not say where {name} is") from error
    if dtype not in _DTYPES:
        raise ValueError(f"{name} has type {dtype}; supported are {', '.join(_DTYPES)}")
    numbers = [begin, end, *shape] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"the shape and offsets of {name} are not whole numbers")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != expected or start + end > size:
        raise ValueError(
            f"{name} needs {expected:,} bytes, but its header puts it at {begin:,} to {end:,} of {size - start:,}"
        )
    return Entry(_DTYPES[dtype], tuple(shape), start + begin)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    get: Callable[[str], torch.Tensor],
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Write the tensors named in ``shapes``, all in ``dtype``. ``get`` returns each one when it is written, so only one is
    in memory at a time; ``advance`` is called with its size in bytes once it is written. Raises: OSError if
    writing fails."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = get(name).to(device="cpu", dtype=dtype).contiguous()
            assert tuple(tensor.shape) == tuple(shape), f"{name} is {tuple(tensor.shape)}, announced as {tuple(shape)}"
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            advance(tensor.nbytes)
