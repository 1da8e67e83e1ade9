"""Exported folders: transformers opens them and computes what we compute; they are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import corpus
from tests.helpers.ranks import Ranks
from tests.helpers.runs import TINY, config_of, read_logs
from tests.interop.families import MODELS, batch, save
from tinytron.checkpoint import complete_checkpoints
from tinytron.checkpoint.tools import consolidate
from tinytron.cli.export import byte_count
from tinytron.cli.main import main
from tinytron.data.shards import open_shard
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop import export as exporting
from tinytron.interop.export import export
from tinytron.interop.importing import import_model
from tinytron.interop.tokenizer import tokenizer_of_data
from tinytron.interop.weights import HFWeights
from tinytron.model import GPT, ModelConfig
from tinytron.training import Trainer
from tinytron.utils.model import count_parameters


def opened(folder: Path, dtype: torch.dtype | None = None) -> Any:
    transformers = pytest.importorskip("transformers")
    options: dict[str, Any] = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    if dtype is not None:
        options["dtype"] = dtype
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def write_run(folder: Path, model: GPT) -> Path:
    """The folder of an import that happens to be ``model``."""
    folder.mkdir()
    config = {field: getattr(model.config, field) for field in ModelConfig.__dataclass_fields__}
    (folder / "config.json").write_text(json.dumps({"config": {"model": config}}))
    torch.save(model.state_dict(), folder / "00000_model.pt")
    return folder


def small(**options: Any) -> GPT:
    sizes: dict[str, Any] = {
        "block_size": 32, "vocab_size": 41, "num_layer": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 16, "intermediate_size": 20, "init_std": 0.3,
    }  # fmt: skip
    return GPT(ModelConfig(**sizes | options))


EXPERTS: dict[str, Any] = {
    "use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_again(tmp_path: Path, name: str) -> None:
    """The same bits under the same names, and what transformers computes from them."""
    theirs = save(name, tmp_path / "theirs", torch.float32)
    import_model(str(tmp_path / "theirs"), tmp_path / "mine", torch.float32)
    export(tmp_path / "mine", tmp_path / "again")
    before, after = HFWeights(tmp_path / "theirs"), HFWeights(tmp_path / "again")
    assert before.shapes == after.shapes
    assert all(torch.equal(before.get(tensor), after.get(tensor)) for tensor in before.shapes)
    ids, _ = batch()
    again = opened(tmp_path / "again")
    assert torch.equal(again(input_ids=ids).logits, theirs(input_ids=ids).logits)
    if name != "mistral no window":  # which is a llama
        assert type(again) is type(theirs)


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"tied_lm_head": False, "bias": True}, "LlamaForCausalLM"),
        ({"qk_norm": True}, "Qwen3ForCausalLM"),
        ({"sliding_window": 5}, "MistralForCausalLM"),
        ({"qkv_bias": True, "sliding_window": 5, "sliding_window_layers": (0,)}, "Qwen2ForCausalLM"),
        (EXPERTS, "MixtralForCausalLM"),
        (EXPERTS | {"norm_topk_prob": False, "qk_norm": True, "first_k_dense": 1}, "Qwen3MoeForCausalLM"),
    ],
)
def test_our_own_architecture(tmp_path: Path, options: dict[str, Any], architecture: str) -> None:
    model = small(**options)
    made = export(write_run(tmp_path / "run", model), tmp_path / "out")
    theirs = opened(tmp_path / "out")
    assert made.architecture == architecture == type(theirs).__name__
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(model.config).total
    ids, _ = batch()
    torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        (EXPERTS | {"num_shared_experts": 1, "qk_norm": True}, "qwen3_moe, lacks --num_shared_experts 1"),
        (EXPERTS | {"moe_router_score": "sigmoid"}, "mixtral, lacks --moe_router_score sigmoid"),
        (EXPERTS | {"moe_bias_update_rate": 0.5}, "mixtral, lacks --moe_bias_update_rate 0.5"),
        (EXPERTS | {"norm_topk_prob": False}, "mixtral, lacks --no-norm_topk_prob"),
        ({"norm_type": "layer"}, "llama, lacks --norm_type layer"),
        ({"parallel_residual": True}, "llama, lacks --parallel_residual"),
        ({"sliding_window": 4, "sliding_window_layers": (1,)}, "lacks --sliding_window 4, --sliding_window_layers 1"),
        (
            {"position_type": "learned", "mlp_type": "gelu", "norm_type": "layer", "bias": True},
            "--num_key_value_heads 2",
        ),
    ],
)
def test_what_no_family_has_is_named(tmp_path: Path, options: dict[str, Any], lacks: str) -> None:
    run = write_run(tmp_path / "run", small(**options))
    with pytest.raises(ConfigError, match=r"^no Hugging Face family has this architecture; .+$") as caught:
        export(run, tmp_path / "out")
    assert lacks in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_bias_that_moved_is_not_lost(tmp_path: Path) -> None:
    model = small(**EXPERTS)
    model.moe_layers[1].router.bias[2] = 0.25
    with pytest.raises(ConfigError, match=r"blocks.1.mlp.router.bias is not zero \(--moe_bias_update_rate\)"):
        export(write_run(tmp_path / "run", model), tmp_path / "out")


@pytest.mark.parametrize("limit", [1, 3000, 10**9])
def test_files_are_no_larger_than_asked_for(tmp_path: Path, limit: int) -> None:
    model = small()
    made = export(write_run(tmp_path / "run", model), tmp_path / "out", max_shard_size=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == made.files
    sizes = {path.name: sum(tensor.numel() * 4 for tensor in _tensors(path)) for path in files}
    assert sum(sizes.values()) == made.bytes
    assert all(size <= limit or len(_tensors(tmp_path / "out" / name)) == 1 for name, size in sizes.items())
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    if index.exists():
        assert json.loads(index.read_text())["metadata"] == {"total_size": made.bytes}
    ids, _ = batch()
    torch.testing.assert_close(model(ids), opened(tmp_path / "out")(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_a_file_may_be_exactly_full() -> None:
    assert exporting._shards({"a": 2, "b": 2, "c": 9, "d": 2}, 4) == [["a", "b"], ["c"], ["d"]]


def _tensors(path: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(path).values())


def test_the_type_of_the_weights_is_chosen(tmp_path: Path) -> None:
    model = small()
    run = write_run(tmp_path / "run", model)
    export(run, tmp_path / "out", dtype=torch.bfloat16)
    weights = HFWeights(tmp_path / "out")
    assert set(weights.dtypes.values()) == {torch.bfloat16}
    assert torch.equal(weights.get("model.embed_tokens.weight"), model.wte.weight.detach().bfloat16())
    assert opened(tmp_path / "out").dtype == torch.bfloat16
    import_model(str(tmp_path / "out"), tmp_path / "half", torch.float16)
    assert torch.load(tmp_path / "half" / "00000_model.pt")["wte.weight"].dtype == torch.float16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["source"] == str(tmp_path / "out")


def test_the_card_tells_the_parameters_of_a_token_apart(tmp_path: Path) -> None:
    model = small(**EXPERTS)
    export(write_run(tmp_path / "run", model), tmp_path / "out")
    count = count_parameters(model.config)
    assert count.active < count.total
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| parameters | {count.total:,} ({count.active:,} per token) |" in card


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", small())
    (tmp_path / f".out.tmp.{os.getpid()}").mkdir()  # of a killed process with the same number
    (tmp_path / f".out.tmp.{os.getpid()}" / "old").touch()
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", recorded_fsync)
        patch.setattr(os, "replace", recorded_replace)
        export(run, tmp_path / "out")
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(order[:-3]) == sorted(names)
    assert order[-3:] == [f".out.tmp.{os.getpid()}", "rename", tmp_path.name]
    assert {"config.json", "model.safetensors"} < set(names)
    assert "old" not in names


# Runs, through the command line.

SEQ = 12
EXPERT_FLAGS = ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8)


def _train(data: Path, log_dir: Path, *flags: object) -> tuple[Path, list[dict[str, Any]]]:
    """A few steps on ``data``, validated at the end. A job for the pool."""
    more = ("--dataset_path", data, "--no-use_mock_data", "--vocab_size", 448, "--max_steps", 6, "--do_val")
    trainer = Trainer(config_of(*TINY, "--log_dir", log_dir, *more, *flags))
    trainer.train()
    return trainer.log_dir, read_logs(trainer.log_dir)[1] if trainer.master_process else []


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Token shards of a few documents, some for validation, and their tokenizer."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("text")
    texts = corpus.write_jsonl(folder / "texts.jsonl", corpus.make_texts(80))
    tokenizer = corpus.make_tokenizer(folder / "tokenizer.json")
    corpus.tokenize(texts, tokenizer, folder / "shards", "--val_fraction", 0.3)
    return folder / "shards", tokenizer


@pytest.mark.parametrize(
    ("flags", "world"),
    [
        ((), 1),
        (
            ("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8, "--ep_size", 2),
            2,
        ),
    ],
)
@pytest.mark.sample(1)
def test_transformers_validates_as_the_run_did(
    ranks: Callable[[int], Ranks], shards: tuple[Path, Path], tmp_path: Path, flags: tuple[object, ...], world: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    data, tokenizer_file = shards
    run, records = ranks(world).run(_train, data, tmp_path / "log", *flags)[0]
    (logged,) = (record for record in records if record["stage"] == "val")
    assert main(["export", "--checkpoint", str(run), "--out", str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path / 'hf'}: ")
    theirs = opened(tmp_path / "hf")
    held_out = [torch.tensor(open_shard(path).tolist()) for path in sorted(data.glob("val_*.bin"))]
    rows = [part[i : i + SEQ + 1] for part in held_out for i in range(0, len(part) - SEQ, SEQ)]
    assert len(rows) * SEQ == logged["tokens"] > 200
    with torch.no_grad():
        loss = sum(float(theirs(input_ids=row[None], labels=row[None]).loss) for row in rows) / len(rows)
    assert loss == pytest.approx(logged["loss"], abs=1e-4)
    # And the text becomes the tokens that the run saw.
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = corpus.make_texts(3)[0]
    assert fast(text, add_special_tokens=False).input_ids == corpus.Naive(tokenizer_file).documents([text])[0][1:]
    assert (fast.eos_token, fast.bos_token) == (corpus.EOT, corpus.EOT)
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == fast.eos_token_id
    assert theirs.config.bos_token_id == fast.bos_token_id


def test_a_run_has_many_names(ranks: Callable[[int], Ranks], shards: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder, a checkpoint, and a consolidated file, which has the fp32 main weights of a bf16 run."""
    run, _ = ranks(1).run(_train, shards[0], tmp_path / "log", "--save_every_steps", 3, "--precision", "bf16")[0]
    (consolidated,) = [consolidate(files) for files in complete_checkpoints(run) if files.step == 6]
    for name, source in (("run", run), ("three", run / "00003_model.pt"), ("six", run / "00006_model.pt")):
        export(source, tmp_path / name)
    export(consolidated, tmp_path / "main")
    export(run, tmp_path / "wide", dtype=torch.float32)
    found = {n: HFWeights(tmp_path / n) for n in ("run", "three", "six", "main", "wide")}
    name = "model.layers.1.mlp.up_proj.weight"
    values = {n: weights.get(name) for n, weights in found.items()}
    assert torch.equal(values["run"], values["six"])
    assert not torch.equal(values["run"], values["three"])
    assert (values["run"].dtype, values["main"].dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(values["main"].bfloat16(), values["run"])
    assert not torch.equal(values["main"], values["wide"])
    assert torch.equal(values["wide"], values["run"].float())
    card = (tmp_path / "three" / "README.md").read_text()
    assert "| optimizer steps | 3 |" in card
    assert "| training tokens | 288 |" in card


# What goes wrong.


def refusal(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(word) for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_errors_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "run", small()), tmp_path / "out"

    def export_error(*more: object) -> str:
        return refusal("export", "--checkpoint", run, "--out", out, *more, capsys=capsys)

    assert export_error("--tokenizer", run) == (
        f"error: --tokenizer {run} is neither a tokenizer.json nor a folder with a tokenizer's files"
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 41}}}))
    assert export_error("--tokenizer", tmp_path / "tokenizer.json") == (
        f"error: --tokenizer {tmp_path}/tokenizer.json has ids up to 41, but the model has 41 tokens; "
        "use the one it was trained with"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    assert export_error("--tokenizer", tmp_path / "tokenizer.json") == (
        f"error: --tokenizer {tmp_path}/tokenizer.json cannot be read (KeyError: 'model')"
    )
    assert export_error("--max_shard_size", "0") == "error: --max_shard_size 0 must be at least 1; use 5GB"
    assert export_error("--max_shard_size", "5XB") == (
        "error: argument --max_shard_size: invalid size: '5XB'; use 5GB; see --help"
    )
    (tmp_path / "tokenizer.json").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    out.mkdir()
    (out / "precious").touch()
    assert export_error() == f"error: --out {out} already exists; use another name, or remove it"
    text = refusal("import", run, "--out", tmp_path / "new", capsys=capsys)
    assert text == f"error: {run} already has Tinytron's format; use it with --init_from"
    text = refusal("import", "no such/name/here", "--out", tmp_path / "new", capsys=capsys)
    assert text == (
        "error: no such/name/here is neither a model folder nor a name on the hub, such as openai-community/gpt2"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    text = refusal("export", "--checkpoint", empty, "--out", tmp_path / "new", capsys=capsys)
    assert text.startswith(
        f"error: {empty} has no checkpoint: use a run folder (with *_model.pt; --debug and --no-do_save "
    )


def test_a_tokenizer_is_taken_along(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 40}]}))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "weights.bin").write_text("not wanted")
    export(write_run(tmp_path / "run", small()), tmp_path / "out", tokenizer=folder)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} < names
    assert "weights.bin" not in names
    (folder / "tokenizer_config.json").unlink()
    export(tmp_path / "run", tmp_path / "made", tokenizer=folder)
    config = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["clean_up_tokenization_spaces"]) == (32, False)
    assert json.loads((tmp_path / "made" / "generation_config.json").read_text())["do_sample"] is True


