"""Shards that consist of rows: each is one sample, its padding carries nothing; and pairs of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokenize, tokens_of
from tests.helpers.runs import train
from tinytron.data.formats import open_weights
from tinytron.data.mixture import MixtureOrder
from tinytron.data.mixture_file import read_mixture
from tinytron.data.pairs import PairDataset
from tinytron.data.samples import MixtureDataset, SampleOptions, TokenShardDataset
from tinytron.data.shards import find_shards, open_shards
from tinytron.errors import DataError
from tinytron.training import Config, Trainer
from tinytron.utils.sequences import IGNORE_INDEX

START, END = "<|im_start|>", "<|im_end|>"
SIZE, VOCAB = 32, 400
TEXTS = make_texts(40, longest=8)
CHAT = ("--messages_key", "messages", "--assistant_only", "--eot_position", "append")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of shards: ``rows`` and ``stream`` of the same dialogues, and ``pairs``."""
    folder = tmp_path_factory.mktemp("made")
    make_tokenizer(folder / "tokenizer.json", (EOT, START, END))
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b[: 3 + i]}]}
        for i, (a, b) in enumerate(zip(TEXTS[::2], TEXTS[1::2], strict=True))
    ]
    pairs = [{"prompt": a, "chosen": b, "rejected": a} for a, b in zip(TEXTS[::2], TEXTS[1::2], strict=True)]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ("--num_tokens_per_file", 7 * SIZE)
    tokenize(folder / "chats.jsonl", folder / "tokenizer.json", folder / "rows", *CHAT, "--block_size", SIZE, *small)
    tokenize(folder / "chats.jsonl", folder / "tokenizer.json", folder / "stream", *CHAT, *small)
    keys = ("--chosen_key", "chosen", "--rejected_key", "rejected", "--prompt_key", "prompt", "--assistant_only")
    flags = (*keys, "--block_size", SIZE, "--val_fraction", 0.2, *small)
    tokenize(folder / "pairs.jsonl", folder / "tokenizer.json", folder / "pairs", *flags)
    return folder


def dataset(folder: Path, seq_len: int = SIZE, **reading: Any) -> TokenShardDataset:
    return TokenShardDataset(open_shards(find_shards(str(folder), "train")), seq_len, VOCAB, SampleOptions(**reading))


def weights_of(folder: Path) -> list[float]:
    return [weight for path in sorted(folder.glob("train_*.weights")) for weight in open_weights(path).tolist()]


def table(folder: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[int]]:
    """Ids and weights, a row a line, and the length of each row without its padding, which begins after its only end."""
    ids = np.array(tokens_of(folder)).reshape(-1, SIZE)
    return ids, np.array(weights_of(folder)).reshape(-1, SIZE), [1 + row.index(0) for row in ids.tolist()]


@pytest.mark.parametrize("seq_len", [SIZE - 1, SIZE, SIZE + 5])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_row_is_a_sample(made: Path, seq_len: int, packing: str) -> None:
    ids, weights, lengths = table(made / "rows")
    data = dataset(made / "rows", seq_len, packing=packing, document_mask=True, mark_padding=True)
    assert len(data) == len(ids) == 20
    assert min(lengths) < SIZE == max(lengths)
    batch = data.__getitems__(range(20))
    assert batch.weights is not None
    assert batch.positions is not None
    assert batch.padding is not None
    for row, length in enumerate(lengths):
        pairs = length - 1
        assert batch.input_ids[row, :pairs].tolist() == ids[row, :pairs].tolist()
        assert batch.labels[row, :pairs].tolist() == ids[row, 1:length].tolist()
        assert batch.weights[row, :pairs].tolist() == weights[row, 1:length].tolist()
        assert batch.labels[row, pairs:].tolist() == [IGNORE_INDEX] * (seq_len - pairs)
        assert not batch.weights[row, pairs:].any()
        assert batch.padding[row].tolist() == [False] * pairs + [True] * (seq_len - pairs)
        assert batch.positions[row].tolist() == [*range(pairs), *range(seq_len - pairs)]
    assert any("rows: 20 rows of 32 tokens, one per sequence" in line for line in data.describe())
    assert data.fingerprint().startswith("rows shards:")


