"""Exports keep what came with a Hugging Face model: token ids, chat template, special tokens, settings of generation. The
tokens that training changed win, and a line says so."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tests.interop.families import SIZES
from tests.interop.test_tokens import change_json, read
from tinytron.cli.main import main
from tinytron.interop.export import export
from tinytron.interop.open import open_model
from tinytron.text.run_tokenizer import tokenizer_of_run
from tinytron.training import Trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
Pools = Callable[[int], Ranks]
BEGIN, END, TURN, PAD, UNK, EXTRA = SPECIALS = ("<s>", "</s>", "<|turn|>", "<pad>", "<unk>", "<tool>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|turn|>{% endfor %}"
)
CHAT = [{"role": "user", "content": "the quick 猫s"}, {"role": "assistant", "content": "jumps"}]
TEXTS = ["the quick brown fox", " naïve 猫s  🙂\n and <|turn|> on", ""]
SETTINGS: dict[str, Any] = {
    "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.05, "max_new_tokens": 77,
    "eos_token_id": [2, 1], "bos_token_id": 0, "pad_token_id": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a chat model with as many rows as tokens."""
    folder = tmp_path_factory.mktemp("chat") / "hf"
    folder.mkdir()
    file = make_tokenizer(folder.parent / "tokenizer.json", SPECIALS)
    named = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "unk_token": UNK}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), additional_special_tokens=[TURN, EXTRA], chat_template=TEMPLATE, **named
    )
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3}
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": len(tokenizer), **ids})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.generation_config = transformers.GenerationConfig(**SETTINGS)
    model.save_pretrained(folder)
    assert (folder / "chat_template.jinja").is_file()
    return folder


def old_style(folder: Path, out: Path) -> Path:
    """The same model as older versions of transformers wrote it: the template in tokenizer_config.json."""
    shutil.copytree(folder, out)
    template = out / "chat_template.jinja"
    change_json(out / "tokenizer_config.json", chat_template=template.read_text())
    template.unlink()
    return out


def train(source: Path, log_dir: Path, *flags: object) -> tuple[Path, str]:
    """Two steps from the weights ``source``, exported at the end; the run's folder, and what was printed."""
    sizes = TINY[TINY.index("--total_batch_size") : TINY.index("--block_size")]
    data = () if "--dataset_path" in flags else ("--use_mock_data", "--mock_data_num_samples", 32)
    words = ("--exp_name", "run", "--precision", "fp32", "--save_every_steps", 2, "--export_every", 2, "--max_steps", 2)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        trainer = Trainer(config_of(*sizes, *data, *words, "--init_from", source, "--log_dir", log_dir, *flags))
        trainer.train()
    return trainer.log_dir, shown.getvalue()


