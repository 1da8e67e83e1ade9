"""One training run on the ranks, through the Trainer, and the same run by the naive twin; and how they differ."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from tests.helpers.runs import config_of
from tests.naive.gpt import Experts, Shape
from tests.naive.training import Arrays, Outcome, Recipe, train
from tinytron.data import GlobalBatchSampler, ShuffledEpochs
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.sharding import box_of
from tinytron.distributed.zero1.flat_buffer import OwnedSlice
from tinytron.model import GPT
from tinytron.optim import parameter_groups
from tinytron.training import Config, Trainer

STEPS, GLOBAL_BATCH, SEQ_LEN, VOCAB = 4, 8, 12, 61
CLIPPED = Recipe(clip=0.3)
Mask = Literal["none", "uneven", "rank", "all", "few"]
Precision = Literal["fp32", "fp64"]
Parts = list[tuple[str, int, int, Any]]  # parameter, its size, offset, this rank's part of it

# Both balance terms weigh enough to be seen; the bias moves by more than the scores differ, so that it changes choices.
EXPERTS = Experts(top_k=2, balance_coef=0.05, z_coef=0.01, bias_rate=0.02)
NUM_EXPERTS = 4


@dataclass(frozen=True)
class Case:
    """One cell of the parity matrix."""

    world: int
    accumulation: int = 1
    mask: Mask = "none"
    shard: bool = True
    sep: int = 1
    ep: int = 1
    experts: Experts | None = None
    shared_experts: int = 0
    overlap: bool = True
    view: bool = True
    small_buckets: bool = False
    precision: Precision = "fp32"
    tied: bool = True
    kv_heads: int = 2
    idle_expert: bool = False
    recompute: str = "none"
    wire: str = "fp32"
    recipe: Recipe = CLIPPED
    tf32: bool = True
    padded: bool = False

    @property
    def dp(self) -> int:
        """Number of groups of ranks with different sequences."""
        return self.world // self.sep

    @property
    def micro_batch(self) -> int:
        """Rows of one micro-batch of one rank."""
        return GLOBAL_BATCH // self.dp // self.accumulation

    @property
    def shape(self) -> Shape:
        """What the twin needs to know of the model."""
        return Shape(layers=2, heads=4, kv_heads=self.kv_heads, experts=self.experts)

    def config(self, log_dir: Path) -> Config:
        """The run's configuration."""
        recipe, muon = self.recipe, "muon" in self.recipe.optimizer
        flags: dict[str, object] = {
            **{"exp_name": "parity", "log_dir": log_dir, "log_every": 1, "precision": self.precision},
            **{"total_batch_size": GLOBAL_BATCH * SEQ_LEN, "batch_size": self.micro_batch, "seq_len": SEQ_LEN},
            **{"block_size": SEQ_LEN, "vocab_size": VOCAB, "num_layer": 2, "hidden_size": 16, "init_std": 0.1},
            **{"num_attention_heads": 4, "num_key_value_heads": self.kv_heads, "intermediate_size": 24},
            **{"max_lr": recipe.max_lr, "min_lr": recipe.min_lr, "warmup_steps": recipe.warmup},
            **{"weight_decay": recipe.weight_decay, "grad_clip_value": recipe.clip, "recompute": self.recompute},
            **({} if recipe.last_decay is None else {"weight_decay_schedule": "linear"}),
            **{"weight_decay_end": recipe.last_decay or 0.0, "layer_lr_decay": recipe.layer_decay},
            **{"ema_decay": recipe.ema_decay},
            **{"sep_size": self.sep, "ep_size": self.ep, "optimizer": "muon" if muon else "adam"},
            **{"bucket_size_mb": 0.002 if self.small_buckets else 64, "grad_reduce_dtype": self.wire},
        }
        switches = {
            **{"do_save": False, "use_distributed_optimizer": self.shard, "tied_lm_head": self.tied},
            **{"overlap_grad_reduce": self.overlap, "overlap_param_gather": self.overlap},
            **{"ddp_gradient_as_bucket_view": self.view, "muon_normuon": recipe.optimizer == "normuon"},
            **{"disable_tf32": not self.tf32},
        }
        if experts := self.experts:
            flags |= {
                **{"num_experts": NUM_EXPERTS, "num_experts_per_tok": experts.top_k, "moe_intermediate_size": 12},
                **{"num_shared_experts": self.shared_experts, "first_k_dense": experts.first_k_dense},
                **{"moe_router_score": experts.score, "moe_aux_loss_scope": experts.scope},
                **{"moe_aux_loss_coef": experts.balance_coef, "moe_z_loss_coef": experts.z_coef},
                **{"moe_bias_update_rate": experts.bias_rate},
            }
            switches |= {"use_moe": True, "norm_topk_prob": experts.renormalized}
        valued = [text for name, value in flags.items() for text in (f"--{name}", value)]
        return config_of(*valued, *(f"--{name}" if on else f"--no-{name}" for name, on in switches.items()))