def test_a_row_of_one_token_has_no_target(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a lazy dog"}\n')
    flags = ("--block_size", 4, "--eot_position", "none")
    tokenize(tmp_path / "a.jsonl", made / "tokenizer.json", tmp_path / "out", *flags)
    first = dataset(tmp_path / "out", 4)[0]
    assert first["labels"].tolist() == [IGNORE_INDEX] * 4


def test_rows_that_do_not_fit(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its rows of 32 tokens do not fit --seq_len 16; use --seq_len 32"):
        dataset(made / "rows", 16)
    shards = open_shards([*find_shards(str(made / "rows"), "train"), *find_shards(str(made / "stream"), "train")])
    with pytest.raises(DataError, match=r"stream/train_000000\.bin has no rows, but others have; keep them in folders"):
        TokenShardDataset(shards, SIZE, VOCAB)
    shards = open_shards(find_shards(str(made / "rows"), "train"))
    shards[0].count -= 1
    with pytest.raises(DataError, match="223 tokens are not whole rows of 32; tokenize again"):
        TokenShardDataset(shards, SIZE, VOCAB)
    data = dataset(made / "rows")
    data.shards[0].document_starts = None
    with pytest.raises(DataError, match=r"has rows, but train_000000\.docs is missing; tokenize again"):
        _ = data[0]


class Seen(Trainer):
    """Keeps its model as it was before the first step."""

    def _init_model(self, config: Config) -> None:
        super()._init_model(config)
        self.first = {name: p.detach().clone() for name, p in self.raw_model.named_parameters()}

    def report(self) -> Any:
        for name, parameter in self.raw_model.named_parameters():
            parameter.data.copy_(self.first[name])
        return self.raw_model


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_the_loss_counts_the_assistants_tokens_alone(made: Path, tmp_path: Path, kind: str) -> None:
    """One step over all samples, against a loop over the tokens of every sample that asks for each target's weight."""
    ids, weights, _ = table(made / "rows")
    if kind == "stream":
        row, learned = tokens_of(made / "stream"), weights_of(made / "stream")
        sizes = [shard.count for shard in open_shards(find_shards(str(made / "stream"), "train"))]
        starts = [sum(sizes[:n]) + i * SIZE for n, size in enumerate(sizes) for i in range((size - 1) // SIZE)]
        ids, weights = (np.array([values[at : at + SIZE + 1] for at in starts]) for values in (row, learned))
    count = len(ids)
    flags = ("--dataset_path", made / kind, "--seq_len", SIZE, "--block_size", SIZE, "--vocab_size", 448)
    sizes_of_step = ("--total_batch_size", count * SIZE, "--batch_size", 1, "--max_steps", 1, "--no-use_mock_data")
    run = train(Seen, tmp_path, *flags, *sizes_of_step)
    total, targets = 0.0, 0
    for sample, learn in zip(ids, weights, strict=True):
        tokens = torch.tensor(sample).long()
        with torch.no_grad():
            logits = run.extra(tokens[None, :SIZE])[0].double()
        for at in range(len(sample) - 1):
            if learn[at + 1]:
                total -= float(logits[at].log_softmax(-1)[tokens[at + 1]])
                targets += 1
    assert 0 < targets < ids.size / 2
    (step,) = [record for record in run.records if record.get("step") == 1 and "loss" in record][:1]
    assert step["loss"] == pytest.approx(total / targets, rel=1e-5)


def test_rows_and_streams_mix(made: Path, tmp_path: Path) -> None:
    sources = [{"name": name, "path": str(made / name), "weight": 0.5} for name in ("rows", "stream")]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    data = {name: dataset(made / name, mark_padding=True) for name in ("rows", "stream")}
    order = MixtureOrder(read_mixture(tmp_path / "mixture.json"), [len(d) for d in data.values()], SIZE, 1)
    mixed = MixtureDataset({"stream": data["stream"], "rows": data["rows"]}, order)
    batch = mixed.__getitems__([0, len(data["stream"])])
    assert batch.padding is not None
    assert batch.padding.any(dim=1).tolist() == [False, True]


# Pairs.


def test_pairs_are_aligned(made: Path) -> None:
    pairs = PairDataset(made / "pairs")
    val = PairDataset(made / "pairs", "val", VOCAB)
    assert len(pairs) + len(val) == 20
    tokenizer = __import__("tokenizers").Tokenizer.from_file(str(made / "tokenizer.json"))
    chosen_of = dict(zip(TEXTS[::2], TEXTS[1::2], strict=True))
    for pair in (*pairs, *(val[i] for i in range(-len(val), 0))):
        said = []
        for row in pair:
            assert (row.ids.shape, row.weights.shape) == ((SIZE,), (SIZE,))
            assert not row.weights[row.length :].any()
            assert row.ids[row.length :].tolist() == [0] * (SIZE - row.length)
            said.append(tokenizer.decode(row.ids[row.weights > 0].tolist()))
        worse = next(text for text in chosen_of if text.endswith(said[1]))
        assert chosen_of[worse].endswith(said[0])
    with pytest.raises(IndexError):
        _ = pairs[len(pairs)]


def test_pairs_that_cannot_be_read(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rows has no pairs; make them with the job data/tokenize_contrastive_dataset"):
        PairDataset(made / "rows")
    with pytest.raises(DataError, match="pairs has no pairs for test; hold out more of them"):
        PairDataset(made / "pairs", "test")
    with pytest.raises(DataError, match=r"token id \d+ in row 0 is not below --vocab_size 3"):
        _ = PairDataset(made / "pairs", vocab_size=3)[0]
    import shutil

    shutil.copytree(made / "pairs", tmp_path / "cut")
    last = sorted((tmp_path / "cut").glob("train.neg_*.bin"))[-1]
    last.unlink()
    with pytest.raises(DataError, match=r"train.pos_\*.bin have \[.*\] rows, but train.neg_\*.bin have"):
        PairDataset(tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut")
    shutil.copytree(made / "pairs", tmp_path / "cut")
    (tmp_path / "cut" / "train.pos_000000.weights").unlink()
    with pytest.raises(DataError, match=r"train.pos_000000.bin has no train.pos_000000.weights; tokenize again"):
        _ = PairDataset(tmp_path / "cut")[0]


def test_pairs_are_no_data_of_a_language_model(made: Path) -> None:
    with pytest.raises(DataError, match="pairs holds pairs of answers, which only a trainer that reads pairs can use"):
        dataset(made / "pairs")
