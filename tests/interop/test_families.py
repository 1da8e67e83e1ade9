"""Every family against transformers' own model: what is loaded gives the same logits, loss and gradients, and what is
written back is the same bits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop import families
from tests.interop.families import MODELS, batch, save, their_loss
from tinytron.interop import families as hf_families
from tinytron.interop.architectures import facts, read_architecture, write_architecture
from tinytron.interop.families import FAMILIES, Family
from tinytron.interop.load import architecture_of, load_hf, load_pretrained, parts_of
from tinytron.interop.weights import HFWeights
from tinytron.model import GPT, ModelConfig


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    model = GPT(architecture_of(str(folder)), dtype=dtype, seed=None, **options)
    load_pretrained(model, str(folder))
    return model


def family_of(folder: Path) -> Family:
    return FAMILIES[json.loads((folder / "config.json").read_text())["model_type"]]


def their_gradients(model: Any, mine: GPT, family: Family) -> dict[str, torch.Tensor]:
    """In our shapes: a model of ours whose weights are their gradients."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads = {family.table["lm_head"][0] + ".weight" if n == "lm_head.weight" else n: g for n, g in grads.items()}
    holder = GPT(mine.config, dtype=torch.float64, seed=None)
    fused = {n: g for n, g in grads.items() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    with torch.no_grad():
        for part in parts_of(family, holder):
            if part.name in grads:
                part.view.copy_(grads[part.name].view(part.view.shape))
        for layer in holder.config.moe_layers:  # transformers 5 has them stacked in memory
            block = holder.blocks[layer].mlp
            prefix = f"model.layers.{layer}.mlp."
            block.router.weight.copy_(grads[prefix + "gate.weight"])
            for name in ("gate_up_proj", "down_proj"):
                getattr(block.experts, name).copy_(fused[f"{prefix}experts.{name}"])
    return {name: parameter.detach() for name, parameter in holder.named_parameters()}


def close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str) -> None:
    scale = float(theirs.detach().abs().max())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * scale, msg=lambda text: f"{what}: {text}")


# Rotary angles are fp32 in transformers whatever the model's type, so fp64 agrees to fp32's digits there.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_gradients_are_theirs(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    theirs, mine = save(name, tmp_path, dtype), load(tmp_path, dtype)
    tolerance = 1e-12 if name.startswith("gpt2") and dtype == torch.float64 else 1e-5
    ids, labels = batch()
    close(mine(ids), theirs(input_ids=ids, use_cache=False).logits, tolerance, "logits")
    loss, expected = mine(ids, labels), their_loss(theirs, ids, labels)
    close(loss.token, expected, tolerance, "loss")
    expected.backward()
    names, parameters = zip(*mine.named_parameters(), strict=True)
    config = dataclasses.replace(mine.config, moe_aux_loss_coef=0.0)
    alone = GPT(config, dtype=dtype, seed=None)
    load_pretrained(alone, str(tmp_path))
    names, parameters = zip(*alone.named_parameters(), strict=True)
    grads = torch.autograd.grad(alone(ids, labels).objective, parameters)
    wanted = their_gradients(theirs, mine, family_of(tmp_path))
    assert set(names) == set(wanted)
    for parameter_name, grad in zip(names, grads, strict=True):
        close(grad.double(), wanted[parameter_name], 3 * tolerance, parameter_name)


@pytest.mark.parametrize("name", MODELS)
def test_the_way_there_and_back_keeps_every_bit(tmp_path: Path, name: str) -> None:
    save(name, tmp_path, torch.float32)
    mine, weights = load(tmp_path, torch.float32), HFWeights(tmp_path)
    parts = parts_of(family_of(tmp_path), mine)
    assert {part.name: part.shape for part in parts} == weights.shapes
    for part in parts:
        assert torch.equal(part.view.reshape(part.shape), weights.get(part.name)), part.name


@pytest.mark.parametrize("name", MODELS)
def test_settings_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    save(name, tmp_path)
    config = architecture_of(str(tmp_path))
    family, values = write_architecture(config)
    _, again = read_architecture(values, "config.json")
    assert facts(again) == facts(config)
    if name == "qwen2 windows":  # which older versions read from max_window_layers
        del values["layer_types"]
        assert facts(read_architecture(values, "config.json")[1]) == facts(config)
    if name not in ("mistral no window",):  # which is a llama
        assert family == family_of(tmp_path)


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "mixtral"])
def test_a_larger_vocabulary_is_padded_with_the_mean(tmp_path: Path, name: str) -> None:
    theirs = save(name, tmp_path)
    config = dataclasses.replace(architecture_of(str(tmp_path)), vocab_size=64)
    mine = GPT(config, dtype=torch.float64, seed=None)
    load_pretrained(mine, str(tmp_path))
    ids, _ = batch()
    expected = theirs(input_ids=ids, use_cache=False).logits
    logits = mine(ids)
    close(logits[..., : families.VOCAB], expected, 1e-5, "logits")
    mean = expected.mean(-1, keepdim=True).expand(-1, -1, 64 - families.VOCAB)
    close(logits[..., families.VOCAB :], mean, 1e-5, "padding")


def test_routers_that_have_moved_begin_anew(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    mine = load(tmp_path)
    for layer in mine.moe_layers:
        layer.router.bias.fill_(0.5)
    load_pretrained(mine, str(tmp_path))
    assert not any(bool(layer.router.bias.any()) for layer in mine.moe_layers)


def test_each_tensor_is_read_once_and_into_place(tmp_path: Path) -> None:
    """Nothing is gathered first: a model of the size of memory can be loaded into itself."""
    save("mixtral", tmp_path, torch.float32)
    mine = GPT(architecture_of(str(tmp_path)), seed=None)
    places = {name: parameter.data_ptr() for name, parameter in mine.named_parameters()}
    weights, read = HFWeights(tmp_path), list[str]()
    get = weights.get
    weights.get = lambda name: (read.append(name), get(name))[1]  # type: ignore[method-assign]
    load_hf(mine, weights, FAMILIES["mixtral"], mine.config.vocab_size)
    assert sorted(read) == sorted(weights.shapes)
    assert {name: parameter.data_ptr() for name, parameter in mine.named_parameters()} == places


def test_every_family_is_one_file_in_the_list_and_two_rows_of_the_tests() -> None:
    files = {path.stem for path in Path(hf_families.__file__).parent.glob("*.py")}
    assert files - {"__init__", "family", "shared"} == set(FAMILIES)
    for family in FAMILIES.values():
        names = [family.architecture.removesuffix(end) for end in ("ForCausalLM", "LMHeadModel")]
        assert sum(prefix in names for prefix, _ in MODELS.values()) >= 2, family.model_type


def test_facts_leave_no_option_out() -> None:
    """Every option of the architecture is a fact, or one that is known not to be."""
    not_facts = {
        "dropout", "init_std", "moe_aux_loss_coef", "moe_aux_loss_scope", "moe_z_loss_coef", "moe_bias_update_rate",
        "bias",  # in the three biases
        "mup_base_width",  # a fact only if it is used; exports fold it
        "first_k_dense", "sliding_window_layers",  # in the lists by layer
    }  # fmt: skip
    config = ModelConfig(num_layer=3, use_moe=True, first_k_dense=1, rope_scaling="llama3", rope_original_block_size=8)
    yarn = dataclasses.replace(config, rope_scaling="yarn")
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert facts(config).keys() | facts(yarn).keys() == names - not_facts
