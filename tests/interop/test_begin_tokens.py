"""The token before a text: exported tokenizers put there what training did, and prompts get what an imported one puts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokenize, write_jsonl
from tests.interop.families import SIZES, change_config
from tests.interop.test_tokens import V, read, write_run
from tinytron.checkpoint import load_model
from tinytron.cli.main import main
from tinytron.evaluation.choices import encode_pair
from tinytron.interop.export import export
from tinytron.interop.importing import import_model
from tinytron.interop.open import open_model
from tinytron.interop.tokenizer import initial_tokens, run_tokens
from tinytron.text.run_tokenizer import RunTokenizer, tokenizer_of_run

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["the quick brown fox", " naïve 猫s  🙂\n and on", "a"]
SPECIALS = (EOT, "<s>")


def template(token: str, number: int) -> dict[str, Any]:
    """The post-processor that puts ``token`` first, as Llama's."""
    made = tokenizers.processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])
    return {"type": "TemplateProcessing", **json.loads(made.__getstate__())}


BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
PROCESSORS: dict[str, Any] = {
    "none": None,
    "bytes": BYTES,
    "end": template(EOT, 0),
    "other": template("<s>", 1),
    "sequence": {"type": "Sequence", "processors": [BYTES, template("<s>", 1)]},
    "roberta": {
        "type": "RobertaProcessing", "sep": [EOT, 0], "cls": ["<s>", 1], "trim_offsets": True, "add_prefix_space": False,
    },
}  # fmt: skip


def write_tokenizer(path: Path, processor: str) -> Path:
    make_tokenizer(path, SPECIALS)
    content = json.loads(path.read_text()) | {"post_processor": PROCESSORS[processor], "truncation": None}
    path.write_text(json.dumps(content))
    tokenizers.Tokenizer.from_file(str(path))
    return path


def tokenizer_of(folder: Path) -> RunTokenizer:
    _, config = open_model(folder)
    return tokenizer_of_run(config, None, folder)


