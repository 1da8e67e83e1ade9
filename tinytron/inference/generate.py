"""Sampling, one token at a time, from the model's own next-token distribution."""

from __future__ import annotations

import torch

from tinytron.errors import ConfigError
from tinytron.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_token: int | None = None,
) -> list[int]:
    """``prompt`` and up to ``max_new_tokens`` more token ids; ends early before ``stop_token``.

    ``temperature`` 0 takes the most likely token; ``top_k`` > 0 samples among the k most likely ones only. The whole
    window (at most ``block_size`` tokens) is computed anew for every token. Raises: ConfigError for an empty prompt.
    """
    if not prompt:
        raise ConfigError("generate needs a prompt of at least one token; use the end-of-text token to start afresh")
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-model.config.block_size :]], device=device)
        logits_V = model.lm_head(model.hidden_states(window)[0][0, -1]).float()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            if top_k > 0:
                threshold = logits_V.topk(min(top_k, len(logits_V))).values[-1]
                logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
            token = int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
        if token == stop_token:
            break
        tokens.append(token)
    model.train(was_training)
    return tokens
