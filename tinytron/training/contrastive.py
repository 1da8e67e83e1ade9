"""Preference learning: DPO (arXiv:2305.18290, section 4) on pairs of a better and a worse answer.

A pair is one sample: both answers packed as two documents, so one forward pass serves both, on every layout. The reference
is the model before the first step, without dropout. Its log-probabilities are computed once, before training, and kept in
the run's folder; no second model is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F

from tinytron.config import configure, field, is_configured
from tinytron.data import Batch
from tinytron.data.batch import collate
from tinytron.data.mixture_file import read_mixture
from tinytron.data.pairs import NUMBER, REFERENCE, SIDE, PackedPairs, PairDataset
from tinytron.distributed.agreement import agree, told_by_first
from tinytron.distributed.collectives import sum_over
from tinytron.errors import ConfigError, DataError
from tinytron.model.modules.loss import LossSums
from tinytron.model.protocols import require_gpt
from tinytron.training.backbone import BackbonedTrainer, BackbonedTrainerConfig
from tinytron.training.base import BaseTrainer, BaseTrainerConfig
from tinytron.training.config import Config
from tinytron.training.datasets import whole_of
from tinytron.training.forward_pass import cross_entropy, forward_pass
from tinytron.training.reference import first_model, require_whole_rows
from tinytron.utils.training import write_atomically

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")
REFERENCE_FILE = "reference.pt"  # in the run's folder: log-probabilities by split, float64 [N, 2]
NAMES = ("rewards/chosen", "rewards/rejected", "rewards/accuracy", "rewards/margin", "logps/chosen", "logps/rejected")


@dataclass
class ContrastiveTrainerConfig(BaseTrainerConfig):
    """The options of a run, and those of DPO."""

    beta: float = field("optimization/dpo/beta", default=0.1, help="weight of the distance to the reference")
    label_smoothing: float = field(
        "optimization/dpo/label_smoothing", default=0.0, help="assumed share of pairs whose answers are swapped"
    )

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ConfigError(f"optimization.dpo.beta={self.beta} must be above 0; use 0.1")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(
                f"optimization.dpo.label_smoothing={self.label_smoothing} must be at least 0 and below 0.5; use 0"
            )


@dataclass
class BackbonedContrastiveTrainerConfig(ContrastiveTrainerConfig, BackbonedTrainerConfig):
    """The options of DPO that starts from a model of Hugging Face."""


class ContrastiveTrainer(BaseTrainer[ConfigT, ModelT]):
    """Trains the GPT on the pairs of ``--dataset_path``, a folder that the job ``data/tokenize_contrastive_dataset`` made.
    ``--seq_len`` must hold both answers, and ``--total_batch_size`` counts pairs times ``--seq_len``. The loss is the mean
    over pairs; validation is the same on held-out pairs.

    Raises: ConfigError or DataError.
    """

    CONFIG: ClassVar[type] = ContrastiveTrainerConfig
    READS_PAIRS: ClassVar[bool] = True  # tells jobs that data of the style CONTRASTIVE can be used

    def __init__(self, spec: Config) -> None:
        self.options: ContrastiveTrainerConfig = (
            configure(ContrastiveTrainerConfig) if is_configured() else ContrastiveTrainerConfig()
        )
        require_whole_rows(spec, "a pair")
        super().__init__(spec)

    # Data.

    def _init_data(self, spec: Config) -> None:
        if spec.data.dataset_path is None:
            raise ConfigError(
                f"{type(self).__name__} needs pairs; give --dataset_path, a folder of data/tokenize_contrastive_dataset"
            )
        found = agree(lambda: _read_pairs(Path(str(spec.data.dataset_path)), spec), self.state.groups["world"])
        self.train_dataset, self.val_dataset = found

    # Loss.

    def _init_optimizer(self, config: Config) -> None:
        require_gpt(self.raw_model, f"{type(self).__name__} trains", "use a family that the GPT has, such as llama")
        super()._init_optimizer(config)

    def _loss(self, batch: Batch) -> LossSums:
        """DPO, as sums over pairs. The gradient of a pair's loss is that of its tokens' cross entropies, each times the
        derivative of the loss by it, so the fused loss is used twice: for the numbers, and then with these weights."""
        model: Any = self.raw_model
        passed = forward_pass(model, batch, self.state)
        x_BsD = passed.hidden_BsD
        side_Bs = batch.extras[SIDE].double()
        with torch.no_grad():
            sums = cross_entropy(model, x_BsD.detach(), batch)
            logp_B2 = self._sums_of_pairs(sums, side_Bs)
            margins_B2 = logp_B2 - batch.extras[REFERENCE].double()
            losses_B, slope_B = dpo(margins_B2, self.options.beta, self.options.label_smoothing)
            real_B = torch.ones_like(losses_B)
            real_B[len(real_B) - batch.filling :] = 0  # rows that only fill up the last validation batch
            weights_Bs = -side_Bs * (slope_B * real_B)[:, None]
        objective = cross_entropy(model, x_BsD, batch, weights_Bs).objective
        first = float(self.sp_rank == 0)  # the ranks of a group share their pairs
        total = (losses_B * real_B).sum() * first
        numbers = _numbers(margins_B2, logp_B2, self.options.beta)
        aux = {name: (value * real_B).sum() * first for name, value in zip(NAMES, numbers, strict=True)}
        found = LossSums(objective, total.to(objective.dtype), aux, counts=dict.fromkeys(aux, real_B.sum() * first))
        self._custom["train" if model.training else "val"].update(found, batch)
        return passed.with_routing_losses(model, found)

    def _sums_of_pairs(self, sums: LossSums, side_Bs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the better and the worse answers, float64 ``[B, 2]``. Collective over ``sp_group``."""
        assert sums.per_token is not None, "the fused loss returns every token's cross entropy"
        logp_Bs = -sums.per_token.view_as(side_Bs).double()
        parts = [(logp_Bs * side_Bs.clamp(min=0)).sum(1), (logp_Bs * (-side_Bs).clamp(min=0)).sum(1)]
        return sum_over(torch.stack(parts, 1), self.sp_group)

    def _normalizer(self, batch: Batch) -> torch.Tensor:
        pairs = (len(batch.labels) - batch.filling) * (self.sp_rank == 0)
        return torch.full((), pairs, dtype=torch.int64, device=self.device)

    # The reference.

    def _resume_from_checkpoint(self) -> None:
        """Load a checkpoint, and the reference's log-probabilities. A run that begins computes these with its own weights.
        One that continues without their file, such as on another machine, computes them again with the weights that it
        began with."""
        super()._resume_from_checkpoint()
        splits = {"train": whole_of(self.train_dataset), "val": whole_of(self.val_dataset)}
        if splits["val"] is None or splits["val"] is splits["train"]:  # the latter: --split_rate
            del splits["val"]
        pairs_of: dict[str, PackedPairs] = {
            name: pairs for name, pairs in splits.items() if isinstance(pairs, PackedPairs)
        }
        assert pairs_of.keys() == splits.keys(), "_init_data sets packed pairs"
        file, world = self.log_dir / REFERENCE_FILE, self.state.groups["world"]
        # On several nodes, only the first may have the file.
        found = told_by_first(lambda: _read_reference(file, pairs_of) if self._continues else None, world)
        if found is None:
            self._say(f"computing the reference's log-probabilities of {sum(map(len, pairs_of.values())):,} pairs")
            model = first_model(self.config, self.raw_model, self.state) if self._continues else self.raw_model
            found = {name: self._log_probs(model, pairs) for name, pairs in pairs_of.items()}
            agree(lambda: self._write_reference(file, found), world)
        for name, pairs in pairs_of.items():
            pairs.reference = found[name]

    def _write_reference(self, file: Path, found: dict[str, torch.Tensor]) -> None:
        if self.master_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, lambda out: torch.save(found, out))

    @torch.no_grad()
    def _log_probs(self, model: Any, pairs: PackedPairs) -> torch.Tensor:
        """Log-probabilities of all ``pairs`` under ``model``, float64 ``[N, 2]`` on the CPU. Collective: each data-parallel
        rank computes its share."""
        size, mine = self.config.train.batch_size, range(self.dp_rank, len(pairs), self.dp_world_size)
        rounds = -(-len(pairs) // (self.dp_world_size * size))  # the same on every rank: experts exchange tokens
        total = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.device)
        model.eval()
        for first in range(0, rounds * size, size):
            numbers = [mine[i] for i in range(first, min(first + size, len(mine)))] or [0]
            batch = self.data.preparer.prepare(collate([pairs[i] for i in numbers])).to(self.device)
            x_BsD, _ = model.hidden_states(batch.input_ids, batch.positions, batch.documents, padding_Bs=batch.padding)
            side_Bs = batch.extras[SIDE].double()
            logp_B2 = self._sums_of_pairs(cross_entropy(model, x_BsD, batch), side_Bs)
            if first < len(mine) and self.sp_rank == 0:
                total[batch.extras[NUMBER]] = logp_B2
        model.train()
        return sum_over(total, self.state.groups["world"]).cpu()