def test_the_tokenizer_of_a_mixture_is_that_of_its_first_source_with_one(
    shards: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    sources = [{"name": name, "path": str(path), "weight": 1} for name, path in (("a", "bare"), ("b", shards[0]))]
    (tmp_path / "mixture.json").write_text(json.dumps({"sources": sources}))
    found, plain = (tokenizer_of_data(str(path), 448) for path in (tmp_path / "mixture.json", shards[0]))
    assert found == plain
    assert found.files == (shards[0] / "tokenizer.json",)
    assert tokenizer_of_data(str(tmp_path / "gone.json"), 448).files == ()
    with pytest.raises(
        ConfigError, match=r"^the tokenizer of .+mixture.json has ids up to \d+, but the model has 7 tokens"
    ):
        tokenizer_of_data(str(tmp_path / "mixture.json"), 7)


def test_a_folder_of_something_else_is_no_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", small())
    (run / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"config.json does not say its num_attention_heads"):  # as of Hugging Face
        export(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"config.json does not describe a model \(it has no config.model\)"):
        export(run / "00000_model.pt", tmp_path / "out")
    (run / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"00000_model.pt needs its run's config.json next to it, but there is none"
    ):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("after", ["weights", "settings"])
def test_a_failing_disk_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_safetensors" if after == "weights" else "_write_settings", full)
    with pytest.raises(OSError, match="No space left"):
        export(write_run(tmp_path / "run", small()), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_changed_checkpoint_is_not_exported(
    ranks: Callable[[int], Ranks], shards: tuple[Path, Path], tmp_path: Path
) -> None:
    run, _ = ranks(1).run(_train, shards[0], tmp_path / "log")[0]
    path = run / "00006_model.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"00006_model.pt cannot be read \(its SHA-256 differs"):
        export(run, tmp_path / "out")


def test_weights_of_another_model_are_not_exported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", small())
    torch.save(small(hidden_size=32).state_dict(), run / "00000_model.pt")
    with pytest.raises(CheckpointError, match=r"is from a different model \(\d+ differences\)"):
        export(run, tmp_path / "out")
    torch.save({"optimizer": {}}, run / "00000_model.pt")
    with pytest.raises(CheckpointError, match=r"00000_model.pt does not hold GPT weights \(no wte.weight\)"):
        export(run, tmp_path / "out")
    torch.save({"wte.weight": [1.0]}, run / "00000_model.pt")
    with pytest.raises(CheckpointError, match=r"00000_model.pt holds wte.weight, which is not a tensor"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5kb", 1500), ("2GiB", 2**31), ("17", 17), ("300 MB", 3 * 10**8)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert byte_count(text) == size


def test_weights_that_the_precision_cannot_hold_or_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp.down_proj.weight.mul_(1e6)
    run = write_run(tmp_path / "run", model)
    with pytest.raises(
        ConfigError, match=r"--dtype fp16 has a maximum of 65504, .*down_proj.weight contains .*; use --dtype bf16"
    ):
        export(run, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    assert export(run, tmp_path / "bf16", dtype=torch.bfloat16).files == 1
    with torch.no_grad():
        model.blocks[0].mlp.down_proj.weight.abs_().neg_()
    with pytest.raises(ConfigError, match="--dtype fp16 has a maximum of 65504"):
        export(write_run(tmp_path / "negative", model), tmp_path / "out", dtype=torch.float16)
    with torch.no_grad():
        model.final_norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"norm.weight has NaN or infinite weights; export an earlier checkpoint"):
        export(write_run(tmp_path / "broken", model), tmp_path / "out")
