"""``--hf_model`` and ``--init_from`` with models of transformers whose family the GPT does not have: the same gradients and
steps as transformers and torch alone, on one rank and on two; saved, continued, exported and loaded; errors."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

from tests.helpers.ranks import Ranks
from tests.helpers.runs import Run, config_of, losses, read_logs
from tests.interop.test_init_from import FLAGS as ALL_FLAGS
from tests.interop.test_init_from import LR, STEPS, Rows, RowsTrainer
from tinytron.checkpoint import load_model
from tinytron.cli.main import main
from tinytron.errors import CheckpointError, ConfigError
from tinytron.interop.causal_lm import build_causal_lm
from tinytron.interop.load import architecture_of
from tinytron.model import GPT
from tinytron.training import Trainer
from tinytron.training.dry_run import plan_run
from tinytron.training.hf_model import KNOWN
from tinytron.training.presets import PRESETS
from tinytron.utils.sequences import IGNORE_INDEX

Pools = Callable[[int], Ranks]
FLAGS = ALL_FLAGS[: ALL_FLAGS.index("--moe_aux_loss_coef")]  # those after it describe the GPT
OPT: dict[str, Any] = {
    **{"model_type": "opt", "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 32, "num_attention_heads": 2},
    **{"vocab_size": 61, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "init_std": 0.1},
}
_LLAMA_LIKE = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 61},
    **{"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32},
}
# Families by what is special about their logits, and True if they are nevertheless a plain matrix product.
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "opt": (OPT, True),
    "gemma2": ({"model_type": "gemma2", **_LLAMA_LIKE, "final_logit_softcapping": 3.0}, False),
    "granite": ({"model_type": "granite", **_LLAMA_LIKE, "logits_scaling": 3.0}, False),
    "phi": ({"model_type": "phi", **_LLAMA_LIKE, "num_key_value_heads": 2}, False),  # its head has a bias
    "mamba": (
        {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 61, "state_size": 4},
        False,
    ),
}


def write(folder: Path, settings: dict[str, Any]) -> Path:
    """A folder with nothing but a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("z_loss_coef", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_transformers_logits(family: str, z_loss_coef: float) -> None:
    settings, fused = FAMILIES[family]
    model = build_causal_lm(settings, family, dtype=torch.float64, z_loss_coef=z_loss_coef)
    assert model.fused is fused
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (2, 12), generator=generator)
    labels = torch.randint(61, (2, 12), generator=generator)
    labels[0, 3] = IGNORE_INDEX
    weights = torch.rand(2, 12, generator=generator)
    sums = model(ids, labels, weights)
    sums.objective.backward()
    found = {name: p.grad.clone() for name, p in model.hf.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model.hf(input_ids=ids).logits.flatten(0, 1)
    nll = F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    counted = weights.flatten() * (labels.flatten() != IGNORE_INDEX)
    expected = (nll * counted).sum()
    (expected + z_loss_coef * (logits.logsumexp(1).square() * counted).sum()).backward()
    assert float(sums.token) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(sums.per_token.flatten(), nll.detach(), rtol=1e-12)
    for name, parameter in model.hf.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-10, atol=1e-12), name


class _OwnRows(RowsTrainer):
    def report(self) -> dict[str, torch.Tensor]:
        self.optimizer.finish_gather()
        return {name: p.detach().clone() for name, p in self.raw_model.named_parameters()}


def train(log_dir: Path, *flags: object) -> Run:
    """Train on ``Rows``. A job for the pool."""
    trainer = _OwnRows(config_of(*FLAGS, "--log_dir", log_dir, *flags))
    trainer.train()
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, trainer.report())


