"""Reads the weights in a Hugging Face folder tensor by tensor: safetensors or pickled, in one file or several."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tinytron.checkpoint.load import read_file, read_json
from tinytron.errors import CheckpointError
from tinytron.interop.safetensors import SafetensorsFile

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


class HFWeights:
    """All tensors of ``folder`` by name: their ``shapes``, and ``get``, which maps a file and reads only what is used.
    ``files`` are the names of the files that contain them.

    Raises: CheckpointError if the files are missing, damaged, or contradict their index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._get: dict[str, Callable[[str], torch.Tensor]] = {}
        found = self._files()
        self.files = tuple(found)
        for name, wanted in found.items():
            self._open(folder / name, wanted)

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name``, on the CPU, in its stored type; read-only."""
        return self._get[name](name)

    def _files(self) -> dict[str, list[str] | None]:
        """File names, and the tensors that the index assigns to each (``None``: everything in the file)."""
        for name in (SAFETENSORS, PICKLED):
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                return _read_index(index)
            if (self.folder / name).is_file():
                return {name: None}
        raise CheckpointError(
            f"{self.folder} has no weights: neither {SAFETENSORS} nor {PICKLED}, in one file or with an index"
        )

    def _open(self, path: Path, wanted: list[str] | None) -> None:
        get: Callable[[str], torch.Tensor]
        if path.suffix == ".safetensors":
            file = SafetensorsFile(path)
            facts = {name: (entry.shape, entry.dtype) for name, entry in file.entries.items()}
            get = file.get
        else:
            loaded = _read_pickled(path)
            facts = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in loaded.items()}
            get = loaded.__getitem__
        for name in facts if wanted is None else wanted:
            if name not in facts:
                raise CheckpointError(f"{path} lacks {name}, which the index assigns to it")
            self.shapes[name], self.dtypes[name] = facts[name]
            self._get[name] = get


def _read_index(path: Path) -> dict[str, list[str] | None]:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{path} does not map tensors to files in a weight_map")
    files: dict[str, list[str] | None] = {}
    for name, file in places.items():
        if "/" in file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{path} says that {name} is in {file!r}, which is not a weights file in its folder")
        names = files.setdefault(file, [])
        assert names is not None, "set to a list above"
        names.append(name)
    if missing := sorted(file for file in files if not (path.parent / file).is_file()):
        raise CheckpointError(f"{path.parent} lacks {len(missing)} of the {len(files)} weights files: {missing[0]}")
    return files


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = read_file(path, mmap=True)
    except CheckpointError:  # files from before torch 1.6 cannot be mapped
        content = read_file(path)
    if wrong := [name for name, value in content.items() if not isinstance(value, torch.Tensor)]:
        raise CheckpointError(f"{path} contains {wrong[0]}, which is not a tensor")
    return content
