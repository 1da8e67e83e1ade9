"""Fine-tuning and preference steps compared with TRL's, on the same model, data, batch and optimizer.

    python benchmarks/posttraining.py [--rounds 5] [--steps 12] [--out benchmarks/results/NAME.md]

Each measurement is a process of its own: our trainer and TRL's take turns, round by round. Rates count the data's tokens
without padding. Memory is the growth of the resident set from before the model was built. Needs ``pip install trl``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROW, BATCH, VOCAB = 128, 8, 4096
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
VARIANTS = ("sft tinytron", "sft trl", "dpo tinytron", "dpo trl", "dpo trl, reference computed once")


def words(count: int, draw: random.Random) -> str:
    """A text of ``count`` tokens."""
    return " ".join(f"w{draw.randrange(VOCAB - 2)}" for _ in range(count))


def prepare(folder: Path, steps: int) -> int:
    """Write model, tokenizer and data to ``folder``; returns the tokens of an average step, prompts included."""
    import tokenizers
    import transformers

    names = {"<end>": 0, "<pad>": 1, **{f"w{i}": i + 2 for i in range(VOCAB - 2)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>", "<pad>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.save_pretrained(folder / "model")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, eos_token_id=0, pad_token_id=1))
    model.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows, total = [], 0
    for _ in range(BATCH * steps):
        lengths = draw.randrange(20, 61), draw.randrange(20, 61), draw.randrange(20, 61)
        prompt, chosen, rejected = (words(length, draw) for length in lengths)
        rows.append({"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected})
        total += 2 * lengths[0] + lengths[1] + lengths[2] + 2
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": row["prompt"] + row["chosen"]} for row in rows]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return total // steps


def main_trl(folder: Path, kind: str, steps: int, *, once: bool) -> tuple[list[float], int]:
    """Seconds of each step of TRL's trainer, and its tokens per step."""
    import datasets
    import transformers
    import trl

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": BATCH, "max_steps": steps, "report_to": "none",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-5, "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "max_length": ROW, "optim": "adamw_torch_fused",
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    file = "pairs" if kind == "dpo" else "texts"
    data = datasets.load_dataset("json", data_files=str(folder / f"{file}.jsonl"), split="train")
    if kind == "dpo":
        args = trl.DPOConfig(**common, beta=0.1, precompute_ref_log_probs=once)
        trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    else:
        args = trl.SFTConfig(**common, packing=False)
        trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return times, 0


def main_tinytron(folder: Path, kind: str, steps: int) -> tuple[list[float], int]:
    """The same for Tinytron's."""
    from tinytron.text.options import TokenizeOptions
    from tinytron.text.tokenize import tokenize_dataset
    from tinytron.training import Trainer, build_config, parse_args
    from tinytron.training.contrastive import BackbonedContrastiveTrainer

    times: list[float] = []

    def timed(cls: type[Trainer]) -> type[Trainer]:
        class Timed(cls):  # type: ignore[misc, valid-type]
            def train_step(self, *args: Any) -> None:
                super().train_step(*args)
                times.append(time.perf_counter())

        return Timed

    pairs: dict[str, Any] = {
        "prompt_key": "prompt",
        "chosen_key": "chosen",
        "rejected_key": "rejected",
        "block_size": ROW,
    }
    options = TokenizeOptions(
        dataset_path=str(folder / ("pairs.jsonl" if kind == "dpo" else "texts.jsonl")), num_proc=0,
        tokenizer_path=str(folder / "model" / "tokenizer.json"), output_dir=str(folder / f"tokens_{kind}"),
        **(pairs if kind == "dpo" else {}),
    )  # fmt: skip
    tokenize_dataset(options, say=lambda text: None)
    seq_len = 2 * ROW - 2 if kind == "dpo" else ROW
    rows = BATCH if kind == "dpo" else BATCH * 81 // ROW  # without padding: as many tokens as in TRL's batch
    flags: dict[str, Any] = {
        "exp_name": kind, "log_dir": folder / "log", "init_from": folder / "model",
        "dataset_path": folder / f"tokens_{kind}", "precision": "fp32", "seq_len": seq_len, "batch_size": rows,
        "total_batch_size": rows * seq_len, "max_steps": steps, "max_epochs": 20, "max_lr": 1e-5, "min_lr": 1e-6,
        "weight_decay": 0.0, "log_every": 1000,
    }  # fmt: skip
    more = [] if kind == "dpo" else ["--packing", "best_fit", "--document_mask"]
    text = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    trainer = timed(BackbonedContrastiveTrainer if kind == "dpo" else Trainer)(
        build_config(parse_args([*text, "--no-do_save", *more]))
    )
    trainer.train()
    return times, rows * seq_len


