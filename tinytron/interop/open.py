"""Any model ready to evaluate: Tinytron's own checkpoints, and folders of Hugging Face models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint import load_model
from tinytron.checkpoint.load import read_json
from tinytron.checkpoint.model import CONFIG, is_saved_model, weights_at
from tinytron.errors import CheckpointError
from tinytron.interop.load import about_ignored, architecture_of, load_pretrained
from tinytron.interop.tokenizer import imported_facts
from tinytron.interop.weights import HFWeights
from tinytron.model import GPT
from tinytron.text.run_tokenizer import TOKENS


def model_source(path: Path) -> Path:
    """The weights file that ``path`` names or that is the newest in it, or ``path`` itself if it is the folder of a Hugging
    Face model. Raises: CheckpointError if it is none of these."""
    if _is_hf_folder(path):
        return path
    if path.is_dir() and not is_saved_model(path):
        raise CheckpointError(
            f"{path} holds no checkpoint: use a run folder (with *_model.pt; --debug and --no-do_save write none), "
            f"or a Hugging Face folder (with a {CONFIG} that names its model_type, and model.safetensors)"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path} does not describe its model; use its folder, {path.parent}")
    return weights_at(path)


def open_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> tuple[GPT, dict[str, Any]]:
    """The model at ``path``, ready to evaluate, and its configuration by section: of Tinytron's own as ``load_model`` gives
    it, of a Hugging Face folder the sections ``model`` and ``tokens``.

    ``dtype`` None is that of the file. ``say`` gets a line on keys of a Hugging Face config.json that are ignored. Raises:
    CheckpointError if the model at ``path`` is missing or damaged; ConfigError for an architecture that Tinytron lacks.
    """
    source = model_source(Path(path))
    if source.is_file():
        return load_model(source, device, dtype)
    config = architecture_of(str(source))
    model = GPT(config, dtype=dtype or _dtype_of(source), device=device, seed=None)
    if ignored := load_pretrained(model, str(source)):
        say(f"read {source}{about_ignored(ignored)}")
    return model.eval(), {"model": dataclasses.asdict(config), TOKENS: imported_facts(source).as_section()}


def _is_hf_folder(path: Path) -> bool:
    try:
        return path.is_dir() and not is_saved_model(path) and "model_type" in read_json(path / CONFIG)
    except CheckpointError:
        return False


def _dtype_of(folder: Path) -> torch.dtype:
    """The type of the largest tensor: families keep some small ones in fp32."""
    weights = HFWeights(folder)
    largest = max(weights.shapes, key=lambda name: torch.Size(weights.shapes[name]).numel())
    return weights.dtypes[largest]
