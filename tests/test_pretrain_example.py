"""pretrain_example.py: every source and tokenizer gives the right tokens, once; every mistake gives one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.helpers.corpus import contents
from tests.helpers.ranks import Ranks
from tests.helpers.runs import config_of
from tinytron.data import write_shard
from tinytron.data.formats import open_shard
from tinytron.errors import TinytronError
from tinytron.training.run.reporter import Reporter

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, here or in a process started from here
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")

import pretrain_example  # noqa: E402

ROOT = Path(__file__).parent.parent
WORDS = "the quick brown fox jumps over a lazy dog and sleeps all day".split()  # noqa: SIM905
TEXTS = [" ".join(WORDS[i % 13 :] + WORDS[: i % 11]) + f" {i}." for i in range(60)]
EOT = "<|endoftext|>"
MODEL = (
    *("--num_layer", 1, "--hidden_size", 16, "--num_attention_heads", 2, "--num_key_value_heads", 1),
    *("--intermediate_size", 16, "--block_size", 16, "--seq_len", 16, "--vocab_size", 320, "--precision", "fp32"),
)
RUN = ("--batch_size", 2, "--total_batch_size", 64, "--max_steps", 3, "--log_every", 1, "--warmup_steps", 0)
Pools = Callable[[int], Ranks]


def _train_tokenizer(special: list[str]) -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and tokenizers of every kind."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = _train_tokenizer([EOT])
    start = tokenizers.processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, 0)])
    tokenizer.post_processor = start  # which training must not add
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "bare").mkdir()
    tokenizer.save(str(folder / "bare" / "tokenizer.json"))
    _train_tokenizer([]).save(str(folder / "endless.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=EOT)
    fast.save_pretrained(str(folder / "saved"))
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "repo" / "data").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, folder / "c.parquet", row_group_size=7)
    parquet.write_table(table, folder / "repo" / "data" / "train-00000-of-00001.parquet", row_group_size=7)
    parquet.write_table(table.slice(0, 5), folder / "repo" / "data" / "test-00000-of-00001.parquet")
    (folder / "notes" / "sub").mkdir(parents=True)
    for name, text in zip(("a.txt", "b.md", "sub/c.py"), TEXTS, strict=False):
        (folder / "notes" / name).write_text(text)
    return folder


def _expected(made: Path, texts: list[str], end: bool = True) -> list[int]:
    tokenizer = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))
    tail = [tokenizer.token_to_id(EOT)] if end else []
    return [token for text in texts for token in [*tokenizer.encode(text, add_special_tokens=False).ids, *tail]]


def _init_dataset(flags: tuple[object, ...], variables: dict[str, str], hidden: tuple[str, ...] = ()) -> Any:
    """What the example's ``_init_dataset`` does on this rank: its data set, or the error."""
    modules = mock.patch.dict(sys.modules, dict.fromkeys(hidden))
    mine = {name: value.replace("RANK", str(dist.get_rank())) for name, value in variables.items()}
    environment = mock.patch.dict(os.environ, {"LOCAL_RANK": str(dist.get_rank()), **mine})
    trainer = pretrain_example.ExampleTrainer.__new__(pretrain_example.ExampleTrainer)
    config = config_of(*MODEL, *(str(flag).replace("RANK", str(dist.get_rank())) for flag in flags))
    trainer._init_distributed(config)
    trainer.reporter = Reporter(trainer.state, [])
    with modules, environment:
        try:
            trainer._init_dataset(config)
        except TinytronError as error:
            return f"{type(error).__name__}: {error}"
    return trainer.train_dataset


def _init_dataset_on_two_nodes(flags: tuple[object, ...], variables: dict[str, str]) -> Any:
    """``_init_dataset`` with a node for each rank."""
    return _init_dataset(flags, {**variables, "LOCAL_RANK": "0"})


