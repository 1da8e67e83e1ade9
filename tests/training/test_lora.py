"""LoRA: steps equal those of the peft package on transformers' model, on every layout; merging, export, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import config_of, losses, read_logs
from tests.interop import families
from tests.interop.families import VOCAB, save
from tests.interop.test_init_from import FLAGS, STEPS, RowsTrainer, run, steps_of
from tinytron.checkpoint.load import read_file
from tinytron.cli.main import main
from tinytron.errors import ConfigError
from tinytron.interop import load_pretrained
from tinytron.interop.adapters import export_adapters
from tinytron.model import GPT, ModelConfig
from tinytron.model.lora import Adapters, add_adapters, merged

Pools = Callable[[int], Ranks]
LORA: tuple[object, ...] = ("--lora_rank", 3, "--lora_alpha", 6, "--max_lr", 0.02)


def with_peft(hf: Any, folder: Path, *, train: bool = False) -> Any:
    """transformers' model with the adapters in ``folder``, in fp64."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(hf, str(folder), is_trainable=train, autocast_adapter_dtype=False)


def their_steps(model: Any) -> list[float]:
    """The run's steps by torch's AdamW on the trainable parameters; returns the losses before each."""
    mine = [p for p in model.parameters() if p.requires_grad]
    return steps_of(torch.optim.AdamW(mine, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), model)


EXPORTED = ("--save_at_start", "--save_every_steps", STEPS, "--export_every", STEPS)
CASES: list[tuple[str, int, tuple[object, ...]]] = [
    ("llama", 1, ()),
    ("llama tied biased", 2, ("--lora_targets", "q_proj", "v_proj", "down_proj")),
    ("qwen3 windows", 2, ("--sep_size", 2, "--lora_targets", "attn")),
    ("mixtral", 2, ("--ep_size", 2)),
    ("qwen3_moe some layers", 2, ("--ep_size", 2, "--recompute", "full", "--lora_targets", "attn")),
    ("llama", 2, ("--no-use_distributed_optimizer", "--recompute", "selective")),
    ("qwen2", 4, ("--sep_size", 2)),
    ("neox", 1, ("--lora_targets", "mlp", "out_proj")),
    ("gpt2", 1, ("--lora_targets", "mlp", "out_proj")),
]


