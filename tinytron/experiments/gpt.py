"""Pre-training of GPTs."""

from __future__ import annotations

from tinytron.registry import job
from tinytron.training import Trainer


@job("gpt/train/pretrain")
class PretrainGPT(Trainer):
    """Pre-train a GPT on token shards."""
