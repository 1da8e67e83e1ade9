"""The README.md of an exported folder."""

from __future__ import annotations

import torch

import tinytron
from tinytron.checkpoint.model import SavedModel
from tinytron.interop.families import Family
from tinytron.interop.tokenizer import TokenizerFiles
from tinytron.utils.model import count_parameters


def model_card(saved: SavedModel, family: Family, dtype: torch.dtype, tokenizer: TokenizerFiles, name: str) -> str:
    """README.md of the folder: facts only."""
    config, meta = saved.config, saved.meta
    count = count_parameters(config)
    optim, train = saved.section("optim"), saved.section("train")
    rows: list[tuple[str, object]] = [
        ("architecture", family.architecture),
        ("parameters", f"{count.total:,}" + (f" ({count.active:,} per token)" if config.use_moe else "")),
        ("type of the weights", str(dtype).removeprefix("torch.")),
        ("layers", config.num_layer),
        ("width", config.hidden_size),
        ("heads", f"{config.num_attention_heads} for queries, {config.num_key_value_heads} for keys and values"),
        ("longest sequence", f"{config.block_size} tokens"),
        ("vocabulary", config.vocab_size),
    ]
    if unused := len(tokenizer.unused):
        rows.append(("rows without a token", f"{unused:,}, which generation_config.json suppresses"))
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
        rows.append(("optimizer", f"{optim.get('optimizer')}, peak learning rate {optim.get('max_lr')}"))
        rows.append(("global batch", f"{train.get('total_batch_size'):,} tokens"))
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

Trained with Tinytron {tinytron.__version__}, written by `tinytron export`.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```
"""