class Example:
    """Calls ``_init_dataset`` on the ranks with the made files and a cache of its own."""

    def __init__(self, ranks: Pools, made: Path, cache: Path) -> None:
        self.ranks, self.made, self.cache = ranks, made, cache

    def __call__(
        self, path: str | None, *flags: object, world: int = 1, hidden: tuple[str, ...] = (), **env: str
    ) -> Any:
        """The answer of every rank if they are the same. ``path`` and HF_TOKENIZER are below the made folder."""
        place = () if path is None else ("--dataset_path", self.made / path)
        name = env.pop("HF_TOKENIZER", "tokenizer.json")
        tokenizer = str(self.made / name) if (self.made / name).exists() else name
        variables = {"HF_CACHE_DIR": str(self.cache), "HF_TOKENIZER": tokenizer, "HF_MIN_CHARS": "1", **env}
        answers = self.ranks(world).run(_init_dataset, (*place, *flags), variables, hidden)
        if not isinstance(answers[0], str):
            assert len({answer.fingerprint() for answer in answers}) == 1
        else:
            assert len(set(answers)) == 1, "one error on all ranks"
            assert "\n" not in answers[0]
        return answers[0]

    def tokens(self, *args: Any, **kwargs: Any) -> list[int]:
        """All tokens of the shards."""
        answer = self(*args, **kwargs)
        assert not isinstance(answer, str), answer
        return [int(token) for path in answer.paths for token in open_shard(path)]


@pytest.fixture
def example(ranks: Pools, made: Path, tmp_path: Path) -> Example:
    return Example(ranks, made, tmp_path)


# Tokens.


@pytest.mark.parametrize("source", ["c.jsonl", "c.parquet", "c.*l"])
def test_rows_of_files_become_their_tokens_with_an_end_after_each(example: Example, made: Path, source: str) -> None:
    assert example.tokens(source, world=2) == _expected(made, TEXTS)


def test_a_folder_of_text_files_is_one_document_per_file(example: Example, made: Path) -> None:
    assert example.tokens("notes") == _expected(made, TEXTS[:3])


def test_a_data_set_streamed_by_name_and_split(example: Example, made: Path) -> None:
    repo = str(made / "repo")
    assert example.tokens(None, HF_DATASET_REPO=repo, HF_DATASET_NAME="default") == _expected(made, TEXTS)
    assert example.tokens(None, HF_DATASET_REPO=repo, HF_SPLIT="test") == _expected(made, TEXTS[:5])


@pytest.mark.parametrize("tokenizer", ["saved", "bare"])
def test_tokenizers_in_folders(example: Example, made: Path, tokenizer: str) -> None:
    assert example.tokens("c.jsonl", HF_TOKENIZER=tokenizer) == _expected(made, TEXTS)


def test_options(example: Example, made: Path) -> None:
    assert example.tokens("c.jsonl", HF_MAX_SAMPLES="7") == _expected(made, TEXTS[:7])
    assert example.tokens("c.jsonl", HF_MAX_SAMPLES="0") == _expected(made, TEXTS)
    assert example.tokens("c.jsonl", HF_ADD_EOS_TOKEN="0") == _expected(made, TEXTS, end=False)
    assert example.tokens("c.jsonl", HF_ADD_EOS_TOKEN="0", HF_TOKENIZER="endless.json")
    long = [text for text in TEXTS if len(text) >= 60]
    assert 0 < len(long) < len(TEXTS)
    assert example.tokens("c.jsonl", HF_MIN_CHARS="60") == _expected(made, long)
    assert example.tokens("c.jsonl", HF_MIN_CHARS="60", HF_MAX_SAMPLES="3") == _expected(made, long[:3])


def test_shuffling_by_the_seed(example: Example, made: Path) -> None:
    once, again, other = (
        example.tokens("c.jsonl", "--seed", seed, HF_SHUFFLE_BUFFER="16", HF_CACHE_DIR=str(example.cache / cache))
        for seed, cache in ((1, "."), (1, ".."), (2, "."))
    )
    assert once == again
    assert once != other
    assert sorted(once) == sorted(other) == sorted(_expected(made, TEXTS))


def test_a_large_vocabulary_is_written_as_uint32(example: Example, tmp_path: Path) -> None:
    words = {word: i for i, word in enumerate([*(f"w{i}" for i in range(70000)), EOT, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "large.json"))
    flags = ("--vocab_size", 70100)
    tokens = example.tokens("c.jsonl", *flags, HF_TOKENIZER=str(tmp_path / "large.json"), HF_MAX_SAMPLES="2")
    assert tokens == [words.get(word, 0) for text in TEXTS[:2] for word in [*text.split(), EOT]]
    assert max(tokens) > 2**16
    assert {path.stat().st_size for path in tmp_path.glob("*/*.bin")} == {1024 + 4 * len(tokens)}


@pytest.mark.parametrize("path", ["", "train_*.bin"], ids=["folder", "pattern"])
def test_token_shards_and_mock_data_go_the_built_in_way(example: Example, tmp_path: Path, path: str) -> None:
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "train_000000.bin", range(33))
    answer = example(str(tmp_path / "shards" / path), world=2, hidden=("transformers",))
    assert len(answer) == 2
    assert len(example(None, "--use_mock_data", "--mock_data_num_samples", 40)) == 40
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


