"""Greedy generation by us, with and without a cache, and by Hugging Face transformers with the same weights.

python benchmarks/generate.py [--rounds 5] [--precision fp32] [--batch 1 8]     (needs: pip install transformers)

A Llama of about 14M parameters, prompts of 128 tokens, 64 new ones. Variants take turns; a figure is the median over rounds
of new tokens per second of all rows together, prefill included, and of their ratio to Hugging Face in the same round.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tinytron.inference import SamplingOptions, complete
from tinytron.model import GPT, ModelConfig
from tinytron.utils.training import DTYPES

LAYERS, WIDTH, HEADS, KV_HEADS, VOCAB = 6, 384, 6, 2, 8192
PROMPT, NEW = 128, 64
Run = Callable[[torch.Tensor], list[list[int]]]


def build(dtype: torch.dtype) -> GPT:
    """Our model."""
    config = ModelConfig(
        block_size=PROMPT + NEW, vocab_size=VOCAB, num_layer=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, hidden_size=WIDTH, intermediate_size=1024, tied_lm_head=False, init_std=0.1,
    )  # fmt: skip
    return GPT(config, dtype=dtype).eval()


def same_llama(model: GPT, dtype: torch.dtype) -> Any:
    """Hugging Face's Llama with the weights of ``model``."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=PROMPT + NEW,
        rms_norm_eps=model.config.norm_eps, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    llama, H = transformers.LlamaForCausalLM(config).to(dtype), WIDTH // HEADS
    mine = model.state_dict()
    theirs = {
        "model.embed_tokens.weight": mine["wte.weight"],
        "model.norm.weight": mine["final_norm.weight"],
        "lm_head.weight": mine["lm_head.weight"],
    }
    for i in range(LAYERS):
        q, k, v = mine[f"blocks.{i}.attn.qkv_proj.weight"].split((HEADS * H, KV_HEADS * H, KV_HEADS * H))
        gate, up = mine[f"blocks.{i}.mlp.gate_up_proj.weight"].chunk(2)
        named = {
            **{"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate},
            **{"mlp.up_proj": up, "mlp.down_proj": mine[f"blocks.{i}.mlp.down_proj.weight"]},
            **{"self_attn.o_proj": mine[f"blocks.{i}.attn.out_proj.weight"]},
            **{"input_layernorm": mine[f"blocks.{i}.attn_norm.weight"]},
            **{"post_attention_layernorm": mine[f"blocks.{i}.mlp_norm.weight"]},
        }
        theirs |= {f"model.layers.{i}.{name}.weight": weight for name, weight in named.items()}
    llama.load_state_dict(theirs)
    return llama.eval()


def variants(model: GPT, llama: Any) -> dict[str, Run]:
    """What is compared; the first is the base."""

    def hugging_face(prompts: torch.Tensor) -> list[list[int]]:
        made = llama.generate(prompts, do_sample=False, max_new_tokens=NEW, attention_mask=torch.ones_like(prompts))
        return made[:, PROMPT:].tolist()

    def cached(prompts: torch.Tensor) -> list[list[int]]:
        result = complete(model, prompts.tolist(), SamplingOptions(max_new_tokens=NEW, temperature=0))
        return [sample.tokens for sample in result.samples]

    @torch.no_grad()
    def anew(prompts: torch.Tensor) -> list[list[int]]:
        ids = prompts
        for _ in range(NEW):
            hidden, _ = model.hidden_states(ids)
            ids = torch.cat((ids, model.lm_head(hidden[:, -1]).argmax(-1, keepdim=True)), dim=1)
        return ids[:, PROMPT:].tolist()

    return {
        "transformers generate": hugging_face,
        "tinytron, everything anew for each token": anew,
        "tinytron": cached,
    }


def measure(runs: dict[str, Run], prompts: torch.Tensor, rounds: int) -> None:
    """Print a table of rates, and how many rows are token by token those of the base."""
    made = {name: run(prompts) for name, run in runs.items()}  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(prompts)
            seconds[name].append(time.perf_counter() - start)
    base = next(iter(runs))
    for name, times in seconds.items():
        ratio = statistics.median(b / t for b, t in zip(seconds[base], times, strict=True))
        same = sum(mine == theirs for mine, theirs in zip(made[name], made[base], strict=True))
        rate = len(prompts) * NEW / statistics.median(times)
        print(f"{len(prompts)} rows  {name:<42} {rate:>8,.0f} tok/s {ratio:>6.2f}x  {same} rows equal", flush=True)


def main() -> None:
    """Run all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    dtype = DTYPES[args.precision]
    model = build(dtype)
    runs = variants(model, same_llama(model, dtype))
    print(
        f"{args.precision}, {PROMPT} + {NEW} tokens, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.processor() or platform.machine()}"
    )
    for rows in args.batch:
        prompts = torch.randint(VOCAB, (rows, PROMPT), generator=torch.Generator().manual_seed(rows))
        measure(runs, prompts, args.rounds)


if __name__ == "__main__":
    main()
