"""The options of the training loop; sections.py has the other sections."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from tinytron.errors import ConfigError
from tinytron.kernels.choice import Backend, Kernels
from tinytron.model.modules.recompute import Recompute
from tinytron.utils.batch_sizes import BatchSizes
from tinytron.utils.flags import Flag
from tinytron.utils.training import DTYPES


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    total_batch_size: Annotated[int, Flag("global batch per optimizer step", "tokens", at_least=1)] = 524288
    total_batch_sequences: Annotated[
        int | None,
        Flag(
            "total_batch_size in sequences of seq_len tokens, into which it is converted",
            "sequences",
            identity=False,
            at_least=1,
            works=128,
        ),
    ] = None
    batch_size: Annotated[
        int,
        Flag(
            "micro-batch per data-parallel rank; auto: the largest that fits",
            "sequences",
            identity=False,
            at_least=0,
            rule="at least 1, or auto",
            works=8,
            words=(("auto", 0),),
        ),
    ] = 8
    fit_batch: Annotated[
        bool,
        Flag("lower batch_size to the nearest number that divides a rank's part of the global batch", identity=False),
    ] = False
    batch_warmup_sizes: Annotated[
        tuple[int, ...],
        Flag("global batches of the first steps, before total_batch_size; batch_warmup_ends says how long", "tokens"),
    ] = ()
    batch_warmup_ends: Annotated[
        tuple[int, ...], Flag("number of steps after which each of batch_warmup_sizes ends", "steps")
    ] = ()
    seq_len: Annotated[int, Flag("length of a training sequence", "tokens", at_least=1)] = 4096
    seq_warmup_lens: Annotated[
        tuple[int, ...],
        Flag("lengths into which sequences are cut in the first steps; seq_warmup_ends says how long", "tokens"),
    ] = ()
    seq_warmup_ends: Annotated[
        tuple[int, ...], Flag("number of steps after which each of seq_warmup_lens ends", "steps")
    ] = ()
    max_steps: Annotated[
        int | None, Flag("stop after this many steps; holds before the limits below", identity=False, at_least=1)
    ] = None
    max_train_tokens: Annotated[
        int | None,
        Flag(
            "total training tokens across all ranks, rounded up to a whole step",
            "tokens",
            identity=False,
            at_least=1,
        ),
    ] = None
    max_epochs: Annotated[
        int, Flag("passes over the data, if neither steps nor tokens are limited", identity=False, at_least=1)
    ] = 1
    do_val: Annotated[bool, Flag("validate every val_every_steps and after the last step", identity=False)] = False
    val_every_steps: Annotated[
        int, Flag("validate every N steps; 0: only after the last step", "steps", identity=False, at_least=0)
    ] = 250
    max_eval_tokens: Annotated[
        int | None,
        Flag("validation tokens across all ranks; default: all", "tokens", identity=False, at_least=1),
    ] = None
    eval_tasks: Annotated[
        tuple[str, ...],
        Flag(
            "files of multiple-choice items (docs/inference.md), or registered evaluations, to answer while training",
            identity=False,
            path=True,
        ),
    ] = ()
    eval_every: Annotated[
        int, Flag("evaluate eval_tasks every N steps; 0: only after the last step", "steps", identity=False, at_least=0)
    ] = 0
    eval_length: Annotated[
        int | None,
        Flag(
            "number of items to use of each of eval_tasks; default: all", "items", identity=False, at_least=1, works=100
        ),
    ] = None
    eval_data_dir: Annotated[
        str | None,
        Flag(
            "folder with local data of registered evaluations, such as mnli.jsonl; default: the hub",
            identity=False,
            path=True,
        ),
    ] = None
    eval_tokenizer: Annotated[
        str | None,
        Flag("tokenizer.json for eval_tasks; default: the one next to the shards", identity=False, path=True),
    ] = None
    split_rate: Annotated[
        float | None,
        Flag(
            "fraction of a dataset without validation data used for training; default 0.99 with do_val, else 1.0",
            above=0,
            at_most=1,
            works=0.99,
        ),
    ] = None
    grad_clip_value: Annotated[
        float, Flag("clip the global gradient norm to this; 0: no clipping", at_least=0, infinite=True)
    ] = 1.0
    spike_sigma: Annotated[
        float,
        Flag(
            "reject steps whose loss or gradient norm exceeds the recent mean by this many standard deviations; 0: never",
            identity=False,
            at_least=0,
        ),
    ] = 0.0
    spike_window: Annotated[
        int, Flag("number of accepted steps that spike_sigma compares with", "steps", identity=False, at_least=1)
    ] = 100
    spike_action: Annotated[
        Literal["skip", "stop", "rollback"],
        Flag(
            "skip a rejected step; stop: also save and end the run; rollback: return to the last checkpoint, and continue "
            "without the data since then",
            identity=False,
        ),
    ] = "skip"
    replica_check_every: Annotated[
        int,
        Flag("compare the replicas' parameters bit by bit every N steps; 0: off", "steps", identity=False, at_least=0),
    ] = 0
    step_timeout: Annotated[
        float, Flag("dump all stacks if a step takes longer than this; 0: never", "seconds", identity=False, at_least=0)
    ] = 0.0
    preempt_file: Annotated[
        str | None, Flag("stop as after SIGTERM once this file exists on any node", identity=False, path=True)
    ] = None
    preempt_url: Annotated[
        str | None,
        Flag(
            "stop as after SIGTERM once this URL of a node's metadata service announces that the node is taken away",
            identity=False,
        ),
    ] = None
    debug: Annotated[bool, Flag("trial run in its own folder: no checkpoints, no validation")] = False
    precision: Annotated[
        str,
        Flag(
            "data type of parameters and matmuls; main weights, gradients and reductions are fp32 (fp64: everything)",
            choices=tuple(DTYPES),
        ),
    ] = "bf16"
    z_loss_coef: Annotated[
        float, Flag("weight of the squared log-partition term in the loss", at_least=0, at_most=1e6)
    ] = 0.0
    recompute: Annotated[
        Recompute,
        Flag(
            "recompute activations in backward. full: those of whole blocks; selective: keep the results of matmuls, "
            "attention and exchanges",
            identity=False,
        ),
    ] = "none"
    attn_backend: Annotated[
        Backend,
        Flag(
            "attention kernels. sdpa: torch's; flash: the flash-attn package; varlen: torch's kernels for documents; math: "
            "plain formulas; auto: sdpa, tiled on CPUs",
            identity=False,
        ),
    ] = "auto"
    use_compile: Annotated[bool, Flag("torch.compile every block (needs a C++ compiler on CPU)", identity=False)] = (
        False
    )
    use_liger_kernel: Annotated[
        bool, Flag("RMSNorm and SwiGLU from the liger-kernel package, on CUDA devices", identity=False)
    ] = False
    use_cut_cross_entropy: Annotated[
        bool, Flag("output head and loss from the cut-cross-entropy package, on CUDA devices", identity=False)
    ] = False
    use_triton_kernels: Annotated[
        bool,
        Flag(
            "loss, sums of experts' rows and Muon's products with our Triton kernels, on CUDA devices", identity=False
        ),
    ] = False
    disable_tf32: Annotated[
        bool,
        Flag("exact fp32 matmuls on Ampere and later GPUs; on CPUs, torch's BLAS instead of oneDNN", identity=False),
    ] = False
    use_profiler: Annotated[bool, Flag("write a Chrome trace of steps_to_profile", identity=False)] = False
    steps_to_profile: Annotated[tuple[int, int], Flag("first and last profiled step, from 1", identity=False)] = (
        15,
        20,
    )

    def __post_init__(self) -> None:
        count, tokens = self.total_batch_sequences, self.total_batch_size
        if count is None or count < 1 or self.seq_len < 1:  # the bounds of flags are checked later
            return
        if tokens not in (TrainingConfig.total_batch_size, count * self.seq_len):
            raise same_batch(count, tokens)
        object.__setattr__(self, "total_batch_size", count * self.seq_len)
        object.__setattr__(self, "total_batch_sequences", None)

    def with_derived(self) -> TrainingConfig:
        """These options with the split rate that they imply, if none is given: 0.99 for a run that validates, else 1."""
        if self.split_rate is not None:
            return self
        return replace(self, split_rate=0.99 if self.do_val and not self.debug else 1.0)

    @property
    def batch_sizes(self) -> BatchSizes:
        """The global batch of each step."""
        stages = zip(self.batch_warmup_sizes, self.batch_warmup_ends, strict=True)
        full = self.total_batch_size // self.seq_len
        return BatchSizes(full, tuple((tokens // self.seq_len, end) for tokens, end in stages))

    def row_length(self, step: int) -> int:
        """Length of the rows of step ``step``, counted from 0: ``seq_len``, or less during the warm-up of the length."""
        stages = zip(self.seq_warmup_lens, self.seq_warmup_ends, strict=True)
        return next((length for length, end in stages if step < end), self.seq_len)

    @property
    def kernels(self) -> Kernels:
        """The implementation of each operation that these options choose."""
        return Kernels.from_flags(
            attn_backend=self.attn_backend,
            use_liger_kernel=self.use_liger_kernel,
            use_triton_kernels=self.use_triton_kernels,
            use_cut_cross_entropy=self.use_cut_cross_entropy,
        )


def same_batch(sequences: int, tokens: int) -> ConfigError:
    """The error for a global batch that is given in both units."""
    return ConfigError(
        f"--total_batch_sequences {sequences} and --total_batch_size {tokens} (tokens) both set the global batch; leave "
        "one of them out"
    )
