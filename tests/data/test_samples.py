"""Documents, weights, packing and mixtures in samples, against loops over single tokens."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytron.data import EndOfText, MixtureDataset, SampleOptions, Shard, TokenShardDataset, write_shard
from tinytron.data.formats import write_weights
from tinytron.data.pack_files import PackFile, make_pack_files
from tinytron.errors import DataError

EOT, VOCAB = 0, 50


def documents(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Documents of ``lengths`` tokens, the end-of-text token first."""
    random = np.random.default_rng(seed)
    return [[EOT, *random.integers(1, VOCAB, length - 1).tolist()] for length in lengths]


def write(folder: Path, texts: list[list[int]], name: str = "train_000000", docs: bool = True) -> Shard:
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [token for text in texts for token in text]
    write_shard(folder / f"{name}.bin", tokens)
    if docs:
        starts = [0, *itertools.accumulate(map(len, texts))][: len(texts)]
        write_shard(folder / f"{name}.docs", starts, np.uint32)
    return Shard(folder / f"{name}.bin", eot=None if docs else EndOfText(EOT))


def all_rows(dataset: TokenShardDataset | MixtureDataset) -> dict[str, list[list[Any]]]:
    batch = dataset.__getitems__(range(len(dataset)))
    return {name: rows.tolist() for name, rows in batch._asdict().items() if torch.is_tensor(rows)}


def naive_rows(tokens: list[int], seq_len: int, cross: bool) -> dict[str, list[list[int]]]:
    """Windows of ``seq_len`` tokens, one token at a time."""
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "positions": []}
    for first in range(0, len(tokens) - seq_len, seq_len):
        position = -1
        row: list[tuple[int, int, int]] = []
        for at in range(first, first + seq_len):
            position = 0 if tokens[at] == EOT or at == first else position + 1
            begins_another = tokens[at + 1] == EOT
            row.append((tokens[at], -100 if begins_another and not cross else tokens[at + 1], position))
        for name, column in zip(made, zip(*row, strict=True), strict=True):
            made[name].append(list(column))
    return made


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(lengths=LENGTHS, seq_len=st.integers(1, 9), cross=st.booleans(), docs=st.booleans())
def test_windows_know_their_documents(
    tmp_path: Path, lengths: list[int], seq_len: int, cross: bool, docs: bool
) -> None:
    texts = documents(lengths)
    tokens = [token for text in texts for token in text]
    if len(tokens) <= seq_len:
        return
    (tmp_path / "train_000000.docs").unlink(missing_ok=True)
    reading = SampleOptions(document_mask=True, cross_document_loss=cross)
    dataset = TokenShardDataset([write(tmp_path, texts, docs=docs)], seq_len, VOCAB, reading)
    assert all_rows(dataset) == naive_rows(tokens, seq_len, cross)


def test_an_end_of_text_token_may_stand_after_its_document(tmp_path: Path) -> None:
    write_shard(tmp_path / "train_0.bin", [1, 2, EOT, 3, EOT, EOT, 4, 5, 6])
    shard = Shard(tmp_path / "train_0.bin", eot=EndOfText(EOT, "append"))
    assert shard.starts_between(0, 9).tolist() == [3, 5, 6]
    assert [shard.starts_between(n, n + 1).tolist() for n in (2, 3, 6, 8)] == [[], [3], [6], []]
    dataset = TokenShardDataset([shard], 8, VOCAB, SampleOptions(document_mask=True, cross_document_loss=False))
    assert all_rows(dataset) == {
        "input_ids": [[1, 2, EOT, 3, EOT, EOT, 4, 5]],
        "labels": [[2, EOT, -100, EOT, -100, -100, 5, 6]],
        "positions": [[0, 1, 2, 0, 1, 0, 0, 1]],
    }


@QUICK
@given(lengths=LENGTHS, seq_len=st.integers(1, 9), cross=st.booleans(), docs=st.booleans())
def test_packed_rows_hold_every_training_pair_once(
    tmp_path: Path, lengths: list[int], seq_len: int, cross: bool, docs: bool
) -> None:
    for old in tmp_path.glob("train_000000.*"):
        old.unlink()
    texts = documents(lengths)
    tokens = [token for text in texts for token in text]
    if len(tokens) < 2:
        return
    shard = write(tmp_path, texts, docs=docs)
    make_pack_files([shard], seq_len)
    reading = SampleOptions(document_mask=True, cross_document_loss=cross, packing="best_fit")
    rows = all_rows(TokenShardDataset([shard], seq_len, VOCAB, reading))
    pairs, pieces = [], []
    for inputs, labels, positions in zip(*rows.values(), strict=True):
        assert len(inputs) == len(labels) == len(positions) == seq_len
        starts = [n for n, position in enumerate(positions) if position == 0]
        assert starts[0] == 0
        for first, last in itertools.pairwise([*starts, seq_len]):
            assert positions[first:last] == list(range(last - first))
            piece = list(zip(inputs[first:last], labels[first:last], strict=True))
            if all(pair == (0, -100) for pair in piece) and len(set(inputs[first:])) == 1:
                continue  # the unused end of the row (or documents of one token that look like it)
            assert EOT not in [token for token, _ in piece[1:]]  # no document begins inside
            pieces.append(piece)
            pairs += piece
    expected = [
        (a, -100 if b == EOT and not cross else b)
        for a, b in itertools.pairwise(tokens)
        if cross or (a, b) != (EOT, EOT)
    ]
    assert sorted(pair for pair in pairs if cross or pair != (EOT, -100)) == sorted(expected)


