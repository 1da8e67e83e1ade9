"""The four kinds of evaluations against naive loops and transformers; the same on every layout, in training and after."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, train, user_error
from tests.inference.models import greedy, logits_of, make_model
from tests.training.test_evals import EXPERTS, FLAGS, stages
from tinytron.config import configuration, nested
from tinytron.errors import CheckpointError, ConfigError, DataError
from tinytron.evaluation import (
    EncodingEvaluation,
    Evaluation,
    PerplexityComparisonEvaluation,
    PerplexityEvaluation,
    RolloutEvaluation,
)
from tinytron.evaluation.subject import Subject
from tinytron.experiments.evaluate import EvaluateGPT
from tinytron.inference.engine import excluded_tokens
from tinytron.job import JobSpec
from tinytron.model import GPT
from tinytron.registry import evaluation
from tinytron.text.run_tokenizer import RunTokenizer
from tinytron.text.tokenizers import from_file
from tinytron.training import Trainer

pytest.importorskip("tokenizers")
Pools = Callable[[int], Ranks]
BLOCK, NEW = 24, 5
TEXTS = [text[: 30 + 60 * n] for n, text in enumerate(make_texts(8)) if text]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``web``: token shards with tokenizer.json."""
    root = tmp_path_factory.mktemp("made")
    make_tokenizer(root / "tokenizer.json")
    texts = write_jsonl(root / "web.jsonl", make_texts(60))
    tokenize(texts, root / "tokenizer.json", root / "web", "--num_tokens_per_file", 100000)
    return root


@evaluation("letters")
class Letters(RolloutEvaluation):
    """Whether an answer has an even number of letters, which about half have by chance."""

    max_new_tokens = NEW
    stop = ("q",)

    def __len__(self) -> int:
        return len(TEXTS)

    def get(self, index: int) -> tuple[str, str]:
        return TEXTS[index], str(index % 2)

    def clean(self, text: str) -> str:
        return text.replace(" ", "")

    def check(self, answer: str, given: str) -> bool:
        return answer == str(len(given) % 2)


@evaluation("drawn")
class Drawn(Letters):
    """The same with drawn tokens."""

    temperature, top_p = 1.0, 0.9


@evaluation("next")
class Next(EncodingEvaluation):
    """The tokens after texts."""

    def __len__(self) -> int:
        return len(TEXTS)

    def get(self, index: int) -> tuple[str, str]:
        return TEXTS[index], str(index % 2)

    def check(self, answer: str, given: str) -> bool:
        return answer == str(len(given) % 2)


@evaluation("vowels")
class Vowels(Next):
    """The likeliest of some letters after texts."""

    choices = ("a", "e", "i", "o", "u")

    def check(self, answer: str, given: str) -> bool:
        return given == "aeiou"[2 * int(answer)]


@evaluation("texts_ppl")
class TextsPpl(PerplexityEvaluation):
    """Perplexity of texts, shorter and longer than the window."""

    def __len__(self) -> int:
        return len(TEXTS)

    def get(self, index: int) -> str:
        return TEXTS[index]


@evaluation("compared")
class Compared(PerplexityComparisonEvaluation):
    """Continuations of different lengths."""

    def __len__(self) -> int:
        return 6

    def get(self, index: int) -> tuple[str, Sequence[str], int]:
        texts = [" " + text[: 3 + 6 * (n + index)] for n, text in enumerate(TEXTS[1 : 4 - index % 2])]
        return TEXTS[index][:9], texts, index % 2


