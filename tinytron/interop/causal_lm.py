"""Causal language models of transformers whose family Tinytron's GPT does not have, as models of the trainer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from tinytron.checkpoint.load import load_weights, read_json
from tinytron.checkpoint.model import HF_CONFIG, foreign_config, is_saved_model, read_weights, weights_at
from tinytron.errors import CheckpointError, ConfigError, first_line
from tinytron.interop.families import FAMILIES
from tinytron.interop.hub import model_folder
from tinytron.model.lora import is_adapter
from tinytron.model.modules.loss import LossSums, cross_entropy_of_logits, fused_linear_cross_entropy
from tinytron.utils.optional import require_package

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_UNLIMITED = 2**20  # the longest sequence of a model that names none, such as Mamba
_BACKENDS = {"auto": None, "sdpa": "sdpa", "math": "eager", "flash": "flash_attention_2"}


def config_file(name: str, *, weights: bool = False) -> Path:
    """The config.json that ``name`` means: that file, a folder's, or that of a model on the hub, whose weights are
    downloaded, too, with ``weights``. Raises: ConfigError."""
    path = Path(name)
    return path if path.is_file() else model_folder(name, weights=weights) / "config.json"


def foreign_settings(name: str) -> dict[str, Any] | None:
    """The config.json of the model ``name`` if its family is not one of the GPT's, else ``None``: of what ``config_file``
    takes, or of a run that trained such a model. Raises: ConfigError if there is no such model; CheckpointError if it
    cannot be read."""
    if is_saved_model(Path(name)):
        return foreign_config(weights_at(Path(name)))
    file = config_file(name)
    settings = read_json(file) if file.suffix == ".json" else {}
    kind = settings.get("model_type")
    return settings if isinstance(kind, str) and kind not in FAMILIES else None


def sizes_of(settings: dict[str, Any], source: str) -> dict[str, int]:
    """``vocab_size`` and ``block_size`` of a foreign model. Raises: ConfigError if transformers does not know the family,
    or has no causal language model of it."""
    config = _hf_config(settings, source)
    text = config.get_text_config()
    length = next((int(n) for name in _LENGTHS if (n := getattr(text, name, None))), _UNLIMITED)
    return {"vocab_size": int(text.vocab_size), "block_size": length}


def _hf_config(settings: dict[str, Any], source: str) -> Any:
    transformers = require_package("transformers", "data")
    kind = settings["model_type"]
    try:
        config = transformers.AutoConfig.for_model(**settings)
    except Exception as error:  # each family checks its own settings
        raise ConfigError(
            f"{source}: transformers {transformers.__version__} cannot read this config.json of a {kind} "
            f"({first_line(error)}); use a family that it has, such as opt, or a newer transformers"
        ) from error
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in known:
        raise ConfigError(
            f"{source}: transformers has no causal language model of the family {kind}; use one such as opt"
        )
    return config


class CausalLM(nn.Module):
    """A causal language model of transformers with the interface of the trainer's models: token ids and shifted labels go
    in, ``LossSums`` come out. It sees whole sequences (``--sep_size 1``) and no document boundaries.

    ``settings`` are the content of its config.json; they are saved with the weights, which thus describe themselves. If the
    logits are the product of hidden states and a matrix, they are never in memory as a whole.
    """

    def __init__(self, model: Any, settings: dict[str, Any], *, z_loss_coef: float = 0.0) -> None:
        super().__init__()
        self.hf, self.z_loss_coef = model, z_loss_coef
        text = json.dumps(settings, sort_keys=True).encode()
        device = next(model.parameters()).device
        self.register_buffer(HF_CONFIG, torch.tensor(list(text), dtype=torch.uint8, device=device))
        self.fused = self._head_is_a_matrix()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor | LossSums:
        """Logits ``[B, S, V]``; with ``labels`` ``[B, S]`` (already shifted) the loss sums, weighted by ``weights``.
        Raises: ConfigError for ``positions``, because the model attends across documents."""
        if positions is not None:
            raise ConfigError(
                "positions that begin again inside a row need Tinytron's GPT, but this model is built by transformers "
                f"(family {self.hf.config.model_type}); leave them out of the data"
            )
        if labels is None:
            logits: torch.Tensor = self.hf(input_ids=input_ids, use_cache=False).logits
            return logits
        weights_T = None if weights is None else weights.flatten()
        if self.fused:
            hidden_BSD = self.hf.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
            head = self.hf.get_output_embeddings().weight
            arguments = hidden_BSD.flatten(0, 1), head, labels.flatten()
            sums = fused_linear_cross_entropy(*arguments, weights_T=weights_T, z_loss_coef=self.z_loss_coef)
        else:
            outputs = self.hf(input_ids=input_ids, use_cache=False)
            sums = cross_entropy_of_logits(
                outputs.logits.flatten(0, 1), labels.flatten(), weights_T=weights_T, z_loss_coef=self.z_loss_coef
            )
        assert sums.per_token is not None, "both functions return it"
        return sums._replace(per_token=sums.per_token.view_as(labels))

    @torch.no_grad()
    def _head_is_a_matrix(self) -> bool:
        """True if the logits are hidden states times the output matrix. A family may also scale or cap them, or add a bias.
        No attribute says so, therefore a few tokens are tried."""
        head, config = self.hf.get_output_embeddings(), self.hf.config
        if not isinstance(head, nn.Linear) or head.bias is not None or getattr(config, "output_router_logits", False):
            return False
        was_training = self.hf.training
        self.hf.eval()
        try:
            ids = torch.arange(8, device=head.weight.device)[None] % config.get_text_config().vocab_size
            hidden = self.hf.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            same = torch.equal(head(hidden), self.hf(input_ids=ids, use_cache=False).logits)
        except Exception:  # a family without that part, or whose part returns something else
            same = False
        self.hf.train(was_training)
        return same


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Context in which transformers shows no progress bars: every rank would."""
    logging = require_package("transformers", "data").utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def build_causal_lm(
    settings: dict[str, Any],
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 1337,
    attention: str = "auto",
    recompute: bool = False,
    z_loss_coef: float = 0.0,
) -> CausalLM:
    """A new model with the config.json ``settings``, which errors call ``source``. Its weights depend on the seed alone.
    Raises: ConfigError if transformers cannot build it."""
    config = _hf_config(settings, source)
    transformers = require_package("transformers", "data")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # on the CPU, so that weights do not depend on the device
        try:
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=_BACKENDS[attention]
            )
        except Exception as error:  # such as a size that does not divide, or a missing package of the family
            raise ConfigError(f"{source}: transformers cannot build this model ({first_line(error)})") from error
    model.to(device)
    if recompute:
        model.gradient_checkpointing_enable()
    return CausalLM(model, settings, z_loss_coef=z_loss_coef)


def load_foreign(model: CausalLM, name: str) -> None:
    """Set the weights of ``model`` from the folder or hub name ``name``, or from a run. Raises: ConfigError or
    CheckpointError."""
    if is_saved_model(Path(name)):
        file = weights_at(Path(name))
        load_weights(model, read_weights(file, foreign=True), str(file))
        return
    folder = config_file(name, weights=True).parent
    transformers = require_package("transformers", "data")
    try:
        with without_bars():
            loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=next(model.parameters()).dtype, output_loading_info=True
            )
    except Exception as error:
        raise CheckpointError(f"{name}: transformers cannot load these weights ({first_line(error)})") from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{name} lacks {len(missing)} weights of its model ({missing[0]})")
    adapters = {name: tensor for name, tensor in model.hf.state_dict().items() if is_adapter(name)}
    model.hf.load_state_dict({**loaded.state_dict(), **adapters})
