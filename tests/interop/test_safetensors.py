"""The safetensors format against its own library, both ways; and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tinytron.errors import CheckpointError
from tinytron.interop.safetensors import SafetensorsFile, write_safetensors

TENSORS = {
    "one": torch.arange(6.0).view(2, 3),
    "bf16 ü": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "none": torch.empty(0, 4),
    "half": torch.full((3,), 0.5, dtype=torch.float16),
    "ids": torch.tensor([[1], [-2]]),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "small": torch.tensor([-1, 7], dtype=torch.int8),
    "mask": torch.tensor([True, False, True]),
}


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    library.save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert file.entries[name].shape == tuple(tensor.shape)
        assert file.get(name).dtype == tensor.dtype == file.entries[name].dtype
        assert torch.equal(file.get(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    library = pytest.importorskip("safetensors.torch")
    wanted = {name: TENSORS[name] for name in ("one", "bf16 ü", "scalar", "none", "half")}
    wanted["transposed"] = torch.arange(12.0).view(3, 4).t()
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: tuple(t.shape) for name, t in wanted.items()}, dtype, wanted.__getitem__)
    found = library.load_file(path)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in wanted.items())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_one_tensor_at_a_time_is_asked_for(tmp_path: Path) -> None:
    asked: list[str] = []

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.ones(2)

    write_safetensors(tmp_path / "x", {"b": (2,), "a": (2,)}, torch.float32, get)
    assert asked == ["b", "a"]


def test_bytes_read_are_not_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": (2,)}, torch.float32, lambda _: torch.ones(2))
    before = path.read_bytes()
    SafetensorsFile(path).get("a").zero_()
    assert path.read_bytes() == before


def _file(path: Path, header: Any, body: bytes = bytes(8), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"no json", "Expecting value"),
        ([1], "its header is not a table of tensors"),
        ({"a": 3}, "its header does not say where a is"),
        ({"a": {"dtype": "F32"}}, "its header does not say where a is"),
        (entry(data_offsets=[0]), "its header does not say where a is"),
        (entry(dtype="F8_E4M3"), "a has type F8_E4M3; supported are F64, F32"),
        (entry(shape="2"), "the shape and offsets of a are not whole numbers"),
        (entry(shape=[-2]), "the shape and offsets of a are not whole numbers"),
        (entry(shape=[2.0]), "the shape and offsets of a are not whole numbers"),
        (entry(data_offsets=[True, 8]), "the shape and offsets of a are not whole numbers"),
        (entry(shape=[3]), "a needs 12 bytes, but its header puts it at 0 to 8 of 8"),
        (entry(data_offsets=[4, 12]), "a needs 8 bytes, but its header puts it at 4 to 12 of 8"),
        (entry(shape=[2**40], data_offsets=[0, 2**42]), "a needs 4,398,046,511,104 bytes"),
    ],
)
def test_a_damaged_header_is_told(tmp_path: Path, header: Any, why: str) -> None:
    path = _file(tmp_path / "x.safetensors", header)
    with pytest.raises(CheckpointError, match=r"^.+$") as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path} is not a complete safetensors file (")
    assert why in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_a_file_cut_off_is_told(tmp_path: Path, size: int) -> None:
    path = _file(tmp_path / "x.safetensors", entry())
    SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        SafetensorsFile(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "x.safetensors")
