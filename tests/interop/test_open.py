"""Hugging Face folders in ``generate`` and ``evaluate``: the same as after an import; other folders are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.families import VOCAB, change_config, save
from tinytron.checkpoint import load_model
from tinytron.cli.main import main
from tinytron.interop.importing import import_model
from tinytron.interop.open import open_model

tokenizers = pytest.importorskip("tokenizers")
WORDS = [f"w{number}" for number in range(VOCAB)]
FAMILIES = ["llama", "gpt2", "qwen3_moe"]


def word_tokenizer(folder: Path) -> None:
    """A tokenizer.json with a token per word, as many as the small models have."""
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="w40")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture(params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The folder of a Hugging Face model and its import."""
    save(request.param, tmp_path / "hf", torch.float32)
    change_config(tmp_path / "hf", bos_token_id=1, eos_token_id=[39, 40])
    word_tokenizer(tmp_path / "hf")
    import_model(str(tmp_path / "hf"), tmp_path / "mine", torch.float32)
    return tmp_path / "hf", tmp_path / "mine"


def test_it_is_the_model_that_an_import_makes(both: tuple[Path, Path]) -> None:
    (theirs, sections), (ours, config) = open_model(both[0]), load_model(both[1])
    assert theirs.config == ours.config
    assert not theirs.training
    assert {name: sections[name] for name in ("model", "tokens")} == {
        "model": {k: tuple(v) if isinstance(v, list) else v for k, v in config["model"].items()},
        "tokens": config["tokens"],
    }
    for name, weight in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], weight), name
    assert open_model(both[0], dtype=torch.float64)[0].wte.weight.dtype == torch.float64


def test_generation(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for folder in both:
        words = ["--checkpoint", folder, "--prompt", "w3 w4 w5", "--max_new_tokens", 12, "--temperature", 0]
        assert main(["generate", *map(str, words)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 4


def test_evaluation(both: tuple[Path, Path], tmp_path: Path) -> None:
    items = [{"context": "w1 w2", "choices": [f" w{n} w4", f" w{n + 1}"], "answer": n % 2} for n in range(9)]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
    results: list[dict[str, Any]] = []
    for folder in both:
        assert main(["evaluate", "--checkpoint", str(folder), "--tasks", str(tmp_path / "task.jsonl")]) == 0
        results.append(json.loads((folder / "results.json").read_text()))
    assert results[0]["results"] == results[1]["results"]
    assert results[0]["results"]["task"]["items"] == 9
    assert [content["checkpoint"] for content in results] == [str(both[0]), str(both[1] / "00000_model.pt")]


def test_the_type_is_that_of_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("llama", tmp_path, torch.bfloat16)
    change_config(tmp_path, attention_dropout=0.1)
    told: list[str] = []
    assert open_model(str(tmp_path), say=told.append)[0].wte.weight.dtype == torch.bfloat16
    assert all("attention_dropout" in line for line in told)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_what_is_no_model_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task.jsonl").write_text(json.dumps({"context": "a", "choices": ["b", "c"], "answer": 0}))
    more = ["--prompt", "a"] if command == "generate" else ["--tasks", str(tmp_path / "task.jsonl")]

    def told(path: Path) -> str:
        assert main([command, "--checkpoint", str(path), *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "nowhere does not exist; give a run folder (log/<run>), a weights file in it" in told(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for content in (None, "{}", "[", '{"config": 3'):
        if content is not None:
            (tmp_path / "folder" / "config.json").write_text(content)
        assert "folder has no checkpoint: use a run folder (with *_model.pt" in (line := told(tmp_path / "folder"))
        assert "or a Hugging Face folder (with a config.json that names its model_type" in line
    save("llama", tmp_path / "hf")
    assert f"no tokenizer: neither the data of the model nor {tmp_path / 'hf'} has one; give --tok" in told(
        tmp_path / "hf"
    )
    assert told(tmp_path / "hf" / "model.safetensors") == told(tmp_path / "hf")
    change_config(tmp_path / "hf", model_type="mamba")
    assert "mamba" in told(tmp_path / "hf")
    change_config(tmp_path / "hf", model_type="llama")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert "hf has no weights: neither model.safetensors nor" in told(tmp_path / "hf")


def test_a_run_without_a_checkpoint_is_told_as_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"config": {"model": {}}}')
    assert main(["generate", "--checkpoint", str(tmp_path), "--prompt", "a"]) == 2
    assert "holds no checkpoint (no *_model.pt); runs with --debug or" in capsys.readouterr().err