# Once.


def test_the_second_time_needs_no_package_no_network_and_no_source_reading(example: Example, made: Path) -> None:
    first = example("c.jsonl")
    second = example("c.jsonl", world=2, hidden=("transformers", "datasets", "tokenizers"))
    assert second.paths == first.paths


def test_shards_of_earlier_versions_are_used_as_they_are(example: Example) -> None:
    (path,) = example("c.jsonl").paths
    for beside in path.parent.iterdir():
        if beside != path:
            beside.unlink()  # an earlier version wrote no manifest and no .docs
    facts = {"documents": 60, "tokens": 1000, "vocab_size": 300, "shards": {path.name: 1000}}
    (path.parent / "prepared.json").write_text(json.dumps(facts))
    before = path.stat().st_mtime_ns
    assert example("c.jsonl", world=2, hidden=("tokenizers",)).paths == [path]
    assert path.stat().st_mtime_ns == before


def test_a_folder_whose_shards_are_damaged_is_made_again(example: Example) -> None:
    (path,) = example("c.jsonl").paths
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert example("c.jsonl", world=2).paths == [path]
    assert path.read_bytes() == whole


def test_everything_that_changes_the_tokens_changes_the_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(*flags: object, source: str | None = "c.jsonl", **env: str) -> Path:
        place = ("--dataset_path", made / source) if source else ()
        with mock.patch.dict(os.environ, {"HF_TOKENIZER": str(made / "tokenizer.json"), **env}):
            return pretrain_example.plan(config_of(*MODEL, *place, *flags))[1]

    def different() -> Iterator[Path]:
        yield folder()
        yield folder(source="c.parquet")
        yield folder(source=None)
        yield folder(source=None, HF_DATASET_REPO="other/name")
        yield folder(source=None, HF_DATASET_NAME="sample-10BT")
        yield folder(source=None, HF_SPLIT="test")
        yield folder(source=None, HF_DATASET_REPO=str(made / "repo"))
        yield folder(HF_TEXT_KEY="body")
        yield folder(HF_TOKENIZER="gpt2")
        yield folder(HF_TOKENIZER=str(made / "saved"))
        yield folder(HF_MAX_SAMPLES="1")
        yield folder(HF_MIN_CHARS="1")
        yield folder(HF_ADD_EOS_TOKEN="0")
        yield folder(HF_SHUFFLE_BUFFER="9")
        yield folder("--seed", 3, HF_SHUFFLE_BUFFER="9")
        for name in ("c.jsonl", "tokenizer.json"):
            os.utime(made / name)
            yield folder()
        os.utime(made / "repo" / "data" / "train-00000-of-00001.parquet")
        yield folder(source=None, HF_DATASET_REPO=str(made / "repo"))

    folders = list(different())
    assert len(set(folders)) == len(folders)
    same = folder("--max_steps", 5, "--seed", 3, HF_DATASET_REPO="unused", HF_SPLIT="unused", HF_MAX_SAMPLES="")
    assert same == folders[-2]
    assert same.parent == Path("data/prepared")
    assert folder(HF_CACHE_DIR="elsewhere") == Path("elsewhere") / same.name


# Mistakes.

LONG = ("--seq_len", 999, "--total_batch_size", 1998, "--block_size", 999, "--batch_size", 1)
NETWORK = "check the names and the network, or give a local file or folder"


