"""Compare learning rates: train one preset with AdamW and with Muon at several peak rates on the same batches, and print
the validation losses as a Markdown table.

python benchmarks/preset_rates.py --preset tiny --data data/quickstart/NAME --vocab_size 4096 [-- more flags]

All runs draw the same samples in the same order from the same initial weights. Each warms up for --warmup_steps (default: a
tenth of its steps) and follows a cosine down to a tenth (AdamW) or a hundredth (Muon) of the peak, as the presets do.
Interrupted? The same command continues.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tinytron.training import build_config, parse_args
from tinytron.training.run.folder import run_folder

ADAM_RATES = (6e-4, 1e-3, 2e-3, 4e-3)
MUON_RATES = (0.005, 0.01, 0.02, 0.04)


def optimizer_flags(optimizer: str, rate: float) -> list[str]:
    """The flags of one column. With Muon, AdamW still updates embeddings and norms, at half the rate."""
    floor = rate / (100 if optimizer == "muon" else 10)
    mult = "0.5" if optimizer == "muon" else "1"
    flags = ["--optimizer", optimizer, "--max_lr", repr(rate), "--min_lr", repr(floor)]
    return [*flags, "--embedding_lr_mult", mult, "--scalar_lr_mult", mult]


def validation_loss(flags: list[str]) -> float:
    """The last validation loss [nats per token] of the run with these flags, which is trained unless it has been.

    Raises: CalledProcessError if the run fails.
    """
    subprocess.run([sys.executable, "-m", "tinytron", "pretrain", *flags], check=True, stdout=sys.stderr)
    log = run_folder(build_config(parse_args(flags))) / "log.txt"
    lines = [line.split() for line in log.read_text().splitlines()]
    return [float(loss) for _, stage, loss in lines if stage == "val"][-1]


def main() -> None:
    """Train what is not trained yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--data", required=True, help="folder of token shards")
    parser.add_argument("--vocab_size", required=True)
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--warmup_steps", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--adam", type=float, nargs="*", default=ADAM_RATES, help="peak rates")
    parser.add_argument("--muon", type=float, nargs="*", default=MUON_RATES, help="peak rates")
    parser.add_argument("--log_dir", type=Path, default=Path("log/preset_rates"))
    parser.add_argument("flags", nargs="*", help="for all runs, after --")
    args = parser.parse_args()
    warmup = args.max_steps // 10 if args.warmup_steps is None else args.warmup_steps
    common = ["--preset", args.preset, "--dataset_path", args.data, "--vocab_size", args.vocab_size, "--do_val"]
    common += ["--max_steps", str(args.max_steps), "--warmup_steps", str(warmup), "--val_every_steps", "0"]
    common += ["--log_dir", str(args.log_dir / args.preset), *args.flags]
    rows = []
    for optimizer, rates in (("adam", args.adam), ("muon", args.muon)):
        for rate in rates:
            losses = []
            for seed in args.seeds:
                losses.append(validation_loss([*common, *optimizer_flags(optimizer, rate), "--seed", str(seed)]))
            shown = ", ".join(f"{loss:.4f}" for loss in losses)
            rows.append(f"| {args.preset} | {optimizer} | {rate:g} | {shown} |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("| preset | optimizer | peak rate | validation loss |\n|---|---|---:|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
