"""``tinytron export`` of a Hugging Face folder, without an import: the same weights, tokens, chat template and settings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.interop.families import change_config, save
from tests.interop.test_card import run_snippet
from tests.interop.test_gguf import imported, read
from tests.interop.test_lossless import chat, facts_of  # noqa: F401  # chat is a fixture
from tests.interop.test_tokens import change_json
from tinytron.cli.main import main
from tinytron.interop.weights import HFWeights

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


def export(checkpoint: Path, out: Path, *flags: str) -> None:
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out), *flags]) == 0


@pytest.mark.parametrize("name", ["llama tied biased", "mistral", "mixtral", "neox", "gpt2 untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_those_of_the_folder(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save(name, tmp_path / "hf", dtype)
    export(tmp_path / "hf", tmp_path / "out")
    theirs, ours = HFWeights(tmp_path / "hf"), HFWeights(tmp_path / "out")
    assert theirs.shapes == ours.shapes
    for tensor in theirs.shapes:
        assert ours.dtypes[tensor] == dtype
        assert torch.equal(theirs.get(tensor), ours.get(tensor)), tensor
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Converted by Tinytron" in card
    assert "Trained with" not in card


def test_tokens_template_and_settings_are_those_of_the_folder(
    chat: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    export(chat, tmp_path / "out", "--dtype", "bf16")
    assert facts_of(tmp_path / "out") == facts_of(chat)
    assert "generation stops at </s> (1)" in capsys.readouterr().out
    assert run_snippet(tmp_path / "out", monkeypatch)[1]


def test_a_tokenizer_of_an_older_form_travels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a tokenizer.json, which our own generation needs: no command to generate is proposed."""
    save("gpt2", tmp_path / "hf", torch.float32)
    files = {
        "vocab.json": '{"a": 0, "b": 1}',
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config.json": '{"eos_token": "b"}',
    }
    for file, content in files.items():
        (tmp_path / "hf" / file).write_text(content)
    export(tmp_path / "hf", tmp_path / "out")
    assert {file: (tmp_path / "out" / file).read_text() for file in files} == files
    assert "next:" not in capsys.readouterr().out


def test_ignored_keys_are_told(chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    shutil.copytree(chat, tmp_path / "hf")
    change_config(tmp_path / "hf", unsloth_version="1")
    export(tmp_path / "hf", tmp_path / "out")
    assert "ignored in its config.json, not part of the model's function: unsloth_version" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama llama3", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_gguf_file_is_that_of_the_import(tmp_path: Path, name: str, kind: str) -> None:
    """Which ``test_gguf.py`` compares with transformers, and ``test_llama_cpp.py`` with llama.cpp."""
    pytest.importorskip("gguf")
    hf, own = imported(name, tmp_path)
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copy(hf / "chat_template.jinja", own)
    for source, out in ((hf, "hf.gguf"), (own, "own.gguf")):
        export(source, tmp_path / out, "--gguf", kind)
    (keys, values, types), expected = read(tmp_path / "hf.gguf"), read(tmp_path / "own.gguf")
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys | {"general.name": ""} == expected[0] | {"general.name": ""}
    assert types == expected[2]
    for tensor, value in values.items():
        assert np.array_equal(value, expected[1][tensor]), tensor


def test_llama_cpp_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy text of llama.cpp from the f16 file of a folder is that of ``tinytron generate`` on the folder."""
    from tests.helpers.llama_cpp import LlamaCpp
    from tests.interop.test_llama_cpp import V, make_tokenizer

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path / "hf")
    make_tokenizer(tmp_path / "hf" / "tokenizer.json")
    export(tmp_path / "hf", tmp_path / "model.gguf", "--gguf", "f16")
    capsys.readouterr()
    words = ["--prompt", "the quick", "--temperature", "0", "--max_new_tokens", "16", "--dtype", "fp32"]
    assert main(["generate", "--checkpoint", str(tmp_path / "hf"), *words]) == 0
    assert "the quick" + LlamaCpp(tmp_path / "model.gguf").greedy("the quick", 16) + "\n" == capsys.readouterr().out


def test_an_architecture_that_cannot_go_out_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("llama", tmp_path / "hf", torch.float32)
    change_json(tmp_path / "hf" / "config.json", model_type="mamba")
    assert main(["export", "--checkpoint", str(tmp_path / "hf"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mamba" in line
    assert not (tmp_path / "out").exists()
