"""Train nanoGPT's character model and modern ones on the same characters, and print their validation losses.

python scripts/shakespeare_char/compare.py [--data input.txt] [-- flags for all runs]

The last tenth of the text is held out, as in nanoGPT. nanoGPT estimates its validation loss from 20 random batches; here it
is computed on all held-out text.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import urllib.request
from pathlib import Path

from tinytron.cli import entry
from tinytron.errors import DataError
from tinytron.text.options import TokenizeOptions
from tinytron.text.sources import file_states
from tinytron.text.state import recipe_hash
from tinytron.text.tokenize import tokenize_dataset
from tinytron.training import Config, build_config, parse_args
from tinytron.training.run.folder import run_folder
from tinytron.utils.training import write_atomically

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
PUBLISHED = 1.88  # nanoGPT's README, section "I only have a macbook", after the same 2,000 steps
COMMON = ("--max_steps", "2000", "--precision", "fp32", "--do_val", "--val_every_steps", "500", "--log_every", "100")
# The same depth, width, batch and rates, but with rotary positions, RMSNorm, SwiGLU with the same number of parameters, and
# heads of 64.
MODERN = (
    *("--preset", "nanogpt-char-cpu", "--position_type", "rotary", "--norm_type", "rms", "--norm_eps", "1e-6"),
    *("--mlp_type", "swiglu", "--intermediate_size", "352", "--num_attention_heads", "2", "--num_key_value_heads", "2"),
)
MUON = ("--optimizer", "muon", "--max_lr", "0.02", "--min_lr", "0.0002", "--embedding_lr_mult", "0.5")
RUNS = {
    "nanogpt": ("nanoGPT's model and AdamW", ("--preset", "nanogpt-char-cpu")),
    "modern": ("modern model, same AdamW", MODERN),
    "muon": ("modern model, Muon", (*MODERN, *MUON, "--scalar_lr_mult", "0.5")),
}


def find_text(data: str | None, folder: Path, url: str = URL) -> Path:
    """The text file: ``data``, or the file at ``url``, which is cached in ``folder``. Raises: DataError if there is
    none."""
    if data is not None:
        if not Path(data).is_file():
            raise DataError(f"DATA={data} is not a file; name a text file, such as DATA=input.txt")
        return Path(data)
    path = folder / "input.txt"
    if not path.exists():
        print(f"downloading {url}", file=sys.stderr, flush=True)
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                content = response.read()
        except (OSError, ValueError) as error:
            raise DataError(
                f"{url} cannot be downloaded ({error}); fetch it elsewhere and give DATA=path/to/input.txt"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    return path


def prepare(text: Path, folder: Path) -> list[str]:
    """Write character-level token shards of ``text``; returns the flags for training on them."""
    shards = folder / recipe_hash({"files": file_states([text])})[:8]
    options = TokenizeOptions(
        dataset_path=str(text),
        train_chars=True,
        eot_position="none",
        val_fraction=0.1,
        output_dir=str(shards),
        num_proc=0,
    )
    manifest = tokenize_dataset(options, repair=True).manifest
    assert manifest is not None, "only a request to stop ends without a manifest"
    counts = " and ".join(f"{count:,} for {split}" for split, count in manifest.tokens.items())
    print(f"{manifest.tokenizer.vocab_size} different characters: {counts}", flush=True)
    return ["--dataset_path", str(shards), "--vocab_size", str(manifest.tokenizer.vocab_size)]


def validation_loss(config: Config) -> float:
    """The last validation loss of a run, from its log.txt."""
    lines = [line.split() for line in (run_folder(config) / "log.txt").read_text().splitlines()]
    return [float(loss) for _, stage, loss in lines if stage == "val"][-1]


def main() -> int:
    """Prepare the data, train the models that are not trained yet, and print the table. Returns the exit status of the
    first run that fails, or zero."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text file; default: tiny Shakespeare, downloaded")
    parser.add_argument("--folder", type=Path, default=Path("data/shakespeare_char"), help="folder for text and shards")
    parser.add_argument("--log_dir", default="log/shakespeare_char", help="folder for the runs")
    parser.add_argument("flags", nargs="*", help="training flags for all runs, after --")
    args = parser.parse_args()
    data = prepare(find_text(args.data, args.folder), args.folder)
    rows = []
    for name, (about, own) in RUNS.items():
        flags = [*own, *COMMON, *data, "--exp_name", name, "--log_dir", args.log_dir, *args.flags]
        print(f"\n{about}", flush=True)
        if status := subprocess.run([sys.executable, "-m", "tinytron", "pretrain", *flags], check=False).returncode:
            return status
        config = build_config(parse_args(flags))
        rows.append((about, config.train.max_steps, validation_loss(config)))
    print(f"\n{'validation loss [nats per character]':<44} steps  loss")
    if args.data is None:
        print(f"{'nanoGPT, published':<44} {2000:>5}  {PUBLISHED:.2f}")
    for about, steps, loss in rows:
        print(f"{about:<44} {steps:>5}  {loss:.4f}")
    return 0


if __name__ == "__main__":
    entry.run(main)
