"""The tokenizing jobs, datasets by name, and ``training.dataset``: as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokens_of
from tests.jobs.conftest import TINY
from tinytron.cli.main import main
from tinytron.data.manifest import read_manifest
from tinytron.data.pairs import PairDataset
from tinytron.errors import ConfigError, DataError
from tinytron.experiments import builtin as experiments
from tinytron.experiments.datasets import choices, label, transcript
from tinytron.job import JobSpec
from tinytron.jobs.kinds import job_class
from tinytron.jobs.places import folder_of_shards
from tinytron.jobs.sampling import FILE, read_sampling
from tinytron.jobs.specs import read_stages
from tinytron.quick import quick
from tinytron.registry import DATASETS
from tinytron.text.inputs import documents_of
from tinytron.text.named import NamedDataset, find_named, rows_of
from tinytron.text.options import parse_options

TEXTS = make_texts(60, longest=12)
JOB = "data/tokenize_{}_dataset"
GPT = "gpt/train/pretrain"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tokenizer, texts, dialogues and pairs."""
    monkeypatch.chdir(tmp_path)
    make_tokenizer(tmp_path / "tokenizer.json", (EOT, "<|im_start|>", "<|im_end|>"))
    asked = list(zip(TEXTS[::2], TEXTS[1::2], strict=True))
    rows = {
        "texts": [{"text": text} for text in TEXTS],
        "chats": [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in asked
        ],
        "pairs": [{"prompt": a, "chosen": b, "rejected": a} for a, b in asked],
    }
    for name, entries in rows.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in entries))
    return tmp_path


def run(kind: str, name: str, **options: Any) -> Path:
    """Run a tokenizing job in this process; returns the folder of its shards."""
    given = {"data.name": name, "data.val_pct": 0.2, "system.num_proc": 0, **options}
    with quick(JOB.format(kind), "out", f"{kind}-{Path(name).stem}") as j:
        for path, value in {"tokenizer.backend": "file", "tokenizer.name": "tokenizer.json", **given}.items():
            j.options.set(path, value)
        j()
    values = j.options.values()
    return folder_of_shards(Path("out"), values["data.name"], values["data.suffix"])


def test_the_three_jobs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = run("variable", "texts.jsonl", **{"data.max_tokens": 300})
    assert stream == Path("out/data/texts")
    manifest = read_manifest(stream)
    assert manifest is not None
    assert manifest.complete
    assert 300 <= sum(manifest.tokens.values()) < 340
    more = {"data.messages_key": "messages", "data.assistant_only": True, "data.system_prompt": "Be kind."}
    rows = run("blockwise", "chats.jsonl", **more, **{"architecture.block_size": 48, "data.suffix": "rows"})
    manifest = read_manifest(rows)
    assert (rows, manifest and manifest.row) == (Path("out/data/chats_rows"), 48)
    pairs = run("contrastive", "pairs.jsonl", **{"data.prompt_key": "prompt", "architecture.block_size": 48})
    found = PairDataset(pairs)
    assert found.row_size == 48
    assert all(0 < float(row.weights.sum()) < row.length for pair in found for row in pair)  # prompts are not learned
    capsys.readouterr()
    assert run("contrastive", "pairs.jsonl", **{"data.prompt_key": "prompt", "architecture.block_size": 48}) == pairs
    assert capsys.readouterr().out.startswith("contrastive-pairs is finished")


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        (
            "variable",
            {"tokenizer.backend": "bpe"},
            "tokenizer.backend=bpe must be one of tiktoken, huggingface, file, tra",
        ),
        ("variable", {"tokenizer.backend": "train_bpe"}, "tokenizer.name=tokenizer.json must be a vocabulary size"),
        ("variable", {"data.assistant_only": True}, "--assistant_only needs dialogues"),
        ("variable", {"data.max_tokens": 0}, "--max_tokens 0 must be in"),
        ("blockwise", {"architecture.block_size": 1}, "--block_size 1 must be in"),
        ("contrastive", {"data.chosen_key": "better"}, "pairs.jsonl, line 1 has no key 'better'; set --chosen_key to"),
        (
            "variable",
            {"data.name": "hh-rlhf"},
            "data.name=hh-rlhf is a dataset of pairs; use the job data/tokenize_contr",
        ),
        (
            "contrastive",
            {"data.name": "alpaca"},
            "data.name=alpaca is a dataset of dialogues; use the job data/tokenize_v",
        ),
    ],
)
def test_options_of_the_jobs_that_do_not_fit(folder: Path, kind: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, DataError), match=says):
        run(kind, "pairs.jsonl", **{"data.text_key": "prompt"} if kind != "contrastive" else {}, **options)


