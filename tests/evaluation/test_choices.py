"""Multiple choice against every row by itself; task files; tokens of context and choice."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import EOT, make_texts, make_tokenizer
from tests.inference.models import logits_of, make_model
from tinytron.data import Batch
from tinytron.errors import ConfigError, DataError
from tinytron.evaluation.choices import (
    Item,
    Row,
    encode_items,
    encode_pair,
    log_probs,
    plan_batches,
    read_items,
    summarize,
)
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.text.run_tokenizer import RunTokenizer, find_tokenizer
from tinytron.text.tokenizers import from_file

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> RunTokenizer:
    """Byte-level; texts begin with the end-of-text token."""
    made = from_file(make_tokenizer(tmp_path_factory.mktemp("made") / "tokenizer.json"))
    return RunTokenizer(made, made.token_id(EOT), True)


def make_items(count: int = 9) -> list[Item]:
    """Contexts and choices of different lengths; the first context is empty."""
    texts = make_texts(4 * count, longest=8)
    items = []
    for n in range(count):
        choices = tuple(" " + text[: 5 + 2 * n] for text in texts[4 * n + 1 : 4 * n + 3 + n % 2])
        items.append(Item(texts[4 * n] if n else "", choices, n % len(choices)))
    return items


def scores_of(model: GPT, rows: list[Row], **options: Any) -> list[float]:
    def loss(batch: Batch) -> LossSums:
        sums = model(batch.input_ids, batch.labels)
        assert isinstance(sums, LossSums)
        return sums

    given: dict[str, Any] = {"longest": model.config.block_size, "tokens_per_batch": 128, "device": torch.device("cpu")}
    return log_probs(model, loss, rows, **given | options)


def naive_score(model: GPT, row: Row) -> float:
    log_prob = logits_of(model, list(row.ids[:-1])).log_softmax(-1)
    return sum(float(log_prob[t - 1, row.ids[t]]) for t in range(row.start, len(row.ids)))


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
@pytest.mark.parametrize("name", ["plain", "learned", "some windows", "moe"])
def test_sums_are_those_of_every_row_by_itself(name: str, tokens: int, tokenizer: RunTokenizer) -> None:
    model = make_model(name, vocab_size=420, block_size=64, dropout=0.5)
    rows = encode_items(make_items(), tokenizer, 64)
    model.train()
    made = scores_of(model, rows, tokens_per_batch=tokens)
    assert model.training
    model.eval()
    assert made == pytest.approx([naive_score(model, row) for row in rows], rel=1e-10)


def test_batches_hold_each_row_once_and_few_tokens(tokenizer: RunTokenizer) -> None:
    rows = encode_items(make_items(), tokenizer, 64)
    batches = plan_batches(rows, 128, 64)
    assert sorted(n for batch in batches for n in batch) == list(range(len(rows)))
    for batch in batches:
        longest = max(len(rows[n].ids) - 1 for n in batch)
        assert len(batch) == 1 or len(batch) * (-(-longest // 16) * 16) <= 128
    assert len(batches) > 2


def test_a_batch_may_be_exactly_full() -> None:
    rows = [Row(0, n, (0,) * 17, 1, 1) for n in range(4)]
    assert plan_batches(rows, 32, 64) == [[0, 1], [2, 3]]


def test_a_model_in_evaluation_mode_stays_in_it() -> None:
    model = make_model()
    scores_of(model, [Row(0, 0, (1, 2), 1, 1)])
    assert not model.training


def test_nats_are_added_in_double_precision() -> None:
    def loss(batch: Batch) -> LossSums:
        nats = torch.where(batch.labels == 2, 2.0**24, (batch.labels == 3).float())
        return LossSums(nats.sum(), torch.zeros(()), per_token=nats.flatten())

    row, cpu = Row(0, 0, (1, 2, 3), 1, 1), torch.device("cpu")
    assert log_probs(make_model(), loss, [row], longest=16, tokens_per_batch=16, device=cpu) == [-(2.0**24) - 1]


def test_results_by_hand() -> None:
    items = [Item("", ("a", "bbbb"), 0), Item("", ("a", "bbbb"), 1), Item("", ("a", "bbbb"), 0)]
    shapes = [Row(item, choice, (0,) * (1 + (choice + 1)), 1, (1, 4)[choice]) for item in range(3) for choice in (0, 1)]
    scores = [-1.0, -2.0, -1.5, -2.4, -1.0, -3.0]  # per token -1, -1 | -1.5, -1.2 | -1, -1.5
    found = summarize(items, shapes, scores)
    assert found["items"] == 3
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_per_token"] == 1.0  # the first of two equal ones
    assert found["accuracy_per_byte"] == pytest.approx(1 / 3)
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert found["accuracy_per_token_stderr"] == 0.0
    assert summarize(items[:1], shapes[:2], scores[:2])["accuracy_stderr"] == 0.0


def test_a_model_without_the_loss_of_every_token() -> None:
    model = make_model()
    model.train()
    with pytest.raises(ConfigError, match="tasks need the loss of every token, but this model has none"):
        log_probs(
            model, lambda _: LossSums(torch.zeros(()), torch.zeros(())), [Row(0, 0, (1, 2), 1, 1)],
            longest=16, tokens_per_batch=16, device=torch.device("cpu"),
        )  # fmt: skip
    assert model.training


# Tokens.


def test_context_and_choice_are_tokenised_together(tokenizer: RunTokenizer) -> None:
    encode = tokenizer.tokenizer.encode
    ids, start = encode_pair("the quick", " brown fox", tokenizer)
    assert ids == [tokenizer.end, *encode(["the quick brown fox"])[0]]
    assert start == 1 + len(encode(["the quick"])[0])
    assert encode_pair("the quick ", "brown fox", tokenizer) == (ids, start)  # the space belongs to the choice
    assert encode_pair("the quick\n", "fox", tokenizer) == encode_pair("the quick", "\nfox", tokenizer)  # as a line end
    assert encode_pair("", "brown", tokenizer) == ([tokenizer.end, *encode(["brown"])[0]], 1)


def test_texts_that_do_not_begin_with_the_end_of_text(tokenizer: RunTokenizer) -> None:
    bare = RunTokenizer(tokenizer.tokenizer, tokenizer.end, False)
    ids, start = encode_pair("the quick", " brown", bare)
    assert ids == [*tokenizer.tokenizer.encode(["the quick brown"])[0]]
    assert start == len(tokenizer.tokenizer.encode(["the quick"])[0])
    assert encode_pair("", "brown", bare)[0][0] == tokenizer.end


def test_a_token_that_holds_the_end_of_the_context_too(tokenizer: RunTokenizer) -> None:
    encode = tokenizer.tokenizer.encode
    together, apart = list(encode(["the"])[0]), list(encode(["th"])[0])
    assert len(together) <= len(apart), "the tokenizer has the word as one token"
    ids, start = encode_pair("th", "e", tokenizer)
    assert (ids, start) == ([tokenizer.end, *apart, *encode(["e"])[0]], 1 + len(apart))


def test_long_contexts_lose_their_beginning(tokenizer: RunTokenizer) -> None:
    item = Item("the quick brown fox jumps over a lazy dog " * 9, (" and sleeps", " all day"), 0)
    whole, cut = encode_items([item], tokenizer, 500), encode_items([item], tokenizer, 12)
    for long, short in zip(whole, cut, strict=True):
        assert short.ids == long.ids[-13:]
        assert short.ids[short.start :] == long.ids[long.start :]
    with pytest.raises(DataError, match="item 1: choice 0 has 40 tokens, which must be 1 to 12; shorten it"):
        encode_items([Item("a", ("0" * 40, "b"), 0)], tokenizer, 12)
    (longest, _) = encode_items([Item("a", ("0" * 12, "b"), 0)], tokenizer, 12)
    assert len(longest.ids) - longest.start == 12


# Files.


def test_a_task_file(tmp_path: Path) -> None:
    path = tmp_path / "sky.jsonl"
    lines = [{"context": f"c{n}", "choices": [" a", " b"], "answer": n % 2, "more": 1} for n in range(3)]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_items(path) == [Item(f"c{n}", (" a", " b"), n % 2) for n in range(3)]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 2 is not of the form {"),
        ("[]", "line 2 is not of the form"),
        ('{"context": "a", "choices": ["b", "c"]}', "(KeyError: 'answer')"),
        (
            '{"context": "a", "choices": ["b"], "answer": 0}',
            "line 2 needs a text as context and at least two non-empty texts",
        ),
        ('{"context": 1, "choices": ["b", "c"], "answer": 0}', "line 2 needs a text as context"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "two non-empty texts as choices"),
        (
            '{"context": "a", "choices": ["b", "c"], "answer": 2}',
            "line 2: answer 2 must be the number of a choice, 0 to 1",
        ),
        ('{"context": "a", "choices": ["b", "c"], "answer": -1}', "answer -1 must be the number of a choice, 0 to 1"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "answer True must be"),
        ('{"context": "a", "choices": ["b", "c"], "answer": "b"}', "answer 'b' must be"),
    ],
)
def test_a_line_that_is_no_item(line: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n' + line)
    with pytest.raises(DataError) as error:
        read_items(tmp_path / "t.jsonl")
    assert text in str(error.value)
    assert str(tmp_path / "t.jsonl") in str(error.value)


def test_files_without_items(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty; give lines of the form"):
        read_items(tmp_path / "empty.jsonl")


def test_the_tokenizer_of_a_run_has_the_right_name_in_errors() -> None:
    with pytest.raises(ConfigError, match=r"give --eval_tokenizer path/to/tokenizer.json"):
        find_tokenizer(None, option="--eval_tokenizer")


@pytest.mark.parametrize(
    "text", ["the quick brown fox jumps over", "naïve dog sleeps 42 days", "says lazy 猫s 🙂 all day"]
)
def test_what_is_scored_is_the_choice_at_every_border(tokenizer: RunTokenizer, text: str) -> None:
    for k in range(1, len(text)):
        ids, start = encode_pair(text[:k], text[k:], tokenizer)
        kept = text[:k].rstrip()
        assert tokenizer.tokenizer.decode(ids[start:]) == text[len(kept) :]
        assert ids[:start] == tokenizer.prompt_ids(kept)


def test_a_score_that_is_no_number_makes_no_accuracy() -> None:
    items = [Item("a", (" b", " c"), 0), Item("a", (" b", " c"), 1)]
    rows = [Row(n // 2, n % 2, (1, 2), 1, 2) for n in range(4)]
    found = summarize(items, rows, [-1.0, math.nan, -3.0, -2.0])
    assert all(math.isnan(value) for name, value in found.items() if name != "items")


def test_a_choices_bytes_are_bytes_and_not_characters(tokenizer: RunTokenizer) -> None:
    (row, _) = encode_items([Item("the", (" 猫s", " fox"), 0)], tokenizer, 64)
    assert row.text_bytes == 5


def test_a_task_file_with_a_byte_order_mark_odd_separators_and_half_a_character(tmp_path: Path) -> None:
    item = {"context": "a\u2028b\x85", "choices": [" x\x0c", " y"], "answer": 1}
    line = json.dumps(item, ensure_ascii=False).encode()
    other = b'{"context": "\\ud83d", "choices": ["a", "b"], "answer": 0}'
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + other)
    assert read_items(tmp_path / "t.jsonl") == [
        Item("a\u2028b\x85", (" x\x0c", " y"), 1),
        Item("?", ("a", "b"), 0),
    ]


def test_a_choice_that_is_there_twice_is_right_whichever_is_named() -> None:
    rows = [Row(0, choice, (0, 1 + choice % 2), 1, 2) for choice in range(3)]
    for answer, accuracy in ((0, 1.0), (2, 1.0), (1, 0.0)):
        found = summarize([Item("", (" a", " b", " a"), answer)], rows, [-1.0, -2.0, -1.0])
        assert [found[name] for name in ("accuracy", "accuracy_per_token", "accuracy_per_byte")] == [accuracy] * 3
