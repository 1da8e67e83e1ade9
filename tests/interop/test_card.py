"""The model card: its snippet is executed, and its facts are those of the run."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tests.interop.test_tokens import write_run
from tinytron.data.manifest import MANIFEST
from tinytron.interop.card import _optimizer
from tinytron.interop.export import export
from tinytron.training import Config, Trainer

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
PROMPT = "Once upon a time"


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def run_snippet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """Execute the card's only snippet next to ``folder``, as its reader would; its variables and what it printed."""
    (code,) = re.findall(r"```python\n(.+?)```", card(folder), re.DOTALL)
    monkeypatch.chdir(folder.parent)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(code, found)
    return found, shown.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and shards of it whose documents begin with the end of text."""
    root = tmp_path_factory.mktemp("card")
    make_tokenizer(root / "tokenizer.json")
    (root / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenize(write_jsonl(root / "texts.jsonl", make_texts(20)), root / "tokenizer.json", root / "data")
    return root


@pytest.mark.parametrize("given", [None, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_the_snippet_uses_the_exported_tokenizer(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any] | None
) -> None:
    """Also one whose settings do not say which inputs models take."""
    tokenizer = None
    if given is not None:
        tokenizer = tmp_path / "given"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_bytes((made / "tokenizer.json").read_bytes())
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(given))
    export(write_run(tmp_path / "run", made / "data"), tmp_path / "out", tokenizer=tokenizer)
    found, shown = run_snippet(tmp_path / "out", monkeypatch)
    assert shown.startswith(PROMPT)
    assert len(shown) > len(PROMPT) + 3
    assert found["ids"][0, 0] == 0, "documents begin with the end of text"
    assert found["tokens"].shape[1] <= found["ids"].shape[1] + 16
    assert "AutoTokenizer" in card(tmp_path / "out")


def test_tokenizers_take_the_inputs_that_models_do(made: Path, tmp_path: Path) -> None:
    """A card of the hub calls ``generate(**inputs)``, and decoders refuse ``token_type_ids``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export(write_run(tmp_path / "run", made / "data"), tmp_path / "out")
    inputs = AutoTokenizer.from_pretrained(tmp_path / "out")(PROMPT, return_tensors="pt")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(**inputs, max_new_tokens=1)


def test_the_snippet_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(write_run(tmp_path / "run", None), tmp_path / "out")
    found, shown = run_snippet(tmp_path / "out", monkeypatch)
    assert json.loads(shown) == found["tokens"][0].tolist()
    assert found["ids"].tolist() == [[0]]
    assert "tokenizer" not in found


@pytest.mark.parametrize("kind", ["encoding_name", "tokenizer_name"])
def test_the_snippet_fetches_a_tokenizer_that_is_not_a_file(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """From tiktoken or the hub, with the token before a text that training put there."""
    import transformers

    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([number]): number + 1 for number in range(256)}
    encoding = tiktoken.Encoding("odd", pat_str=r".", mergeable_ranks=ranks, special_tokens={EOT: 0})
    monkeypatch.setattr(tiktoken, "get_encoding", {"lab/odd": encoding}.__getitem__)
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: load({"lab/odd": made}[name]))
    data = tmp_path / "data"
    data.mkdir()
    manifest = json.loads((made / "data" / MANIFEST).read_text())
    size = encoding.n_vocab if kind == "encoding_name" else manifest["tokenizer"]["vocab_size"]
    manifest["tokenizer"] |= {"kind": kind, "name": "lab/odd", "vocab_size": size}
    (data / MANIFEST).write_text(json.dumps(manifest))
    export(write_run(tmp_path / "run", data), tmp_path / "out")
    found, shown = run_snippet(tmp_path / "out", monkeypatch)
    assert shown.startswith(EOT + PROMPT)
    assert found["ids"][0].tolist().count(0) == 1, "the template of the tokenizer adds no second one"


def test_the_snippet_loads_the_branch_of_its_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", None)
    export(run, tmp_path / "out", name="lab/model", revision="step5")
    assert '.from_pretrained("lab/model", revision="step5")' in card(tmp_path / "out")
    export(run, tmp_path / "last", name="lab/model")
    assert '.from_pretrained("lab/model")' in card(tmp_path / "last")


# The optimizer.


class OwnOptimizer(Trainer):
    """Trains with an optimizer that no option names."""

    def _init_optimizer(self, config: Config) -> None:
        self.optimizer = torch.optim.Adagrad(self.raw_model.parameters(), lr=0.01)  # type: ignore[assignment]


EXPORTED = ("--save_every_steps", 1, "--export_every", 1)


def _train(cls: type[Trainer], log_dir: Path, *flags: object) -> Path:
    trainer = cls(config_of(*TINY, "--log_dir", log_dir, "--max_steps", 1, *EXPORTED, *flags))
    trainer.train()
    return trainer.log_dir


@pytest.mark.parametrize(
    ("cls", "flags", "named"),
    [
        (Trainer, (), "AdamW, peak"),
        (Trainer, ("--optimizer", "muon"), "Muon for matrices, AdamW for the rest, peak"),
        (Trainer, ("--optimizer", "muon", "--muon_normuon"), "NorMuon for matrices, AdamW for the rest, peak"),
        (OwnOptimizer, (), "Adagrad, peak"),
    ],
)
def test_the_optimizer_is_the_one_that_trained(
    ranks: Callable[[int], Ranks], tmp_path: Path, cls: type[Trainer], flags: tuple[object, ...], named: str
) -> None:
    run = ranks(1).run(_train, cls, tmp_path, *flags)[0]
    assert f"| optimizer | {named} learning rate 0.01 |" in card(run / "export" / "step_00001")


@pytest.mark.parametrize(
    ("options", "name"),
    [({"optimizer": "adam"}, "AdamW"), ({"optimizer": "muon"}, "Muon for matrices, AdamW for the rest")],
)
def test_older_checkpoints_name_the_optimizer_by_their_options(options: dict[str, Any], name: str) -> None:
    assert _optimizer(options, None) == name
