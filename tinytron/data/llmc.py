"""Token files as llm.c reads them: 256 little-endian int32 of header, then uint16 token ids.

header[0] = 20240520 (magic)   [1] = 1 (version)   [2] = number of tokens
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from tinytron.errors import DataError
from tinytron.utils.training import write_atomically

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


def write_llmc(path: Path, tokens: npt.NDArray[np.uint16]) -> None:
    """Write token ids as one file, whole or not at all. Raises: OSError."""
    assert tokens.dtype == np.uint16, f"{tokens.dtype} is not what llm.c reads"
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    body = tokens.astype("<u2").tobytes()
    write_atomically(path, lambda file: (file.write(header.tobytes()), file.write(body)))


def open_llmc(path: Path) -> npt.NDArray[np.uint16]:
    """The tokens of a file as a read-only memory map. Raises: DataError for another header, or a length that is not what
    the header says."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: {len(raw)} bytes are no token shard: its header alone has {HEADER_BYTES}")
    magic, version, count = (int(v) for v in np.frombuffer(raw, "<i4", 3))
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path}: magic {magic}, version {version}: not an llm.c token shard ({MAGIC}, {VERSION})")
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        raise DataError(
            f"{path}: the header promises {count} tokens, so {expected} bytes, but the file has {size}: it is truncated or "
            "damaged; write or fetch it again"
        )
    if count == 0:
        return np.empty(0, np.uint16)
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
