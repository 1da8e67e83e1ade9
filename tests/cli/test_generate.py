"""``tinytron generate`` and ``load_model``: what they print, where they look, what they refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.runs import ROOT
from tests.inference.models import greedy, make_model
from tinytron.checkpoint import load_model
from tinytron.checkpoint.model import model_config_of
from tinytron.cli.main import main
from tinytron.errors import CheckpointError, ConfigError
from tinytron.model import GPT
from tinytron.text.run_tokenizer import find_tokenizer, tokenizer_of_run, tokenizers_of_data

pytest.importorskip("tokenizers")
PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: a run folder with weights of two steps; ``data``: its token shards, with tokenizer and manifest."""
    root = tmp_path_factory.mktemp("made")
    make_tokenizer(root / "tokenizer.json")
    tokenize(write_jsonl(root / "texts.jsonl", make_texts(20)), root / "tokenizer.json", root / "data")
    model = make_model("some windows", torch.float32, vocab_size=420, block_size=24)
    (root / "run").mkdir()
    for step in (5, 20):
        torch.save(model.state_dict(), root / "run" / f"{step:05d}_model.pt")
        with torch.no_grad():
            model.wte.weight.neg_()
    model.wte.weight.data.neg_()
    write_config(root / "run", model, str(root / "data"))
    return root