def resident() -> int:
    """Bytes of the resident set now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def one(variant: str, folder: Path, steps: int) -> None:
    """Measure one variant; prints JSON."""
    import torch
    import transformers  # noqa: F401  # not part of the memory of either

    import tinytron.training  # noqa: F401

    torch.set_num_threads(os.cpu_count() or 1)
    before = resident()
    kind = variant.split()[0]
    run: Callable[[], tuple[list[float], int]] = lambda: main_tinytron(folder, kind, steps)  # noqa: E731
    if "trl" in variant:
        run = lambda: main_trl(folder, kind, steps, once="once" in variant)  # noqa: E731
    times, tokens = run()
    seconds = [after - start for start, after in itertools.pairwise(times[2:])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print("RESULT " + json.dumps({"seconds": statistics.median(seconds), "tokens": tokens, "peak": peak}))


def measure(variant: str, folder: Path, steps: int) -> dict[str, float]:
    """``one`` in a process of its own."""
    words_ = [sys.executable, __file__, "--one", variant, "--folder", str(folder), "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as own:
        done = subprocess.run(words_, capture_output=True, text=True, check=False, cwd=own)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{variant} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, float] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def report(found: dict[str, list[dict[str, float]]], tokens: dict[str, float]) -> str:
    """A table: rates, ratios to TRL by round, and memory."""
    import torch
    import transformers
    import trl

    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, trl {trl.__version__}; fp32, {len(next(iter(found.values())))} rounds",
        "",
        "| variant | ms per step | tokens/s without padding | times TRL's rate (min-max) | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for variant, rounds in found.items():
        kind = variant.split()[0]
        rates = [tokens[variant] / one_round["seconds"] for one_round in rounds]
        peers = [tokens[f"{kind} trl"] / one_round["seconds"] for one_round in found[f"{kind} trl"]]
        ratios = [rate / peer for rate, peer in zip(rates, peers, strict=True)]
        milliseconds = 1e3 * statistics.median(one_round["seconds"] for one_round in rounds)
        peak = statistics.median(one_round["peak"] for one_round in rounds) / 2**20
        lines.append(
            f"| {variant} | {milliseconds:.0f} | {statistics.median(rates):,.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {peak:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure all variants in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        one(args.one, args.folder, args.steps)
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        pair_tokens = prepare(Path(name), args.steps)
        for number in range(args.rounds):
            for variant in VARIANTS:
                found[variant].append(measure(variant, Path(name), args.steps))
                print(f"round {number + 1}: {variant} {1e3 * found[variant][-1]['seconds']:.0f} ms", flush=True)
        lengths = [
            len(json.loads(line)["text"].split()) + 1 for line in (Path(name) / "texts.jsonl").read_text().splitlines()
        ]
    text_tokens = sum(lengths) / args.steps
    tokens = dict.fromkeys(VARIANTS, text_tokens) | {v: pair_tokens for v in VARIANTS if v.startswith("dpo")}
    # Ours packs texts, and its rows are full but for what no text fits into.
    tokens["sft tinytron"] = found["sft tinytron"][0]["tokens"] * filled(lengths, ROW + 1)
    table = report(found, tokens)
    print(table)
    if args.out is not None:
        args.out.write_text(f"# Fine-tuning and preferences compared with TRL\n\n`{' '.join(sys.argv)}`\n\n{table}\n")


def filled(lengths: list[int], row: int) -> float:
    """The share of rows of ``row`` tokens that first-fit packing fills."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = next((i for i, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(row - length)
        else:
            rooms[place] -= length
    return 1 - sum(rooms) / (row * len(rooms))


if __name__ == "__main__":
    main()
