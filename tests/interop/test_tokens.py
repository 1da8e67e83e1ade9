"""Facts about tokens: exports and imports have those that generation uses, whatever tells them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.corpus import EOT, make_texts, make_tokenizer, tokenize, write_jsonl
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of
from tests.interop.families import change_config, save
from tinytron.checkpoint import load_model
from tinytron.cli.export import about_tokens
from tinytron.cli.main import main
from tinytron.errors import ConfigError
from tinytron.inference import SamplingOptions, complete
from tinytron.interop.export import export
from tinytron.interop.importing import import_model
from tinytron.interop.tokenizer import TokenizerFiles
from tinytron.model import GPT, ModelConfig
from tinytron.text import run_tokenizer
from tinytron.text.run_tokenizer import TokenFacts, tokenizer_of_run
from tinytron.text.tokenizers import from_file, from_tiktoken
from tinytron.training import Trainer

pytest.importorskip("tokenizers")
Pools = Callable[[int], Ranks]
V = 420  # ids of the model; the tokenizers have fewer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose documents begin (``data``) or end (``after``) with the end of text; ``bare``: without a manifest;
    ``odd``: a tokenizer whose end only its tokenizer_config.json names."""
    root = tmp_path_factory.mktemp("tokens")
    make_tokenizer(root / "tokenizer.json")
    texts = write_jsonl(root / "texts.jsonl", make_texts(20))
    tokenize(texts, root / "tokenizer.json", root / "data")
    tokenize(texts, root / "tokenizer.json", root / "after", "--eot_position", "append")
    (root / "bare").mkdir()
    shutil.copy(root / "tokenizer.json", root / "bare")
    (root / "odd").mkdir()
    make_tokenizer(root / "odd" / "tokenizer.json", ("<stop>", "</s>"))
    config = {"eos_token": {"__type": "AddedToken", "content": "<stop>", "lstrip": False}, "pad_token": "</s>"}
    (root / "odd" / "tokenizer_config.json").write_text(json.dumps(config))
    return root


def write_run(folder: Path, dataset_path: Path | None, **data: Any) -> Path:
    folder.mkdir()
    sizes: dict[str, Any] = {
        "block_size": 32, "vocab_size": V, "num_layer": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "hidden_size": 8, "intermediate_size": 8, "init_std": 0.3,
    }  # fmt: skip
    model = GPT(ModelConfig(**sizes))
    torch.save(model.state_dict(), folder / "00000_model.pt")
    path = None if dataset_path is None else str(dataset_path)
    sections = {"model": dataclasses.asdict(model.config), "data": {"dataset_path": path, **data}}
    (folder / "config.json").write_text(json.dumps({"config": sections}))
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def ids_in(folder: Path) -> tuple[Any, Any]:
    """End and begin of an export, the same in both of its files."""
    config, generation = read(folder, "config"), read(folder, "generation_config")
    found = config["eos_token_id"], config["bos_token_id"]
    assert (generation.get("eos_token_id"), generation.get("bos_token_id")) == found
    return found


CASES: list[tuple[str | None, dict[str, Any], str | None, str | None, bool]] = [
    # data, its flags, --tokenizer -> the end, and whether texts begin with it
    ("data", {}, None, EOT, True),
    ("data", {}, "tokenizer.json", EOT, True),
    ("data", {}, "data", EOT, True),
    ("data", {}, "odd", None, True),  # the data decides, and this tokenizer calls that id otherwise
    ("after", {}, None, EOT, False),
    ("after", {}, "tokenizer.json", EOT, False),
    ("bare", {}, None, EOT, True),
    ("bare", {"eot_position": "append"}, None, EOT, False),
    ("bare", {"eot_id": 0}, None, EOT, True),
    ("bare", {"eot_id": 5, "eot_position": "append"}, None, None, False),
    ("bare", {}, "after", EOT, False),  # the manifest beside --tokenizer
    ("bare", {}, "odd", "<stop>", True),
    (None, {}, "tokenizer.json", EOT, False),
    (None, {}, "odd", "<stop>", False),
    (None, {"eot_id": 7}, "odd", None, True),
    ("gone", {}, "tokenizer.json", EOT, True),
]