KINDS: dict[str, type[Evaluation]] = {
    **{"letters": Letters, "drawn": Drawn, "next": Next, "vowels": Vowels},
    **{"texts_ppl": TextsPpl, "compared": Compared},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> RunTokenizer:
    """Byte-level; texts begin with the end-of-text token."""
    made = from_file(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
    return RunTokenizer(made, made.token_id(EOT), True)


def model_of(name: str = "plain", **options: Any) -> GPT:
    return make_model(name, vocab_size=420, block_size=BLOCK, **options)


def prepared(cls: type[Evaluation], tokenizer: RunTokenizer, **settings: Any) -> Evaluation:
    found = cls()
    found.name = next((name for name, kind in KINDS.items() if kind is cls), "own_ppl")
    for name, value in settings.items():
        setattr(found, name, value)
    found.prepare(tokenizer, BLOCK)
    return found


def score(cls: type[Evaluation], model: GPT, tokenizer: RunTokenizer, tokens: int = 200, **settings: Any) -> float:
    return prepared(cls, tokenizer, **settings).evaluate(Subject.of_checkpoint(model, tokenizer, tokens)).score


# Against naive loops.


@pytest.mark.parametrize("tokens", [1, 10**5])
@pytest.mark.parametrize("name", ["plain", "moe"])
def test_rollouts_are_greedy_texts_up_to_a_stop(name: str, tokens: int, tokenizer: RunTokenizer) -> None:
    model, right = model_of(name), 0
    for index, text in enumerate(TEXTS):
        prompt = tokenizer.prompt_ids(text)[-(BLOCK + 1 - NEW) :]
        ids = greedy(model, prompt, NEW, tokenizer.tokenizer.vocab_size)
        ids = ids[: ids.index(tokenizer.end)] if tokenizer.end in ids else ids
        right += len(tokenizer.tokenizer.decode(ids).split("q")[0].replace(" ", "")) % 2 == index % 2
    assert 0 < right < len(TEXTS)
    assert score(Letters, model, tokenizer, tokens) == right / len(TEXTS)


@pytest.mark.parametrize("tokens", [1, 10**5])
def test_encodings_are_the_likeliest_next_tokens(tokens: int, tokenizer: RunTokenizer) -> None:
    model, right, of_choices = model_of(), 0, 0
    banned = excluded_tokens(model, tokenizer.tokenizer.vocab_size, tokenizer.tokenizer.unused)
    assert banned is not None
    with torch.no_grad():
        model.lm_head.weight[banned] *= 9  # tokens that the tokenizer does not have would often be the likeliest
    vowels = [tokenizer.ids(letter)[0] for letter in "aeiou"]
    for index, text in enumerate(TEXTS):
        logits = logits_of(model, tokenizer.prompt_ids(text)[-BLOCK:])[-1].masked_fill(banned, -math.inf)
        right += len(tokenizer.tokenizer.decode([int(logits.argmax())]).strip()) % 2 == index % 2
        of_choices += int(logits[vowels].argmax()) == 2 * (index % 2)
    assert 0 < right < len(TEXTS)
    assert score(Next, model, tokenizer, tokens) == right / len(TEXTS)
    assert score(Vowels, model, tokenizer, tokens) == of_choices / len(TEXTS)


def naive_nll(forward: Callable[[list[int]], torch.Tensor], ids: list[int], start: int) -> float:
    """The loss of ``ids[start:]`` in nats, in windows that are full where possible."""
    nats = 0.0
    while start < len(ids):
        end = min(len(ids), start + BLOCK)
        first = max(0, end - BLOCK - 1)
        log_probs = forward(ids[first : end - 1]).double().log_softmax(-1)
        nats -= sum(float(log_probs[place - first - 1, ids[place]]) for place in range(start, end))
        start = end
    return nats


@pytest.mark.parametrize("tokens", [1, 10**5])
@pytest.mark.parametrize("name", ["plain", "learned", "moe"])
def test_perplexity_is_that_of_plain_torch(name: str, tokens: int, tokenizer: RunTokenizer) -> None:
    model = model_of(name)
    ids = [[tokenizer.end, *tokenizer.ids(text)] for text in TEXTS]
    assert max(map(len, ids)) > 2 * BLOCK
    nats = sum(naive_nll(lambda seen: logits_of(model, seen), own, 1) for own in ids)
    expected = math.exp(nats / sum(len(own) - 1 for own in ids))
    assert score(TextsPpl, model, tokenizer, tokens) == pytest.approx(expected, rel=1e-10)


def test_perplexity_is_that_of_transformers(tokenizer: RunTokenizer) -> None:
    pytest.importorskip("transformers")
    from tests.inference.hugging_face import to_hugging_face

    model = model_of(tied_lm_head=False)
    theirs = to_hugging_face(model)

    @torch.no_grad()
    def forward(seen: list[int]) -> torch.Tensor:
        logits: torch.Tensor = theirs(input_ids=torch.tensor([seen])).logits[0]
        return logits

    ids = [[tokenizer.end, *tokenizer.ids(text)] for text in TEXTS]
    nats = sum(naive_nll(forward, own, 1) for own in ids)
    expected = math.exp(nats / sum(len(own) - 1 for own in ids))
    # Its norms and rotations are in fp32, whatever the model is in.
    assert score(TextsPpl, model, tokenizer) == pytest.approx(expected, rel=1e-5)


def test_comparison_takes_the_smallest_mean_loss(tokenizer: RunTokenizer) -> None:
    model, right, by_sums = model_of(), 0, 0
    for index in range(6):
        context, texts, answer = Compared().get(index)
        before = tokenizer.prompt_ids(context.rstrip())
        sums, counts = [], []
        for text in texts:
            ids = [*before[:1], *tokenizer.ids(context + text)]
            assert ids[: len(before)] == before
            sums.append(naive_nll(lambda seen: logits_of(model, seen), ids, len(before)))
            counts.append(len(ids) - len(before))
        means = [nats / count for nats, count in zip(sums, counts, strict=True)]
        right += means.index(min(means)) == answer
        by_sums += sums.index(min(sums)) == answer
    assert 0 < right < 6
    assert right != by_sums
    assert score(Compared, model, tokenizer) == right / 6


def test_a_length_limits_the_items(tokenizer: RunTokenizer) -> None:
    found = prepared(TextsPpl, tokenizer, length=3)
    assert (found.count, found.work > 3) == (3, True)
    assert found.evaluate(Subject.of_checkpoint(model_of(), tokenizer, 100)).fields().keys() == {
        *("score", "higher_is_better", "count")
    }
    assert not found.higher_is_better
    assert prepared(Letters, tokenizer, length=10**6).count == len(TEXTS)


@pytest.mark.parametrize("cls", KINDS.values(), ids=list(KINDS))
def test_weights_that_are_not_finite(cls: type[Evaluation], tokenizer: RunTokenizer) -> None:
    model = model_of()
    with torch.no_grad():
        model.final_norm.weight[0] = math.nan
    with pytest.raises(CheckpointError, match="are NaN or infinite"):
        score(cls, model, tokenizer)
    subject = Subject(model, tokenizer, BLOCK, 100, torch.device("cpu"))
    assert math.isnan(prepared(cls, tokenizer).evaluate(subject).score)


# Mistakes.


class Unnamed(TextsPpl):
    pass


class Same(Next):
    choices = ("ab", "ab")


class NoPair(Next):
    def get(self, index: int) -> Any:
        return TEXTS[index]


class NoText(TextsPpl):
    def get(self, index: int) -> Any:
        return index


class NoAnswer(Compared):
    def get(self, index: int) -> Any:
        return "a", ["b", "c"], 2


class Empty(TextsPpl):
    def __len__(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("cls", "settings", "text"),
    [
        (Unnamed, {"name": "mine"}, "the evaluation mine measures perplexity; call it mine_ppl"),
        (Same, {}, r"the choices \('ab', 'ab'\) must begin with different tokens"),
        (NoPair, {}, r"get\(0\) returned '.*'; return two texts, prompt and answer"),
        (NoText, {}, r"the evaluation own_ppl: get\(\) returned 0; return a text"),
        (NoAnswer, {}, r"get\(0\) returned \('a', \['b', 'c'\], 2\), which is not of the form"),
        (Empty, {}, "the evaluation own_ppl has no items; give it at least one"),
    ],
)
def test_mistakes(cls: type[Evaluation], settings: dict[str, Any], text: str, tokenizer: RunTokenizer) -> None:
    with pytest.raises((ConfigError, DataError), match=text):
        prepared(cls, tokenizer, **settings)


# Layouts, during training and after.

NAMES = ("letters", "drawn", "next", "vowels", "texts_ppl", "compared", "arithmetic")
LAYOUTS: list[tuple[int, tuple[object, ...]]] = [
    (2, ()),
    (2, ("--sep_size", 2)),
    (2, ("--ep_size", 2)),
    (4, ("--sep_size", 2, "--ep_size", 4)),
]


def _train(log_dir: Path, *flags: object) -> Run:
    """``train`` in a process that has imported this module, and thus the evaluations."""
    return train(Trainer, log_dir, *flags)


def _error(log_dir: Path, *flags: object) -> str:
    return user_error(Trainer, log_dir, *flags)


def _after(folder: Path, out: Path) -> None:
    """Run the job on the checkpoint in ``folder``."""
    values: dict[str, Any] = {option.path: option.default for option in EvaluateGPT.options() if not option.required}
    values |= {"eval.evaluations": NAMES, "eval.length": 5, "eval.checkpoint": str(folder)}
    made = EvaluateGPT(JobSpec("gpt/evaluate", "after", str(out), values))
    made.spec.folder.mkdir(parents=True, exist_ok=True)
    with configuration(nested(values)):
        made.check()
        made.run()


def run_of(ranks: Pools, world: int, data: Path, log_dir: Path, *flags: object) -> Run:
    run: Run = ranks(world).run(_train, log_dir, *FLAGS, "--dataset_path", data, *flags, timeout=240)[0]
    return run


def test_the_same_on_every_layout_during_training_and_after(ranks: Pools, made: Path, tmp_path: Path) -> None:
    flags = ("--eval_tasks", *NAMES, "--eval_length", 5, "--precision", "fp64", *EXPERTS)
    flags = (*flags, "--init_std", 0.3, "--do_save", "--max_steps", 1)
    run = run_of(ranks, 1, made / "web", tmp_path / "1", *flags)
    alone = {record["task"]: record for record in stages(run, "eval")}
    assert list(alone) == list(NAMES)
    assert all(record["count"] == 5 for record in alone.values())
    assert {name for name, record in alone.items() if not record["higher_is_better"]} == {"texts_ppl"}
    assert len({record["score"] for record in alone.values()}) > 3
    for number, (world, layout) in enumerate(LAYOUTS):
        other = stages(run_of(ranks, world, made / "web", tmp_path / f"layout{number}", *flags, *layout), "eval")
        for record in other:
            expected = alone[record["task"]]
            assert record == {**expected, "score": pytest.approx(expected["score"], rel=1e-10)}, (layout, record)
    for world in (1, 2):
        out = tmp_path / f"after{world}"
        ranks(world).run(_after, run.folder, out, timeout=240)
        found = json.loads((out / "checkpoints/general/default/after/results.json").read_text())["results"]
        assert found.keys() == alone.keys()
        for name, result in found.items():
            assert result.pop("seconds") >= 0
            assert result == {key: pytest.approx(alone[name][key], rel=1e-10) for key in result}
            assert result.keys() == {"score", "higher_is_better", "count"}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--eval_tasks", "winogrand"), "there is no evaluation winogrand; did you mean winogrande?"),
        (("--eval_tasks", "letters", "--eval_length", 0), "--eval_length 0 must be at least 1; use 100"),
        (("--eval_length", 5), "--eval_length 5 needs tasks; use --eval_tasks tasks.jsonl, or drop it"),
        (("--eval_tasks", "mnli", "--eval_data_dir", "nowhere"), "the evaluation mnli needs nowhere/mnli.jsonl (or "),
    ],
)
def test_what_a_run_refuses(ranks: Pools, made: Path, tmp_path: Path, flags: tuple[object, ...], text: str) -> None:
    for told in ranks(2).run(_error, tmp_path / "log", *FLAGS, "--dataset_path", made / "web", *flags):
        assert text in told
    assert not (tmp_path / "log").exists(), "told before anything is written"
