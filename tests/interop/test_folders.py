"""Folders in every form that Hugging Face's have, and in forms they should not have: an error names what is wrong, and
nothing else happens."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.interop.families import batch, change_config, make, save
from tests.interop.test_families import close
from tinytron.errors import CheckpointError, ConfigError, TinytronError
from tinytron.interop.load import architecture_of, load_pretrained
from tinytron.interop.weights import HFWeights
from tinytron.model import GPT


def load(folder: Path | str) -> GPT:
    model = GPT(architecture_of(str(folder)), seed=None)
    load_pretrained(model, str(folder))
    return model


def refusal(folder: Path | str, kind: type[TinytronError] = CheckpointError) -> str:
    with pytest.raises(kind, match=r"^.+$") as caught:
        load(folder)
    return str(caught.value)


def check(folder: Path | str, theirs: Any) -> None:
    ids, _ = batch()
    close(load(folder)(ids), theirs(input_ids=ids).logits, 1e-5, "logits")


def rewrite(folder: Path, change: Any) -> None:
    """Give the folder's tensors to ``change`` and save what it returns."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)


# Forms.


def test_several_files_with_an_index(tmp_path: Path) -> None:
    theirs = save("llama", tmp_path, torch.float32, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    check(tmp_path, theirs)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pickled_weights(tmp_path: Path, name: str, shards: int) -> None:
    theirs = save(name, tmp_path, torch.float32)
    weights = HFWeights(tmp_path)
    tensors = {tensor: weights.get(tensor).clone() for tensor in weights.shapes}
    (tmp_path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        places = {tensor: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, tensor in enumerate(names)}
        for file in set(places.values()):
            torch.save({n: tensors[n] for n in names if places[n] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    check(tmp_path, theirs)


def test_pickles_of_before_torch_1_6(tmp_path: Path) -> None:
    theirs = save("llama", tmp_path, torch.float32)
    weights = HFWeights(tmp_path)
    tensors = {tensor: weights.get(tensor).clone() for tensor in weights.shapes}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    check(tmp_path, theirs)


def test_of_both_forms_the_safe_one_is_read(tmp_path: Path) -> None:
    theirs = save("llama", tmp_path, torch.float32)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not to be unpickled")
    check(tmp_path, theirs)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama tied biased"])
def test_files_of_the_bare_model_and_old_tables(tmp_path: Path, name: str) -> None:
    """As openai-community/gpt2 and old versions of Pythia are on the hub."""
    theirs = save(name, tmp_path, torch.float32)
    base = {"gpt2": "transformer.", "neox": "gpt_neox."}.get(name, "model.")
    old = {
        "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)},
        "neox": {f"layers.1.attention.{n}": torch.ones(2) for n in ("bias", "masked_bias", "rotary_emb.inv_freq")},
    }.get(name, {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})  # fmt: skip
    rewrite(tmp_path, lambda tensors: {n.removeprefix(base): t for n, t in tensors.items()} | old)
    check(tmp_path, theirs)


def test_a_tied_head_may_be_saved_all_the_same(tmp_path: Path) -> None:
    theirs = save("qwen2", tmp_path, torch.float32)
    embedding = theirs.model.embed_tokens.weight.detach()
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": embedding.clone()})
    check(tmp_path, theirs)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": embedding + 1})
    assert "(1 differences): lm_head.weight [41, 16] is unknown to this qwen2" in refusal(tmp_path)


@pytest.mark.parametrize(("name", "embedding"), [("qwen2", "model.embed_tokens"), ("gpt2", "transformer.wte")])
def test_a_tied_tensor_may_have_the_name_of_the_head_alone(tmp_path: Path, name: str, embedding: str) -> None:
    theirs = save(name, tmp_path, torch.float32)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors.pop(f"{embedding}.weight")})
    check(tmp_path, theirs)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", ["llama llama3", "llama linear", "neox", "neox in turn", "mixtral"])
def test_settings_of_old_and_new_versions(tmp_path: Path, name: str, version: int) -> None:
    theirs = save(name, tmp_path, torch.float32)
    rope = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]
    if version == 4:
        theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", None)
        scaling = rope if rope["rope_type"] != "default" else None
        if scaling is not None:
            scaling["type"] = scaling["rope_type"]
        old = {"rotary_emb_base": theta, "rotary_pct": part} if name.startswith("neox") else {"rope_theta": theta}
        change_config(tmp_path, rope_parameters=None, rope_scaling=scaling, **old)
    check(tmp_path, theirs)


# The hub.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, list[str]]]:
    """A hub with one model; what it was asked for."""
    save("llama", tmp_path / "hub", torch.float32)
    asked: list[tuple[str, Any, list[str]]] = []

    def snapshot_download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        if repository != "owner/tiny":
            raise OSError("404 Client Error\nand much more")
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for path in (tmp_path / "hub").glob(pattern):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_a_name_is_fetched(hub: list[tuple[str, Any, list[str]]], tmp_path: Path) -> None:
    assert architecture_of("owner/tiny@v1").num_layer == 2
    assert hub == [("owner/tiny", "v1", ["config.json"])]  # no weights yet
    load("owner/tiny")
    assert hub[-1] == ("owner/tiny", None, ["config.json", "*.index.json", "*.safetensors"])


def test_pickled_weights_are_fetched_where_there_are_no_others(
    hub: list[tuple[str, Any, list[str]]], tmp_path: Path
) -> None:
    weights = HFWeights(tmp_path / "hub")
    torch.save({n: weights.get(n).clone() for n in weights.shapes}, tmp_path / "hub" / "pytorch_model.bin")
    (tmp_path / "hub" / "model.safetensors").unlink()
    load("owner/tiny@v1")
    assert hub[-1] == ("owner/tiny", "v1", ["config.json", "pytorch_model*.bin"])


def test_what_the_hub_does_not_give_is_told(hub: list[Any]) -> None:
    text = "owner/none is not a local folder, and the hub download failed (404 Client Error); use a local folder"
    assert refusal("owner/none", ConfigError) == text


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    text = "a/b is not a local folder; to download it from the hub: pip install huggingface_hub; or give a folder"
    assert refusal("a/b", ConfigError) == text


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = f"{tmp_path}/file is neither a model folder nor a name on the hub, such as openai-community/gpt2"
    assert refusal(tmp_path / "file", ConfigError) == text


# What does not fit.


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save("llama", tmp_path, torch.float32)
    return tmp_path


def test_differences_are_listed_with_their_number(llama: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 16)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 16, dtype=torch.int8)
        return tensors | {"model.layers.2.input_layernorm.weight": torch.ones(16)}

    rewrite(llama, change)
    assert refusal(llama) == (
        f"{llama} does not match the llama that its config.json describes (4 differences): "
        "model.layers.0.mlp.up_proj.weight is [3, 16], expected [20, 16]; "
        "model.layers.0.self_attn.q_proj.weight has type int8, expected floats; "
        "model.layers.2.input_layernorm.weight [16] is unknown to this llama"
    )


