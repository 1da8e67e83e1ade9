"""The options of the optimizer and its schedule; sections.py has those of all other parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tinytron.optim.rates import WEIGHT_DECAY_SCHEDULES
from tinytron.optim.schedule import DECAY_SHAPES, SCHEDULES
from tinytron.utils.flags import Flag


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: Annotated[
        Literal["adam", "muon"],
        Flag("AdamW, or Muon for matrices (a good first max_lr is 0.02) with AdamW for the rest"),
    ] = "adam"
    max_lr: Annotated[float, Flag("peak learning rate", at_least=0, at_most=1000)] = 4e-3
    min_lr: Annotated[
        float, Flag("learning rate of the last step, where a schedule decays to it", at_least=0, at_most=1000)
    ] = 3e-5
    warmup_steps: Annotated[
        int, Flag("linear warm-up; a run of at most this length warms up for a tenth of it", "steps", at_least=0)
    ] = 1000
    warmup_ratio: Annotated[
        float,
        Flag("warm-up as a fraction of the steps, instead of warmup_steps; 0: off", at_least=0, below=1, works=0.01),
    ] = 0.0
    warmup_start: Annotated[
        float | None,
        Flag("fraction of max_lr at which the warm-up begins; default: one step's share", at_least=0, at_most=1),
    ] = None
    lr_schedule: Annotated[
        str, Flag("after the warm-up; wsd: constant, then a decay; wsds: then constant again", choices=tuple(SCHEDULES))
    ] = "cosine"
    lr_stages: Annotated[
        tuple[float, ...], Flag("cosine_rewarm: fractions of the steps at which its second and later stages begin")
    ] = ()
    rewarm_lr: Annotated[
        float, Flag("cosine_rewarm: peak learning rate of its second and later stages", at_least=0, at_most=1000)
    ] = 1e-4
    lr_power: Annotated[
        float, Flag("polynomial schedule: exponent of the remaining fraction", above=0, at_most=100, works=1.0)
    ] = 1.0
    lr_cycles: Annotated[int, Flag("cosine_with_restarts: number of half waves", at_least=1)] = 1
    wsd_decay_fraction: Annotated[
        float,
        Flag(
            "fraction of the steps in which wsd decays, at the end, or wsds, before its constant end",
            above=0,
            at_most=1,
            works=0.1,
        ),
    ] = 0.1
    wsd_decay_shape: Annotated[str, Flag("shape of the decay of wsd and wsds", choices=tuple(DECAY_SHAPES))] = "cosine"
    wsds_constant_fraction: Annotated[
        float, Flag("fraction of the steps, at the end, in which wsds stays at min_lr", at_least=0, below=1, works=0.5)
    ] = 0.5
    weight_decay: Annotated[
        float, Flag("decoupled weight decay of matrices and embeddings", at_least=0, at_most=1000)
    ] = 0.1
    weight_decay_schedule: Annotated[
        str,
        Flag(
            "weight decay over the run: linear or cosine to weight_decay_end, or in proportion to the learning rate",
            choices=WEIGHT_DECAY_SCHEDULES,
        ),
    ] = "constant"
    weight_decay_end: Annotated[
        float, Flag("weight decay of the last step of a linear or cosine schedule", at_least=0, at_most=1000)
    ] = 0.0
    decay_embeddings: Annotated[bool, Flag("decay the token embedding too")] = True
    decay_all: Annotated[bool, Flag("decay all parameters, including norms and biases")] = False
    adam_beta1: Annotated[float, Flag("decay of the first moment", at_least=0, below=1, works=0.9)] = 0.9
    adam_beta2: Annotated[float, Flag("decay of the second moment", at_least=0, below=1, works=0.9)] = 0.95
    adam_eps: Annotated[float, Flag("added to the root of the second moment", at_least=0, at_most=1)] = 1e-8
    muon_momentum: Annotated[float, Flag("momentum of Muon", at_least=0, below=1, works=0.9)] = 0.95
    muon_ns_steps: Annotated[int, Flag("number of iterations of Muon's orthogonalization", at_least=1)] = 5
    muon_normuon: Annotated[bool, Flag("NorMuon: divide Muon's update by its running root mean square")] = False
    muon_beta2: Annotated[float, Flag("decay of NorMuon's second moment", at_least=0, below=1, works=0.9)] = 0.95
    muon_cautious: Annotated[bool, Flag("apply weight decay only where its sign agrees with Muon's update")] = False
    matrix_lr_mult: Annotated[float, Flag("learning-rate multiplier of matrices", at_least=0, at_most=1e6)] = 1.0
    embedding_lr_mult: Annotated[
        float, Flag("learning-rate multiplier of the (tied) token embedding", at_least=0, at_most=1e6)
    ] = 1.0
    head_lr_mult: Annotated[float, Flag("learning-rate multiplier of an untied head", at_least=0, at_most=1e6)] = 1.0
    scalar_lr_mult: Annotated[float, Flag("learning-rate multiplier of norms and biases", at_least=0, at_most=1e6)] = (
        1.0
    )
    layer_lr_decay: Annotated[
        float,
        Flag(
            "learning rate of each block as a fraction of that of the block above; the embedding's is the lowest; 1: off",
            above=0,
            at_most=1,
            works=0.9,
        ),
    ] = 1.0
    ema_decay: Annotated[
        float,
        Flag(
            "keep, validate and save moving averages of the weights with this decay per step; 0: off",
            at_least=0,
            below=1,
            works=0.999,
        ),
    ] = 0.0