def facts_of(folder: Path) -> dict[str, Any]:
    """Everything that transformers knows of the tokens of ``folder``, and its settings of generation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder).to_dict()
    generation.pop("transformers_version", None)
    return {
        "ids": [tokenizer(text).input_ids for text in TEXTS],
        "chat": tokenizer.apply_chat_template(CHAT, tokenize=False),
        "chat ids": tokenizer.apply_chat_template(CHAT)["input_ids"],
        "special": tokenizer.special_tokens_map,
        "all special": set(tokenizer.all_special_ids),
        "class": type(tokenizer).__name__,
        "length": tokenizer.model_max_length,
        "generation": generation,
        "config": {key: read(folder, "config")[f"{key}_token_id"] for key in ("bos", "pad")},
    }


@pytest.mark.parametrize("source", ["hf", "import", "old", "old import"])
def test_what_came_in_goes_out(ranks: Pools, chat: Path, tmp_path: Path, source: str) -> None:
    """Through an import, two steps of training, and both kinds of export, when all that it came from is gone."""
    begin = shutil.copytree(chat, tmp_path / "hf") if "old" not in source else old_style(chat, tmp_path / "hf")
    wanted = facts_of(begin)
    assert wanted["generation"]["temperature"] == 0.6
    assert wanted["special"]["pad_token"] == PAD
    if "import" in source:
        assert main(["import", str(begin), "--out", str(tmp_path / "own")]) == 0
        shutil.rmtree(begin)
        begin = tmp_path / "own"
        export(begin, tmp_path / "untrained")
        assert facts_of(tmp_path / "untrained") == wanted
    run, _ = ranks(1).run(train, begin, tmp_path / "log")[0]
    shutil.rmtree(begin)
    made = export(run, tmp_path / "out")
    assert made.changes == ()
    for out in (run / "export" / "step_00002", tmp_path / "out"):
        assert facts_of(out) == wanted


def test_a_tokenizer_that_names_another_end_than_its_model_stays(chat: Path, tmp_path: Path) -> None:
    """As those of some published chat models do."""
    folder = shutil.copytree(chat, tmp_path / "hf")
    change_json(folder / "tokenizer_config.json", eos_token=TURN)
    assert main(["import", str(folder), "--out", str(tmp_path / "own")]) == 0
    assert export(tmp_path / "own", tmp_path / "out").changes == ()
    assert facts_of(tmp_path / "out") == facts_of(folder)
    assert facts_of(folder)["special"]["eos_token"] == TURN


def test_generation_stops_where_transformers_does(chat: Path, tmp_path: Path) -> None:
    """At the ends of generation_config.json, too; the one of config.json separates documents."""
    _, config = open_model(chat)
    assert tokenizer_of_run(config, None, chat).stop_tokens == (1, 2)
    folder = shutil.copytree(chat, tmp_path / "hf")
    for broken in ("{", '{"eos_token_id": null}'):
        (folder / "generation_config.json").write_text(broken)
        assert tokenizer_of_run(open_model(folder)[1], None, folder).stop_tokens == (1,)
    change_json(folder / "generation_config.json", eos_token_id=4)
    assert tokenizer_of_run(open_model(folder)[1], None, folder).stop_tokens == (1, 4)


def test_ids_of_more_rows_are_suppressed_and_the_rest_stays(ranks: Pools, chat: Path, tmp_path: Path) -> None:
    wanted = facts_of(chat)
    size = read(chat, "config")["vocab_size"]
    run, _ = ranks(1).run(train, chat, tmp_path / "log", "--vocab_size", size + 5)[0]
    change_json(run / "generation_config.json", suppress_tokens=[7])
    made = export(run, tmp_path / "out")
    assert made.tokenizer.unused == tuple(range(size, size + 5))
    found = facts_of(tmp_path / "out")
    assert found["generation"].pop("suppress_tokens") == [7, *range(size, size + 5)]
    wanted["generation"].pop("suppress_tokens")
    assert found == wanted


# Training on data of its own.


def shards(chat: Path, out: Path, end: str, position: str) -> Path:
    texts = write_jsonl(out.parent / "texts.jsonl", make_texts(30))
    tokenize(texts, chat / "tokenizer.json", out, "--eot_token", end, "--eot_position", position)
    return out


def test_the_template_travels_with_data_of_the_same_tokenizer(ranks: Pools, chat: Path, tmp_path: Path) -> None:
    """Documents begin with another token now, which one of the ends separates; the rest is as it was."""
    data = shards(chat, tmp_path / "data", TURN, "prepend")
    run, said = ranks(1).run(train, chat, tmp_path / "log", "--dataset_path", data)[0]
    shutil.rmtree(data)
    changes = [
        "generation_config.json: bos_token_id was 0 and is 2, as in the training data",
        f"tokenizer.json: the token before a text was 0 and is {TURN}, as in the training data",
        f"tokenizer_config.json: eos_token was {END} and is {TURN}, as in the training data",
        f"tokenizer_config.json: bos_token was {BEGIN} and is {TURN}, as in the training data",
    ]
    assert "; ".join(["step_00002", *changes]) in said
    made = export(run, tmp_path / "out")
    assert list(made.changes) == changes
    before, after = facts_of(chat), facts_of(tmp_path / "out")
    assert after["special"] == before["special"] | {"eos_token": TURN, "bos_token": TURN}
    assert after["generation"] == before["generation"] | {"bos_token_id": 2}
    assert after["chat"] == before["chat"].replace(BEGIN, TURN)
    assert after["ids"] == [[2, *ids[1:]] for ids in before["ids"]]
    assert read(tmp_path / "out", "config")["eos_token_id"] == [2, 1]


def test_an_end_that_the_model_did_not_have_replaces_its_ends(
    ranks: Pools, chat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shards(chat, tmp_path / "data", UNK, "append")
    run, _ = ranks(1).run(train, chat, tmp_path / "log", "--dataset_path", data)[0]
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("next: ")
    assert lines[1:-1] == [
        f"generation stops at {UNK} (4)",
        "generation_config.json: eos_token_id was [2, 1] and is 4, as in the training data",
        "generation_config.json: bos_token_id was 0 and is none, as in the training data",
        "tokenizer.json: the token before a text was 0 and is none, as in the training data",
        f"tokenizer_config.json: eos_token was {END} and is {UNK}, as in the training data",
    ]
    before, after = facts_of(chat), facts_of(tmp_path / "out")
    assert after["generation"] == before["generation"] | {"eos_token_id": 4, "bos_token_id": None}
    assert after["special"] == before["special"] | {"eos_token": UNK}
    assert after["ids"] == [ids[1:] for ids in before["ids"]]


def test_data_of_another_tokenizer_leaves_the_template_behind(ranks: Pools, chat: Path, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "tokenizer.json", (END,))
    data = tmp_path / "data"
    tokenize(write_jsonl(tmp_path / "texts.jsonl", make_texts(30)), other, data, "--eot_token", END)
    run, said = ranks(1).run(train, chat, tmp_path / "log", "--dataset_path", data)[0]
    assert (
        f"the data has a different tokenizer than {chat}, whose chat template and settings are therefore left out\n"
        in said
    )
    export(run, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()
    assert "temperature" not in read(tmp_path / "out", "generation_config")


def test_another_tokenizer_of_an_export_gets_the_tokens_of_the_model(chat: Path, tmp_path: Path) -> None:
    """It is not the one that the model came with, so what it says of its own is changed."""
    assert main(["import", str(chat), "--out", str(tmp_path / "own")]) == 0
    given = shutil.copytree(chat, tmp_path / "given", ignore=shutil.ignore_patterns("model*", "config.json"))
    change_json(given / "tokenizer_config.json", eos_token=UNK)
    made = export(tmp_path / "own", tmp_path / "out", tokenizer=given)
    assert made.changes == (f"tokenizer_config.json: eos_token was {UNK} and is {END}, as in the training data",)
    assert facts_of(tmp_path / "out")["special"]["eos_token"] == END


def test_special_tokens_of_a_map_travel(chat: Path, tmp_path: Path) -> None:
    """The tokenizer has no tokenizer_config.json."""
    folder = shutil.copytree(chat, tmp_path / "hf")
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": PAD, "unk_token": UNK}))
    assert main(["import", str(folder), "--out", str(tmp_path / "own")]) == 0
    export(tmp_path / "own", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    named = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD, "unk_token": UNK}
    assert tokenizer.special_tokens_map.items() >= named.items()
