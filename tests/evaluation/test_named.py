"""The built-in evaluations on small local files with the columns of their datasets; what is said if data are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.corpus import EOT, make_tokenizer
from tests.inference.models import make_model
from tinytron.cli.main import main
from tinytron.errors import ConfigError, DataError
from tinytron.evaluation.grades import chrf, word_f1
from tinytron.evaluation.hub_items import FileItems, HubItems
from tinytron.evaluation.kinds import RolloutEvaluation
from tinytron.evaluation.named import find_evaluation, find_evaluations
from tinytron.evaluation.subject import Subject
from tinytron.experiments.builtin import EVALUATIONS as BUILT_IN
from tinytron.experiments.evaluations_of_files import RELATIVES
from tinytron.registry import EVALUATIONS, evaluation
from tinytron.text.named import find_named
from tinytron.text.run_tokenizer import RunTokenizer
from tinytron.text.tokenizers import from_file

pytest.importorskip("tokenizers")
MNLI = {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0, "idx": 0}
QQP = {"question1": "Who?", "question2": "Which one?", "label": 1, "idx": 0}
SIQA = {
    **{"context": "Kai fell.", "question": "Why?", "answerA": "ice", "answerB": "luck", "answerC": "joy"},
    "label": "2",
}
WINOGRANDE = {"sentence": "The cup is in the _ now.", "option1": "box", "option2": "sink", "answer": "2"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "mnli": [MNLI, {**MNLI, "label": 2}],
    "qqp": [QQP, {**QQP, "label": 0}],
    "siqa": [SIQA],
    "winogrande": [WINOGRANDE],
    "sst2": [{"sentence": "a joy ", "label": 1, "idx": 0}],
    "mmlu": [{"question": "2+2?", "subject": "math", "choices": ["3", "4", "5", "6"], "answer": 1}],
    "squad": [
        {"context": "Bo ran.", "question": "Who ran?", "answers": {"text": ["Bo", "bo r"], "answer_start": [0, 0]}}
    ],
    "cfq": [{"question": "Who?", "query": "SELECT ?x\nWHERE { }"}],
    "fineweb": [{"text": "the quick brown fox"}, {"text": ""}, {"text": "a lazy dog"}],
    "pile": [{"text": "the quick brown fox", "meta": {}}],
    "pg19": [{"text": "the quick brown fox", "short_book_title": "x"}],
    "tinystories": [{"text": "the quick brown fox"}],
    "alpaca": [{"instruction": "Add.", "input": "1 and 2", "output": "The sum is 3."}],
    "blimp": [{"sentence_good": "He ran.", "sentence_bad": "He run.", "UID": "x"}],
    "bbq": [
        {"context": "A and B sat.", "question": "Who stood?", "ans0": "A", "ans1": "B", "ans2": "Unknown", "label": 2}
    ],
    "clutrr": [{"story": "Al has a son, Bo.", "query": "('Al', 'Bo')", "target_text": "son", "target": 15}],
    "fever": [{"id": 1, "claim": "It rains.", "label": "REFUTES"}],
    "longbench": [
        {"context": "Bo ran.", "input": "Who?", "answers": ["Bo", "He\nran"], "all_classes": None, "dataset": "qasper"},
        {"context": "", "input": "What?", "answers": ["Food"], "all_classes": ["Food", "Food item"], "dataset": "trec"},
    ],
    "longhealth": [
        {"text": "Ill.", "question": "Is she?", **{f"answer_{x}": x * 2 for x in "abcde"}, "correct": "dd", "No": 0}
    ],
    "mtob": [{"source": "bal", "target": "a dog", "instructions": "To English."}],
    "pes2o": [{"text": "the quick brown fox", "source": "s2orc"}],
    "pile_injected": [{"text": ""}, {"text": "the quick brown fox"}],
}
ITEMS: dict[str, Any] = {
    "mnli": (
        "Premise: It rains.\nHypothesis: It is wet.\nIs it entailment, neutral or contradiction?\nAnswer:",
        [" entailment", " neutral", " contradiction"],
        0,
    ),
    "qqp": ("Who?\nWhich one?\nDo these questions ask the same?\nAnswer:", [" no", " yes"], 1),
    "siqa": ("Kai fell. Why?", [" ice", " luck", " joy"], 1),
    "winogrande": ("", ["The cup is in the box now.", "The cup is in the sink now."], 1),
    "sst2": ("a joy \nIs this positive or negative?\nAnswer:", [" negative", " positive"], 1),
    "mmlu": ("2+2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:", "B"),
    "squad": ("Bo ran.\n\nWho ran?\nAnswer:", "Bo\nbo r"),
    "cfq": ("Who?\nAnswer:", "SELECT ?x\nWHERE { }"),
    "arithmetic": ("Q: What is 10 plus 10?\nA:", "20"),
    "alpaca": ("Add.\n\n1 and 2\nAnswer:", "The sum is 3."),
    "blimp": ("", ["He ran.", "He run."], 0),
    "bbq": ("A and B sat.\nWho stood?\nAnswer:", [" A", " B", " Unknown"], 2),
    "clutrr": ("Al has a son, Bo.\nQuery: ('Al', 'Bo')\nRelation:", [f" {name}" for name in RELATIVES], 15),
    "fever": ("Claim: It rains.\nIs the claim true, false or unknown?\nAnswer:", [" true", " false", " unknown"], 1),
    "longbench": ("Bo ran.\n\nWho?\nAnswer:", "Bo\nHe ran"),
    "longhealth": ("Ill.\n\nIs she?\nA. aa\nB. bb\nC. cc\nD. dd\nE. ee\nAnswer:", "D"),
    "mtob": ("To English.\n\nbal\nTranslation:", "a dog"),
    **dict.fromkeys(("fineweb_ppl", "pile_ppl", "pg19_ppl", "tinystories_ppl"), "the quick brown fox"),
    **dict.fromkeys(("pes2o_ppl", "pile_injected_ppl"), "the quick brown fox"),
    "mnli_ppl": (
        "Premise: It rains.\nHypothesis: It is wet.\nIs it entailment, neutral or contradiction?\nAnswer: entailment"
    ),
    "qqp_ppl": "Who?\nWhich one?\nDo these questions ask the same?\nAnswer: yes",
    "siqa_ppl": "Kai fell. Why?\nA. ice\nB. luck\nC. joy\nAnswer: B. luck",
    "sst2_ppl": "a joy \nIs this positive or negative?\nAnswer: positive",
    "winogrande_ppl": "The cup is in the _ now.\nA. box\nB. sink\nAnswer: B. sink",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> RunTokenizer:
    made = from_file(make_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))
    return RunTokenizer(made, made.token_id(EOT), True)


def test_every_built_in_one_is_tested() -> None:
    assert {*ITEMS, "lagging"} == BUILT_IN.keys()
    for name in BUILT_IN:
        assert EVALUATIONS[name].__module__ == BUILT_IN[name][0]
        assert EVALUATIONS.help(name)


@pytest.mark.parametrize("name", ITEMS)
def test_items_and_score(name: str, data: Path, tokenizer: RunTokenizer) -> None:
    found = find_evaluation(name, 5, data)
    assert found is not None
    assert found.get(0) == ITEMS[name]
    if isinstance(found, HubItems) and not isinstance(found, FileItems) and not found.configs:
        registered = find_named(name.removesuffix("_ppl"))
        assert registered is found.dataset, "the data are those of the dataset of that name"
    if name in ("mmlu", "longhealth"):
        with pytest.raises(ConfigError, match="must begin with different tokens"):
            found.prepare(tokenizer, 64)
        return
    found.prepare(tokenizer, 64)
    model = make_model(vocab_size=420, block_size=64)
    result = found.evaluate(Subject.of_checkpoint(model, tokenizer, 256))
    assert result.count == min(5, len(found))
    assert result.higher_is_better != name.endswith("_ppl")
    assert result.score > 1 if name.endswith("_ppl") else 0 <= result.score <= 1


def test_answers_are_cleaned() -> None:
    squad, cfq, sums = (find_evaluation(name) for name in ("squad", "cfq", "arithmetic"))
    assert squad.check("Bo\nbo r", squad.clean(" BO R. "))  # type: ignore[union-attr]
    assert not squad.check("Bo\nbo r", squad.clean("ran"))  # type: ignore[union-attr]
    assert cfq.check("SELECT ?x\nWHERE { }", cfq.clean(" SELECT ?x  WHERE { }\n"))  # type: ignore[union-attr]
    assert sums.check("20", sums.clean(" 20."))  # type: ignore[union-attr]
    assert sums is not None
    pairs = {sums.get(index)[0] for index in range(len(sums))}
    assert len(pairs) == len(sums) == 1000
    for index in (0, 1, 999):
        question, answer = sums.get(index)
        words = question.split()
        assert int(words[3]) + int(words[5].split("?")[0]) == int(answer)


def test_grades(data: Path) -> None:
    """chrF as sacrebleu 2.6 computes it; a grade counts as a part of a right answer."""
    assert chrf("the cat sat on the mat", "a cat sat on a mat") == pytest.approx(0.45654498288000467, rel=1e-12)
    assert chrf("It is raining.", "it rains") == pytest.approx(0.21410319389144564, rel=1e-12)
    assert chrf("ab", "abcdefgh") == pytest.approx(0.55, rel=1e-12)
    assert (chrf("a b", "ab"), chrf("ab", ""), chrf("", " ")) == (1, 0, 1)
    assert word_f1("The sum is 3.", "it is, in sum, 3!") == pytest.approx(2 * 3 / (3 + 5))
    assert (word_f1("a", "the"), word_f1("Bo", ""), word_f1("Bo", "al")) == (1, 0, 0)
    long, alpaca = find_evaluation("longbench", -1, data), find_evaluation("alpaca")
    assert isinstance(long, RolloutEvaluation)
    assert isinstance(alpaca, RolloutEvaluation)
    one, named = (long.get(number)[1] for number in range(2))
    assert (long.check(one, "he ran"), long.check(one, "bo ran")) == (1, pytest.approx(2 / 3))
    assert named == "Food\n\nFood\nFood item"
    assert long.check("Food", "all food") == pytest.approx(2 / 3), "the classes are those of its row"
    assert long.check(named, "It is Food")
    assert not long.check(named, "Food item")  # the longest of the classes that begin there
    assert not long.check(named, "nothing")
    alpaca._answers = ["one two", "one two"]
    assert alpaca._share(["one two", "one"]) == pytest.approx((1 + 2 / 3) / 2)


def test_configurations_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("datasets")
    opened: list[str] = []

    def load(path: str, config: str, **options: Any) -> Any:
        opened.append(config)
        rows = [
            {"sentence_good": f"{config} {n}", "sentence_bad": "x"} for n in range(2 if config == "causative" else 1)
        ]
        return hub.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(hub, "load_dataset", load)
    found = find_evaluation("blimp")
    assert found is not None
    assert len(found) == 68
    assert len(set(opened)) == len(opened) == 67
    goods = [found.get(number)[1][0] for number in range(68)]
    assert goods[0] == "adjunct_island 0"
    assert goods.index("causative 0") == 5
    assert goods[-1] == "causative 1"


def test_a_length_limits_the_rows_that_are_read(data: Path) -> None:
    found = find_evaluation("fineweb_ppl", 2, data)
    assert found is not None
    assert [found.get(n) for n in range(len(found))] == ["the quick brown fox", "a lazy dog"]
    assert len(find_evaluation("fineweb_ppl", 1, data) or ()) == 1


def test_parquet_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS["mnli"]), tmp_path / "mnli.parquet")
    found = find_evaluation("mnli", -1, tmp_path)
    assert found is not None
    assert (len(found), found.get(0)) == (2, ITEMS["mnli"])


@evaluation("tests/function")
def function(trainer: Any) -> dict[str, float]:
    return {"score": 1.0}


def test_what_is_said_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"needs .*squad.jsonl \(or squad.jsonl.gz, squad.parquet\), with the columns of"
    ):
        len(find_evaluation("squad", -1, tmp_path) or ())
    (tmp_path / "squad.jsonl").write_text('{"context": "a"}\n')
    with pytest.raises(
        DataError, match=r"the evaluation squad: row 1 cannot be read .*question.* it needs the columns of"
    ):
        len(find_evaluation("squad", -1, tmp_path) or ())
    (tmp_path / "sst2.jsonl").write_text('{"sentence": "a", "label": -1}\n')
    with pytest.raises(DataError, match=r"the evaluation sst2: row 1 .*as in a split without labels"):
        len(find_evaluation("sst2", -1, tmp_path) or ())
    with pytest.raises(
        ConfigError, match=r"fever reads a local file: put rows with claim and label .* into DIR/fever.jsonl, and give"
    ):
        len(find_evaluation("fever") or ())
    with pytest.raises(ConfigError, match=r"needs .*mtob.jsonl .* with source, target and .*; put it there$"):
        len(find_evaluation("mtob", -1, tmp_path) or ())
    (tmp_path / "bbq.jsonl").write_text(json.dumps({**ROWS["bbq"][0], "label": -1}) + "\n")
    with pytest.raises(
        DataError, match=r"bbq: row 1 .*label is -1.*; it needs context, question, ans0, .* as the files"
    ):
        len(find_evaluation("bbq", -1, tmp_path) or ())
    with pytest.raises(
        ConfigError, match="the evaluation tests/function needs a trainer, so it runs only during training"
    ):
        find_evaluations(["tests/function"])
    with pytest.raises(ConfigError, match="there are two evaluations called arithmetic"):
        find_evaluations(["arithmetic", "arithmetic"])
    hub = pytest.importorskip("datasets")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "load_dataset", offline)
    with pytest.raises(DataError) as error:
        len(find_evaluation("mnli_ppl") or ())
    text = str(error.value)
    assert text.startswith("the evaluation mnli_ppl needs the dataset nyu-mll/glue of the hub, which cannot be read (")
    assert "no network" in text
    assert text.endswith("put its rows into DIR/mnli.jsonl and give --eval_data_dir DIR (eval.data_dir)")


def test_they_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "--evaluations"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sst2_ppl ") and "Perplexity of questions with their answers" in line for line in lines)
