"""Resuming: from a checkpoint of the run, from another run's checkpoint, or from initial weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.nn as nn

from tinytron.checkpoint import (
    CheckpointFiles,
    complete_checkpoints,
    find_checkpoints,
    first_undamaged,
    load_checkpoint,
)
from tinytron.checkpoint.load import other_optimizer
from tinytron.checkpoint.meta import FORMAT_VERSION, CheckpointMeta
from tinytron.distributed.agreement import agree_slowly, told_by_first
from tinytron.distributed.parallel_state import ParallelState
from tinytron.distributed.zero1.distributed_optimizer import DistributedOptimizer
from tinytron.errors import CheckpointError
from tinytron.interop import about_ignored, load_pretrained
from tinytron.interop.causal_lm import CausalLM, load_foreign
from tinytron.model.protocols import require_gpt
from tinytron.training.config import Config
from tinytron.utils.batch_sizes import Skips

_LENGTHS = ("train.max_steps", "train.max_train_tokens", "train.max_epochs")
_CHANGES_NUMBERS = (
    *_LENGTHS,
    *("parallel.grad_reduce_dtype", "train.disable_tf32", "train.spike_sigma", "train.spike_action"),
)
# These must be the same for a checkpoint to continue; other differences are the user's choice and are printed.
_FIXED_ON_RESUME = (
    "model.",
    "lora.",
    "train.total_batch_size",
    "train.batch_warmup",
    "train.seq_len",
    "train.seq_warmup",
    "seed.seed",
)


def resume(
    config: Config,
    folder: Path,
    model: nn.Module,
    optimizer: DistributedOptimizer,
    state: ParallelState,
    data_identity: Callable[[int, Skips], str],
    say: Callable[[str], None],
) -> CheckpointMeta | None:
    """Load the newest undamaged checkpoint of the run's ``folder``, else of ``--resume_path``, and return its record.
    Without a checkpoint, load the weights of ``--init_from`` and return ``None``. Collective.

    ``data_identity`` maps a step and the run's skips to a string that identifies the data before it. Raises:
    CheckpointError or ConfigError on every rank if a checkpoint is damaged or belongs to another run.
    """
    world = state.groups["world"]
    found = told_by_first(lambda: checkpoints_to_resume(config, folder), world)
    if found:
        files, meta = first_undamaged(found, world, say)
        differences = check_continues(config, meta, data_identity(files.step, Skips.of(meta.skips)), str(files.meta))
        load_checkpoint(files, meta, model, optimizer, state)
        say(f"resuming after step {files.step} from {files.model}")
        if before := other_optimizer(meta, optimizer):
            now = type(optimizer.inner).__name__
            say(
                f"the optimizer was {before} and is now {now}: momentum and other state does not fit and starts from zero"
            )
        for difference in differences:
            say(f"changed since the checkpoint: {difference}")
        return meta
    if (name := config.ckpt.init_from) is not None:
        ignored = load_initial_weights(name, model, optimizer, state)
        say(f"starting from the weights of {name}" + about_ignored(ignored))
    return None


def checkpoints_to_resume(config: Config, folder: Path) -> list[CheckpointFiles]:
    """The checkpoints of the run's ``folder``, newest first, or else what ``--resume_path`` names. A requeued job with that
    flag thus continues where it got to. Raises: CheckpointError if ``--resume_path`` names no checkpoint."""
    own = complete_checkpoints(folder) if config.ckpt.resume and not config.train.debug else []
    if own or config.ckpt.resume_path is None:
        return own
    return find_checkpoints(config.ckpt.resume_path)


def load_initial_weights(
    name: str, model: nn.Module, optimizer: DistributedOptimizer, state: ParallelState
) -> list[str]:
    """Start from the weights that ``--init_from name`` names; returns their settings that were ignored. Collective.
    Raises: as ``fill_model``."""
    ignored = fill_model(model, name, state)
    optimizer.refresh_shards()
    return ignored


def fill_model(model: nn.Module, name: str, state: ParallelState) -> list[str]:
    """Set the weights of ``model`` from what ``--init_from name`` takes; returns the settings that were ignored.
    Collective. Raises: ConfigError or CheckpointError on every rank if they cannot be read, or do not fit the model."""

    def load() -> list[str]:
        if isinstance(model, CausalLM):
            load_foreign(model, name)
            return []
        return load_pretrained(require_gpt(model, f"--init_from {name} fills", "load it yourself"), name)

    return agree_slowly(load, state.groups["world"])  # may first download from the hub


def check_continues(config: Config, meta: CheckpointMeta, fingerprint: str, source: str) -> list[str]:
    """Compare a checkpoint's run with ``config``, which should continue it; returns the allowed differences, as text.

    Raises: CheckpointError for another format, model, batch, sequence length, seed or dataset.
    """
    if meta.format != FORMAT_VERSION:
        raise CheckpointError(f"{source} has format {meta.format}, but this version reads format {FORMAT_VERSION}")
    # An option added after the checkpoint was written counts as having its default.
    mine, theirs = config.identity(), {**config.default_identity(), **meta.identity}
    differing = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
    differences = [f"{k}: {theirs.get(k)} in the checkpoint, {mine.get(k)} now" for k in differing]
    fixed = [text for k, text in zip(differing, differences, strict=True) if k.startswith(_FIXED_ON_RESUME)]
    differences += _other_differences(config, meta)
    if fixed:
        shown = "; ".join(fixed[:3])
        raise CheckpointError(f"{source} belongs to a different run ({shown}); use the flags it was trained with")
    if meta.data != fingerprint:
        raise CheckpointError(
            f"{source} was trained on other data ({meta.data}, now {fingerprint}); use the same data (and the same "
            "--do_val and --split_rate, if validation data is split off), or another --exp_name to start a new run"
        )
    return differences


def _other_differences(config: Config, meta: CheckpointMeta) -> list[str]:
    """Differences, as text, in values that are not part of a run's identity but change its numbers: lengths, which
    determine the learning rate, and precisions."""
    saved = meta.run.get("config", {})
    found = []
    for name in _CHANGES_NUMBERS:
        section, _, option = name.partition(".")
        now = getattr(config[section], option)
        before = saved.get(section, {}).get(option, now)
        if before != now:
            why = "; the learning rate follows the new length" if name in _LENGTHS else ""
            found.append(f"{name}: {before} in the checkpoint, {now} now{why}")
    return found
