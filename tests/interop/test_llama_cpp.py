"""llama.cpp computes from our GGUF files what we compute: tokens, logits, greedy texts. Needs ``pip install cyllama``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.llama_cpp import LlamaCpp
from tests.interop import families
from tests.interop.families import change_config, save
from tests.interop.test_gguf import DIGITS, LLAMA3, PLAIN, QWEN2, sequence, split
from tests.interop.test_tokens import V
from tinytron.cli.main import main
from tinytron.interop.gguf import export_gguf
from tinytron.interop.importing import import_model
from tinytron.interop.open import open_model
from tinytron.model import GPT, ModelConfig

tokenizers = pytest.importorskip("tokenizers")
# GELU is a table of fp16 numbers there, by the formula with tanh.
MODELS = {
    "llama tied biased": 1e-4, "llama mha head_dim": 1e-4, "llama linear": 1e-4, "llama llama3": 1e-4, "llama yarn": 1e-4,
    "qwen2": 1e-4, "qwen3": 1e-4, "mixtral": 1e-4, "qwen3_moe": 1e-4, "neox": 0.02, "gpt2": 0.02, "gpt2 untied": 0.02,
}  # fmt: skip


@pytest.mark.parametrize(("name", "tolerance"), MODELS.items())
def test_logits_are_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tolerance: float) -> None:
    for sizes in (families.SIZES, families.NEOX, families.GPT2):
        monkeypatch.setitem(sizes, "vocab_size", V)
    save(name, tmp_path / "hf", torch.float32)
    change_config(tmp_path / "hf", eos_token_id=0)
    make_tokenizer(tmp_path / "hf" / "tokenizer.json")
    import_model(str(tmp_path / "hf"), tmp_path / "own", torch.float32)
    export_gguf(tmp_path / "own", tmp_path / "model.gguf", "f32")
    model, _ = open_model(tmp_path / "own")
    ids = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids)[0].numpy()
    theirs = LlamaCpp(tmp_path / "model.gguf").logits(ids[0].tolist())
    assert ours.std() > 1
    assert np.abs(theirs - ours[:, : theirs.shape[1]]).max() < tolerance


def write_run(folder: Path, data: Path | None, hidden: int = 64) -> Path:
    """A run of random weights on ``data``."""
    sizes: dict[str, Any] = {
        "block_size": 128, "vocab_size": V, "num_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": hidden, "intermediate_size": 96, "init_std": 0.2, "qk_norm": True,
    }  # fmt: skip
    torch.manual_seed(3)
    model = GPT(ModelConfig(**sizes))
    folder.mkdir()
    torch.save(model.state_dict(), folder / "00000_model.pt")
    sections = {"model": sizes, "data": {"dataset_path": None if data is None else str(data)}}
    (folder / "config.json").write_text(json.dumps({"config": sections}))
    return folder


@pytest.mark.parametrize("position", ["prepend", "append"])
def test_greedy_texts_are_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str], position: str) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(20))
    tokenize(texts, tmp_path / "tokenizer.json", tmp_path / "data", "--eot_position", position)
    run = write_run(tmp_path / "run", tmp_path / "data")
    for kind in ("f32", "f16"):
        assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / kind), "--gguf", kind]) == 0
    capsys.readouterr()
    prompt, count = "the quick brown", 24
    words = ["--prompt", prompt, "--temperature", "0", "--max_new_tokens", str(count)]
    assert main(["generate", "--checkpoint", str(run), *words]) == 0
    ours = capsys.readouterr().out
    for kind in ("f32", "f16"):
        theirs = LlamaCpp(tmp_path / kind)
        assert (theirs.tokenize(prompt)[0] == 0) == (position == "prepend")
        assert prompt + theirs.greedy(prompt, count) + "\n" == ours, kind


def test_types_of_weights_are_close(tmp_path: Path) -> None:
    """The correlation of logits with those of fp32; a wrong order of anything would leave none."""
    run = write_run(tmp_path / "run", None)
    make_tokenizer(run / "tokenizer.json")
    ids = torch.randint(300, (1, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = open_model(run)[0](ids)[0].numpy()
    for kind, least in (("f16", 0.99999), ("bf16", 0.999), ("q8_0", 0.999)):
        export_gguf(run, tmp_path / kind, kind, tokenizer=run)
        theirs = LlamaCpp(tmp_path / kind).logits(ids[0].tolist())
        assert np.corrcoef(theirs.ravel(), ours[:, : theirs.shape[1]].ravel())[0, 1] > least, kind


TEXTS = [
    "the quick brown fox", " naïve 猫s  🙂\n\n and on\t\t42", "I'll say 12345 times: DON'T!!  \r\n x", f"a {EOT} b",
    "é e\u0301 ½²", "    def f(x):\n        return x_1+1  ", "'re 'RE we'Ve",
]  # fmt: skip
SPLITS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    (sequence(DIGITS, PLAIN | {"use_regex": True}), False),
    (sequence(split(LLAMA3), PLAIN), True),
    (sequence(split(LLAMA3), PLAIN), False),
    (sequence(split(QWEN2), PLAIN), False),
]


@pytest.mark.parametrize(("content", "whole"), SPLITS)
def test_texts_become_our_tokens(tmp_path: Path, content: dict[str, Any], whole: bool) -> None:
    """By every way of splitting that has a name. One word of the vocabulary is not the result of merges."""
    run = write_run(tmp_path / "run", None, hidden=8)
    made = make_tokenizer(run / "tokenizer.json")
    state = json.loads(made.read_text()) | content | {"truncation": None, "post_processor": None}
    trained = tokenizers.Tokenizer.from_str(json.dumps(state))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=V - 1, special_tokens=[EOT], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    trained.train_from_iterator([*TEXTS, "123 12 we'VE 'RE x\n\n \n"] * 3, trainer)
    trained.save(str(made))
    state = json.loads(made.read_text())
    state["model"]["ignore_merges"] = whole
    state["model"]["vocab"]["zqzqz"] = len(state["model"]["vocab"])
    made.write_text(json.dumps(state))
    trained = tokenizers.Tokenizer.from_file(str(made))
    trained.encode_special_tokens = True
    export_gguf(run, tmp_path / "model.gguf", "f32", tokenizer=made)
    theirs = LlamaCpp(tmp_path / "model.gguf")
    for text in [*TEXTS, "zqzqz"]:
        assert theirs.tokenize(text) == trained.encode(text, add_special_tokens=False).ids, text
    shutil.rmtree(run)
