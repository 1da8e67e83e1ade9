"""Writes Tinytron's weights and tokenizer as one GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tinytron.errors import ConfigError
from tinytron.interop.architectures import write_architecture
from tinytron.interop.export import check_finite, checked_specs
from tinytron.interop.gguf.kinds import KINDS, Q8_BLOCK
from tinytron.interop.gguf.model import Tensor, architecture_for, model_metadata, tensors
from tinytron.interop.gguf.tokenizer import tokenizer_metadata
from tinytron.interop.mup import folded_config, folded_weights
from tinytron.interop.open import Say, open_saved
from tinytron.interop.tokenizer import TokenizerFiles, exported_tokenizer
from tinytron.text.run_tokenizer import TOKENS
from tinytron.utils.optional import require_package
from tinytron.utils.progress import Progress
from tinytron.utils.training import appears_whole


@dataclass(frozen=True)
class ExportedGGUF:
    """A finished file: the architecture by llama.cpp's name, the number of tensors, the file size in bytes, the tokenizer,
    and the number of rows without a token, which were left out."""

    architecture: str
    tensors: int
    bytes: int
    tokenizer: TokenizerFiles
    left_out: int


def export_gguf(
    checkpoint: Path | str, out: Path, kind: str, *, tokenizer: Path | None = None, say: Say = lambda text: None
) -> ExportedGGUF:
    """Write the weights of ``checkpoint`` (anything ``open_saved`` opens) and their tokenizer to the GGUF file ``out``, in
    the type ``kind`` (one of ``KINDS``). Norms, biases and routers are always fp32. ``out`` appears complete or not at all.
    Tinytron's own weights are read one tensor at a time; a Hugging Face model is in memory as a whole. ``say`` is passed to
    ``open_saved``.

    Raises: ConfigError if llama.cpp lacks the architecture or cannot read the tokenizer, ``out`` exists, or the package
    gguf is missing; CheckpointError if the checkpoint is missing or damaged; OSError if writing fails; and what
    ``open_saved`` raises.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} already exists; use another name, or remove it")
    gguf = require_package("gguf", "gguf")
    saved = open_saved(checkpoint, say)
    config = folded_config(saved.config)
    family, _ = write_architecture(config)
    found = architecture_for(family.model_type, config)
    weights = folded_weights(saved.config, saved.weights())
    saved = saved._replace(config=config)
    specs = checked_specs(saved, weights)
    known = exported_tokenizer(
        config.vocab_size, saved.section("data"),
        given=tokenizer, checkpoint=saved.file, imported=saved.section(TOKENS),
    )  # fmt: skip
    of_tokenizer = tokenizer_metadata(known, config.vocab_size)
    rows = len(of_tokenizer["tokenizer.ggml.tokens"])
    parts = list(tensors(found, config, specs, weights, rows))
    general = {"general.name": out.stem, "general.file_type": KINDS[kind][1], "general.quantization_version": 2}
    out.parent.mkdir(parents=True, exist_ok=True)
    with appears_whole(out, f".tmp.{os.getpid()}") as path:
        writer = gguf.GGUFWriter(path, found.name)
        try:
            for key, value in (general | model_metadata(found, config, rows) | of_tokenizer).items():
                _add(gguf, writer, key, value)
            _write_tensors(gguf, writer, parts, kind)
        finally:
            writer.close()
    return ExportedGGUF(found.name, len(parts), out.stat().st_size, known, config.vocab_size - rows)


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    """Add a key to the header; whole numbers take 32 bits, as llama.cpp reads them."""
    types = gguf.GGUFValueType
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING, list: types.ARRAY}
    if value != []:  # an empty list has no element type
        writer.add_key_value(key, value, kinds[type(value)])


def _write_tensors(gguf: Any, writer: Any, parts: list[Tensor], kind: str) -> None:
    """Declare all tensors, then convert and write them one by one."""
    types = [gguf.GGMLQuantizationType[_type_of(part, kind)] for part in parts]
    for part, type_ in zip(parts, types, strict=True):
        shape = tuple(part.view.shape)
        if type_ in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            numpy_type: Any = np.float32 if type_ == gguf.GGMLQuantizationType.F32 else np.float16
        else:
            shape, numpy_type = gguf.quant_shape_to_byte_shape(shape, type_), np.uint8
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(numpy_type).itemsize
        writer.add_tensor_info(part.name, shape, np.dtype(numpy_type), size, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with Progress("exporting", len(parts), "tensor") as progress:
        for part, type_ in zip(parts, types, strict=True):
            check_finite(
                part.name, part.view, torch.float32 if part.full else KINDS[kind][0], f"--gguf {kind}", "--gguf bf16"
            )
            values: npt.NDArray[np.float32] = part.view.float().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, type_))
            progress.update(1)


def _type_of(part: Tensor, kind: str) -> str:
    """The type of a tensor: f16 if its rows are not whole blocks of q8_0."""
    if part.full:
        return "F32"
    if kind == "q8_0" and part.view.shape[-1] % Q8_BLOCK:
        return "F16"
    return kind.upper()