@pytest.mark.parametrize(
    ("source", "flags", "env", "message"),
    [
        ("c.jsonl", (), {"HF_MAX_SAMPLES": "abc"}, "ConfigError: environment variable HF_MAX_SAMPLES='abc' must be a "
         "whole number; use HF_MAX_SAMPLES=200000"),
        ("c.jsonl", (), {"HF_MIN_CHARS": "-1"}, "HF_MIN_CHARS='-1' must be a whole number; use HF_MIN_CHARS=50"),
        ("c.jsonl", (), {"HF_SHUFFLE_BUFFER": "1.5"}, "HF_SHUFFLE_BUFFER='1.5' must be a whole number; use"),
        ("c.jsonl", (), {"HF_ADD_EOS_TOKEN": "2"}, "HF_ADD_EOS_TOKEN='2' must be a whole number up to 1; use"),
        ("c.jsonl", (), {"HF_TEXT_KEY": "body"}, "line 1 has no key 'body'; set HF_TEXT_KEY to one that it has: id, text"),
        ("c.parquet", (), {"HF_TEXT_KEY": "body"}, "row 1 has no key 'body'; set HF_TEXT_KEY to one that it has: id, text"),
        ("c.parquet", (), {"HF_TEXT_KEY": "id"}, "row 1: 'id' is int, not text; set HF_TEXT_KEY to another key"),
        ("c.jsonl", (), {"HF_MIN_CHARS": "9999"}, "none of 60 documents has HF_MIN_CHARS=9999 characters; use HF_MIN"),
        ("c.jsonl", ("--vocab_size", 299), {}, "ConfigError: --vocab_size 299 is less than the 300 of HF_TOKENIZER="),
        ("c.jsonl", ("--vocab_size", 299), {}, "; use --vocab_size 320"),
        ("c.jsonl", (), {"HF_TOKENIZER": "endless.json"}, "no end-of-text token is known in HF_TOKENIZER="),
        ("c.jsonl", (), {"HF_TOKENIZER": "endless.json"}, "endless.json; use HF_ADD_EOS_TOKEN=0"),
        ("c.jsonl", (), {"HF_TOKENIZER": "gpt2"}, "DataError: HF_TOKENIZER=gpt2: We couldn't connect to "),
        ("c.jsonl", (), {"HF_TOKENIZER": "c.jsonl"}, "; give a tokenizer.json file"),
        ("c.jsonl", (), {"HF_TOKENIZER": "notes"}, "; give a hub name, a local folder or a tokenizer.json file"),
        ("nowhere", (), {}, "nowhere: there is no such file or folder"),
        ("repo/data", (), {"HF_TEXT_KEY": "x"}, "test-00000-of-00001.parquet: row 1 has no key 'x'; set HF_TEXT_KEY"),
        ("bare", (), {}, "has no token shards (train_*.bin) and no text; give a file, or a folder with files, that end in"),
        (None, (), {}, "DataError: HF_DATASET_REPO=HuggingFaceFW/fineweb-edu HF_SPLIT=train: Couldn't "),
        (None, (), {}, NETWORK),
        (None, (), {"HF_DATASET_REPO": "repo", "HF_SPLIT": "dev"}, "HF_SPLIT=dev: Bad split: dev. Available splits: ['"),
        (None, (), {"HF_DATASET_REPO": "repo", "HF_DATASET_NAME": "x"}, "BuilderConfig 'x' not found. Available: ['def"),
        (None, (), {"HF_DATASET_REPO": "repo", "HF_TEXT_KEY": "x"}, "HF_SPLIT=train: row 1 has no key 'x'; set HF_TEXT_K"),
        ("c.jsonl", (), {"HF_CACHE_DIR": "/proc/nowhere"}, "cannot be written ("),
        ("notes", LONG, {}, "no shard holds one sample of"),
    ],
)  # fmt: skip
def test_a_mistake_is_the_same_one_line_error_on_all_ranks(
    example: Example, made: Path, source: str | None, flags: tuple[object, ...], env: dict[str, Any], message: str
) -> None:
    if env.get("HF_DATASET_REPO") == "repo":
        env = {**env, "HF_DATASET_REPO": str(made / "repo")}
    answer = example(source, *flags, world=2, **env)
    assert isinstance(answer, str)
    assert message in answer


