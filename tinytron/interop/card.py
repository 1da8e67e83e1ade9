"""The README.md of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import tinytron
from tinytron.checkpoint.model import SavedModel
from tinytron.interop.families import Family
from tinytron.interop.tokenizer import TokenizerFiles
from tinytron.utils.model import count_parameters

_PROMPT = "Once upon a time"
_MOST_NEW = 100  # tokens that the snippet generates at most
_Around = tuple[
    tuple[str, ...], tuple[str, ...], str
]  # imports, lines before the call of the model, expression to print
_OPTIMIZERS = {"adam": "AdamW", "muon": "Muon"}  # by the option --optimizer


def model_card(
    saved: SavedModel, family: Family, dtype: torch.dtype, tokenizer: TokenizerFiles, name: str, revision: str | None
) -> str:
    """README.md of an export: facts about the run, and a snippet that loads ``name`` (on the hub, from the branch
    ``revision`` if given) and generates text."""
    config, meta = saved.config, saved.meta
    count = count_parameters(config)
    optim, train = saved.section("optim"), saved.section("train")
    rows: list[tuple[str, object]] = [
        ("architecture", family.architecture),
        ("parameters", f"{count.total:,}" + (f" ({count.active:,} per token)" if config.use_moe else "")),
        ("data type of the weights", str(dtype).removeprefix("torch.")),
        ("layers", config.num_layer),
        ("width", config.hidden_size),
        ("heads", f"{config.num_attention_heads} for queries, {config.num_key_value_heads} for keys and values"),
        ("longest sequence", f"{config.block_size} tokens"),
        ("vocabulary", config.vocab_size),
    ]
    if unused := len(tokenizer.unused):
        rows.append(("embedding rows without a token", f"{unused:,}, which generation_config.json suppresses"))
    if (end := tokenizer.facts.end) is not None:
        text = "" if tokenizer.end_token is None else f"`{tokenizer.end_token}`, "
        rows.append(("end of a document", f"{text}id {end}" + (", before each" if tokenizer.facts.prepend else "")))
    if meta.step is not None:
        rows.append(("optimizer steps", f"{meta.step:,}"))
    if (tokens := meta.data_position.get("tokens")) is not None:
        rows.append(("training tokens", f"{tokens:,}"))
    if meta.val_loss is not None:
        rows.append(("validation loss", f"{meta.val_loss:.4f} nats per token"))
    if optim and train:
        named = _optimizer(optim, saved.meta.optimizer)
        rows.append(("optimizer", f"{named}, peak learning rate {optim.get('max_lr')}"))
        rows.append(("global batch", f"{train.get('total_batch_size'):,} tokens"))
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{"Trained with" if train else "Converted by"} Tinytron {tinytron.__version__}, written by `tinytron export`.

| | |
|---|---|
{table}

```python
{_snippet(saved.config.block_size, tokenizer, name, revision)}
```
"""


def _optimizer(optim: Mapping[str, Any], trained: str | None) -> str:
    """The optimizer's usual name. ``trained`` is the class named in the checkpoint, which a subclass of ``Trainer`` may
    have chosen; older checkpoints do not name it, and then the options decide."""
    name = trained or _OPTIMIZERS.get(str(optim.get("optimizer")), str(optim.get("optimizer")))
    if name == "Muon":
        return f"{'NorMuon' if optim.get('muon_normuon') else 'Muon'} for matrices, AdamW for the rest"
    return name


def _snippet(block_size: int, tokenizer: TokenizerFiles, name: str, revision: str | None) -> str:
    """Python that loads the model, with its tokenizer if one is exported or known by name, and generates a text."""
    source = f'"{name}"' if revision is None else f'"{name}", revision="{revision}"'
    imports, before, after = _with_tokenizer(source) if tokenizer.is_complete else _with_ids(tokenizer)
    model = f"model = AutoModelForCausalLM.from_pretrained({source})"
    new = max(1, min(_MOST_NEW, block_size // 2))
    lines = [*imports, "", model, *before, f"tokens = model.generate(ids, max_new_tokens={new})", f"print({after})"]
    return "\n".join(lines)


def _with_tokenizer(source: str) -> _Around:
    """Code around the model call for a folder that has its tokenizer."""
    before = (
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
        f'ids = tokenizer("{_PROMPT}", return_tensors="pt").input_ids',
    )
    imports = ("from transformers import AutoModelForCausalLM, AutoTokenizer",)
    return imports, before, "tokenizer.decode(tokens[0], skip_special_tokens=True)"


def _with_ids(tokenizer: TokenizerFiles) -> _Around:
    """Code around the model call for a folder without a tokenizer: the snippet adds the first token itself."""
    record, facts = tokenizer.record, tokenizer.facts
    first = [facts.end] if facts.prepend and facts.end is not None else []
    ours = "from transformers import AutoModelForCausalLM"
    if record is None or record.kind not in ("encoding_name", "tokenizer_name"):
        ids = f"ids = torch.tensor([{first or [0]}])  # no tokenizer came with the checkpoint"
        return ("import torch", ours), (ids,), "tokens[0].tolist()"
    if record.kind == "encoding_name":
        imports: tuple[str, ...] = ("import tiktoken", "import torch", ours)
        loads, encoded = f'tiktoken.get_encoding("{record.name}")', f'tokenizer.encode("{_PROMPT}")'
    else:
        imports = ("import torch", f"{ours}, AutoTokenizer")
        loads = f'AutoTokenizer.from_pretrained("{record.name}")'
        encoded = f'tokenizer.encode("{_PROMPT}", add_special_tokens=False)'
    sequence = f"{first} + {encoded}" if first else encoded
    before = (f"tokenizer = {loads}", f"ids = torch.tensor([{sequence}])")
    return imports, before, "tokenizer.decode(tokens[0].tolist())"