def test_an_untied_head_must_be_there(llama: Path) -> None:
    rewrite(llama, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    assert "(1 differences): lm_head.weight [41, 16] is missing" in refusal(llama)


def test_nothing_is_copied_from_weights_that_do_not_fit(llama: Path) -> None:
    rewrite(llama, lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    model = GPT(architecture_of(str(llama)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_pretrained(model, str(llama))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("no json", "model.safetensors.index.json cannot be read (Expecting value"),
        ("[]", "model.safetensors.index.json does not hold a JSON object"),
        ("{}", "model.safetensors.index.json does not map tensors to files in a weight_map"),
        ('{"weight_map": {"a": 3}}', "does not map tensors to files in a weight_map"),
        (
            '{"weight_map": {"a": "../x.bin"}}',
            "says that a is in '../x.bin', which is not a weights file in its folder",
        ),
        ('{"weight_map": {"a": "x.pkl"}}', "says that a is in 'x.pkl', which is not a weights file in its folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "lacks 1 of the 1 weights files: x.safetensors"),
        ('{"weight_map": {"a": "model.safetensors"}}', "model.safetensors lacks a, which the index assigns to it"),
    ],
)
def test_a_damaged_index_is_told(llama: Path, index: str, text: str) -> None:
    (llama / "model.safetensors.index.json").write_text(index)
    assert text in refusal(llama)


def test_pickles_hold_tensors_only(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    torch.save({"a": 3}, llama / "pytorch_model.bin")
    assert refusal(llama) == f"{llama}/pytorch_model.bin contains a, which is not a tensor"
    torch.save({"a": Path("x")}, llama / "pytorch_model.bin")  # code, to an unpickler
    assert "pytorch_model.bin cannot be read" in refusal(llama)


# Damage of any kind: the right weights, or an error of ours.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make("mixtral", torch.float32).save_pretrained(folder, max_shard_size="20KB")
    return folder


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_an_error_of_ours(whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    kind = data.draw(st.sampled_from(["gone", "cut", "flipped", "value"]))
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "flipped" or path.suffix != ".json":
        place = data.draw(st.integers(0, min(len(content), 4000) - 1))
        path.write_bytes(content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :])
    else:
        values = json.loads(content)
        table = values["weight_map"] if "weight_map" in values and data.draw(st.booleans()) else values
        table[data.draw(st.sampled_from(sorted(table)))] = data.draw(JSON)
        path.write_text(json.dumps(values))
    with contextlib.suppress(TinytronError):
        assert sum(p.numel() for p in load(folder).parameters()) < 10**6
    shutil.rmtree(folder)
