"""Every option of a training run by section, as frozen dataclasses: the only source of names, defaults, help and bounds.

The command line (arguments.py) and the tables in docs/reference are generated from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tinytron.model.config import ModelConfig
from tinytron.training.lora_section import LoraConfig
from tinytron.training.optim_section import OptimConfig
from tinytron.training.train_section import TrainingConfig
from tinytron.utils.flags import Flag


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
    keep_best: Annotated[bool, Flag("also keep the best checkpoint, by best_metric", identity=False)] = False
    best_metric: Annotated[
        str | None,
        Flag(
            "number of the validation (accuracy) or name of an evaluation by which the best checkpoint is found; default: "
            "the validation loss",
            identity=False,
        ),
    ] = None
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
    hf_model: Annotated[
        str | None,
        Flag(
            "train a new model with this architecture: gpt2 (docs/interop.md), or the config.json of a folder or hub name",
            path=True,
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
    """Console output, loggers and trial modes."""

    exp_name: Annotated[str, Flag("first part of the run folder's name")] = "gpt"
    log_dir: Annotated[str, Flag("folder or URL that contains run folders", identity=False, path=True)] = "./log/"
    log_every: Annotated[
        int, Flag("report and write the log files every N steps", "steps", identity=False, at_least=1)
    ] = 10
    loggers: Annotated[
        tuple[str, ...],
        Flag(
            "where records go: console, log (log.txt), jsonl, csv, tensorboard, wandb; messages: messages.jsonl",
            identity=False,
        ),
    ] = ("console", "log", "jsonl", "messages")
    wandb_project: Annotated[str | None, Flag("project of Weights & Biases; default: tinytron", identity=False)] = None
    wandb_run_name: Annotated[
        str | None, Flag("name of the run there; default: that of the run's folder", identity=False)
    ] = None
    wandb_group: Annotated[str | None, Flag("group of the run there", identity=False)] = None
    wandb_mode: Annotated[
        Literal["online", "offline"] | None,
        Flag("offline: keep files that wandb sync uploads later; default: WANDB_MODE, or online", identity=False),
    ] = None
    log_phases: Annotated[
        bool, Flag("log the seconds per step of each phase, and the slowest rank", identity=False)
    ] = True
    save_plots: Annotated[
        bool, Flag("keep the figures of a model's or trainer's plot() in the run folder", identity=False)
    ] = True
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
    log_norms: Annotated[
        bool,
        Flag("log the norm of every tensor's gradient, weights and update at every report", identity=False),
    ] = False
    log_activations: Annotated[
        bool,
        Flag(
            "log statistics of each block's activations, and the norms of their gradients, at reports", identity=False
        ),
    ] = False
    log_attention: Annotated[
        bool, Flag("log the entropy and the largest logit of each layer's attention at every report", identity=False)
    ] = False
    log_loss_by_position: Annotated[
        bool, Flag("log the loss by position in the sequence at every report", identity=False)
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
    "lora": LoraConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "ckpt": CkptConfig,
    "logging": LoggingConfig,
    "seed": SeedConfig,
}