@pytest.mark.parametrize(("name", "world", "flags"), CASES)
@pytest.mark.sample(5)
def test_steps_are_those_of_peft(
    ranks: Pools, tmp_path: Path, name: str, world: int, flags: tuple[object, ...]
) -> None:
    theirs = save(name, tmp_path / "hf")
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    folder, logged = ranks(world).run(run, tmp_path / "hf", tmp_path / "log", *LORA, *EXPORTED, *flags)[0]
    for step in (0, STEPS):
        export_adapters(folder / f"{step:05d}_model.pt", tmp_path / f"adapters{step}")
    twin = with_peft(theirs, tmp_path / "adapters0", train=True)
    expected = their_steps(twin)
    assert list(logged.values()) == pytest.approx(expected, rel=1e-5)
    assert expected[0] - expected[-1] > 1e-2
    mine = with_peft(families.make(name), tmp_path / f"adapters{STEPS}")
    trained = dict(twin.named_parameters())
    compared = 0
    for key, parameter in mine.named_parameters():
        if "lora_" in key:
            # Their rotary angles are fp32; AdamW makes large steps of small gradients, too.
            torch.testing.assert_close(parameter, trained[key], rtol=2e-3, atol=2e-4)
            compared += 1
    assert compared == sum(p.requires_grad for p in twin.parameters())
    # Nothing else has moved, and the export of the run is the model with the adapters merged.
    for key, value in twin.unload().state_dict().items():
        assert torch.equal(value, before[key]), key
    transformers = pytest.importorskip("transformers")
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "export" / f"step_{STEPS:05d}", dtype=torch.float64
    )
    whole.config._experts_implementation = "eager"
    ids, _ = families.batch(seed=5)
    with torch.no_grad():
        torch.testing.assert_close(whole(ids).logits, mine(ids).logits, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_packed_projections_become_one_adapter_where_the_family_packs_them(
    ranks: Pools, tmp_path: Path, name: str
) -> None:
    """GPT-2 and GPT-NeoX keep query, key and value in one matrix: the adapter's rank there is the sum of the ranks."""
    theirs = save(name, tmp_path / "hf")
    folder, _ = ranks(1).run(
        run, tmp_path / "hf", tmp_path / "log", *LORA, "--lora_targets", "q_proj", "v_proj", "mlp"
    )[0]
    assert export_adapters(folder, tmp_path / "out").base == str(tmp_path / "hf")
    model = GPT(config_of(*FLAGS, "--init_from", tmp_path / "hf").model, dtype=torch.float64, seed=None)
    load_pretrained(model, str(folder))
    ids, _ = families.batch(seed=5)
    with torch.no_grad():
        wanted = theirs(ids).logits
        found = with_peft(theirs, tmp_path / "out")(ids).logits
        assert float((found - wanted).abs().max()) > 1e-3, "the adapters do something"
        torch.testing.assert_close(found, model(ids), rtol=1e-5, atol=1e-6)


def run_foreign(folder: Path, log_dir: Path, *flags: object) -> tuple[Path, dict[int, float]]:
    """``run`` without an option that only the GPT has. A job for the pool."""
    of_any = FLAGS[: FLAGS.index("--moe_aux_loss_coef")]
    trainer = RowsTrainer(
        config_of(*of_any, "--max_epochs", STEPS, "--init_from", folder, "--log_dir", log_dir, *flags)
    )
    trainer.train()
    return trainer.log_dir, losses(read_logs(trainer.log_dir)[0]) if trainer.master_process else {}


def test_a_foreign_model_gets_adapters_too(ranks: Pools, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    hf = transformers.OPTForCausalLM(
        transformers.OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.0)
    )
    hf.double().save_pretrained(tmp_path / "hf")
    flags = (*LORA, "--lora_targets", "q_proj", "fc1", "--save_at_start")
    folder, logged = ranks(2).run(run_foreign, tmp_path / "hf", tmp_path / "log", *flags)[0]
    for step in (0, STEPS):
        export_adapters(folder / f"{step:05d}_model.pt", tmp_path / f"adapters{step}")
    twin = with_peft(hf.eval(), tmp_path / "adapters0", train=True)
    assert list(logged.values()) == pytest.approx(their_steps(twin), rel=1e-5)
    again = transformers.OPTForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    mine, trained = with_peft(again, tmp_path / f"adapters{STEPS}"), dict(twin.named_parameters())
    for key, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter, trained[key], rtol=2e-3, atol=2e-4)


def test_continued_bit_equal(ranks: Pools, tmp_path: Path) -> None:
    save("llama", tmp_path / "hf")
    whole, _ = ranks(2).run(run, tmp_path / "hf", tmp_path / "whole", *LORA)[0]
    ranks(2).run(run, tmp_path / "hf", tmp_path / "parts", *LORA, "--max_steps", 2)
    parts, _ = ranks(2).run(run, tmp_path / "hf", tmp_path / "parts", *LORA)[0]
    mine, theirs = (read_file(folder / f"{STEPS:05d}_model.pt") for folder in (parts, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


SMALL = ModelConfig(
    vocab_size=31, num_layer=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=8, intermediate_size=12,
    block_size=16,
)  # fmt: skip


def test_only_adapters_are_trained_and_the_function_starts_unchanged() -> None:
    model, ids = GPT(SMALL, seed=1), torch.arange(12).view(1, 12)
    before = model(ids)
    assert add_adapters(model, Adapters(2, 4.0), seed=1) == 8
    assert torch.equal(model(ids), before)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all(".lora." in name for name in names)
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).normal_()
    plain = GPT(SMALL, seed=None)
    plain.load_state_dict(merged(model.state_dict()))
    torch.testing.assert_close(plain(ids), model(ids))
    assert float((plain(ids) - before).detach().abs().max()) > 1e-2


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--lora_rank 2: this model has no linear layer \(nn.Linear\) for an adapter"
    ):
        add_adapters(torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4)), Adapters(2, 4.0), seed=1)


