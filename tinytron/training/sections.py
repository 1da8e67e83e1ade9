"""Every option of a training run by section, as frozen dataclasses: the only source of names, defaults, help and bounds.

The command line (arguments.py) and the tables in docs/reference are generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from tinytron.kernels.choice import Backend, Kernels
from tinytron.model.config import ModelConfig
from tinytron.model.modules.recompute import Recompute
from tinytron.training.optim_section import OptimConfig
from tinytron.utils.flags import Flag
from tinytron.utils.training import DTYPES


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The training loop."""

    total_batch_size: Annotated[int, Flag("global batch per optimizer step", "tokens", at_least=1)] = 524288
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
    seq_len: Annotated[int, Flag("length of a training sequence", "tokens", at_least=1)] = 4096
    max_steps: Annotated[int | None, Flag("stop after this many steps", identity=False, at_least=1)] = None
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
            "files of multiple-choice items to evaluate during training (docs/inference.md)", identity=False, path=True
        ),
    ] = ()
    eval_every: Annotated[
        int, Flag("evaluate eval_tasks every N steps; 0: only after the last step", "steps", identity=False, at_least=0)
    ] = 0
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
        Literal["skip", "stop"], Flag("skip a rejected step; stop: also save and end the run", identity=False)
    ] = "skip"
    replica_check_every: Annotated[
        int,
        Flag("compare the replicas' parameters bit by bit every N steps; 0: off", "steps", identity=False, at_least=0),
    ] = 0
    step_timeout: Annotated[
        float, Flag("dump all stacks if a step takes longer than this; 0: never", "seconds", identity=False, at_least=0)
    ] = 0.0
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

    def with_derived(self) -> TrainingConfig:
        """These options with the split rate that they imply, if none is given: 0.99 for a run that validates, else 1."""
        if self.split_rate is not None:
            return self
        return replace(self, split_rate=0.99 if self.do_val and not self.debug else 1.0)

    @property
    def kernels(self) -> Kernels:
        """The implementation of each operation that these options choose."""
        return Kernels.from_flags(
            attn_backend=self.attn_backend,
            use_liger_kernel=self.use_liger_kernel,
            use_triton_kernels=self.use_triton_kernels,
            use_cut_cross_entropy=self.use_cut_cross_entropy,
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of samples and how they are read."""

    dataset_path: Annotated[
        str | None,
        Flag(
            "folder or URL with train_*.bin and val_*.bin, a pattern of shards, or a mixture.json; default: mock data",
            identity=False,
            path=True,
        ),
    ] = None
    val_dataset_path: Annotated[
        str | None,
        Flag(
            "file, folder, URL or pattern of the validation shards; default: the val_*.bin of dataset_path",
            identity=False,
            path=True,
        ),
    ] = None
    token_dtype: Annotated[
        Literal["uint16", "uint32"] | None, Flag("data type of tokens in shards without a header", identity=False)
    ] = None
    document_mask: Annotated[
        bool, Flag("let tokens attend only to their own document, in which positions count from 0")
    ] = False
    cross_document_loss: Annotated[
        bool, Flag("train the last token of a document to predict the first one of the next")
    ] = True
    packing: Annotated[
        Literal["concat", "best_fit"],
        Flag("concat: cut the token stream every seq_len tokens; best_fit: fill sequences with whole documents"),
    ] = "concat"
    eot_id: Annotated[
        int | None,
        Flag("id of the token between documents, if no .docs file or manifest.json has it; default: none", at_least=0),
    ] = None
    eot_position: Annotated[
        Literal["prepend", "append"], Flag("position of eot_id: before every document or after it")
    ] = "prepend"
    use_mock_data: Annotated[bool, Flag("train on random tokens", identity=False)] = False
    mock_data_num_samples: Annotated[
        int, Flag("number of mock samples; a tenth more for validation", "samples", at_least=1)
    ] = 1280
    num_workers: Annotated[
        int, Flag("loader processes per rank; 0: a thread of the rank loads", identity=False, at_least=0)
    ] = 0
    prefetch: Annotated[
        int, Flag("number of steps whose micro-batches are prepared ahead; 0: none", identity=False, at_least=0)
    ] = 2
    pin_memory: Annotated[bool, Flag("load into pinned memory, from which GPUs copy directly", identity=False)] = True


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Processes and what they share."""

    backend: Annotated[
        Literal["auto", "nccl", "gloo"], Flag("collective backend; auto: nccl on GPUs, gloo on CPUs", identity=False)
    ] = "auto"
    init_method: Annotated[str, Flag("how processes find each other", identity=False)] = "env://"
    sep_size: Annotated[
        int, Flag("number of ranks that share each sequence (Ulysses)", "processes", identity=False, at_least=1)
    ] = 1
    ep_size: Annotated[
        int,
        Flag("number of ranks that share the experts; 0: same as sep_size", "processes", identity=False, at_least=0),
    ] = 0
    use_distributed_optimizer: Annotated[
        bool, Flag("shard optimizer state over the ranks (ZeRO-1)", identity=False)
    ] = True
    bucket_size_mb: Annotated[
        float,
        Flag("size of a bucket of gradients, which are exchanged together", "MiB", identity=False, above=0, works=64),
    ] = 64.0
    overlap_grad_reduce: Annotated[bool, Flag("exchange gradients while backward is still running", identity=False)] = (
        True
    )
    overlap_param_gather: Annotated[
        bool, Flag("gather updated parameters during the next forward pass", identity=False)
    ] = True
    grad_reduce_dtype: Annotated[
        Literal["fp32", "bf16"], Flag("data type in which gradients are sent; sums are in fp32", identity=False)
    ] = "fp32"
    print_topology: Annotated[bool, Flag("print the ranks' layout and what each owns", identity=False)] = False
    ddp_find_unused_parameters: Annotated[
        bool, Flag("accept parameters without a gradient instead of raising an error", identity=False)
    ] = False
    ddp_gradient_as_bucket_view: Annotated[
        bool, Flag("keep gradients in the exchange buffers; off: copy them there, using more memory", identity=False)
    ] = True


@dataclass(frozen=True, kw_only=True)
class CkptConfig:
    """Saving and resuming."""

    do_save: Annotated[bool, Flag("save every save_every_steps and after the last step", identity=False)] = True
    save_every_steps: Annotated[
        int, Flag("save every N steps; 0: only after the last step", "steps", identity=False, at_least=0)
    ] = 5000
    save_at_start: Annotated[
        bool, Flag("also save, and export, the weights that training begins with, as step 0", identity=False)
    ] = False
    async_save: Annotated[
        bool, Flag("continue training while a checkpoint is written; off: wait for the disk", identity=False)
    ] = True
    keep_last: Annotated[
        int,
        Flag(
            "number of newest checkpoints to keep; 0: all, or 1 with keep_every or keep_best",
            identity=False,
            at_least=0,
        ),
    ] = 0
    keep_every: Annotated[
        int, Flag("also keep every N-th step's checkpoint; 0: off", "steps", identity=False, at_least=0)
    ] = 0
    keep_best: Annotated[bool, Flag("also keep the checkpoint with the lowest validation loss", identity=False)] = False
    export_every: Annotated[
        int,
        Flag(
            "export a Hugging Face checkpoint every N steps and at the end; 0: never",
            "steps",
            identity=False,
            at_least=0,
        ),
    ] = 0
    export_dir: Annotated[
        str | None,
        Flag(
            "folder of this run's exports, as step<N>; default: export/ in the run's folder", identity=False, path=True
        ),
    ] = None
    hub_model_id: Annotated[
        str | None, Flag("upload every export to this hub repository, owner/name, as revision step<N>", identity=False)
    ] = None
    hub_private: Annotated[bool, Flag("make that repository private if it is new", identity=False)] = True
    resume: Annotated[bool, Flag("continue from the newest checkpoint of the run's folder", identity=False)] = True
    resume_path: Annotated[
        str | None,
        Flag(
            "resume from this run folder or <step>_model.pt, unless the run has a checkpoint", identity=False, path=True
        ),
    ] = None
    init_from: Annotated[
        str | None,
        Flag(
            "start from the weights and architecture of a Hugging Face folder or hub name, or of a run (a folder or "
            "<step>_model.pt)",
            path=True,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Console output, log files and trial modes."""

    exp_name: Annotated[str, Flag("first part of the run folder's name")] = "gpt"
    log_dir: Annotated[str, Flag("folder or URL that contains run folders", identity=False, path=True)] = "./log/"
    log_every: Annotated[
        int, Flag("report and write the log files every N steps", "steps", identity=False, at_least=1)
    ] = 10
    print_config: Annotated[
        Literal["no", "json", "yaml"],
        Flag("print the resolved configuration (default format: JSON) and stop", identity=False, bare="json"),
    ] = "no"
    dry_run: Annotated[
        bool, Flag("print a rank's memory by kind and stop; --backend nccl: as on a GPU", identity=False)
    ] = False
    dry_run_world_size: Annotated[
        int | None,
        Flag("number of ranks that dry_run assumes; default: as launched", "processes", identity=False, at_least=1),
    ] = None
    moe_router_debug: Annotated[
        bool, Flag("log the margin between the last chosen expert and the first one not chosen", identity=False)
    ] = False
    moe_route_trace: Annotated[
        bool, Flag("write each token's experts at every report, for scripts/compare_routes.py; large", identity=False)
    ] = False


@dataclass(frozen=True, kw_only=True)
class SeedConfig:
    """Randomness."""

    seed: Annotated[
        int,
        Flag(
            "seed of weights, data order and dropout", at_least=0, at_most=2**63 - 1, rule="in 0..2^63 - 1", works=1337
        ),
    ] = 1337
    deterministic: Annotated[bool, Flag("bit-identical repetition, even on GPUs", identity=False)] = False


SECTIONS: dict[str, type] = {
    "train": TrainingConfig,
    "model": ModelConfig,
    "optim": OptimConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "ckpt": CkptConfig,
    "logging": LoggingConfig,
    "seed": SeedConfig,
}