@pytest.mark.parametrize(("data", "flags", "given", "end", "begins"), CASES)
def test_exports_say_what_generation_uses(
    made: Path,
    tmp_path: Path,
    data: str | None,
    flags: dict[str, Any],
    given: str | None,
    end: str | None,
    begins: bool,
) -> None:
    run = write_run(tmp_path / "run", None if data is None else made / data, **flags)
    option = None if given is None else made / given
    _, config = load_model(run)
    ours = tokenizer_of_run(config, option, run)
    export(run, tmp_path / "out", tokenizer=option)
    assert ids_in(tmp_path / "out") == (ours.end, ours.end if begins else None)
    assert ours.prepend == begins
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.eos_token_id == ours.end
    if end is not None:
        assert theirs.eos_token == end
    if begins:
        assert theirs.bos_token_id == ours.end


def test_nothing_is_said_where_documents_have_no_end(made: Path, tmp_path: Path) -> None:
    tokenize(made / "texts.jsonl", made / "tokenizer.json", tmp_path / "data", "--eot_position", "none")
    run = write_run(tmp_path / "run", tmp_path / "data")
    assert ids_in_export(run, tmp_path / "out") == (None, None)
    assert about_tokens(TokenizerFiles(())).startswith("no end-of-text token is known, so generation does not stop")


def ids_in_export(run: Path, out: Path, tokenizer: Path | None = None) -> tuple[Any, Any]:
    export(run, out, tokenizer=tokenizer)
    return ids_in(out)


def test_other_files_of_a_tokenizer_name_the_end_of_the_data(made: Path, tmp_path: Path) -> None:
    """What else they say stays."""
    shutil.copytree(made / "odd", tmp_path / "odd")
    (tmp_path / "odd" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<stop>", "unk_token": "a"}))
    run = write_run(tmp_path / "run", made / "bare", eot_id=1)
    export(run, tmp_path / "out", tokenizer=tmp_path / "odd")
    assert read(tmp_path / "out", "tokenizer_config") == {
        "eos_token": "</s>",
        "bos_token": "</s>",
        "pad_token": "</s>",
        "add_bos_token": True,
    }
    assert read(tmp_path / "out", "special_tokens_map") == {"eos_token": "</s>", "unk_token": "a"}


# Which ids exist.


def size_of(tokenizer: Path) -> int:
    """The number of its tokens, by the package itself."""
    import tokenizers

    count: int = tokenizers.Tokenizer.from_file(str(tokenizer)).get_vocab_size()
    assert 300 < count < 410
    return count


def with_holes(source: Path, out: Path) -> Path:
    """The tokenizer with one more token, whose id is far behind the others."""
    content = json.loads(source.read_text())
    content["model"]["vocab"]["far"] = 410
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(content))
    return out / "tokenizer.json"


def test_ids_without_a_token_are_suppressed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", made / "data")
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 0
    size = size_of(made / "tokenizer.json")
    said = f"generation stops at <|endoftext|> (0); {V - size} ids have no token and are suppressed"
    assert said in capsys.readouterr().out
    assert read(tmp_path / "out", "generation_config")["suppress_tokens"] == list(range(size, V))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| embedding rows without a token | {V - size}, which generation_config.json suppresses |" in card
    assert "| end of a document | `<|endoftext|>`, id 0, before each |" in card
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.manual_seed(0)
    options = {"max_new_tokens": 30, "do_sample": True, "top_k": 0, "temperature": 9.0, "pad_token_id": 0}
    ids = theirs.generate(torch.zeros(40, 1, dtype=torch.long), **options)
    assert int(ids.max()) < size
    assert len(ids.unique()) > size / 2


def test_holes_inside_a_vocabulary_are_suppressed_too(made: Path, tmp_path: Path) -> None:
    file = with_holes(made / "tokenizer.json", tmp_path / "holes")
    export(write_run(tmp_path / "run", None), tmp_path / "out", tokenizer=file)
    size = size_of(made / "tokenizer.json")
    unused = [*range(size, 410), *range(411, V)]
    assert read(tmp_path / "out", "generation_config")["suppress_tokens"] == unused
    tokenizer = from_file(file)
    assert (tokenizer.vocab_size, tokenizer.unused) == (411, tuple(range(size, 410)))
    model, _ = load_model(tmp_path / "run")
    options = SamplingOptions(max_new_tokens=30, num_samples=60, temperature=9.0)
    made_ = complete(model, [[0]], options, vocab_size=411, without=tokenizer.unused)
    seen = {token for sample in made_.samples for token in sample.tokens}
    assert 410 in seen
    assert not seen & set(unused)