def test_first_values_depend_on_seed_and_name() -> None:
    drawn = []
    for seed, targets in ((1, ()), (1, ("attn",)), (2, ())):
        model = GPT(SMALL, seed=1)
        add_adapters(model, Adapters(2, 4.0, targets), seed=seed)
        drawn.append(model.state_dict()["blocks.1.attn.out_proj.lora.a"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


TUNED = ("--init_from", "HF", "--lora_rank", 2, "--lora_targets")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora_rank", 2), "--lora_rank 2 adapts weights that stay as they are, but they would be random; give --init"),
        (("--lora_alpha", 4), "--lora_alpha 4.0 needs adapters; use --lora_rank 16"),
        (("--lora_targets", "q_proj"), "--lora_targets q_proj needs adapters; use --lora_rank 16"),
        ((*TUNED, "q_porj"), "q_porj matches no linear layer of this model; did you mean q_proj?"),
        ((*TUNED, "lm_head"), "lm_head matches no linear layer of this model, because the head has no adapter"),
        ((*TUNED[:4], "--optimizer", "muon"), "--optimizer muon trains whole matrices, but with --lora_rank 2"),
        ((*TUNED, "zzz"), "zzz matches no linear layer of this model; use names such as q_proj"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, flags: tuple[object, ...], message: str) -> None:
    if "HF" in flags:
        save("llama", tmp_path / "hf")
    with pytest.raises(ConfigError, match=message):
        RowsTrainer(
            config_of(*FLAGS, "--log_dir", tmp_path, *(tmp_path / "hf" if flag == "HF" else flag for flag in flags))
        )


def test_a_run_cannot_change_its_adapters(ranks: Pools, tmp_path: Path) -> None:
    """Other adapters are another run; a checkpoint of one run does not continue in the other."""
    save("llama", tmp_path / "hf")
    folder, _ = ranks(1).run(run, tmp_path / "hf", tmp_path / "log", *LORA, "--max_steps", 1)[0]
    for flags in (("--lora_rank", 4), ()):
        message = str(ranks(1).run(error_of, tmp_path / "hf", tmp_path / "other", "--resume_path", folder, *flags)[0])
        assert "belongs to a different run (lora.lora_" in message


def error_of(folder: Path, log_dir: Path, *flags: object) -> str:
    """The error that a run on ``folder``'s architecture ends in. A job for the pool."""
    from tinytron.errors import TinytronError

    config = config_of(*FLAGS, "--hf_model", folder, "--max_epochs", STEPS, "--log_dir", log_dir, *flags)
    try:
        RowsTrainer(config)
    except TinytronError as error:
        return str(error)
    return ""


def test_exports_refuse_what_has_no_adapters_or_no_base(
    ranks: Pools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("llama", tmp_path / "hf")
    plain, _ = ranks(1).run(run, tmp_path / "hf", tmp_path / "log", "--max_steps", 1)[0]
    with pytest.raises(ConfigError, match="has no adapters; use a run with --lora_rank"):
        export_adapters(plain, tmp_path / "out")
    tuned, _ = ranks(1).run(run, plain, tmp_path / "log", *LORA, "--max_steps", 1, "--exp_name", "on a run")[0]
    with pytest.raises(ConfigError, match="transformers cannot open; export that model first"):
        export_adapters(tuned, tmp_path / "out")
    words = ["export", "--checkpoint", str(tuned), "--out", str(tmp_path / "out"), "--adapters"]
    assert main([*words, "--base", str(tmp_path / "hf")]) == 0
    assert f"14 adapters of {tmp_path / 'hf'}" in capsys.readouterr().out
    assert main([*words, "--dtype", "fp32"]) != 0
    assert "--dtype applies to whole models" in capsys.readouterr().err
