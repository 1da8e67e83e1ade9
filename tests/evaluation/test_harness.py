"""The adapter for lm-evaluation-harness: each question against every row by itself, with a stand-in for the package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.cli.test_generate import write_config
from tests.evaluation.test_choices import make_items
from tests.helpers.corpus import EOT, make_tokenizer
from tests.inference.models import greedy, logits_of, make_model
from tinytron.cli.main import main
from tinytron.errors import CheckpointError, ConfigError
from tinytron.evaluation.choices import encode_pair
from tinytron.evaluation.harness import Answers, harness_model
from tinytron.inference import SamplingOptions, complete
from tinytron.model import GPT
from tinytron.text.run_tokenizer import RunTokenizer
from tinytron.text.tokenizers import from_file

pytest.importorskip("tokenizers")
Instance = namedtuple("Instance", ["args"])
TEXT = "the quick brown fox jumps over a lazy dog and sleeps all day, says 42 " * 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> RunTokenizer:
    made = from_file(make_tokenizer(tmp_path_factory.mktemp("made") / "tokenizer.json"))
    return RunTokenizer(made, made.token_id(EOT), True)


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model("some windows", vocab_size=400, block_size=12)


def score(model: GPT, ids: list[int], start: int) -> tuple[float, bool]:
    """Of ``ids[start:]``, which the model can read in one piece."""
    logits = logits_of(model, ids[:-1])
    log_prob = logits.log_softmax(-1)
    total = sum(float(log_prob[t - 1, ids[t]]) for t in range(start, len(ids)))
    return total, all(int(logits[t - 1].argmax()) == ids[t] for t in range(start, len(ids)))


def test_log_likelihoods(model: GPT, tokenizer: RunTokenizer) -> None:
    pairs = [("the quick", " brown"), ("", "fox"), ("a lazy dog", " and sleeps")]
    made = Answers(model, tokenizer, batch_tokens=40).loglikelihood([Instance(pair) for pair in pairs])
    for pair, (total, likeliest) in zip(pairs, made, strict=True):
        expected = score(model, *encode_pair(*pair, tokenizer))
        assert (total, likeliest) == (pytest.approx(expected[0], rel=1e-10), expected[1])


def test_what_greedy_generation_gives_is_told(model: GPT, tokenizer: RunTokenizer, monkeypatch: Any) -> None:
    ids = tokenizer.prompt_ids("the quick")
    likeliest = [*ids, *greedy(model, ids, 3)]
    for last, expected in ((likeliest[-1], True), ((likeliest[-1] + 1) % 400, False)):
        pair = [*likeliest[:-1], last], len(ids)
        monkeypatch.setattr("tinytron.evaluation.harness.encode_pair", lambda *_, pair=pair: pair)
        assert Answers(model, tokenizer).loglikelihood([Instance(("", ""))])[0][1] is expected


def test_one_token_that_is_not_the_likeliest_counts_in_whichever_window(
    model: GPT, tokenizer: RunTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlikely = [1]
    for _ in range(12):
        unlikely.append(int(logits_of(model, unlikely)[-1].argmin()))
    ids = [*unlikely, *greedy(model, unlikely[1:], 1)]
    monkeypatch.setattr("tinytron.evaluation.harness.encode_pair", lambda *_: (ids, 1))
    assert Answers(model, tokenizer).loglikelihood([Instance(("", ""))])[0][1] is False
    monkeypatch.setattr("tinytron.evaluation.harness.encode_pair", lambda *_: (ids, 13))
    assert Answers(model, tokenizer).loglikelihood([Instance(("", ""))])[0][1] is True


def test_log_probabilities_of_half_precision_logits_are_not_rounded(tokenizer: RunTokenizer) -> None:
    half = make_model(dtype=torch.bfloat16, vocab_size=400, block_size=12)
    ((made, _),) = Answers(half, tokenizer).loglikelihood([Instance(("the quick", " fox"))])
    ids, start = encode_pair("the quick", " fox", tokenizer)
    log_prob = logits_of(half, ids[:-1]).float().log_softmax(-1)
    assert made == pytest.approx(sum(float(log_prob[t - 1, ids[t]]) for t in range(start, len(ids))), rel=1e-4)


def test_scores_that_are_no_numbers_are_refused(tokenizer: RunTokenizer) -> None:
    broken = make_model(vocab_size=400, block_size=12)
    with torch.no_grad():
        broken.final_norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="scores are NaN or infinite"):
        Answers(broken, tokenizer).loglikelihood([Instance(("the", " fox"))])


def test_long_contexts_and_long_continuations(model: GPT, tokenizer: RunTokenizer) -> None:
    answers = Answers(model, tokenizer)
    ids, start = encode_pair(TEXT, " fox", tokenizer)
    assert len(ids) > 14
    cut = ids[-13:]
    ((made, _),) = answers.loglikelihood([Instance((TEXT, " fox"))])
    assert made == pytest.approx(score(model, cut, start - (len(ids) - 13))[0], rel=1e-10)
    ids, start = encode_pair("the", f" quick {TEXT}", tokenizer)
    assert len(ids) - start > 24
    ((made, _),) = answers.loglikelihood([Instance(("the", f" quick {TEXT}"))])
    expected, at = 0.0, start
    while at < len(ids):
        end = min(len(ids), at + 12)
        first = max(0, end - 13)
        expected += score(model, ids[first:end], at - first)[0]
        at = end
    assert made == pytest.approx(expected, rel=1e-10)


def test_whole_texts_in_windows(model: GPT, tokenizer: RunTokenizer) -> None:
    """As the harness documents it: full windows one after another, and a last one that is full too."""
    ids = [int(i) for i in tokenizer.tokenizer.encode([TEXT])[0]]
    assert len(ids) > 24 and len(ids) % 12  # noqa: PT018
    whole = [int(tokenizer.end or 0), *ids]
    expected = 0.0
    for first in range(0, len(ids) - 11, 12):
        expected += score(model, whole[first : first + 13], 1)[0]
    rest = len(ids) % 12
    expected += score(model, whole[-13:], 13 - rest)[0]
    answers = Answers(model, tokenizer)
    short = [int(tokenizer.end or 0), *(int(i) for i in tokenizer.tokenizer.encode(["fox"])[0])]
    made = answers.loglikelihood_rolling([Instance((TEXT,)), Instance(("fox",)), Instance(("",))])
    assert made == pytest.approx([expected, score(model, short, 1)[0], 0.0], rel=1e-10)


def test_generation_until_a_text(model: GPT, tokenizer: RunTokenizer) -> None:
    ids = tokenizer.prompt_ids("the")
    whole = tokenizer.tokenizer.decode(greedy(model, ids, 6))
    stop = whole[3:5]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"until": [stop], "max_gen_toks": 6}, whole[: whole.index(stop)]),
        ({"until": stop, "max_gen_toks": 6, "temperature": 0.0}, whole[: whole.index(stop)]),
        ({"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 0.7}, whole),
        # Sampled, and so narrowly that only one token is left.
        ({"max_gen_toks": 6, "temperature": 1e-6}, whole),
        ({"max_gen_toks": 6, "do_sample": True, "temperature": 9.0, "top_k": 1}, whole),
        ({"max_gen_toks": 6, "do_sample": True, "temperature": 9.0, "top_p": 1e-9}, whole),
    ]
    made = Answers(model, tokenizer).generate_until([Instance(("the", given)) for given, _ in cases])
    assert made == [text for _, text in cases]
    (long,) = Answers(model, tokenizer, max_new_tokens=4).generate_until([Instance((TEXT, {}))])
    kept = tokenizer.prompt_ids(TEXT)[-9:]
    assert long == tokenizer.tokenizer.decode(greedy(model, kept, 4))


def test_generation_ends_at_the_end_of_text_and_gives_no_id_without_a_token(
    model: GPT, tokenizer: RunTokenizer
) -> None:
    plain = tokenizer.tokenizer
    ids = [int(i) for i in plain.encode(["the"])[0]]
    likeliest = greedy(model, ids, 4)
    ended = RunTokenizer(plain, likeliest[2], False)
    assert likeliest.index(likeliest[2]) == 2
    assert Answers(model, ended).generate_until([Instance(("the", {"max_gen_toks": 4}))]) == [
        plain.decode(likeliest[:2])
    ]
    first, second = (int(i) for i in logits_of(model, ids)[-1, : plain.vocab_size].topk(2).indices)
    without = RunTokenizer(replace(plain, unused=(first,)), None, False)
    assert Answers(model, without).generate_until([Instance(("the", {"max_gen_toks": 1}))]) == [plain.decode([second])]


def test_a_task_that_wants_more_tokens_than_the_model_reads_keeps_its_context(
    model: GPT, tokenizer: RunTokenizer
) -> None:
    decode = tokenizer.tokenizer.decode
    ids = tokenizer.prompt_ids("the")
    answers = Answers(model, tokenizer)  # 256 tokens by default; the model reads 12
    assert answers.generate_until([Instance(("the", {}))]) == [decode(greedy(model, ids, 12))]
    long = tokenizer.prompt_ids(TEXT)[-6:]
    assert answers.generate_until([Instance((TEXT, {"max_gen_toks": 12}))]) == [decode(greedy(model, long, 12))]


def test_repeats_are_samples_of_their_own(model: GPT, tokenizer: RunTokenizer) -> None:
    answers, sampled = Answers(model, tokenizer), {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = [Instance(("the", sampled)), Instance(("a", sampled)), *[Instance(("the", dict(sampled)))] * 3]
    made = answers.generate_until(requests)
    assert len(set(made)) == 5
    options = SamplingOptions(max_new_tokens=8, num_samples=4, stop_tokens=tokenizer.stop_tokens)
    unused = tokenizer.tokenizer.unused
    expected = complete(
        model,
        [tokenizer.prompt_ids("the")],
        options,
        decode=tokenizer.tokenizer.decode,
        vocab_size=tokenizer.tokenizer.vocab_size,
        without=unused,
    )
    assert [made[0], *made[2:]] == [sample.text for sample in expected.samples]
    assert len(set(answers.generate_until([Instance(("the", {"max_gen_toks": 8}))] * 3))) == 1  # greedy


def test_settings_that_are_off_in_the_manner_of_other_libraries(model: GPT, tokenizer: RunTokenizer) -> None:
    def text(**given: Any) -> str:
        return Answers(model, tokenizer).generate_until([Instance(("the", given))])[0]

    plain = text(max_gen_toks=4)
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert text(**{name: 4}) == plain
    off = {"until": ["", None], "temperature": None, "top_p": None, "top_k": None, "do_sample": None}
    assert text(max_gen_toks=4, **off) == plain == text(max_gen_toks=4, until=None, temperature=0.0, do_sample=True)
    sampled = {"max_gen_toks": 4, "do_sample": True}
    assert text(**sampled, top_k=-1) == text(**sampled)
    assert text(**sampled, min_p=1.0) == plain


# The package.


class StandIn(ABC):
    """What ``lm_eval.api.model.LM`` demands."""

    def __init__(self) -> None:
        self.rank = 0

    @abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abstractmethod
    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]: ...

    @abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...


def test_it_is_a_model_of_the_harness(model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("lm_eval"), ModuleType("lm_eval.api.model")
    package.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    module.LM = StandIn  # type: ignore[attr-defined]
    for name, stub in (("lm_eval", package), ("lm_eval.api", ModuleType("lm_eval.api")), ("lm_eval.api.model", module)):
        monkeypatch.setitem(sys.modules, name, stub)
    torch.save(model.state_dict(), tmp_path / "00001_model.pt")
    write_config(tmp_path, model, None)
    made = harness_model(tmp_path, tokenizer=make_tokenizer(tmp_path / "tokenizer.json"))
    assert isinstance(made, StandIn)
    assert made.rank == 0
    ((total, _),) = made.loglikelihood([Instance(("the", " fox"))])
    assert total < 0
    assert made.loglikelihood_rolling([Instance(("the fox",))])[0] < 0
    assert isinstance(made.generate_until([Instance(("the", {"max_gen_toks": 2}))])[0], str)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match="lm-evaluation-harness is not installed: pip install lm-eval"):
        harness_model(tmp_path)


def test_the_harness_itself_gives_our_accuracy(tmp_path: Path) -> None:
    lm_eval, task = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.api.task")
    model = make_model("some windows", vocab_size=400, block_size=64)
    torch.save(model.state_dict(), tmp_path / "00001_model.pt")
    write_config(tmp_path, model, None)
    file, items = make_tokenizer(tmp_path / "tokenizer.json"), make_items(24)[1:]
    lines = [{"context": i.context, "choices": i.choices, "answer": i.answer} for i in items]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "toy.jsonl")},
        "test_split": "train",
    }
    choices = {
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
    }
    toy = task.ConfigurableTask(config={"task": "toy", "output_type": "multiple_choice", **shared, **choices})
    found = lm_eval.simple_evaluate(model=harness_model(tmp_path, tokenizer=file), tasks=[toy], bootstrap_iters=0)
    flags = ["--checkpoint", tmp_path, "--tasks", tmp_path / "toy.jsonl", "--tokenizer", file]
    assert main(["evaluate", *map(str, flags)]) == 0
    ours = json.loads((tmp_path / "results.json").read_text())["results"]["toy"]["accuracy"]
    assert found["results"]["toy"]["acc,none"] == ours
    assert 0 < ours < 1
