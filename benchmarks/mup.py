"""Coordinate check of muP: how large activations are after a few steps of Adam, for several widths, with and without it.

    python benchmarks/mup.py --out build/mup.png        # half a minute on a CPU

With muP (--mup_base_width) the curves do not rise with the width (the first logits shrink, which muP allows); without it
they do, so that a learning rate that is right for a narrow model is too high for a wide one (arXiv:2203.03466, figure 5).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.loss import LossSums
from tinytron.optim import parameter_groups

WIDTHS = (64, 128, 256, 512)
BASE_WIDTH = 64
STEPS = 5
Sizes = dict[str, list[float]]  # by part of the model: the mean absolute activation in each step


def coordinates(width: int, base_width: int, steps: int = STEPS, lr: float = 0.01) -> Sizes:
    """Train a model of two blocks on one batch of random tokens and measure its activations. ``base_width`` 0: no muP."""
    config = ModelConfig(
        **{"block_size": 32, "vocab_size": 64, "num_layer": 2, "init_std": 0.1, "hidden_size": width},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 2 * width},
        mup_base_width=base_width,
    )
    model = GPT(config, seed=1)
    groups = parameter_groups(model, model.param_specs(), 0.0, width_mult=config.width_mult)
    optimizer = torch.optim.AdamW([{**group, "lr": lr * group["lr_mult"]} for group in groups], betas=(0.9, 0.95))
    tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(2))
    found: Sizes = {}
    for _ in range(steps):
        with torch.no_grad():
            for name, value in activations(model, tokens[:, :-1]).items():
                found.setdefault(name, []).append(float(value.abs().mean()))
        sums = model(tokens[:, :-1], tokens[:, 1:])
        assert isinstance(sums, LossSums), "labels were given"
        (sums.objective / tokens[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def activations(model: GPT, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of the attention of the last block, of the last block, and of the head."""
    found: dict[str, torch.Tensor] = {}
    parts = {"attention": model.blocks[-1].attn, "residual stream": model.blocks[-1], "logits": model.lm_head}

    def keep(name: str, out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        found[name] = out if isinstance(out, torch.Tensor) else out[0]

    handles = [
        part.register_forward_hook(lambda module, args, out, name=name: keep(name, out)) for name, part in parts.items()
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


def draw(out: Path) -> None:
    """Draw the sizes by width, one curve per step: the standard parametrization on the left, muP on the right."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    import matplotlib.pyplot as plt

    names = list(coordinates(WIDTHS[0], 0, steps=1))
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 6), sharex=True, sharey="col")
    for row, (title, base) in enumerate((("standard", 0), ("muP", BASE_WIDTH))):
        measured = [coordinates(width, base) for width in WIDTHS]
        for axis, name in zip(axes[row], names, strict=True):
            for step in range(STEPS):
                axis.loglog(WIDTHS, [sizes[name][step] for sizes in measured], marker="o", label=f"step {step}", base=2)
            axis.set_title(f"{name}, {title}")
            axis.set_xlabel("hidden_size")
    axes[0][0].set_ylabel("mean |activation|")
    axes[0][0].legend()
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description="Draw a coordinate check of muP.")
    parser.add_argument("--out", type=Path, default=Path("build/mup.png"), help="picture to write")
    out = parser.parse_args().out
    draw(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