def write_config(folder: Path, model: GPT, dataset_path: str | None, **data: Any) -> None:
    config = {"model": dataclasses.asdict(model.config), "data": {"dataset_path": dataset_path, **data}}
    (folder / "config.json").write_text(json.dumps({"config": config, "config_hash": "0"}))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run folder."""
    shutil.copytree(made / "run", tmp_path / "run")
    return tmp_path / "run"


def output(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, str]:
    status = main(["generate", *map(str, words)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that an error is."""
    assert main(["generate", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


# The command.


def test_text_as_the_model_gives_it(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_model(made / "run")
    found = find_tokenizer(str(made / "data"))
    ids = found.prompt_ids(PROMPT)
    assert ids[0] == found.end == found.tokenizer.token_id(EOT)
    expected = found.tokenizer.decode(greedy(model, ids, 6, found.tokenizer.vocab_size))
    out, err = output(
        capsys, "--checkpoint", made / "run", "--prompt", PROMPT, "--max_new_tokens", 6, "--temperature", 0
    )
    assert out == f"{PROMPT}{expected}\n"
    assert f"read {len(ids)} tokens at " in err
    assert "wrote 6 at " in err
    assert "0 stopped, 1 ended by length" in err


def test_several_samples_stand_in_order(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a lazy dog\n\nsleeps all day\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two\\nlines"}\n')
    words = ("--checkpoint", made / "run", "--max_new_tokens", 4, "--num_samples", 2, "--seed", 3)
    out, _ = output(capsys, *words, "--prompt", "first", "--prompts_file", tmp_path / "prompts.txt", "--batch_size", 3)
    heads = [line for line in out.splitlines() if line.startswith("--- ")]
    assert heads == [f"--- prompt {p}, sample {n} ---" for p in (1, 2, 3) for n in (1, 2)]
    assert out.count("\na lazy dog") == out.count("\nsleeps all day") == 2
    again, _ = output(capsys, *words, "--prompt", "first", "--prompts_file", tmp_path / "prompts.txt")
    assert again == out
    lines, _ = output(capsys, *words, "--prompts_file", tmp_path / "prompts.jsonl")
    assert "two\nlines" in lines


def test_stop_strings_and_the_end_of_text(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--checkpoint", made / "run", "--prompt", PROMPT, "--max_new_tokens", 8, "--temperature", 0)
    whole = output(capsys, *words)[0].removeprefix(PROMPT).rstrip("\n")
    stop = whole[3:5]
    out, err = output(capsys, *words, "--stop", "never there", "--stop", stop)
    assert out == f"{PROMPT}{whole[: whole.index(stop)]}\n"
    assert "1 stopped, 0 ended by length" in err


def test_the_end_of_text_before_the_prompt_can_be_chosen(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--checkpoint", made / "run", "--prompt", PROMPT, "--max_new_tokens", 2)
    counts = [int(output(capsys, *words, *flag)[1].split()[1]) for flag in ((), ("--eot",), ("--no-eot",))]
    assert counts[0] == counts[1] == counts[2] + 1


def test_as_a_program(made: Path) -> None:
    command = [sys.executable, "-m", "tinytron", "generate", "--checkpoint", made / "run", "--prompt", ""]
    done = subprocess.run(
        [*map(str, command), "--max_new_tokens", "3"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "read 1 tokens at" in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--prompt", "a", "--temprature", 1), "unknown argument --temprature; did you mean --temperature?"),
        (("--prompt", "a", "--top_p", 2), "--top_p 2.0 must be above 0"),
        (("--prompt", "a", "--batch_size", 0), "--batch_size 0 must be at least 1"),
        (("--prompt", "a", "--device", "abacus"), "--device abacus cannot be used"),
        ((), 'no prompt given; use --prompt "Once upon a time"'),
        (("--prompt", "dog " * 50), "exceeds --block_size 24 of the model; use at most 24 tokens"),
        (("--prompts_file", "nowhere.txt"), "--prompts_file nowhere.txt cannot be read"),
        (("--prompt", "a", "--tokenizer", "nowhere.json"), "--tokenizer_path nowhere.json"),
    ],
)
def test_what_it_refuses(made: Path, words: tuple[object, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in refusal(capsys, "--checkpoint", made / "run", *words)


def test_a_file_of_prompts_that_is_none(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n\n{"text": "b"}\n')
    told = refusal(capsys, "--checkpoint", made / "run", "--prompts_file", tmp_path / "p.jsonl")
    assert told.endswith('line 3 is not of the form {"prompt": "text"}')


# The tokenizer.


def test_where_the_tokenizer_is_found(made: Path, tmp_path: Path) -> None:
    data, end = str(made / "data"), find_tokenizer(str(made / "data")).end
    for path in (data, f"file://{data}", f"{data}/train_*.bin"):
        assert (found := find_tokenizer(path)).tokenizer.name == str(made / "data" / "tokenizer.json")
        assert (found.end, found.prepend) == (end, True)
    sources = [{"name": "only", "path": data, "weight": 1}, {"name": "bare", "path": str(tmp_path), "weight": 1}]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    assert tokenizers_of_data(str(tmp_path / "mixture.json")).folders == (made / "data", tmp_path)
    assert find_tokenizer(str(tmp_path / "mixture.json")).end == end
    assert find_tokenizer(None, made / "tokenizer.json").prepend is False
    assert find_tokenizer(None, made).tokenizer.name == str(made / "tokenizer.json")


def test_the_end_of_text_where_no_manifest_tells(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "tokenizer.json", tmp_path)
    assert find_tokenizer(str(tmp_path)).prepend is True
    assert find_tokenizer(str(tmp_path), eot_position="append").prepend is False
    assert find_tokenizer(str(tmp_path), eot_id=7).end == 7
    endless = make_tokenizer(tmp_path / "endless.json", ())
    found = find_tokenizer(None, endless)
    assert found.end is None
    with pytest.raises(ConfigError, match="the prompt is empty, and the tokenizer has no end-of-text token"):
        found.prompt_ids("")


def test_documents_that_end_with_the_end_of_text(made: Path, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "texts.jsonl", make_texts(5))
    tokenize(text, made / "tokenizer.json", tmp_path / "data", "--eot_position", "append")
    found = find_tokenizer(str(tmp_path / "data"))
    assert found.prompt_ids(PROMPT) == [int(i) for i in found.tokenizer.encode([PROMPT])[0]]
    assert found.prompt_ids("") == [found.end]


def test_a_run_without_a_tokenizer(made: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = load_model(run)
    write_config(run, model, None)
    words = ("--checkpoint", run, "--prompt", "a", "--max_new_tokens", 2)
    told = refusal(capsys, *words)
    assert told.startswith(
        "error: no tokenizer: the run's data (mock data, or your own) does not name one; give --tokenizer "
    )
    write_config(run, model, str(tmp_path))
    assert f"no tokenizer: the data {tmp_path} has none, and the run kept none; give --tokenizer path/to/" in refusal(
        capsys, *words
    )
    output(capsys, *words, "--tokenizer", made / "tokenizer.json")


def test_a_tokenizer_that_is_too_large(made: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("plain", torch.float32, vocab_size=300)
    torch.save(model.state_dict(), run / "00020_model.pt")
    write_config(run, model, str(made / "data"))
    told = refusal(capsys, "--checkpoint", run, "--prompt", "a")
    size = find_tokenizer(str(made / "data")).tokenizer.vocab_size
    assert (
        f"has {size} tokens, but the model has --vocab_size 300; use the tokenizer that its data was made with" in told
    )


def test_the_tokenizer_a_manifest_names(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").unlink()
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    asked: list[str] = []
    for kind, loader in (("encoding_name", "from_tiktoken"), ("tokenizer_name", "from_hub")):
        path.write_text(json.dumps(manifest | {"tokenizer": manifest["tokenizer"] | {"kind": kind, "name": kind}}))
        monkeypatch.setattr(f"tinytron.text.run_tokenizer.{loader}", lambda name: asked.append(name))
        find_tokenizer(str(tmp_path / "data"))
    assert asked == ["encoding_name", "tokenizer_name"]


# The model.


def test_the_newest_weights_and_their_configuration(made: Path) -> None:
    model, config = load_model(made / "run")
    assert config["data"]["dataset_path"] == str(made / "data")
    assert model.config.sliding_window_layers == (1,)
    assert not model.training
    early, _ = load_model(made / "run" / "00005_model.pt", dtype=torch.bfloat16)
    assert early.wte.weight.dtype == torch.bfloat16
    late, _ = load_model(str(made / "run" / "00020_model.pt"))
    assert torch.equal(late.wte.weight, model.wte.weight)
    assert torch.equal(early.wte.weight, -late.wte.weight.bfloat16())
    tokenizer_of_run(config)


def test_precision_is_that_of_the_file(run: Path) -> None:
    weights = {name: w.double() for name, w in torch.load(run / "00020_model.pt").items()}
    torch.save({"step": 20, "model": weights, "optimizer": {}}, run / "00020_consolidated.pt")
    model, _ = load_model(run / "00020_consolidated.pt")
    assert model.wte.weight.dtype == torch.float64


def test_weights_that_are_not_there(run: Path, tmp_path: Path) -> None:
    def told(path: Path) -> str:
        with pytest.raises(CheckpointError) as error:
            load_model(path)
        return str(error.value)

    assert "is neither a run folder nor a weights file; use log/<run> or" in told(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint (no *_model.pt); runs with --debug or --no-do_save write none" in told(
        tmp_path / "empty"
    )
    torch.save({"optimizer": {}}, run / "other.pt")
    assert "does not hold GPT weights (no wte.weight)" in told(run / "other.pt")
    config = json.loads((run / "config.json").read_text())["config"]
    (run / "config.json").write_text(json.dumps({"config": config | {"model": config["model"] | {"num_layer": 2}}}))
    assert "is from a different model" in told(run)
    (run / "config.json").write_text(json.dumps({"config": {"model": 3}}))
    assert "does not describe a model (it has no config.model); use a file that a run wrote" in told(run)
    (run / "config.json").unlink()
    assert "needs its run's config.json next to it, but there is none; copy both" in told(run)


def test_a_configuration_of_another_version() -> None:
    old = {"model": {"vocab_size": 50, "sliding_window": 4, "sliding_window_layers": [0]}}
    assert model_config_of(old, "here").sliding_window_layers == (0,)
    with pytest.raises(CheckpointError, match="here has the model option telepathy, which this version lacks; update"):
        model_config_of({"model": {"telepathy": 1}}, "here")
    with pytest.raises(CheckpointError, match="here: --vocab_size 0 must be at least 1"):
        model_config_of({"model": {"vocab_size": 0}}, "here")


def test_the_longest_text_is_as_long_as_those_trained_on(run: Path) -> None:
    """With rotary positions the model accepts more, and is bad at it; learned ones have their table."""
    saved = json.loads((run / "config.json").read_text())
    own = saved["config"]["model"]["block_size"]
    for added, expected in (
        ({"train": {"seq_len": 7}}, 7),
        ({"train": {"seq_len": 7}, "ckpt": {"init_from": "x"}}, own),
        ({"train": {"seq_len": True}}, own),
    ):
        (run / "config.json").write_text(json.dumps(saved | {"config": saved["config"] | added}))
        model, config = load_model(run)
        assert model.config.block_size == expected
    config["model"]["position_type"] = "learned"
    assert model_config_of(config, "config.json").block_size == own