def theirs(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


# Exports.


@pytest.mark.parametrize("position", ["prepend", "append", "none"])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_an_exported_tokenizer_begins_texts_as_training_did(processor: str, position: str, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.json", processor)
    texts = write_jsonl(tmp_path / "texts.jsonl", make_texts(10))
    tokenize(texts, file, tmp_path / "data", "--eot_position", position)
    run = write_run(tmp_path / "run", tmp_path / "data")
    out = tmp_path / "out"
    export(run, out)
    ours, exported = tokenizer_of(run), theirs(out)
    for text in TEXTS:
        ids = ours.prompt_ids(text)
        assert (ids[0] == 0) == (position == "prepend")
        assert exported(text).input_ids == ids
        assert exported.decode(ids, skip_special_tokens=True) == text
        assert tokenizers.Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids == ids
        assert tokenizer_of(out).prompt_ids(text) == ids, "once, and not twice"
    if position == "prepend":
        assert exported("").input_ids == [0]
        assert processor == "end" or exported("a", "a").input_ids == 2 * ours.prompt_ids("a")
        assert read(out, "tokenizer_config")["add_bos_token"] is True
    import_model(str(out), tmp_path / "mine", torch.float32)
    export(tmp_path / "mine", tmp_path / "again")
    assert [theirs(tmp_path / "again")(text).input_ids for text in TEXTS] == [ours.prompt_ids(text) for text in TEXTS]


def test_what_a_tokenizer_does_to_a_text_stays(tmp_path: Path) -> None:
    """The post-processor that was there comes before the new one."""
    file = write_tokenizer(tmp_path / "tokenizer.json", "bytes")
    tokenize(write_jsonl(tmp_path / "texts.jsonl", make_texts(10)), file, tmp_path / "data")
    export(write_run(tmp_path / "run", tmp_path / "data"), tmp_path / "out")
    kept, added = read(tmp_path / "out", "tokenizer")["post_processor"]["processors"]
    assert kept == BYTES
    assert added["single"][0] == {"SpecialToken": {"id": EOT, "type_id": 0}}
    assert read(tmp_path / "out", "tokenizer_config")["add_bos_token"] is True
    assert json.loads(file.read_text())["post_processor"] == BYTES, "the data's own is not touched"


# Imports.


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A Hugging Face folder whose bos token is ``<s>`` (1), and its end ``EOT`` (0)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": V})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", bos_token_id=1, eos_token_id=0)
    return tmp_path / "hf"


CASES: list[tuple[str, dict[str, Any] | None, int | None]] = [
    # the post-processor, tokenizer_config.json, what stands before a text
    ("none", None, None),
    ("bytes", {"bos_token": "<s>"}, None),
    ("other", None, 1),
    ("other", {"bos_token": EOT}, 1),
    ("sequence", None, 1),
    ("end", None, 0),
    ("roberta", None, 1),
    # transformers 5 ignores the setting
    ("bytes", {"bos_token": "<s>", "add_bos_token": True}, None),
    ("end", {"bos_token": "<s>", "add_bos_token": True}, 0),
    ("other", {"bos_token": "<s>", "add_bos_token": False}, 1),
]


@pytest.mark.parametrize(("processor", "config", "first"), CASES)
def test_prompts_begin_as_with_transformers(
    llama: Path, tmp_path: Path, processor: str, config: dict[str, Any] | None, first: int | None
) -> None:
    write_tokenizer(llama / "tokenizer.json", processor)
    if config is not None:
        content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT, **config}
        (llama / "tokenizer_config.json").write_text(json.dumps(content))
    else:
        (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    import_model(str(llama), tmp_path / "mine", torch.float32)
    export(tmp_path / "mine", tmp_path / "out")
    for folder in (llama, tmp_path / "mine", tmp_path / "out"):
        ours = tokenizer_of(folder)
        for text in TEXTS:
            ids = ours.prompt_ids(text)
            assert ids == theirs(llama)(text).input_ids[: len(ids)], folder.name
            assert theirs(tmp_path / "out")(text).input_ids == theirs(llama)(text).input_ids
            assert ids[:1] == ([first] if first is not None else ours.ids(text)[:1])
        assert (ours.begin, ours.prepend) == (first if first != 0 else None, first == 0)
        assert ours.stop_tokens == (0,)
    tokens = initial_tokens(str(llama), V)
    assert (tokens.facts.first, tokens.facts.prepend) == (first if first != 0 else None, first == 0)
    assert initial_tokens(str(tmp_path / "mine"), V).facts == tokens.facts


def test_the_begin_token_in_generation_and_evaluation(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(llama / "tokenizer.json", "other")
    ours = tokenizer_of(llama)
    plain = ours.ids("the quick")
    assert ours.prompt_ids("") == [1]
    assert encode_pair("the", " quick", ours) == ([1, *plain], 2)
    assert encode_pair("", "the quick", ours) == ([1, *plain], 1)
    marked = replace(ours.tokenizer, encode=lambda texts: [[9, *text.encode()] for text in texts])  # like SentencePiece
    assert encode_pair("a", "b", replace(ours, tokenizer=marked)) == ([1, 9, *b"ab"], 3), "tokenized together"
    counts = []
    for flags in ((), ("--eot",), ("--no-eot",)):
        words = ("generate", "--checkpoint", str(llama), "--prompt", "the quick", "--max_new_tokens", "2", *flags)
        assert main([*words]) == 0
        counts.append(int(capsys.readouterr().err.split()[1]))
    assert counts == [len(plain) + 1, len(plain) + 1, len(plain)]


def test_a_run_on_own_data_does_not_begin_as_the_model_it_came_from(llama: Path, tmp_path: Path) -> None:
    """The data's tokens have no such token before them."""
    file = write_tokenizer(llama / "tokenizer.json", "other")
    tokenize(write_jsonl(tmp_path / "texts.jsonl", make_texts(10)), file, tmp_path / "data", "--eot_position", "append")
    run = write_run(tmp_path / "run", tmp_path / "data")
    _, config = load_model(run)
    config["tokens"] = run_tokens(V, config["data"], [str(llama)]).as_section()
    ours = tokenizer_of_run(config, None, run)
    assert (ours.begin, ours.prepend) == (None, False)