def test_a_manifest_tells_how_many_tokens_there_are(made: Path, tmp_path: Path) -> None:
    """Of a tokenizer that has no tokenizer.json."""
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").unlink()
    export(write_run(tmp_path / "run", tmp_path / "data"), tmp_path / "out")
    assert ids_in(tmp_path / "out") == (0, 0)
    assert read(tmp_path / "out", "generation_config")["suppress_tokens"] == list(
        range(size_of(made / "tokenizer.json"), V)
    )


def test_no_ids_are_suppressed_where_nothing_tells_them(tmp_path: Path) -> None:
    export(write_run(tmp_path / "run", None), tmp_path / "out")
    assert "suppress_tokens" not in read(tmp_path / "out", "generation_config")


def test_holes_of_tiktoken(monkeypatch: pytest.MonkeyPatch) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([number]): number for number in range(256)}
    made = tiktoken.Encoding("odd", pat_str=r".", mergeable_ranks=ranks, special_tokens={"<|end|>": 260})
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["odd"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: made)
    found = from_tiktoken("odd")
    assert (found.vocab_size, found.unused) == (261, (256, 257, 258, 259))


# Imports.


def test_an_import_keeps_the_tokens_of_the_model(made: Path, tmp_path: Path) -> None:
    save("llama", tmp_path / "hf", torch.float32)
    change_config(tmp_path / "hf", bos_token_id=1, eos_token_id=[2, 9], pad_token_id=5)
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<s>": 1, "</s>": 2, "x": 9}}}))
    import_model(str(tmp_path / "hf"), tmp_path / "mine", torch.float32)
    export(tmp_path / "mine", tmp_path / "again")
    config = read(tmp_path / "again", "config")
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, [2, 9], 5]
    assert ids_in(tmp_path / "again") == ([2, 9], 1)
    tokens = read(tmp_path / "again", "tokenizer_config")
    assert (tokens["eos_token"], tokens["bos_token"]) == ("</s>", "<s>")
    assert len(read(tmp_path / "again", "generation_config")["suppress_tokens"]) == 41 - 3


