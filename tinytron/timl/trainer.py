"""timl's trainer: a model, its settings and data loader functions; loss, metrics, optimizer and schedule if wanted."""

from __future__ import annotations

import itertools
import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn as nn

from tinytron.cli.timl import config_of
from tinytron.data import Batch
from tinytron.data.functions import DataLoaderFn, FunctionLoader, data_loader
from tinytron.errors import ConfigError
from tinytron.interop.causal_lm import CausalLM
from tinytron.metrics.custom import Metrics
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums, cross_entropy_of_logits
from tinytron.timl.training_args import TrainingArguments
from tinytron.training import Config
from tinytron.training import Trainer as BaseTrainer
from tinytron.training.build import optimizer_groups
from tinytron.training.objective import LossFunction, loss_sums
from tinytron.training.world import place_in_world
from tinytron.utils.flags import Flag
from tinytron.utils.training import DTYPES

Optimizers = tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None]


@dataclass(frozen=True)
class Extra:
    """Facts about the run that only its log needs."""

    extra_config: Annotated[str, Flag("JSON of further facts about the run", identity=False)] = "{}"


class Trainer(BaseTrainer):
    """Trains ``model`` as ``args`` say, on what the loader functions read: ``fn(file_pattern, per_device_batch_size,
    block_size)`` returns this rank's micro-batches, dictionaries with ``input_ids`` and shifted ``labels``. Construction is
    collective; so is ``train``.

    The loss is ``compute_loss_func(outputs, inputs)``, a mean, or the model's own ``outputs.loss``. A causal language model
    of transformers, whose loss would shift the labels again, gets the cross entropy of its logits. ``optimizers`` are an
    optimizer over ``model.parameters()`` and a schedule of torch, either of them ``None``; ``config`` is further facts for
    the log. Raises: ConfigError, DataError.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_data_loader_fn: DataLoaderFn = data_loader,
        eval_data_loader_fn: DataLoaderFn = data_loader,
        optimizers: Optimizers = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        compute_loss_func: LossFunction | None = None,
        train_metric_cls: Metrics = None,
        eval_metric_cls: Metrics = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.args, self._given_model, self._optimizers = args, model, optimizers
        self._functions = train_data_loader_fn, eval_data_loader_fn
        self._optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.compute_loss_func = compute_loss_func
        self.train_metric_cls, self.eval_metric_cls = train_metric_cls, eval_metric_cls
        self._torch_schedule: torch.optim.lr_scheduler.LRScheduler | None = None
        if optimizers[0] is not None and optimizer_cls_and_kwargs is not None:
            raise ConfigError("optimizers and optimizer_cls_and_kwargs both give an optimizer; leave one out")
        super().__init__(self._config(json.dumps(dict(config or {}), default=str)))

    def _config(self, extra: str) -> Config:
        values = self.args.as_dict()
        config = config_of(values, _model_options(self._given_model, self.args.block_size), place_in_world()[1])
        if not isinstance(self._given_model, GPT) and not _is_transformers(self._given_model):
            config = replace(
                config, ckpt=replace(config.ckpt, export_every=0, export_dir=None)
            )  # nothing else can open it
        return replace(config, further={"extra": Extra(extra)})

    # The parts.

    def _init_dataset(self, config: Config) -> None:
        sizes = self.args.per_device_train_batch_size, self.args.block_size
        train, evaluate = self._functions
        self.train_loader = FunctionLoader(train, self.args.train_file_pattern, *sizes, self.dp_group)
        if config.train.do_val:
            loader = FunctionLoader(evaluate, self.args.eval_file_pattern, *sizes, self.dp_group)
            limit = config.train.max_eval_tokens
            per_batch = sizes[0] * sizes[1] * self.dp_world_size
            self.val_loader = loader if limit is None else _First(loader, -(-limit // per_batch))

    def _init_model(self, config: Config) -> None:
        model = self._given_model.to(self.device, DTYPES[config.train.precision])
        if _is_transformers(model):
            model = CausalLM(model, model.config.to_dict())  # type: ignore[operator, union-attr]
        self.raw_model = self.model = model

    def _init_optimizer(self, config: Config) -> None:
        self.create_optimizer_and_scheduler()

    def create_optimizer_and_scheduler(self) -> None:
        """Set ``optimizer``, and use the schedule of ``create_scheduler`` if it returns one."""
        optimizer = self.create_optimizer()
        self._torch_schedule = self.create_scheduler()
        given = self._optimizers[0] is not None or self._optimizer_cls_and_kwargs is not None
        if given and self._torch_schedule is None and (peak := self.config.optim.max_lr):
            for group in optimizer.param_groups:  # lr_scheduler_type scales the rates of the given optimizer
                group["lr_mult"] = group["lr"] / peak
        self.optimizer = optimizer  # type: ignore[assignment]  # the trainer wraps it

    def create_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that was given, or one of the class that ``get_optimizer_cls_and_kwargs`` returns."""
        if self._optimizers[0] is not None:
            return self._optimizers[0]
        cls, arguments = self.get_optimizer_cls_and_kwargs()
        return cls(self.get_grouped_parameters(), **arguments)

    def create_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler | None:
        """The schedule of torch that was given; ``None``: that of ``lr_scheduler_type``."""
        return self._optimizers[1]

    def get_optimizer_cls_and_kwargs(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Class and arguments of the optimizer."""
        if self._optimizer_cls_and_kwargs is not None:
            return self._optimizer_cls_and_kwargs
        optim = self.config.optim
        betas = optim.adam_beta1, optim.adam_beta2
        return torch.optim.AdamW, {"lr": optim.max_lr, "betas": betas, "eps": optim.adam_eps, "fused": True}

    def get_decay_parameter_names(self) -> list[str]:
        """Names of the parameters that weight decay applies to: those of two dimensions or more."""
        decayed = {
            id(p) for g in optimizer_groups(self.config.optim, self.raw_model) if g["weight_decay"] for p in g["params"]
        }
        return [name for name, parameter in self.raw_model.named_parameters() if id(parameter) in decayed]

    def get_grouped_parameters(self) -> list[dict[str, Any]]:
        """The optimizer's groups: with and without weight decay."""
        names = set(self.get_decay_parameter_names())
        named = [(name, p) for name, p in self.raw_model.named_parameters() if p.requires_grad]
        decay = self.config.optim.weight_decay
        parts = ([p for n, p in named if n in names], decay), ([p for n, p in named if n not in names], 0.0)
        return [{"params": params, "weight_decay": rate} for params, rate in parts if params]

    def _lr_scheduler(self, step: int) -> float:
        schedule = self._torch_schedule
        if schedule is None:
            return super()._lr_scheduler(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects its own order of optimizer and schedule
            while schedule.last_epoch < step:  # also after a resume, from the beginning
                schedule.step()
        first, *others = map(float, schedule.get_last_lr())
        if not first and any(others):
            raise ConfigError(
                "the schedule gives the first group the rate 0, but not the others; put another group first"
            )
        for group, rate in zip(self.optimizer.param_groups, (first, *others), strict=True):
            group["lr_mult"] = rate / first if first else 1.0
        return first

    # The loss.

    def compute_loss(self, outputs: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The mean loss of a micro-batch, by ``compute_loss_func``; an override replaces it."""
        assert self.compute_loss_func is not None, "without one, the loss comes from the outputs"
        return self.compute_loss_func(outputs, inputs)

    def _loss(self, batch: Batch) -> LossSums:
        own = self.compute_loss_func is not None or type(self).compute_loss is not Trainer.compute_loss
        watched = self._custom["train" if self.model.training else "val"]
        arguments = self.args.forward_kwargs or {}
        if isinstance(self.raw_model, GPT) or (
            isinstance(self.raw_model, CausalLM) and not own and not arguments and not watched.collects
        ):
            return super()._loss(batch)
        inputs = batch.as_inputs()
        if isinstance(self.raw_model, CausalLM):
            outputs = self.raw_model.hf(input_ids=batch.input_ids, **arguments)
        else:
            outputs = self.model(**inputs, **arguments)
        watched.update(outputs, batch)
        if own:
            return loss_sums(outputs, batch, self.compute_loss)
        if isinstance(self.raw_model, CausalLM):
            logits, weights = outputs.logits.flatten(0, 1), batch.weights
            return cross_entropy_of_logits(
                logits, batch.labels.flatten(), weights_T=None if weights is None else weights.flatten()
            )
        return loss_sums(outputs, batch)


class _First:
    """The first ``count`` batches of a loader."""

    def __init__(self, loader: FunctionLoader, count: int) -> None:
        self._loader, self._count = loader, count

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self._loader), self._count)


def _is_transformers(model: nn.Module) -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def _model_options(model: nn.Module, block_size: int) -> dict[str, Any]:
    """The options of the run that describe ``model``, by path: all of a GPT; of others the vocabulary, which data are
    checked against. Raises: ConfigError if it cannot be found."""
    if isinstance(model, GPT):
        return {f"model.{name}": value for name, value in asdict(model.config).items()}
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if size is None:
        tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
        size = max(tables, default=None)
    if size is None:
        raise ConfigError(f"{type(model).__name__} has no vocabulary; give it a config.vocab_size or an nn.Embedding")
    return {"model.vocab_size": int(size), "model.block_size": block_size}