def _adamw_twin(settings: dict[str, Any], steps: int = STEPS) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same steps by transformers and torch alone, on all rows at once."""
    torch.manual_seed(1337)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**settings), dtype=torch.float64
    )
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    data, found = Rows(), []
    for _ in range(steps):
        logits = model(input_ids=data.ids).logits.flatten(0, 1)
        loss = F.cross_entropy(logits, data.labels.flatten(), ignore_index=IGNORE_INDEX)
        found.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return named, found


@pytest.mark.parametrize("zero", ["--use_distributed_optimizer", "--no-use_distributed_optimizer"])
@pytest.mark.sample(1)
def test_training_takes_the_steps_of_torch_alone(ranks: Pools, tmp_path: Path, zero: str) -> None:
    folder = write(tmp_path / "opt", OPT)
    expected, expected_losses = _adamw_twin(OPT)
    for world in (1, 2):
        result = ranks(world).run(train, tmp_path / f"log{world}", "--hf_model", folder, zero)[0]
        assert list(losses(result.log).values()) == pytest.approx(expected_losses, rel=1e-9)
        for name, parameter in expected.items():
            assert torch.allclose(result.extra[f"hf.{name}"], parameter, rtol=1e-7, atol=1e-9), name


def test_a_run_is_saved_continued_exported_and_loaded(ranks: Pools, tmp_path: Path) -> None:
    folder = write(tmp_path / "opt", OPT)
    flags = ("--hf_model", folder, "--export_every", 2, "--save_every_steps", 2, "--precision", "fp32")
    whole = ranks(2).run(train, tmp_path / "whole", *flags)[0]
    ranks(2).run(train, tmp_path / "parts", *flags, "--max_steps", 2)
    parts = ranks(2).run(train, tmp_path / "parts", *flags)[0]
    assert parts.log == whole.log
    assert all(torch.equal(parts.extra[name], value) for name, value in whole.extra.items())
    assert whole.records[-1]["mfu"] > 0

    ids = torch.arange(10)[None]
    exported = transformers.AutoModelForCausalLM.from_pretrained(whole.folder / "export" / f"step_{STEPS:05d}")
    trained = build_causal_lm(OPT, "opt")
    trained.load_state_dict(whole.extra, strict=False)
    with torch.no_grad():
        logits = trained.hf(input_ids=ids).logits
        assert torch.equal(exported(input_ids=ids).logits, logits)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            main(["export", "--checkpoint", str(whole.folder), "--out", str(tmp_path / "out")])
        assert "OPTForCausalLM" in shown.getvalue()
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(again(input_ids=ids).logits, logits)

    first = []
    for source in (tmp_path / "out", whole.folder):  # somebody's folder, and a run
        result = ranks(1).run(train, tmp_path / f"from_{source.name}", "--init_from", source, "--precision", "fp32")[0]
        first.append(losses(result.log)[1])
    before = losses(whole.log)
    assert first[0] == first[1] < before[STEPS]


def test_validation_and_compile(ranks: Pools, tmp_path: Path) -> None:
    folder = write(tmp_path / "opt", OPT)
    one, two = (
        ranks(world).run(_train_mock, tmp_path / str(world), "--hf_model", folder, "--do_val")[0] for world in (1, 2)
    )
    assert losses(one.log, "val")
    assert losses(two.log, "val") == pytest.approx(losses(one.log, "val"), rel=1e-5)
    full = ranks(1).run(_train_mock, tmp_path / "full", "--hf_model", folder, "--recompute", "full")[0]
    assert losses(full.log) == pytest.approx(losses(one.log), rel=1e-6)


def _train_mock(log_dir: Path, *flags: object) -> Run:
    trainer = Trainer(config_of(*_MOCK, "--log_dir", log_dir, *flags))
    trainer.train()
    log, records = read_logs(trainer.log_dir) if trainer.master_process else ("", [])
    return Run(trainer.log_dir, trainer.step, log, records, None)


_MOCK: tuple[object, ...] = (
    *("--use_mock_data", "--mock_data_num_samples", 32, "--precision", "fp32", "--total_batch_size", 96),
    *("--batch_size", 2, "--seq_len", 12, "--max_lr", 0.01, "--warmup_steps", 1, "--max_steps", 3, "--log_every", 1),
)


def test_known_names_and_known_families_become_the_gpt(tmp_path: Path) -> None:
    for name, known in KNOWN.items():
        config = config_of("--hf_model", name, "--seq_len", 64)
        options = PRESETS[known.preset].options
        assert config.model.hidden_size == options["hidden_size"]
        assert config.model.block_size == known.block_size
        assert config.model.dropout == known.dropout
    theirs = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=61)
    theirs.save_pretrained(tmp_path / "gpt2")
    for name in (tmp_path / "gpt2", tmp_path / "gpt2" / "config.json"):
        config = config_of("--hf_model", name)
        assert config.model.num_layer == 2
        assert (config.model.dropout, config.model.init_std) == (0.1, 0.02)
        assert config.train.seq_len == 32
    assert config_of("--hf_model", tmp_path / "gpt2", "--dropout", 0.3).model.dropout == 0.3
    GPT(architecture_of(str(tmp_path / "gpt2")), device="meta", seed=None)


def test_a_run_can_be_repeated_from_its_own_config(tmp_path: Path) -> None:
    config = config_of("--hf_model", write(tmp_path / "opt", OPT), "--seq_len", 16)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"config": config.as_dict()}))
    assert config_of("--config", file) == config


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ("--hidden_size", 64),
            "--hidden_size 64 describes Tinytron's GPT, but --hf_model {folder} is built by transf",
        ),
        (("--block_size", 64), "--block_size 64 describes Tinytron's GPT"),
        (("--preset", "tiny"), "--preset tiny and --hf_model {folder} both set the model's sizes; leave one out"),
        (("--init_from", "x"), "--hf_model {folder} is for a new model, and --init_from x has weights; leave one out"),
    ],
)
def test_contradictions_are_errors(tmp_path: Path, flags: tuple[object, ...], text: str) -> None:
    folder = write(tmp_path / "opt", OPT)
    with pytest.raises(ConfigError) as error:
        config_of("--hf_model", folder, *flags)
    assert str(error.value).startswith(text.format(folder=folder))


@pytest.mark.parametrize(
    ("flags", "works"),
    [
        (("--sep_size", 2), "--sep_size 1"),
        (("--ep_size", 2), "--ep_size 1"),
        (("--recompute", "selective"), "--recompute full"),
        (("--document_mask",), "--no-document_mask"),
        (("--attn_backend", "varlen", "--precision", "bf16"), "--attn_backend auto"),
    ],
)
def test_options_that_only_the_gpt_has(ranks: Pools, tmp_path: Path, flags: tuple[object, ...], works: str) -> None:
    folder = write(tmp_path / "opt", OPT)
    for error in ranks(2).run(_error_of, tmp_path, *_MOCK, "--hf_model", folder, *flags):
        assert error == (
            f"ConfigError: {' '.join(map(str, flags[:2]))} needs Tinytron's GPT, but transformers builds {folder} "
            f"(family opt); use {works}"
        )


def _error_of(log_dir: Path, *flags: object) -> str:
    """The error in which a run ends. A job for the pool."""
    try:
        Trainer(config_of("--log_dir", log_dir, *flags))
    except (ConfigError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_estimates_need_the_gpt(tmp_path: Path) -> None:
    folder = write(tmp_path / "opt", OPT)
    config = config_of("--hf_model", folder, "--seq_len", 32, "--total_batch_size", 64, "--batch_size", 2)
    with pytest.raises(ConfigError, match=r"--dry_run knows only Tinytron's GPT, but .* is built by transformers"):
        plan_run(config, 2)
    flags = ("--batch_size", "auto", "--log_dir", tmp_path / "log")
    with pytest.raises(ConfigError, match="--batch_size auto can only estimate the memory of Tinytron's own model"):
        Trainer(config_of(*_MOCK, "--hf_model", folder, *flags))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model_type": "no_such_family"}, "cannot read this config.json of a no_such_family"),
        ({"model_type": "vit"}, "transformers has no causal language model of the family vit"),
        ({**OPT, "num_attention_heads": 3}, "transformers cannot build this model"),
        ({}, "model_type"),
    ],
)
def test_descriptions_that_transformers_cannot_build(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    folder = write(tmp_path / "x", settings)
    with pytest.raises((ConfigError, CheckpointError), match=text):
        Trainer(config_of(*_MOCK, "--hf_model", folder, "--log_dir", tmp_path / "log"))


def test_tools_for_the_gpt_say_what_to_do(ranks: Pools, tmp_path: Path) -> None:
    folder = write(tmp_path / "opt", OPT)
    run = ranks(1).run(train, tmp_path / "log", "--hf_model", folder, "--precision", "fp32")[0]
    with pytest.raises(CheckpointError, match=r"holds a model of transformers .* tinytron export"):
        load_model(run.folder)
    incomplete = tmp_path / "half"
    model = build_causal_lm(OPT, "opt").hf
    weights = {
        name: value for name, value in model.state_dict().items() if "fc1" not in name and name != "lm_head.weight"
    }
    write(incomplete, OPT)
    save_file(weights, incomplete / "model.safetensors", metadata={"format": "pt"})
    error = ranks(2).run(_error_of, tmp_path / "log2", *_MOCK, "--init_from", incomplete)
    assert error[0] == error[1]
    assert "lacks 4 weights of its model" in error[0]


def test_positions_of_documents_are_an_error() -> None:
    model, ids = build_causal_lm(OPT, "opt"), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="positions that begin again inside a row need Tinytron's GPT"):
        model(ids, ids, positions=ids)