def test_a_value_of_another_type_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.assistant_only=maybe must be true or false"):
        run("variable", "texts.jsonl", **{"data.assistant_only": "maybe"})
    with pytest.raises(ConfigError, match=r"data\.chat_template=jinja must be one of chatml, tokenizer"):
        run("variable", "texts.jsonl", **{"data.chat_template": "jinja"})
    with pytest.raises(ConfigError, match=r"there is no option data\.chosen_key"):
        run("variable", "texts.jsonl", **{"data.chosen_key": "x"})


# Datasets by name.

ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "fineweb": ({"text": "A page.", "url": "u"}, "A page."),
    "pile": ({"text": "Code.", "meta": {}}, "Code."),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3", "text": ""}, ["Add.\n\n1 2", "3"]),
    "gsm8k": ({"question": "1+1?", "answer": "#### 2"}, ["1+1?", "#### 2"]),
    "squad": (
        {"context": "It is red.", "question": "Which color?", "answers": {"text": ["red"], "answer_start": [6]}},
        ["It is red.\n\nWhich color?", "red"],
    ),
    "mmlu": (
        {"question": "2?", "choices": list("wxyz"), "answer": 2, "subject": "s"},
        ["2?\nA. w\nB. x\nC. y\nD. z", "C. y"],
    ),
    "winogrande": (
        {"sentence": "The _.", "option1": "cat", "option2": "dog", "answer": "2"},
        ["The _.\nA. cat\nB. dog", "B. dog"],
    ),
    "mnli": (
        {"premise": "a", "hypothesis": "b", "label": 1, "idx": 0},
        ["Premise: a\nHypothesis: b\nIs it entailment, neutral or contradiction?", "neutral"],
    ),
    "qqp": ({"question1": "a?", "question2": "b?", "label": 0}, ["a?\nb?\nDo these questions ask the same?", "no"]),
    "sst2": ({"sentence": "fine", "label": 1}, ["fine\nIs this positive or negative?", "positive"]),
    "cfq": ({"question": "Who?", "query": "SELECT"}, ["Who?", "SELECT"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_registered_datasets(name: str) -> None:
    row, expected = ROWS[name]
    found = find_named(name)
    assert found is not None
    document = rows_of(name, found).document(row, "w")
    if found.kind == "text":
        assert document == expected
    else:
        assert [message["content"] for message in json.loads(document)] == expected


def test_every_dataset_is_complete_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(experiments.DATASETS) > 15
    for name in experiments.DATASETS:  # other tests register more
        found = DATASETS[name]
        assert issubclass(found, NamedDataset), name
        assert found.path.count("/") == 1, name
        assert (found.record is None) == (found.kind == "text"), name
        assert DATASETS.help(name) == (found.__doc__ or "").strip(), name
    main(["jobs", "--datasets"])
    listed = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in listed} >= set(experiments.DATASETS)


def test_pairs_and_dialogues_as_they_are() -> None:
    text = "\n\nHuman: Hi\n\nAssistant: Hello\n\nAnd you?\n\nHuman: Bye\n\nAssistant: Bye."
    assert [message["content"] for message in transcript(text)] == ["Hi", "Hello\n\nAnd you?", "Bye", "Bye."]
    row = {"chosen": text, "rejected": "\n\nHuman: Hi\n\nAssistant: No"}
    found = json.loads(rows_of("hh-rlhf", DATASETS["hh-rlhf"]).document(row, "w"))
    assert found["rejected"][1] == {"role": "assistant", "content": "No"}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert json.loads(rows_of("ultrachat", DATASETS["ultrachat"]).document({"messages": messages}, "w")) == messages
    both = {"chosen": messages, "rejected": messages[:1], "prompt": "Hi"}
    assert json.loads(rows_of("ultrafeedback", DATASETS["ultrafeedback"]).document(both, "w"))["chosen"] == messages


def test_rows_that_have_no_answer_or_other_columns() -> None:
    with pytest.raises(ValueError, match="the label is -1, as in a split without labels"):
        label(("no", "yes"), -1)
    with pytest.raises(ValueError, match="the answer is -1, as in a split without answers"):
        choices("?", ["a", "b"], -1)
    with pytest.raises(ValueError, match="it does not begin with Human: or Assistant:"):
        transcript("Hello")
    with pytest.raises(
        DataError, match=r"file, line 3: the dataset alpaca cannot read this row \(KeyError: 'instruction'"
    ):
        rows_of("alpaca", DATASETS["alpaca"]).document({"text": "a"}, "file, line 3")


MODULE = '''
from tinytron.registry import dataset
from tinytron.experiments.datasets import Alpaca
from tinytron.text.inputs import documents_of
from tinytron.text.named import NamedDataset


@dataset("mine")
class Mine(Alpaca):
    """My instructions."""

    path = "mine.jsonl"


@dataset("empty")
class Empty(NamedDataset):
    """Nothing."""


@dataset("numbers")
class Numbers(NamedDataset):
    """Texts that are none."""

    path = "mine.jsonl"

    @staticmethod
    def record(row):
        return 3
'''


def test_a_dataset_of_ones_own_with_workers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of its module is not on the path of a new process."""
    (folder / "lib").mkdir()
    (folder / "lib" / "my_datasets.py").write_text(MODULE)
    rows = [{"instruction": f"{i} say", "input": "", "output": text} for i, text in enumerate(TEXTS)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["jobs", "--datasets", "--load", "lib/my_datasets.py"]) == 0
    assert ["mine", "My instructions."] in [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    shards = run("variable", "mine", **{"data.assistant_only": True, "system.num_proc": 2})
    assert "mine is the registered dataset mine.jsonl, split train" in capsys.readouterr().err
    manifest = read_manifest(shards)
    assert manifest is not None
    assert sum(manifest.documents.values()) == 60
    assert (manifest.source["dataset"], manifest.source["path"]) == ("mine", "mine.jsonl")
    assert "--dataset_path mine " in manifest.command
    with pytest.raises(
        ConfigError, match=r"the dataset empty is .*; register a subclass of .*NamedDataset with a path"
    ):
        find_named("empty")
    with pytest.raises(DataError, match=r"mine.jsonl, line 1: the dataset numbers gives int, not text"):
        run("variable", "numbers")
    (folder / "mine").mkdir()
    (folder / "mine" / "a.txt").write_text("\n".join(TEXTS))
    local = run("variable", "mine", **{"data.suffix": "local"})
    assert "mine is a local path here; the registered dataset of that name is not used" in capsys.readouterr().err
    assert "0 say" not in str(tokens_of(local))
    assert "dataset" not in (read_manifest(local) or manifest).source


def test_the_keys_of_rows_do_not_go_with_a_registered_dataset(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--messages_key m does not go with the dataset alpaca, which reads its rows"):
        documents_of(parse_options(["--dataset_path", "alpaca", "--messages_key", "m", "--train_bpe", "300"]))


# training.dataset

OUT = Path("out")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "must be a list of data sets; use"),
        ({"name": "a"}, "must be a list of data sets"),
        (["a"], r"training\.dataset\[0\]=a must be a data set"),
        ([{"name": "a", "rate": 1, "stile": "PMD"}], r"\[0\] has no key stile; did you mean style"),
        ([{"rate": 1}], r"\[0\]\.name=None must be the name of a tokenized data set"),
        ([{"name": "a", "rate": 1, "suffix": 3}], r"suffix=3 must be text"),
        ([{"name": "a", "rate": 1, "style": "padded"}], "style=padded must be one of PADDED, PMD, CONTRASTIVE"),
        ([{"name": "a", "rate": 1, "weight": 1}], "has rate and weight, which are one option"),
        ([{"name": "a", "rate": 0}], r"rate=0 must be above 0 and at most 1"),
        ([{"name": "a"}], "rate=None must be above 0"),
        ([{"name": "a", "rate": -0.5}, {"name": "b", "rate": 0.5}], r"\[0\]\.rate=-0.5 must be above 0"),
        ([{"name": "a", "rate": 0.5}, {"name": "b", "rate": 0.3}], "the rates sum to 0.8, but .* use 0.625, 0.375"),
        ([{"name": "a", "rate": 0.5}, {"name": "a", "rate": 0.5}], r"\[1\]: a is given twice; add up the rates"),
        ([{"name": "a/b", "rate": 1, "suffix": "x"}], "suffix=x does not go with the path a/b; put it into the path"),
        ([{"name": "a", "rate": 1, "style": "CONTRASTIVE"}], "a has the style CONTRASTIVE, which only a trainer that"),
    ],
)
def test_lists_that_break_a_rule(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_sampling(value, OUT, reads_pairs=False)


def test_entries() -> None:
    value = [
        {"name": "web", "rate": 0.1, "style": "PMD"},
        {"name": "web", "weight": 0.2, "suffix": "rows", "style": "PADDED"},
        {"name": "./shards/code", "rate": 0.7},
    ]
    found = read_sampling(value, OUT, reads_pairs=False)
    assert [(one.name, one.rate, one.style) for one in found] == [
        ("web", 0.1, "PMD"),
        ("web_rows", 0.2, "PADDED"),
        ("code", 0.7, None),
    ]
    assert [one.folder for one in found] == [
        Path.cwd() / p for p in ("out/data/web", "out/data/web_rows", "shards/code")
    ]
    assert read_sampling([{"name": n, "rate": 0.3333333} for n in "abc"], OUT, reads_pairs=False)
    pair = [{"name": "a", "rate": 1, "style": "CONTRASTIVE"}]
    assert read_sampling(pair, OUT, reads_pairs=True)[0].style == "CONTRASTIVE"


def test_a_job_trains_on_a_list(folder: Path) -> None:
    run("variable", "texts.jsonl")
    more = {"data.messages_key": "messages", "data.assistant_only": True, "architecture.block_size": 12}
    run("blockwise", "chats.jsonl", **more)
    listed = "[{name: texts, rate: 0.75, style: PMD}, {name: chats, rate: 0.25, style: PADDED}]"
    words = [*TINY, "model.vocab_size=448", "train.do_val=true", f"training.dataset={listed}"]
    assert main(["configure", GPT, "run.yaml", *words]) == 0
    assert '  dataset: [{"name": "texts", "rate": 0.75' in Path("run.yaml").read_text()
    assert main(["run", "mine", "run.yaml", "out"]) == 0
    place = Path("out/checkpoints/general/default/mine")
    mixture = json.loads((place / FILE).read_text())
    assert [(s["name"], s["weight"]) for s in mixture["sources"]] == [("texts", 0.75), ("chats", 0.25)]
    (log,) = place.glob("mine_*/log.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    seen = next(record["sources"] for record in reversed(records) if "sources" in record)
    assert set(seen) == {"texts", "chats"}
    assert len(records) > 3


def test_lists_that_do_not_fit_the_shards(folder: Path) -> None:
    run("variable", "texts.jsonl")
    for entry, says in (
        (
            {"name": "texts", "style": "PADDED"},
            "the style of texts is PADDED, but .*texts has a stream of documents; use PMD",
        ),
        ({"name": "nothing"}, "out/data/nothing has no token shards for nothing; make them with a job such as"),
    ):
        with quick(GPT, "out", "mine") as j:
            j.options.override(TINY)
            j.options.set("training.dataset", [{"rate": 1, **entry}])
        with pytest.raises((ConfigError, DataError), match=says):
            j()
    with quick(GPT, "out", "mine") as j:
        j.options.override([*TINY, "data.dataset_path=x", "training.dataset=[{name: a, rate: 1}]"])
    with pytest.raises(ConfigError, match=r"training\.dataset and data\.dataset_path=x both name the data"):
        j()


def test_the_list_is_part_of_what_a_job_is(folder: Path) -> None:
    assert main(["configure", GPT, "run.yaml", *TINY, "training.dataset=[{name: a, rate: 1}]"]) == 0
    (one,) = read_stages("mine", ["run.yaml"], "out")
    (other,) = read_stages("mine", ["run.yaml"], "out", ["training.dataset=[{name: b, rate: 1}]"])
    assert one.fingerprint != other.fingerprint
    again = JobSpec.from_json(one.to_json())
    assert again.fingerprint == one.fingerprint
    assert job_class(GPT)(again).sampling[0].name == "a"  # type: ignore[attr-defined]


def test_rows_of_jobs_are_arrays(folder: Path) -> None:
    """Every row of a blockwise job, read back without Tinytron's dataset."""
    shards = run("blockwise", "texts.jsonl", **{"architecture.block_size": 16, "data.val_pct": 0})
    assert np.array(tokens_of(shards)).reshape(-1, 16).shape == (60, 16)