@pytest.mark.parametrize("mask", [True, False])
def test_packed_rows_mark_the_tokens_that_only_fill_them(tmp_path: Path, mask: bool) -> None:
    shard = write(tmp_path, [[EOT, 5, 6], [EOT, 7], [EOT], [EOT, 8, 9, 4]])
    make_pack_files([shard], 4)
    reading = SampleOptions(mask, cross_document_loss=False, packing="best_fit", mark_padding=True)
    dataset = TokenShardDataset([shard], 4, VOCAB, reading)
    rows = all_rows(dataset)
    pairs = [pair for name in zip(rows["input_ids"], rows["padding"], strict=True) for pair in zip(*name, strict=True)]
    assert sorted(token for token, fills in pairs if not fills) == sorted(
        [EOT, 5, 6, EOT, 7, EOT, EOT, 8, 9]
    )  # all but the last: 4
    for fills, labels in zip(rows["padding"], rows["labels"], strict=True):
        assert fills == sorted(fills)  # at the end
        assert all(label == -100 for label, fill in zip(labels, fills, strict=True) if fill)
    assert set(dataset[0]) == set(rows)
    assert "padding" not in all_rows(TokenShardDataset([shard], 4, VOCAB, SampleOptions(mask, mark_padding=True)))


def test_a_packing_is_kept_and_made_again_for_other_tokens(tmp_path: Path) -> None:
    shard = write(tmp_path, documents([5, 3, 4]))
    with pytest.raises(DataError, match=r"train_000000\.pack4: cannot be read"):
        PackFile(shard, 4)
    make_pack_files([shard], 4)
    path = tmp_path / "train_000000.pack4"
    first = path.stat()
    make_pack_files([shard], 4)
    assert path.stat().st_mtime_ns == first.st_mtime_ns
    assert pickle.loads(pickle.dumps(PackFile(shard, 4))).pieces(0) == PackFile(shard, 4).pieces(0)
    for texts in (documents([3, 4, 5]), documents([5, 3, 4], seed=1), documents([5, 3, 5])):
        other = write(tmp_path, texts)
        with pytest.raises(DataError, match=r"pack4 is not a packing of the tokens in train_000000\.bin"):
            PackFile(other, 4)
        make_pack_files([other], 4)
        PackFile(other, 4)


@pytest.mark.parametrize("at", [0, 3, 4, 5, 6, 9, 11])
def test_a_damaged_packing_is_refused(tmp_path: Path, at: int) -> None:
    shard = write(tmp_path, documents([5, 3, 4]))
    make_pack_files([shard], 4)
    path = tmp_path / "train_000000.pack4"
    values = np.fromfile(path, "<u4")
    values[256 + at] += 7
    path.write_bytes(values.tobytes())
    with pytest.raises(DataError, match=r"pack4.*remove it"):
        PackFile(shard, 4)


def test_a_packing_that_cannot_be_kept_is_an_error(tmp_path: Path) -> None:
    shard = write(tmp_path, documents([5, 3, 4]))
    (tmp_path / "train_000000.pack4.tmp").mkdir()
    with pytest.raises(DataError, match=r"pack4 cannot be written \(Is a directory\); --packing best_fit stores"):
        make_pack_files([shard], 4)


def test_documents_need_something_that_tells_them(tmp_path: Path) -> None:
    write(tmp_path, documents([5, 6]), docs=False)
    shard = Shard(tmp_path / "train_000000.bin")
    TokenShardDataset([shard], 4, VOCAB)
    for reading in (SampleOptions(document_mask=True), SampleOptions(cross_document_loss=False)):
        with pytest.raises(DataError, match=r"no train_000000\.docs, no manifest\.json.*give --eot_id"):
            TokenShardDataset([shard], 4, VOCAB, reading)