def test_token_shards_on_one_node_only(example: Example, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
    (tmp_path / "node1" / "a.txt").write_text("text " * 100)
    write_shard(tmp_path / "node0" / "train_000000.bin", range(33))
    answers = example.ranks(2).run(
        _init_dataset, ("--dataset_path", tmp_path / "nodeRANK"), {"HF_CACHE_DIR": str(tmp_path)}
    )
    assert all("has train_*.bin on some nodes only; copy them to all" in answer for answer in answers)


def test_nodes_that_make_different_shards(example: Example, tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / f"node{rank}").mkdir()
        (tmp_path / f"node{rank}" / "a.txt").write_text("text " * (100 + rank))
    flags, cache = ("--dataset_path", tmp_path / "nodeRANK"), {"HF_CACHE_DIR": str(tmp_path / "cache")}
    answers = example.ranks(2).run(
        _init_dataset_on_two_nodes, flags, cache | {"HF_TOKENIZER": str(example.made / "saved")}
    )
    assert all("has different train shards on some nodes; copy the same ones to all" in answer for answer in answers)


def test_a_folder_that_a_rank_does_not_see(example: Example, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 100)
    variables = {"HF_CACHE_DIR": str(tmp_path / "nodeRANK"), "HF_TOKENIZER": str(example.made / "saved")}
    answers = example.ranks(2).run(_init_dataset, ("--dataset_path", tmp_path / "a.txt"), variables)
    assert len(set(answers)) == 1
    assert "node1/" in answers[0]
    assert ": not prepared as seen from every process; use a folder that they all see" in answers[0]


def test_two_nodes_that_share_a_folder_write_it_once(example: Example, made: Path, tmp_path: Path) -> None:
    variables = {"HF_CACHE_DIR": str(tmp_path), "HF_TOKENIZER": str(made / "tokenizer.json"), "HF_MIN_CHARS": "1"}
    first, second = example.ranks(2).run(_init_dataset_on_two_nodes, ("--dataset_path", made / "c.jsonl"), variables)
    assert first.fingerprint() == second.fingerprint()
    assert [token for path in first.paths for token in open_shard(path).tolist()] == _expected(made, TEXTS)


def test_a_mistake_on_one_rank_only(example: Example, tmp_path: Path) -> None:
    (tmp_path / "rank0.txt").write_text("text " * 100)
    answer = example(str(tmp_path / "rankRANK.txt"), world=2)
    assert answer.endswith("rank1.txt: there is no such file or folder")


def test_shards_of_an_earlier_run_for_a_larger_model(example: Example) -> None:
    assert len(example("c.jsonl"))
    answer = example("c.jsonl", "--vocab_size", 100, world=2)
    assert "ConfigError: --vocab_size 100 is less than the 300 of HF_TOKENIZER=" in answer
    assert answer.endswith("use --vocab_size 320")


@pytest.mark.parametrize(("source", "package"), [("c.jsonl", "tokenizers"), ("c.parquet", "pyarrow")])
def test_a_missing_package_names_the_command_that_installs_it(example: Example, source: str, package: str) -> None:
    answer = example(source, world=2, hidden=(package,))
    assert f"ConfigError: the package {package} is needed" in answer
    assert 'pip install "tinytron[data]"' in answer


def test_jsonl_and_text_need_no_datasets_package(example: Example, made: Path) -> None:
    assert example.tokens("c.jsonl", hidden=("datasets",)) == _expected(made, TEXTS)


# The command line.


def _run(folder: Path, *flags: object, launcher: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "pretrain_example.py"), *map(str, (*MODEL, *RUN, *flags))]
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    variables |= {"PYTHONPATH": str(ROOT), "HF_MIN_CHARS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


TWO = ("-m", "tinytron.cli.launch", "--standalone", "--nproc_per_node", "2")


@pytest.mark.slow
def test_train_reuse_and_redo_an_interrupted_preparation(made: Path, tmp_path: Path) -> None:
    flags, tokenizer = ("--dataset_path", made / "c.jsonl"), str(made / "tokenizer.json")
    first = _run(tmp_path, *flags, "--do_val", HF_TOKENIZER=tokenizer)
    assert first.returncode == 0, first.stderr
    assert "prepared 60 documents, " in first.stdout
    assert "step 3/3" in first.stdout
    assert "val loss" in first.stdout
    (folder,) = (tmp_path / "data" / "prepared").iterdir()
    before = contents(folder)

    both = _run(tmp_path, *flags, "--do_val", "--exp_name", "two", launcher=TWO, HF_TOKENIZER=tokenizer)
    assert both.returncode == 0, both.stderr
    assert "prepared 60" not in both.stdout
    assert _losses(tmp_path, "two") == pytest.approx(_losses(tmp_path, "gpt"), rel=1e-4)

    (folder / "train_000000.bin").write_bytes(b"half")
    redone = _run(tmp_path, *flags, "--exp_name", "redone", launcher=TWO, HF_TOKENIZER=tokenizer)
    assert redone.returncode == 0, redone.stderr
    assert redone.stdout.count("prepared 60 documents, ") == 1
    assert contents(folder) == before


def _losses(folder: Path, name: str) -> list[float]:
    (log,) = (folder / "log").glob(f"{name}_*/log.txt")
    return [float(line.split()[2]) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("launcher", [(), TWO], ids=["one process", "two"])
@pytest.mark.sample(1)
def test_a_mistake_ends_in_one_line_without_traceback(made: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    flags = ("--dataset_path", made / "c.jsonl", "--vocab_size", 100)
    ended = _run(tmp_path, *flags, launcher=launcher, HF_TOKENIZER=str(made / "tokenizer.json"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: --vocab_size 100 is less than the 300 of HF_TOKENIZER=")
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""