class MaskedSamples(Dataset[dict[str, torch.Tensor]]):
    """Random tokens of one epoch, with labels masked by the sample's place: uneven lengths, all of the last rank, or all
    but the last few; and with padding at the end of rows, if asked for."""

    def __init__(self, case: Case) -> None:
        random = torch.Generator().manual_seed(11)
        self.tokens = torch.randint(VOCAB, (STEPS * GLOBAL_BATCH, SEQ_LEN + 1), generator=random)
        self.labels = self.tokens[:, 1:].clone()
        self.lengths = torch.randint(1, SEQ_LEN + 1, (len(self.tokens),), generator=random) if case.padded else None
        if self.lengths is not None:
            beyond = torch.arange(SEQ_LEN) >= self.lengths[:, None]
            self.tokens[:, :-1][beyond], self.labels[beyond] = 0, -100
        if case.mask == "none":
            return
        if case.mask == "few":  # as answers after long prompts
            self.labels[:, : SEQ_LEN // 2] = -100
            self.labels[::3] = -100
            return
        if case.mask == "all":
            self.labels[:] = -100
        for row in self.labels:  # from no valid target to all
            row[int(torch.randint(SEQ_LEN + 1, (), generator=random)) :] = -100
        if case.mask == "rank":
            for step in self.samples_of_steps():
                for place, sample in enumerate(step):
                    if place // case.micro_batch % case.dp == case.dp - 1:  # of the last sequence group, the last part
                        self.labels[sample, SEQ_LEN - SEQ_LEN // case.sep :] = -100

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = {"input_ids": self.tokens[index, :-1], "labels": self.labels[index]}
        if self.lengths is not None:
            sample["padding"] = torch.arange(SEQ_LEN) >= self.lengths[index]
        return sample

    def batch(self, samples: list[int]) -> tuple[torch.Tensor, ...]:
        """What the twin trains on in one step."""
        whole = (self.tokens[samples, :-1], self.labels[samples])
        return whole if self.lengths is None else (*whole, self.lengths[samples])

    def samples_of_steps(self) -> list[list[int]]:
        """The samples of every global step."""
        order = ShuffledEpochs(len(self), 1337)
        sampler = GlobalBatchSampler(order, global_batch=GLOBAL_BATCH, micro_batch=1, dp_rank=0, dp_size=1)
        return [sampler.samples_of_step(step) for step in range(STEPS)]


class _Recording(DistributedOptimizer):
    """Keeps what every step returned and left in the gradients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norms: list[float] = []
        self.grads: list[Parts] = []

    def step(self, max_norm: float = 0.0, reject: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        norm = super().step(max_norm, reject)
        self.norms.append(float(norm))
        self.grads.append(owned_gradients(self))
        return norm


def owned_gradients(optimizer: DistributedOptimizer) -> Parts:
    """This rank's parts of the reduced gradients."""
    parts: Parts = []
    for piece in optimizer.pieces():
        assert piece.holder.grad is not None
        own = piece.holder.grad.view(-1)[piece.start : piece.start + len(piece.main)]
        parts += [
            (piece.name, piece.numel, offset, part) for offset, part in placed(piece, own.double().cpu().numpy().copy())
        ]
    return parts


def owned_averages(optimizer: DistributedOptimizer) -> Parts:
    """This rank's parts of the averaged weights, if there are any."""
    parts: Parts = []
    for piece in optimizer.pieces():
        if (average := optimizer.inner.state[piece.holder].get("ema")) is not None:
            own = average.view(-1)[piece.start : piece.start + len(piece.main)].double().cpu().numpy().copy()
            parts += [(piece.name, piece.numel, offset, part) for offset, part in placed(piece, own)]
    return parts


def placed(piece: OwnedSlice, elements: Any) -> Iterator[tuple[int, Any]]:
    """The ``elements`` of ``piece``, range by range, with their places in the flattened global tensor."""
    first = 0
    for offset, length in piece.runs:
        yield offset, elements[first : first + length]
        first += length


class ParityTrainer(Trainer):
    """The product's trainer, on masked samples, with a recording optimizer."""

    case: Case

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = MaskedSamples(self.case)

    def _init_model(self, config: Config) -> None:
        super()._init_model(config)
        self.raw_model.load_state_dict(_without_last_expert(self.case, self.raw_model.state_dict()))

    def _init_optimizer(self, config: Config) -> None:
        super()._init_optimizer(config)
        inner: torch.optim.Optimizer = self.optimizer.inner
        if self.case.recipe.optimizer == "sgd":
            groups = parameter_groups(self.raw_model, specs_of(self.raw_model), config.optim.weight_decay)
            inner = torch.optim.SGD(groups, lr=config.optim.max_lr, momentum=0.9)
        self.optimizer = _Recording(inner, self.dp_group)

    def _end_step(self) -> None:
        model: Any = self.raw_model
        before = model.load.clone()
        super()._end_step()
        self.loads = [*getattr(self, "loads", []), (model.load - before).cpu().numpy().copy()]
        self.biases = [
            *getattr(self, "biases", []),
            [m.router.bias.double().cpu().numpy().copy() for m in model.moe_layers],
        ]


def _without_last_expert(case: Case, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With ``case.idle_expert`` the router's bias keeps every token away from the last expert."""
    for name, weight in weights.items():
        if case.idle_expert and name.endswith("router.bias"):
            weight[-1] = -9.0
    return weights


def run_case(case: Case, log_dir: Path) -> dict[str, Any]:
    """Train on this rank. A job for the pool."""
    trainer = type("T", (ParityTrainer,), {"case": case})(case.config(log_dir))
    trainer.train()
    lines = (trainer.log_dir / "log.jsonl").read_text().splitlines() if trainer.master_process else []
    weights: Parts = []
    for spec in specs_of(trainer.raw_model):
        flat = trainer.raw_model.get_parameter(spec.name).detach().double().cpu().numpy().flatten()
        (run,) = box_of(spec, trainer.state).runs()
        weights.append((spec.name, spec.numel, run.offset, flat))
    return {
        "log": [json.loads(line) for line in lines],
        "norms": trainer.optimizer.norms,
        "grads": trainer.optimizer.grads,
        "weights": weights,
        "averages": owned_averages(trainer.optimizer),
        "loads": trainer.loads,
        "biases": trainer.biases,
        "buckets": sum(len(buffer.layout.buckets) for buffer in trainer.optimizer.buffers),
    }


@functools.cache
def _twin(mask_key: Case) -> Outcome:
    samples = MaskedSamples(mask_key)
    batches = [samples.batch(ids) for ids in samples.samples_of_steps()]
    config = mask_key.config(Path("unused"))
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[mask_key.precision]
    weights = GPT(config.model, dtype=dtype, seed=config.seed.seed).state_dict()
    weights = _without_last_expert(mask_key, weights)
    return train(weights, batches, mask_key.shape, mask_key.recipe)


def twin(case: Case) -> Outcome:
    """The naive run with the same global batches."""
    masked = {"world": case.world, "accumulation": case.accumulation, "sep": case.sep}
    recipe = case.recipe
    if case.experts and case.experts.scope == "batch":
        recipe = dataclasses.replace(recipe, micro_batches=case.accumulation)
    fields = ("mask", "experts", "shared_experts", "idle_expert", "precision", "tied", "kv_heads", "padded")
    model = {field: getattr(case, field) for field in fields}
    return _twin(Case(**(masked if case.mask == "rank" else {"world": 1}), **model, recipe=recipe))


def assembled(parts: Sequence[Parts], *, owners: int | None = None) -> Arrays:
    """Whole tensors by name, from all ranks' parts. Each element is there (as often as ``owners`` says), and parts that
    overlap are bit-equal."""
    whole: Arrays = {}
    counts: dict[str, Any] = {}
    for rank, its in enumerate(parts):
        for name, numel, offset, own in its:
            there = whole.setdefault(name, np.zeros(numel))[offset : offset + len(own)]
            count = counts.setdefault(name, np.zeros(numel, dtype=int))[offset : offset + len(own)]
            equal = np.equal(there, own) | (np.isnan(there) & np.isnan(own))
            assert equal[count > 0].all(), f"{name} of rank {rank} is not that of an earlier rank"
            there[:] = own
            count += 1
    for name, count in counts.items():
        assert (count > 0 if owners is None else count == owners).all(), f"{name}: elements with {set(count)} owners"
    return whole


def differences(case: Case, results: Sequence[dict[str, Any]], tolerance: float = 0.0) -> list[str]:
    """Where the ranks' results differ from the twin's by more than N5 allows (or ``tolerance``); empty if they agree."""
    tolerance = tolerance or (1e-5 if case.precision == "fp32" else 1e-10)
    expected, found = twin(case), []

    def compare(what: str, mine: Any, theirs: Any) -> None:
        mine, theirs = np.ravel(mine), np.ravel(theirs)
        if mine.shape != theirs.shape:
            found.append(f"{what}: {mine.size} values, expected {theirs.size}")
            return
        if (np.isnan(mine) != np.isnan(theirs)).any():
            found.append(
                f"{what}: NaN at {np.flatnonzero(np.isnan(mine))}, expected {np.flatnonzero(np.isnan(theirs))}"
            )
            return
        mine, theirs = mine[~np.isnan(mine)], theirs[~np.isnan(theirs)]
        error = np.linalg.norm(mine - theirs) / max(float(np.linalg.norm(theirs)), 1e-30)
        if not error <= tolerance:
            found.append(f"{what}: relative error {error:.2e}")

    log = results[0]["log"]
    compare("losses", [float(entry["loss"]) for entry in log], expected.losses)  # JSON has no NaN: it is a text
    compare("logged norms", [entry["grad_norm"] for entry in log], expected.norms)
    for name in expected.aux[0]:
        compare(f"logged {name}", [entry[name] for entry in log], [aux[name] for aux in expected.aux])
    for rank, result in enumerate(results):
        compare(f"norms of rank {rank}", result["norms"], expected.norms)
        for step in range(STEPS if case.experts else 0):
            compare(f"load of step {step} on rank {rank}", result["loads"][step], expected.load[step])
            compare(f"bias after step {step} on rank {rank}", result["biases"][step], expected.biases[step])
    try:
        _compare_tensors(case, results, expected, compare)
    except AssertionError as error:
        found.append(str(error))
    return found


def _compare_tensors(case: Case, results: Sequence[dict[str, Any]], expected: Outcome, compare: Any) -> None:
    for step, theirs in enumerate(expected.grads):
        parts = [result["grads"][step] for result in results]
        mine = assembled(parts, owners=1 if case.shard else None)
        assert mine.keys() == theirs.keys(), f"gradients of step {step} are of {sorted(mine)}"
        for name in theirs:
            compare(f"gradient of {name} in step {step}", mine[name], theirs[name])
    weights = assembled([result["weights"] for result in results])
    assert weights.keys() == expected.weights.keys(), f"there are weights {sorted(weights)}"
    for name in expected.weights:
        compare(f"weight {name}", weights[name], expected.weights[name])
    if case.recipe.ema_decay:
        averages = assembled([result["averages"] for result in results], owners=1 if case.shard else None)
        assert averages.keys() == expected.averages.keys(), f"there are averages {sorted(averages)}"
        for name, average in expected.averages.items():
            compare(f"average of {name}", averages[name], average)
    else:
        assert not any(result["averages"] for result in results), "there are averages"
