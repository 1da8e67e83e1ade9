"""Formats of token files. One reader handles all of them and tells them apart by the first number of the file.

    name      header                                                      then, little-endian
    timl v1   256 int32: 20250805, 1, dtype id, count, zeros              uint16 (id 0) or uint32 (1); weights: float32 (0)
    llm.c     256 int32: 20240520, 1, count, zeros                        uint16
              256 int32: 20240801, 7, count, zeros                        uint32
              3 int32 only: 20240520, 1, count                            uint16
    none      no header: the caller must give the type                    uint16 or uint32

Headers of 256 int32 end at byte 1024. Some descriptions of the second format say otherwise, but its readers start there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tinytron.errors import DataError
from tinytron.utils.training import write_atomically

MAGIC, VERSION = 20250805, 1
HEADER_BYTES, SHORT_HEADER_BYTES = 1024, 12
_LOOKED_AT = 4096  # tokens of a file without a header that are checked for a wrong width
TOKEN_DTYPES: tuple[np.dtype[Any], ...] = (np.dtype("<u2"), np.dtype("<u4"))
WEIGHT_DTYPES: tuple[np.dtype[Any], ...] = (np.dtype("<f4"),)
MAX_TOKENS = 2**31 - 1  # the count is an int32

FileFormat = Literal["timl", "llmc"]
LLMC_MAGIC, LLMC_VERSION = 20240520, 1
_LLMC = {LLMC_MAGIC: (LLMC_VERSION, TOKEN_DTYPES[0]), 20240801: (7, TOKEN_DTYPES[1])}  # magic -> version and type


@dataclass(frozen=True)
class ShardHeader:
    """The content a header declares: ``count`` values of ``dtype`` that start at byte ``offset``. ``file_format`` is
    ``timl``, ``llmc`` or ``none``."""

    dtype: np.dtype[Any]
    count: int
    offset: int = HEADER_BYTES
    file_format: str = "timl"


def read_header(
    path: Path,
    headerless: npt.DTypeLike | None = None,
    dtypes: tuple[np.dtype[Any], ...] = TOKEN_DTYPES,
) -> ShardHeader:
    """Read the header, and check it and the file's length. If ``headerless`` is given, a file without a known magic number
    holds tokens of that type, starting at its first byte. ``dtypes`` maps the dtype ids of timl v1 to types.

    Raises: DataError naming the file and the byte offset of the problem.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check --dataset_path") from error
    numbers = [int(v) for v in np.frombuffer(raw[: len(raw) // 4 * 4], "<i4")[:4]]
    magic = numbers[0] if numbers else None
    known = magic == MAGIC or magic in _LLMC
    if not known and _is_text(raw):
        raise DataError(
            f"{path}: this is text, not tokens; tokenize it first: tinytron tokenize --dataset_path {path} --train_bpe 4096"
        )
    if headerless is not None and not known:
        return _headerless(path, size, np.dtype(headerless).newbyteorder("<"))
    if dtypes is TOKEN_DTYPES and _is_short(numbers, raw, size):
        return ShardHeader(TOKEN_DTYPES[0], numbers[2], SHORT_HEADER_BYTES, "llmc")
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: {len(raw)} bytes are not a token shard: its header alone has {HEADER_BYTES}")
    if not known:
        raise DataError(
            f"{path}: magic number {magic} at byte 0 is not one of {', '.join(map(str, (MAGIC, *_LLMC)))}: not a token "
            "shard (for files without a header, give their type: --token_dtype uint16 or uint32)"
        )
    version, dtype, count, at = _read_numbers(path, numbers, dtypes)
    if numbers[1] != version:
        raise DataError(f"{path}: version {numbers[1]} at byte 4, but only version {version} of {magic} is known")
    expected = HEADER_BYTES + count * dtype.itemsize
    what = "weights" if dtypes is WEIGHT_DTYPES else "tokens"
    if count < 0 or size != expected:
        raise DataError(
            f"{path}: the header (byte {at}) declares {count} {what}, so {expected} bytes, but the file has {size}: "
            "it is truncated or damaged; write it again"
        )
    return ShardHeader(dtype, count, file_format="llmc" if magic in _LLMC else "timl")


def _read_numbers(
    path: Path, numbers: list[int], dtypes: tuple[np.dtype[Any], ...]
) -> tuple[int, np.dtype[Any], int, int]:
    """Version and type that belong to the magic number, the count, and the byte offset of the count."""
    if numbers[0] in _LLMC:
        version, dtype = _LLMC[numbers[0]]
        if dtypes is not TOKEN_DTYPES:
            raise DataError(
                f"{path}: magic number {numbers[0]} at byte 0 stands for tokens, not for {dtypes[0]} values"
            )
        return version, dtype, numbers[2], 8
    if not 0 <= numbers[2] < len(dtypes):
        names = " or ".join(f"{number} ({dtype})" for number, dtype in enumerate(dtypes))
        raise DataError(f"{path}: dtype id {numbers[2]} at byte 8, but expected {names}")
    return VERSION, dtypes[numbers[2]], numbers[3], 12


def _is_short(numbers: list[int], raw: bytes, size: int) -> bool:
    """True if a file has the short header of three numbers; its length must fit that header and not the long one."""
    if len(numbers) < 3 or numbers[:2] != [LLMC_MAGIC, LLMC_VERSION] or numbers[2] < 0:
        return False
    # If only zeros follow, they are the rest of a long header, and the last 1012 bytes of the file are missing.
    return size == SHORT_HEADER_BYTES + 2 * numbers[2] and (numbers[2] == 0 or any(raw[SHORT_HEADER_BYTES:]))


def _is_text(raw: bytes) -> bool:
    """True if the first bytes of a file are UTF-8 text; token ids soon contain a byte that text never has."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(raw) - 3:  # only the last character may be invalid, because it can be cut off
            return False
        text = raw[: error.start].decode("utf-8-sig")
    return len(raw) >= 32 and all(character.isprintable() or character in "\t\r\n" for character in text)


def _headerless(path: Path, size: int, dtype: np.dtype[Any]) -> ShardHeader:
    if dtype not in TOKEN_DTYPES:
        raise DataError(f"token dtype {dtype} is not one of uint16, uint32")
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size} bytes are not a whole number of {dtype} tokens (--token_dtype): the one at byte "
            f"{size - size % dtype.itemsize} is cut off; the file is truncated, or has another type"
        )
    _check_width(path, np.fromfile(path, dtype, min(size // dtype.itemsize, _LOOKED_AT)))
    return ShardHeader(dtype, size // dtype.itemsize, 0, "none")


def _check_width(path: Path, first: npt.NDArray[Any]) -> None:
    """Check that the ``first`` tokens of a file are whole numbers and not halves of wider ones. In the latter case every
    second token is an upper half and has a small value. Raises: DataError."""
    low, high = first[::2], first[1::2]
    if len(first) < 32 or 4 * np.count_nonzero(low) < len(low):  # too few values to tell
        return
    if int(high.max()) == 0 or (int(high.max()) < 16 and int(low.max()) >= 256):
        advice = "use --token_dtype uint32" if first.itemsize == 2 else "write them as uint32"
        raise DataError(
            f"{path}: every second token is {int(high.max())} or less, so these numbers have more than "
            f"{8 * first.itemsize} bits; {advice} (or, if the tokens really are like that, write them with "
            "tinytron.data.write_shard: its header gives their width)"
        )


def open_shard(path: Path, headerless: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    """The tokens of a shard as a read-only memory map. Raises: DataError as ``read_header``."""
    return _map(path, read_header(path, headerless))


def open_weights(path: Path) -> npt.NDArray[np.float32]:
    """The float32 values of a timl v1 file as a read-only memory map. Raises: DataError as ``read_header``."""
    return _map(path, read_header(path, dtypes=WEIGHT_DTYPES))


def _map(path: Path, header: ShardHeader) -> npt.NDArray[Any]:
    if header.count == 0:
        return np.empty(0, header.dtype)
    try:
        return np.memmap(path, header.dtype, mode="r", offset=header.offset, shape=(header.count,))
    except (OSError, ValueError) as error:  # the file was removed or truncated after its header was read
        raise DataError(f"{path}: cannot be mapped ({error}); check --dataset_path") from error


def write_shard(
    path: Path, tokens: npt.ArrayLike, dtype: npt.DTypeLike = np.uint16, file_format: FileFormat = "timl"
) -> None:
    """Write token ids as one shard; the file appears complete or not at all.

    Raises: DataError for more than 2^31 - 1 tokens, ids that are not integers, an id that ``dtype`` cannot hold, or a
    ``dtype`` that the format does not support.
    """
    tokens = np.asarray(tokens)
    target = np.dtype(dtype).newbyteorder("<")
    if target not in TOKEN_DTYPES:
        raise DataError(f"token dtype {target} is not one of uint16, uint32")
    if file_format == "llmc" and target != TOKEN_DTYPES[0]:
        raise DataError(f"{path}: the llmc format holds uint16 only, not {target}; use the timl format")
    if tokens.size and tokens.dtype.kind not in "iu":
        raise DataError(f"{path}: token ids must be integers, not {tokens.dtype}")
    if tokens.size and (tokens.min() < 0 or tokens.max() > np.iinfo(target).max):
        raise DataError(f"{path}: token ids {tokens.min()}..{tokens.max()} do not fit {target}; use uint32")
    start = (LLMC_MAGIC, LLMC_VERSION) if file_format == "llmc" else (MAGIC, VERSION, TOKEN_DTYPES.index(target))
    _write(path, start, tokens.astype(target, copy=False))


def write_weights(path: Path, weights: npt.ArrayLike) -> None:
    """Write float32 values as one timl v1 file, which appears complete or not at all. Raises: DataError for more than
    2^31 - 1 values."""
    _write(path, (MAGIC, VERSION, 0), np.asarray(weights, WEIGHT_DTYPES[0]))


def _write(path: Path, start: tuple[int, ...], values: npt.NDArray[Any]) -> None:
    if values.size > MAX_TOKENS:
        raise DataError(f"{path}: {values.size} tokens exceed the {MAX_TOKENS} of one shard; write several")
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[: len(start) + 1] = *start, values.size
    write_atomically(path, lambda file: (file.write(header.tobytes()), file.write(np.ascontiguousarray(values).data)))
