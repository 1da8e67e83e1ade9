"""``tinytron generate --chat``: prompts as in training, where answers end, and a conversation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers")

from tests.cli.test_generate import output, refusal, write_config
from tests.helpers.corpus import EOT, make_tokenizer
from tests.inference.models import make_model
from tests.text.test_chat import DIALOGUE, HEADERS
from tinytron.cli.chat import _fitting
from tinytron.data.formats import open_shard
from tinytron.data.shards import find_shards
from tinytron.text.chat import ChatML, template_of
from tinytron.text.dialogue import Dialogue, dialogue_of_run
from tinytron.text.options import TokenizeOptions
from tinytron.text.run_tokenizer import RunTokenizer
from tinytron.text.tokenize import tokenize_dataset
from tinytron.text.tokenizers import from_file

MARKS = (EOT, "<|im_start|>", "<|im_end|>")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose tokenizer has ChatML's marks."""
    model = make_model("some windows", torch.float32, vocab_size=420, block_size=200)
    (tmp_path / "run").mkdir()
    torch.save(model.state_dict(), tmp_path / "run" / "00005_model.pt")
    make_tokenizer(tmp_path / "tokenizer.json", MARKS)
    write_config(tmp_path / "run", model, None)
    return tmp_path / "run"


def tokenizer(path: Path, specials: tuple[str, ...], prepend: bool = True) -> RunTokenizer:
    found = from_file(make_tokenizer(path / "tokenizer.json", specials))
    return RunTokenizer(found, found.specials[EOT], prepend)


@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
@pytest.mark.parametrize("specials", [MARKS, (EOT,), (EOT, "<h>", "</h>", "<e>")], ids=["marks", "text", "headers"])
def test_prompts_are_the_tokens_of_training(tmp_path: Path, template: str, specials: tuple[str, ...]) -> None:
    """Up to the first token of the answer, and the answer ends with what ``end`` says."""
    make_tokenizer(tmp_path / "tokenizer.json", specials)
    (tmp_path / "chat_template.jinja").write_text(HEADERS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": EOT}))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": DIALOGUE}) + "\n")
    options = TokenizeOptions(
        dataset_path=str(tmp_path / "chats.jsonl"), tokenizer_path=str(tmp_path / "tokenizer.json"),
        messages_key="messages", assistant_only=True, chat_template=template, output_dir=str(tmp_path / "out"), num_proc=0,
    )  # fmt: skip
    tokenize_dataset(options)
    trained = [int(n) for shard in find_shards(str(tmp_path / "out"), "train") for n in open_shard(shard)]
    text = from_file(tmp_path / "tokenizer.json")
    own = RunTokenizer(text, text.specials[EOT], prepend=True)
    found = Dialogue(own, template_of(template, text.chat_template, text.specials, text.named, "x"))
    prompt = found.prompt_ids(DIALOGUE[:4])
    if template == "tokenizer":
        trained = trained[1:]  # the template begins with the token, too, which a prompt has once
    assert trained[: len(prompt)] == prompt
    rest = trained[len(prompt) :]
    tokens, texts = found.end
    answer = [int(n) for n in text.encode(["No"])[0]]
    assert rest[: len(answer)] == answer
    after = rest[len(answer) :]
    assert after[0] in tokens or any(text.decode(after).startswith(stop) for stop in texts)


def test_the_template_is_that_of_the_data(tmp_path: Path) -> None:
    own = tokenizer(tmp_path, MARKS)
    assert isinstance(dialogue_of_run({}, own, None).template, ChatML)
    (tmp_path / "chat_template.jinja").write_text(HEADERS)
    own = RunTokenizer(from_file(tmp_path / "tokenizer.json"), 0, True)
    assert not isinstance(dialogue_of_run({}, own, None).template, ChatML)
    assert isinstance(dialogue_of_run({}, own, "chatml").template, ChatML)


def test_answers_to_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--checkpoint", run, "--tokenizer", run.parent / "tokenizer.json", "--chat", "--max_new_tokens", 6)
    out, err = output(capsys, *words, "--prompt", "the quick brown", "--temperature", 0)
    assert "the quick brown" not in out, "only the answer is printed"
    assert "wrote 6" in err
    other, _ = output(capsys, *words, "--prompt", "the quick brown", "--temperature", 0, "--system", "a lazy dog")
    assert other != out


def test_a_conversation(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second turn sees the first, unless a new conversation begins; turns that do not fit are left out."""
    words = ("--checkpoint", run, "--tokenizer", run.parent / "tokenizer.json", "--chat", "--max_new_tokens", 6)
    words = (*words, "--temperature", 0)

    def said(*lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return output(capsys, *words)[0].split("\n")[:-1]

    one = said("the quick brown")
    two = said("the quick brown", "the quick brown")
    assert two[0] == one[0] != two[1]
    assert said("the quick brown", "/new", "the quick brown") == [*one, *one]
    assert len(said(*["the quick brown fox jumps over"] * 8)) == 8
    assert said("the quick brown", "", "not read") == one


def test_a_question_leaves_with_its_answer(tmp_path: Path) -> None:
    """What is kept begins with a question, and is as much as fits."""
    dialogue = Dialogue(tokenizer(tmp_path, MARKS), ChatML())
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": f"the quick brown fox {i}"} for i in range(9)]
    whole = len(dialogue.prompt_ids(turns))
    kept, ids = _fitting(turns, dialogue, None, whole + 5, 6)
    assert kept == turns[2:]
    assert ids == dialogue.prompt_ids(kept)
    assert _fitting(turns, dialogue, None, whole + 6, 6)[0] == turns
    assert _fitting(turns, dialogue, None, 40, 6)[0] == turns[8:]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--system", "x", "--prompt", "x"), "--system is about dialogues; add --chat, or drop it"),
        (("--chat_template", "chatml", "--prompt", "x"), "--chat_template is about dialogues"),
        (("--chat", "--eot", "--prompt", "x"), "--eot does not apply to dialogues"),
        (("--chat", "--num_samples", 2), "--num_samples 2: a conversation has one answer per turn; use 1"),
        (("--chat", "--chat_template", "tokenizer", "--prompt", "x"), "has no chat template"),
    ],
)
def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str], words: tuple[Any, ...], text: str) -> None:
    assert text in refusal(capsys, "--checkpoint", run, "--tokenizer", run.parent / "tokenizer.json", *words)


def test_a_turn_that_does_not_fit(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 400 + "\n"))
    text = refusal(capsys, "--checkpoint", run, "--tokenizer", run.parent / "tokenizer.json", "--chat")
    assert "more than the model's --block_size 200; ask in fewer words" in text
