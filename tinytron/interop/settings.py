"""Reads a Hugging Face config.json key by key. An unknown key is an error if its name suggests that it changes what the
weights compute; otherwise it is ignored."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tinytron.errors import ConfigError

# Keys that do not affect what the weights compute, whatever their value: names, token ids, training, generation.
_HARMLESS = {
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id", "decoder_start_token_id",
    "initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "summary_first_dropout",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing",
    "output_router_logits", "router_aux_loss_coef", "summary_type", "summary_use_proj",
    "summary_activation", "summary_proj_to_labels", "task_specific_params", "n_ctx", "_name_or_path", "id2label",
    "label2id", "num_labels", "_num_labels", "problem_type", "tokenizer_class", "chunk_size_feed_forward",
    "return_dict", "is_decoder", "is_encoder_decoder", "output_attentions", "output_hidden_states", "max_length",
    "tie_encoder_decoder", "pretraining_tp", "neftune_noise_alpha", "num_logits_to_keep", "transformers.js_config",
    "torchscript", "masked_softmax_fusion", "use_memory_efficient_attention",
}  # fmt: skip
# Names about how something is computed, about training (dropout, losses, initial values), and about tokens.
_HARMLESS_NAMES = re.compile(
    r"(?:dropout|dropout_prob|pdrop|layerdrop|_token|_token_ids?|_loss_coef|_loss_weight)$|(?:^|_)init(?:ializer)?(?:_|$)|"
    r"flash_?att|sdpa|xformers|implementation|checkpointing"
)
# Parts of names that may concern what the model computes: an unknown key with such a part is an error, not ignored.
_TELLING_PARTS = re.compile(
    r"\w*quant\w*|\w*rope\w*|rotary|positions?|alibi|yarn|scal\w+|multipliers?|factors?|softcap\w*|capping|clip\w*|"
    r"bias\w*|\w*norm\w*|window\w*|attention\w*|attn\w*|heads?|layers?|hidden|sizes?|dims?|width|depth|rank|experts?|"
    r"moe|router|routed|topk|act|activation\w*|residual\w*|parallel\w*|mlp|ffn|ff|\w*glu|gelu|silu|relu|conv\w*|ssm|"
    r"mamba|logits?|embed\w*|causal|bidirectional|prun\w+|lora|adapters?|mask\w*|sparse|sparsity|tied?|shared?|kv|qk|qkv|"
    r"query|queries|keys?|values?|cross|theta|base|alpha|beta|gamma|eps|epsilon|mup|nope|chunk\w*|skip\w*|gat(?:e|es|ed|ing)|"
    r"blocks?|compress\w*|vocab|vocabulary|sinks?|latent|recurrent|mtp|nextn|scor(?:e|es|ing)|func\w*|groups?|interleav\w*|"
    r"pre|post|ln|zero|centered|meta|fp\d+|int\d+|\d+bits?|bits?|bnb|gptq|awq|order"
)
_TOKENS_IN_THE_SEQUENCE = re.compile(r"(?:^|_)(?:meta|sink|register|memory)_?tokens?")
_REQUIRED = object()


class Settings:
    """The values of a config.json; ``source`` names it in errors.

    ``finish`` looks at the keys that ``take`` and similar methods did not ask for. It passes over keys that are null, false
    or empty, or known to be harmless. One whose name may concern what the model computes is an error. It returns the rest.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values, self.source = dict(values), source

    def has(self, key: str) -> bool:
        """True if ``key`` is present, even if it is null."""
        return key in self._values

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """The value of ``key``, which is then removed; null counts as absent."""
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
        """The entry of ``known`` for the value."""
        value = self.take(key, default)
        try:
            return known[value]
        except (KeyError, TypeError):
            works = ", ".join(str(name) for name in known)
            raise self.wrong(key, value, f"only {works} {'is' if len(known) == 1 else 'are'} supported") from None

    def table(self, key: str) -> Settings | None:
        """A nested object, on which ``finish`` must be called too; ``None`` if there is none."""
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

    def agree(self, key: str, value: Any) -> None:
        """Take ``key``, a second name for a known ``value``. Raises: ConfigError if it has a different one."""
        if (found := self.take(key, value)) != value:
            raise self.wrong(key, found, f"other keys say {value}")

    def finish(self, kind: str, *, strict: bool = False) -> list[str]:
        """The remaining keys that have a value but do not affect what the model computes. Raises: ConfigError naming the
        first that may affect it, or with ``strict`` the first that has a value."""
        left = []
        for key, value in self._values.items():
            if value in (None, False, [], {}, "") or key in _HARMLESS:
                continue
            if strict or _may_tell(key):
                raise self.wrong(key, value, f"Tinytron does not know this setting of {kind}")
            left.append(key)
        return left


def _may_tell(key: str) -> bool:
    """True if the name of an unknown key may concern what the model computes."""
    name = key.lower()
    if _HARMLESS_NAMES.search(name) and not _TOKENS_IN_THE_SEQUENCE.search(name):
        return False
    return any(_TELLING_PARTS.fullmatch(part) for part in re.split(r"[^a-z0-9]+", name))
