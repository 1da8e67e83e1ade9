"""Look inside a model that own_data.py trained, whose tokens are bytes: a logit lens, an activation patch and a steering
vector, all by ``tinytron.hooks`` (docs/hooks.md): python examples/look_inside.py RUN_FOLDER [PROMPT OTHER_PROMPT]
"""

import sys

import torch

from tinytron import hooks
from tinytron.inference import SamplingOptions, complete
from tinytron.interop.open import open_model
from tinytron.model import GPT


def logit_lens(model: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    """The logits ``[B, s, V]`` that the head makes of the residual stream after each block."""
    with hooks.on(model, record=["blocks.*.post_mlp"]) as seen:
        model(ids)
    return [model.lm_head(model.final_norm(x)) for x in seen.values()]


def patched(model: GPT, ids: torch.Tensor, other: torch.Tensor, point: str) -> torch.Tensor:
    """The logits for ``ids`` if the activation of the last token at ``point`` is that of ``other``."""
    with hooks.on(model, record=[point]) as seen:
        model(other)
    with hooks.on(model, replace={point: lambda x: torch.cat((x[:, :-1], seen[point][:, -1:]), 1)}):
        return model(ids)


def steered(model: GPT, ids: torch.Tensor, direction: torch.Tensor, point: str) -> list[int]:
    """Tokens generated with ``direction`` added at ``point``, for every token."""
    with hooks.on(model, replace={point: lambda x: x + direction}):
        return complete(model, ids.tolist(), SamplingOptions(max_new_tokens=20, temperature=0)).samples[0].tokens


@torch.no_grad()
def main(run: str, *prompts: str) -> None:
    """Print what each of the three shows."""
    model, point = open_model(run)[0], "blocks.0.post_mlp"
    ids, other = (torch.tensor([list(text.encode())]) for text in prompts or ("Train a model", "a checkpoint"))
    print("logit lens:", [chr(logits[0, -1].argmax()) for logits in logit_lens(model, ids)])
    print("patched:", repr(chr(patched(model, ids, other, point)[0, -1].argmax())))
    with hooks.on(model, record=[point]) as seen:
        means = [(model(one), seen[point].mean(1))[1] for one in (ids, other)]
    print("steered:", repr(bytes(steered(model, ids, 4 * (means[1] - means[0]), point))))


if __name__ == "__main__":
    main(*sys.argv[1:])