def test_an_import_generates_with_its_own_tokenizer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the run does that was exported."""
    run = write_run(tmp_path / "run", made / "after")
    export(run, tmp_path / "out")
    import_model(str(tmp_path / "out"), tmp_path / "mine", torch.float32)
    texts = []
    for folder in (run, tmp_path / "mine"):
        words = [
            "generate",
            "--checkpoint",
            str(folder),
            "--prompt",
            "the",
            "--max_new_tokens",
            "20",
            "--num_samples",
            "40",
        ]
        assert main(words) == 0
        shown = capsys.readouterr()
        texts.append((shown.out, shown.err.rpartition("|")[2]))
    assert texts[0] == texts[1]
    assert " 0 stopped" not in texts[0][1]


def test_more_than_one_end_stops_generation(made: Path, tmp_path: Path) -> None:
    config = {"model": {}, "data": {}, "tokens": {"eos_token_id": [3, 4], "bos_token_id": 1}}
    assert tokenizer_of_run(config, made / "tokenizer.json").stop_tokens == (3, 4)


@pytest.mark.parametrize("value", [None, "2", True, -1, [], [None, "x"]])
def test_what_is_no_id_is_no_end(value: Any) -> None:
    assert TokenFacts.of_import({"eos_token_id": value}) == TokenFacts()


# A run from a model that has been imported, or from another run, on data that tells nothing of its tokens.


def _begin(source: Path, log_dir: Path, *flags: object) -> Path:
    trainer = Trainer(config_of(
        *("--init_from", source, "--log_dir", log_dir, "--use_mock_data", "--mock_data_num_samples", 8, "--seq_len", 8),
        *("--total_batch_size", 32, "--batch_size", 2, "--max_steps", 1, "--precision", "fp32"),
        *("--vocab_size", V, *flags),
    ))  # fmt: skip
    trainer.train()
    return trainer.log_dir


@pytest.mark.parametrize("source", ["hf", "own", "run", "trained"])
def test_a_run_inherits_the_tokens_of_what_it_began_with(ranks: Pools, made: Path, tmp_path: Path, source: str) -> None:
    """Also over two generations, and when what it began with is gone."""
    save("llama tied biased", tmp_path / "hf")
    shutil.copy(made / "odd" / "tokenizer.json", tmp_path / "hf")
    change_config(tmp_path / "hf", eos_token_id=[5, 9], bos_token_id=7, pad_token_id=3)
    begin, expected, prepend = tmp_path / source, ((5, 9), 7, 3), False
    if source in ("own", "run"):
        import_model(str(tmp_path / "hf"), tmp_path / "own", torch.float32)
    if source == "run":
        (begin, *_) = ranks(1).run(_begin, tmp_path / "own", tmp_path / "first")
    if source == "trained":
        write_run(begin, made / "data")
        expected, prepend = ((0,), 0, None), True
    (run, *_) = ranks(2).run(_begin, begin, tmp_path / "log", "--save_every_steps", 1, "--export_every", 1)
    for folder in {begin, tmp_path / "hf", tmp_path / "own"}:
        shutil.rmtree(folder, ignore_errors=True)
    _, config = load_model(run)
    found = tokenizer_of_run(config, None, run)
    assert (found.stop_tokens, found.prepend) == (expected[0], prepend)
    assert (run / "tokenizer.json").read_bytes() == (
        made / ("" if source == "trained" else "odd") / "tokenizer.json"
    ).read_bytes()
    export(run, tmp_path / "again")
    (during,) = (run / "export").glob("step_*")
    for out in (during, tmp_path / "again"):
        content = read(out, "config")
        ends = expected[0][0] if len(expected[0]) == 1 else list(expected[0])
        assert [content[f"{name}_token_id"] for name in ("eos", "bos", "pad")] == [ends, *expected[1:]]
        assert (out / "tokenizer.json").is_file()


def test_the_tokens_of_the_data_come_before_inherited_ones(ranks: Pools, made: Path, tmp_path: Path) -> None:
    save("llama tied biased", tmp_path / "hf")
    shutil.copy(made / "odd" / "tokenizer.json", tmp_path / "hf")
    change_config(tmp_path / "hf", eos_token_id=5)
    (run, *_) = ranks(1).run(_begin, tmp_path / "hf", tmp_path / "log", "--dataset_path", made / "data")
    _, config = load_model(run)
    found = tokenizer_of_run(config, None, run)
    assert (found.stop_tokens, found.prepend) == ((0,), True)
    assert (run / "tokenizer.json").read_bytes() == (made / "data" / "tokenizer.json").read_bytes()


def test_a_tokenizer_with_more_ids_than_the_model_is_not_inherited(ranks: Pools, made: Path, tmp_path: Path) -> None:
    """Some models come with one; it would make their exports fail."""
    save("llama tied biased", tmp_path / "hf")
    shutil.copy(made / "tokenizer.json", tmp_path / "hf")
    (run, *_) = ranks(1).run(
        _begin, tmp_path / "hf", tmp_path / "log", "--save_every_steps", 1, "--export_every", 1, "--vocab_size", 41
    )
    assert not (run / "tokenizer.json").exists()


@pytest.mark.parametrize("position", ["prepend", "append"])
def test_a_run_knows_its_tokens_when_its_data_is_gone(ranks: Pools, made: Path, tmp_path: Path, position: str) -> None:
    tokenize(made / "texts.jsonl", made / "tokenizer.json", tmp_path / "data", "--eot_position", position)
    run = ranks(2).run(_train, tmp_path / "log", "--dataset_path", tmp_path / "data")[0]
    shutil.rmtree(tmp_path / "data")
    _, config = load_model(run)
    found = tokenizer_of_run(config, None, run)
    assert (found.stop_tokens, found.prepend) == ((0,), position == "prepend")
    assert ids_in_export(run, tmp_path / "out") == (0, 0 if position == "prepend" else None)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_what_a_run_has_kept_comes_before_what_has_become_of_its_data(ranks: Pools, made: Path, tmp_path: Path) -> None:
    """Another tokenizer above the folder that is gone, and a flag that the manifest had overruled."""
    data = tmp_path / "texts" / "data"
    tokenize(made / "texts.jsonl", made / "tokenizer.json", data, "--eot_position", "append")
    run = ranks(1).run(_train, tmp_path / "log", "--dataset_path", data, "--eot_id", 7)[0]
    expected = tokenizer_of_run(load_model(run)[1], None, run)
    shutil.rmtree(data)
    shutil.copy(made / "odd" / "tokenizer.json", data.parent)
    found = tokenizer_of_run(load_model(run)[1], None, run)
    assert (found.stop_tokens, found.prepend) == (expected.stop_tokens, expected.prepend) == ((0,), False)
    assert found.tokenizer.name == expected.tokenizer.name == str(run / "tokenizer.json")
    export(run, tmp_path / "out")
    assert read(tmp_path / "out", "tokenizer")["model"] == read(made, "tokenizer")["model"]


def test_generation_needs_no_mixture_file(ranks: Pools, made: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mix.json"
    mixture.write_text(json.dumps({"sources": [{"name": "a", "path": str(made / "data"), "weight": 1}]}))
    run = ranks(1).run(_train, tmp_path / "log", "--dataset_path", mixture)[0]
    mixture.unlink()
    assert tokenizer_of_run(load_model(run)[1], None, run).stop_tokens == (0,)


def test_the_name_of_a_tokenizer_without_a_file_is_kept(
    ranks: Pools, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"some-encoding": from_file(made / "tokenizer.json")}
    monkeypatch.setattr(run_tokenizer, "from_tiktoken", known.__getitem__)
    shutil.copytree(made / "data", tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").unlink()
    path = tmp_path / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"] |= {"kind": "encoding_name", "name": "some-encoding"}
    path.write_text(json.dumps(manifest))
    run = ranks(1).run(_train, tmp_path / "log", "--dataset_path", tmp_path / "data")[0]
    shutil.rmtree(tmp_path / "data")
    found = tokenizer_of_run(load_model(run)[1], None, run)
    assert (found.tokenizer.name, found.stop_tokens) == (str(made / "tokenizer.json"), (0,))


@pytest.mark.parametrize("how", ["--resume_path", "again"])
def test_a_run_that_continues_keeps_what_was_known(ranks: Pools, made: Path, tmp_path: Path, how: str) -> None:
    (tmp_path / "data").mkdir()
    for file in (made / "data").glob("*.bin"):
        shutil.copy(file, tmp_path / "data")
    shutil.copy(made / "tokenizer.json", tmp_path / "data")
    flags = ("--dataset_path", tmp_path / "data", "--save_every_steps", 1)
    first = ranks(1).run(_train, tmp_path / "log", *flags)[0]
    known = read(first, "config")["config"]["tokens"]
    assert known["eos_token_id"] == 0
    (tmp_path / "data" / "tokenizer.json").unlink()
    log_dir, more = (tmp_path / "log", ()) if how == "again" else (tmp_path / "other", (how, first))
    second = ranks(1).run(_train, log_dir, *flags, *more, "--max_steps", 2)[0]
    assert read(second, "config")["config"]["tokens"] == known
    assert (second / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_left_behind_is_said(
    ranks: Pools, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("llama tied biased", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{")
    (run, *_) = ranks(1).run(_begin, tmp_path / "hf", tmp_path / "log")
    assert "the run keeps no copy of the tokenizer: " in ranks(1).run(_printed, tmp_path / "hf", tmp_path / "other")[0]
    assert not (run / "tokenizer.json").exists()


def test_rows_that_no_token_uses_are_said_if_they_are_many(ranks: Pools, made: Path, tmp_path: Path) -> None:
    flags = ("--dataset_path", made / "data")
    size = size_of(made / "tokenizer.json")
    said = ranks(1).run(_train_printed, tmp_path / "a", *flags, "--vocab_size", 1024)[0]
    (line,) = (line for line in said.splitlines() if "never used" in line)
    assert line.startswith(
        f"--vocab_size is 1024, but the tokenizer has {size} tokens: {1024 - size} rows are never used; "
    )
    works = int(line.split("--vocab_size ")[2].split()[0])
    assert size <= works < size + 64
    for vocab in (works, V):
        assert "never used" not in ranks(1).run(_train_printed, tmp_path / "a", *flags, "--vocab_size", vocab)[0]


def _train_printed(log_dir: Path, *flags: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        _train(log_dir, *flags)
    return shown.getvalue()


def _printed(source: Path, log_dir: Path) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        _begin(source, log_dir)
    return shown.getvalue()


def test_a_run_on_data_without_a_tokenizer_keeps_none(ranks: Pools, tmp_path: Path) -> None:
    run = ranks(1).run(_train, tmp_path / "log", "--use_mock_data", "--mock_data_num_samples", 32)[0]
    assert not (run / "tokenizer.json").exists()
    with pytest.raises(ConfigError, match="no tokenizer: "):
        tokenizer_of_run(load_model(run)[1], None, run)


def _train(log_dir: Path, *flags: object) -> Path:
    mock = ("--use_mock_data", "--mock_data_num_samples", 32)
    sizes = [flag for flag in TINY if flag not in mock]
    words = ("--log_dir", log_dir, "--vocab_size", V, "--max_steps", 1, "--warmup_steps", 0)
    trainer = Trainer(config_of(*sizes, *words, *flags))
    trainer.train()
    return trainer.log_dir
