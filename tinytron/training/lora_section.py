"""The options of LoRA; sections.py has the other sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tinytron.errors import ConfigError
from tinytron.model.lora import Adapters
from tinytron.utils.flags import Flag


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA), which are trained instead of the weights."""

    lora_rank: Annotated[
        int, Flag("rank of the adapters, which are trained instead of the weights; 0: off", at_least=0)
    ] = 0
    lora_alpha: Annotated[
        float, Flag("the adapters' output is multiplied by lora_alpha / lora_rank", above=0, at_most=1e6, works=16)
    ] = 16.0
    lora_targets: Annotated[
        tuple[str, ...],
        Flag("linear layers with an adapter, such as q_proj v_proj, attn or mlp; default: all except the head"),
    ] = ()

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that these options describe, if there are any."""
        return Adapters(self.lora_rank, self.lora_alpha, self.lora_targets) if self.lora_rank else None


def check_lora(lora: LoraConfig, optimizer: str) -> None:
    """Raises: ConfigError for options of LoRA without LoRA, and for Muon, whose rates do not suit adapters."""
    default = LoraConfig()
    if lora.lora_rank and optimizer == "muon":
        raise ConfigError(
            f"--optimizer muon trains whole matrices, but with --lora_rank {lora.lora_rank} only adapters are trained; use "
            "--optimizer adam"
        )
    for name in ("lora_alpha", "lora_targets"):
        if not lora.lora_rank and getattr(lora, name) != getattr(default, name):
            value = getattr(lora, name)
            shown = " ".join(value) if isinstance(value, tuple) else value
            raise ConfigError(f"--{name} {shown} needs adapters; use --lora_rank 16, or drop it")
