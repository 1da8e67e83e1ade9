"""A Hugging Face config.json, read key by key: whatever is not understood is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinytron.errors import ConfigError

# Say nothing about the function the weights compute: names, ids of tokens, training and generation.
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id", "initializer_range",
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "classifier_dropout",
    "output_router_logits", "router_aux_loss_coef", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "task_specific_params", "n_ctx", "_name_or_path",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing",
    "id2label", "label2id", "problem_type", "tokenizer_class", "chunk_size_feed_forward", "return_dict", "is_decoder",
    "is_encoder_decoder", "output_attentions", "output_hidden_states", "max_length", "tie_encoder_decoder",
}  # fmt: skip
_REQUIRED = object()


class Settings:
    """The values of a config.json; ``source`` names it in errors. Every key that ``take`` and its kind do not ask for must
    be harmless, or be null, false or empty: ``finish`` raises ConfigError naming the first that is not."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self.source = dict(values), source

    def has(self, key: str) -> bool:
        """Whether ``key`` is there, be it null."""
        return key in self._values

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of ``key``, once; null counts as absent."""
        value = self._values.pop(key, None)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"{self.source} does not say its {key}")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, most: int = 2**31) -> Any:
        """A whole number from 0 to ``most``, or ``default``."""
        value = self.take(key, default)
        if value is default or (type(value) is int and 0 <= value <= most):
            return value
        raise self.wrong(key, value, f"a whole number up to {most:,} is expected")

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number as a float, or ``default``."""
        value = self.take(key, default)
        if value is default:
            return value
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
        raise self.wrong(key, value, "a number is expected")

    def switch(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.take(key, default)
        if isinstance(value, bool):
            return value
        raise self.wrong(key, value, "true or false is expected")

    def one_of(self, key: str, known: Mapping[Any, Any], default: Any) -> Any:
        """What ``known`` has for the value."""
        value = self.take(key, default)
        try:
            return known[value]
        except (KeyError, TypeError):
            works = ", ".join(str(name) for name in known)
            raise self.wrong(key, value, f"only {works} {'is' if len(known) == 1 else 'are'} supported") from None

    def table(self, key: str) -> Settings | None:
        """A nested object, to be finished too; ``None`` if there is none."""
        value = self.take(key, None)
        if value is None or isinstance(value, dict):
            return None if value is None else Settings(value, f"{self.source}: {key}")
        raise self.wrong(key, value, "an object is expected")

    def texts(self, key: str) -> list[str] | None:
        """A list of texts, or ``None``."""
        return self._list(key, str)

    def integers(self, key: str) -> list[int] | None:
        """A list of whole numbers, or ``None``."""
        return self._list(key, int)

    def _list(self, key: str, kind: type) -> list[Any] | None:
        value = self.take(key, None)
        if value is None or (isinstance(value, list) and all(type(item) is kind for item in value)):
            return value
        raise self.wrong(key, value, "a list is expected")

    def wrong(self, key: str, value: Any, why: str) -> ConfigError:
        """The error for a value that is not supported."""
        return ConfigError(f"{self.source}: {key} = {value!r} is not supported; {why}")

    def finish(self, family: str) -> None:
        """Raises: ConfigError if a key is left that says something."""
        for key, value in self._values.items():
            if key not in _HARMLESS and value not in (None, False, [], {}, ""):
                raise self.wrong(key, value, f"Tinytron does not know this setting of {family}")