class BackbonedContrastiveTrainer(ContrastiveTrainer[ConfigT, ModelT], BackbonedTrainer[ConfigT, ModelT]):
    """``ContrastiveTrainer`` from the weights ``--init_from`` (``architecture.backbone.weights``)."""

    CONFIG = BackbonedContrastiveTrainerConfig


def dpo(margins_B2: torch.Tensor, beta: float, smoothing: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every pair, ``[B]``, and its derivative by the difference of the ``margins``: the policy's minus the
    reference's log-probability of the better and of the worse answer.

    -log sigmoid(beta d) (1 - s) - log sigmoid(-beta d) s (arXiv:2305.18290, eq. 7; with smoothing: its appendix on
    conservative DPO).
    """
    difference_B = beta * (margins_B2[:, 0] - margins_B2[:, 1])
    loss_B = -F.logsigmoid(difference_B) * (1 - smoothing) - F.logsigmoid(-difference_B) * smoothing
    slope_B = beta * (smoothing * torch.sigmoid(difference_B) - (1 - smoothing) * torch.sigmoid(-difference_B))
    return loss_B, slope_B


def _numbers(margins_B2: torch.Tensor, logp_B2: torch.Tensor, beta: float) -> list[torch.Tensor]:
    """The values of ``NAMES`` for every pair."""
    chosen_B, rejected_B = (beta * margins_B2).unbind(1)
    return [chosen_B, rejected_B, (chosen_B > rejected_B).double(), chosen_B - rejected_B, *logp_B2.unbind(1)]


def _read_pairs(path: Path, config: Config) -> tuple[PackedPairs, PackedPairs | None]:
    """The training and the validation pairs of a folder, or of a mixture with one source."""
    if path.suffix == ".json":
        sources = read_mixture(path).sources
        if len(sources) != 1:
            raise ConfigError(
                f"{path} mixes {len(sources)} sources, but pairs come from one; tokenize them into one folder"
            )
        path = Path(sources[0].path)
    seq_len, vocab_size = config.train.seq_len, config.model.vocab_size
    train = PackedPairs(PairDataset(path, "train", vocab_size), seq_len)
    try:
        val = PairDataset(path, "val", vocab_size)
    except DataError:
        if config.train.do_val:
            raise
        return train, None
    return train, PackedPairs(val, seq_len)


def _read_reference(file: Path, splits: dict[str, PackedPairs]) -> dict[str, torch.Tensor] | None:
    """The log-probabilities in ``file``; ``None`` if there are none, or those of other pairs."""
    try:
        found: dict[str, torch.Tensor] = torch.load(file, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError):
        return None
    fits = all(name in found and len(found[name]) == len(pairs) for name, pairs in splits.items())
    return found if fits else None
