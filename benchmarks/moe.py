"""A mixture-of-experts model by us and by Hugging Face transformers, side by side in one process.

python benchmarks/moe.py [--rounds 5] [--precision bf16] [--json results/moe.json]     (needs: pip install transformers)

About 20M parameters in all, 8 experts, top-2, the same sizes, batch, precision and AdamW for all. Variants take turns; the
figure is the median over rounds of tokens/s relative to Hugging Face Mixtral in the same round. transformers' third expert
implementation, batched_mm, copies an expert's weights for every token (2 GB a layer here) and is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tinytron.model import GPT, ModelConfig
from tinytron.utils.training import DTYPES

BATCH, SEQ_LEN, VOCAB = 4, 512, 8192
LAYERS, WIDTH, HEADS, KV_HEADS, EXPERTS, TOP_K, EXPERT_WIDTH = 6, 256, 4, 2, 8, 2, 512
Step = Callable[[], None]


def ours(dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Our GPT with experts."""
    config = ModelConfig(
        block_size=SEQ_LEN, vocab_size=VOCAB, num_layer=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        hidden_size=WIDTH, use_moe=True, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        moe_intermediate_size=EXPERT_WIDTH, tied_lm_head=False,
    )  # fmt: skip
    model = GPT(config, dtype=dtype)
    return model, lambda tokens: model(tokens[:, :-1], tokens[:, 1:].contiguous()).objective / (BATCH * SEQ_LEN)


def hugging_face(
    kind: str, dtype: torch.dtype, experts: str
) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """Mixtral or Qwen3-MoE of the same sizes, with one of transformers' expert implementations."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "num_experts_per_tok": TOP_K, "max_position_embeddings": SEQ_LEN,
        "head_dim": WIDTH // HEADS, "output_router_logits": True, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "Mixtral":
        config: Any = transformers.MixtralConfig(**sizes, intermediate_size=EXPERT_WIDTH, num_local_experts=EXPERTS)
    else:
        config = transformers.Qwen3MoeConfig(
            **sizes, intermediate_size=EXPERT_WIDTH, moe_intermediate_size=EXPERT_WIDTH, num_experts=EXPERTS,
            norm_topk_prob=True, decoder_sparse_step=1,
        )  # fmt: skip
    config._experts_implementation = experts
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss


def variants(dtype: torch.dtype) -> dict[str, Callable[[], tuple[torch.nn.Module, Callable[..., torch.Tensor]]]]:
    """What is compared; the first is the base."""
    made: dict[str, Any] = {}
    for kind in ("Mixtral", "Qwen3-MoE"):
        for experts in ("eager", "grouped_mm"):
            made[f"transformers {kind}, {experts}"] = lambda k=kind, e=experts: hugging_face(k, dtype, e)
    made["tinytron"] = lambda: ours(dtype)
    return made


def build(make: Callable[[], Any], tokens: torch.Tensor) -> tuple[Step, int]:
    """One training step as a function, and the number of parameters."""
    model, loss = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # warm-up
    return step, sum(p.numel() for p in model.parameters())


def main() -> None:
    """Run, print a table, and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokens = torch.randint(VOCAB, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    steps: dict[str, tuple[Step, int]] = {}
    for name, make in variants(DTYPES[args.precision]).items():
        start = time.perf_counter()
        try:
            steps[name] = build(make, tokens)
        except Exception as error:  # a peer that does not run here is left out, and said so
            print(f"left out: {name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
        else:
            print(f"first step of {name}: {time.perf_counter() - start:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, (step, _) in steps.items():
            start = time.perf_counter()
            step()
            step()
            seconds[name].append((time.perf_counter() - start) / 2)
    base = next(iter(seconds.values()))
    print(
        f"\n{args.precision}, {BATCH} x {SEQ_LEN} tokens, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {platform.processor() or platform.machine()}"
    )
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
        rate = BATCH * SEQ_LEN / statistics.median(times)
        rows.append({"name": name, "parameters": steps[name][1], "tokens_per_second": rate, "ratio": ratio})
        print(f"{name:<36} {steps[name][1] / 1e6:>6.1f}M {rate:>8,.0f} tok/s {ratio:>6.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"precision": args.precision, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