@pytest.mark.parametrize("starts", [[0, 5, 5], [0, 7, 3], [0, 11]])
def test_damaged_document_offsets_are_refused(tmp_path: Path, starts: list[int]) -> None:
    shard = write(tmp_path, documents([5, 6]))
    write_shard(tmp_path / "train_000000.docs", starts, np.uint32)
    with pytest.raises(DataError, match=r"train_000000\.docs: the offsets do not ascend within the 11 tokens"):
        TokenShardDataset([shard], 4, VOCAB, SampleOptions(document_mask=True))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_what_was_in_the_memory_of_a_batch_is_gone(tmp_path: Path, packing: Any) -> None:
    shard = write(tmp_path, documents([3, 5, 5, 4, 2, 6, 3]))
    write_weights(tmp_path / "train_000000.weights", np.arange(28, dtype=np.float32))
    make_pack_files([shard], 8)
    dataset = TokenShardDataset([shard], 8, VOCAB, SampleOptions(document_mask=True, packing=packing))
    for index in range(len(dataset)):
        rows = {name: np.full((1, 8), 9999, row.numpy().dtype) for name, row in dataset[index].items()}
        dataset.read(index, rows, 0)
        assert all(9999 not in row for row in rows.values())
        assert rows.keys() == {"input_ids", "labels", "weights", "positions"}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_weights_belong_to_targets(tmp_path: Path, packing: Any) -> None:
    """Here every token's weight tells its place, and every token its place too."""
    tokens = list(range(1, 24))
    write_shard(tmp_path / "train_0.bin", tokens)
    write_shard(tmp_path / "train_0.docs", [0, 9, 11], np.uint32)
    write_weights(tmp_path / "train_0.weights", [token / 2 for token in tokens])
    shard = Shard(tmp_path / "train_0.bin")
    make_pack_files([shard], 5)
    rows = all_rows(TokenShardDataset([shard], 5, VOCAB, SampleOptions(packing=packing)))
    for labels, weights in zip(rows["labels"], rows["weights"], strict=True):
        assert weights == [label / 2 if label != -100 else 0 for label in labels]


def test_weights_must_fit_their_tokens_and_be_there_for_all(tmp_path: Path) -> None:
    shards = [write(tmp_path, documents([9]), name) for name in ("train_0", "train_1")]
    write_weights(tmp_path / "train_0.weights", np.ones(8))
    with pytest.raises(DataError, match=r"train_0\.weights: 8 weights for the 9 tokens of train_0\.bin"):
        TokenShardDataset(shards, 4, VOCAB)
    write_weights(tmp_path / "train_0.weights", np.ones(9))
    dataset = TokenShardDataset([Shard(shard.path) for shard in shards], 4, VOCAB)
    assert dataset.describe()[-1] == "tokens are weighted: there are .weights files next to the shards"
    with pytest.raises(DataError, match=r"train_1\.bin has no train_1\.weights, but train_0 has; write them for all"):
        all_rows(dataset)


@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(tmp_path: Path, weight: float) -> None:
    shard = write(tmp_path, documents([9]))
    write_weights(tmp_path / "train_000000.weights", [1, 1, 1, 1, 1, 1, weight, 1, 1])
    dataset = TokenShardDataset([shard], 4, VOCAB)
    assert dataset[0]["weights"].tolist() == [1] * 4
    with pytest.raises(DataError, match=rf"train_000000\.weights: weight {weight} of token 6; weights must be finite"):
        dataset[1]


def test_samples_travel_to_other_processes_without_their_tokens(tmp_path: Path) -> None:
    dataset = TokenShardDataset([write(tmp_path, documents([9_000]))], 4, VOCAB, SampleOptions(document_mask=True))
    before = all_rows(dataset)
    packed = pickle.dumps(dataset)
    assert len(packed) < 3000
    assert all_rows(pickle.loads(packed)) == before


def test_a_mixture_numbers_its_sources_one_after_another(tmp_path: Path) -> None:
    sources = {
        name: TokenShardDataset([write(tmp_path / name, documents([length], seed=length))], 4, VOCAB)
        for name, length in {"web": 9, "code": 17}.items()
    }
    write_weights(tmp_path / "code" / "train_000000.weights", np.full(17, 2.0))
    sources["code"] = TokenShardDataset([Shard(tmp_path / "code" / "train_000000.bin")], 4, VOCAB)
    mixed = MixtureDataset(sources)
    assert len(mixed) == 2 + 4
    assert mixed.names == ["web", "code"]
    rows = all_rows(mixed)
    assert rows["sources"] == [0, 0, 1, 1, 1, 1]
    assert rows["input_ids"] == all_rows(sources["web"])["input_ids"] + all_rows(sources["code"])["input_ids"]
    assert rows["weights"] == [[1.0] * 4] * 2 + [[2.0] * 4] * 4  # a source without weights counts fully
    assert mixed[3]["input_ids"].tolist() == rows["input_ids"][3]
    some = mixed.__getitems__([5, 0, 3])
    assert some.input_ids.tolist() == [rows["input_ids"][n] for n in (5, 0, 3)]
    assert some.sources is not None
    assert some.sources.tolist() == [1, 0, 1]
    web, code = (source.fingerprint() for source in sources.values())
    assert mixed.fingerprint() == f"web={web}, code={code}"
