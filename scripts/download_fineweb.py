"""Download FineWeb from the Hugging Face hub, as text for tokenize_dataset.py or as token shards that are ready for
training.

python scripts/download_fineweb.py --sample 10BT --num_files 2    parquet files of text
python scripts/download_fineweb.py --tokens gpt2 --num_files 9    0.9 billion tokens of gpt2

A download whose connection breaks continues where it stopped. After an interruption, the same command keeps the complete
files and fetches the others. Needs: pip install huggingface_hub
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinytron.cli import entry
from tinytron.data.formats import read_header
from tinytron.errors import ConfigError, DataError
from tinytron.utils.flags import Parser, parse_strictly
from tinytron.utils.optional import as_data_error, require_package
from tinytron.utils.paths import user_path
from tinytron.utils.progress import Progress
from tinytron.utils.texts import counted
from tinytron.utils.training import sync_folder

TEXT_REPOS = {"fineweb": "HuggingFaceFW/fineweb", "fineweb-edu": "HuggingFaceFW/fineweb-edu"}
SAMPLES = ("10BT", "100BT", "350BT")
TOKEN_REPO = "kjj0/fineweb100B-gpt2"
TOKEN_FILES = 1028  # training files of 10^8 tokens each; there is also one validation file
GPT2_VOCABULARY = 50304  # 50257, rounded up to a multiple of 128


@dataclass(frozen=True)
class Wanted:
    """A file of a repository; ``size`` is in bytes, or ``None`` for a token file, whose header gives its size."""

    repo: str
    name: str
    size: int | None = None

    @property
    def local(self) -> str:
        """The file's local name."""
        return self.name.rpartition("/")[2]

    def check(self, path: Path) -> None:
        """Check that the downloaded file is complete. Raises: DataError."""
        if self.size is None:
            read_header(path)
        elif path.stat().st_size != self.size:
            raise DataError(
                f"{path}: {path.stat().st_size} bytes, but the hub says {self.size}: it is truncated or damaged"
            )


def wanted_files(args: argparse.Namespace) -> list[Wanted]:
    """The files that the options select. Raises: DataError if the hub cannot be reached."""
    if args.tokens:
        count = TOKEN_FILES if args.num_files is None else args.num_files
        names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
        return [Wanted(TOKEN_REPO, name) for name in names]
    repo = TEXT_REPOS[args.dataset]
    folder = f"sample/{args.sample}"
    hub = require_package("huggingface_hub")
    with as_data_error(f"{repo}/{folder}", "check the network and the names"):
        listed = list(hub.HfApi().list_repo_tree(repo, folder, repo_type="dataset"))
    files = [Wanted(repo, entry.path, entry.size) for entry in listed if entry.path.endswith(".parquet")]
    if not files:
        raise DataError(f"{repo}/{folder} holds no parquet files; use another --sample of {', '.join(SAMPLES)}")
    return sorted(files, key=lambda file: file.name)[: args.num_files]


def fetch(file: Wanted, target: Path, temporary: Path) -> bool:
    """Download ``file`` to the folder ``target`` unless a complete copy is there; returns whether it was downloaded. The
    file gets its name only once it is complete. Raises: DataError."""
    place = target / file.local
    if place.exists():
        try:
            file.check(place)
            return False
        except DataError:
            place.unlink()
    hub = require_package("huggingface_hub")
    with as_data_error(f"{file.repo}/{file.name}", "check the network; the same command keeps complete files"):
        arrived = Path(hub.hf_hub_download(file.repo, file.name, repo_type="dataset", local_dir=temporary))
        try:
            file.check(arrived)
        except DataError:
            arrived.unlink()  # otherwise the next call would treat it as complete
            raise
        partial = place.with_name(place.name + ".part")
        shutil.move(arrived, partial)  # between disks this is a copy, which may be interrupted
        partial.replace(place)
        sync_folder(target)
    return True


def fetch_all(files: Sequence[Wanted], target: Path, temporary: Path, workers: int) -> int:
    """Fetch files with ``workers`` threads and return the number of files downloaded. Raises: the first error; no further
    downloads start after it."""
    pool = ThreadPoolExecutor(workers)
    fetched = 0
    try:
        jobs = [pool.submit(fetch, file, target, temporary) for file in files]
        with Progress("downloading", len(jobs), "file") as progress:
            for job in as_completed(jobs):
                fetched += job.result()
                progress.update(1)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    return fetched


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the options. Raises: ConfigError."""
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", choices=list(TEXT_REPOS), default="fineweb-edu", help="text dataset")
    parser.add_argument("--sample", choices=SAMPLES, default="10BT", help="size of the sample in gpt2 tokens")
    parser.add_argument("--tokens", choices=["gpt2"], help="fetch FineWeb as tokens instead of text, 10^8 per file")
    parser.add_argument("--num_files", type=int, help="fetch only the first N files; default: all")
    parser.add_argument("--target_dir", type=user_path, help="default: data/<dataset>_<sample>, or data/fineweb_gpt2")
    parser.add_argument(
        "--tmp_dir", type=user_path, help="folder for incomplete files; default: .download in the target folder"
    )
    parser.add_argument("--num_workers", type=int, default=10, help="files fetched at a time")
    args = parse_strictly(parser, argv)
    for name, most in (("num_files", TOKEN_FILES if args.tokens else 10**6), ("num_workers", 1000)):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"--{name} {value} must be in 1..{most}; use --{name} 1")
    if args.target_dir is None:
        args.target_dir = Path("data") / ("fineweb_gpt2" if args.tokens else f"{args.dataset}_{args.sample}")
    return args


def next_command(args: argparse.Namespace) -> str:
    """The command to run next with the files."""
    words: list[Any]
    if args.tokens:
        pattern = args.target_dir / "fineweb_train_*.bin"
        words = ["python", "pretrain_debug.py", "--dataset_path", pattern, "--vocab_size", GPT2_VOCABULARY]
    else:
        words = ["python", "scripts/tokenize_dataset.py", "--dataset_path", args.target_dir, "--encoding_name", "gpt2"]
        words += ["--output_dir", f"{args.target_dir}_gpt2"]
    return shlex.join(map(str, words))


def main(argv: Sequence[str] | None = None) -> None:
    """Download the files that the options select."""
    args = parse_args(argv)
    require_package("huggingface_hub.utils").disable_progress_bars()
    files = wanted_files(args)
    temporary = args.tmp_dir or args.target_dir / ".download"
    try:
        for folder in (args.target_dir, temporary):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be created ({error.strerror}); use another folder") from error
    for left_over in temporary.rglob("*.incomplete"):  # left by a killed call; no later call can continue them
        left_over.unlink()
    fetched = fetch_all(files, args.target_dir, temporary, args.num_workers)
    if args.tmp_dir is None:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{counted(len(files), 'file')} in {args.target_dir}, {fetched} fetched now")
    print(f"next: {next_command(args)}")


if __name__ == "__main__":
    entry.run(main)
