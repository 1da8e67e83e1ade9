"""Opens any model that ``--checkpoint`` can name: Tinytron's own checkpoints and Hugging Face models, on the local disk, on
the hub or at a URL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinytron.checkpoint import load_model
from tinytron.checkpoint.load import read_json
from tinytron.checkpoint.meta import CheckpointMeta
from tinytron.checkpoint.model import CONFIG, SavedModel, is_saved_model, saved_model, weights_at
from tinytron.errors import CheckpointError
from tinytron.interop.generation import GENERATION
from tinytron.interop.hub import is_hub_name, model_folder
from tinytron.interop.load import about_ignored, architecture_of, load_pretrained
from tinytron.interop.remote import fetch_checkpoint
from tinytron.interop.tokenizer import TOKENIZER_FILES, imported_facts
from tinytron.interop.weights import HFWeights
from tinytron.model import GPT
from tinytron.text.run_tokenizer import TOKENS
from tinytron.utils.remote import is_remote

Say = Callable[[str], object]
CHECKPOINT_HELP = (
    "run folder, weights file (<step>_model.pt, model.safetensors), Hugging Face folder, name on the hub "
    "(gpt2, owner/model@revision), or URL of one of the first three"
)
_ACCEPTED = (
    "a run folder (log/<run>), a weights file in it (00100_model.pt), a Hugging Face folder or its model.safetensors, "
    "a name on the hub (gpt2, EleutherAI/pythia-160m, hf://owner/model), or a URL (s3://bucket/log/<run>)"
)


def local_checkpoint(name: Path | str, say: Say = lambda text: None) -> Path:
    """The local weights file, or the local folder of a Hugging Face model, for what ``--checkpoint`` takes: a run's folder
    (its newest checkpoint), a weights file, a Hugging Face folder or a safetensors file in it, a name on the hub, or the
    URL of a folder or file. Remote models are downloaded with their tokenizer; ``say`` gets a line when a download begins.

    Raises: CheckpointError if ``name`` is none of these; ConfigError if the hub's model cannot be downloaded; StorageError
    if a URL cannot be read.
    """
    text = str(name).removeprefix("file://")
    if text.startswith("hf://") or (is_hub_name(text) and not Path(text).exists()):
        return model_folder(text, weights=True, more=(*TOKENIZER_FILES, GENERATION))
    return _model_source(fetch_checkpoint(text, say) if is_remote(text) else Path(text))


def _model_source(path: Path) -> Path:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give {_ACCEPTED}")
    if path.suffix == ".safetensors" and path.is_file():
        return _folder_of(path)
    if _is_hf_folder(path):
        return path
    if path.is_dir() and not is_saved_model(path):
        raise CheckpointError(
            f"{path} has no checkpoint: use a run folder (with *_model.pt; --debug and --no-do_save write none), "
            f"or a Hugging Face folder (with a {CONFIG} that names its model_type, and model.safetensors)"
        )
    return weights_at(path)


def _folder_of(weights: Path) -> Path:
    """The Hugging Face folder whose model consists of the file ``weights``, alone or with others."""
    folder = weights.parent
    if not _is_hf_folder(folder):
        raise CheckpointError(
            f"{weights} does not describe its model; put the model's {CONFIG}, which names its model_type, next to it"
        )
    if weights.name not in (files := HFWeights(folder).files):
        raise CheckpointError(
            f"{weights} is not part of the model in {folder}, whose weights are in {min(files)}; use {folder}, or move "
            f"the file to its own folder, as model.safetensors next to a {CONFIG}"
        )
    return folder


def open_model(
    name: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    say: Say = lambda text: None,
) -> tuple[GPT, dict[str, Any]]:
    """The model ``name`` (anything ``local_checkpoint`` takes), ready to evaluate, and its configuration by section: for a
    Tinytron model what ``load_model`` returns, for a Hugging Face folder the sections ``model`` and ``tokens``.

    ``dtype`` None: as stored in the file. ``say`` gets a line about ignored keys of a Hugging Face config.json. Raises:
    CheckpointError if the model is missing or damaged; ConfigError for an architecture that Tinytron lacks; and what
    ``local_checkpoint`` raises.
    """
    source = local_checkpoint(name, say)
    if source.is_file():
        return load_model(source, device, dtype)
    config = architecture_of(str(source))
    model = GPT(config, dtype=dtype or _dtype_of(source), device=device, seed=None)
    if ignored := load_pretrained(model, str(source), progress=True):
        say(f"read {source}{about_ignored(ignored)}")
    return model.eval(), _sections_of(source)


def open_saved(name: Path | str, say: Say = lambda text: None) -> SavedModel:
    """The model ``name`` with the record of its checkpoint, as ``saved_model`` returns it. For a Hugging Face folder,
    ``file`` is its config.json, and the weights are read into memory on first use, in the type of the largest tensor.

    Raises: the same as ``open_model``.
    """
    source = local_checkpoint(name, say)
    if source.is_file():
        return saved_model(source)
    return SavedModel(
        source / CONFIG,
        architecture_of(str(source)),
        CheckpointMeta(run={"config": _sections_of(source)}),
        read=lambda: open_model(source, say=say)[0].state_dict(),
    )


def _sections_of(folder: Path) -> dict[str, Any]:
    """The configuration of a Hugging Face folder, by section."""
    config = dataclasses.asdict(architecture_of(str(folder)))
    return {"model": config, TOKENS: imported_facts(folder).as_section()}


def _is_hf_folder(path: Path) -> bool:
    try:
        return path.is_dir() and not is_saved_model(path) and "model_type" in read_json(path / CONFIG)
    except CheckpointError:
        return False


def _dtype_of(folder: Path) -> torch.dtype:
    """The type of the largest tensor: families keep some small tensors in fp32."""
    weights = HFWeights(folder)
    largest = max(weights.shapes, key=lambda name: torch.Size(weights.shapes[name]).numel())
    return weights.dtypes[largest]
