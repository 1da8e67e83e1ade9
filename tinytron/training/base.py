"""``BaseTrainer``: a trainer that is described by its model, its options and its schedule, with a batch and a forward pass
of its own if needed.

    @job("my_model/train/pretrain")
    class PretrainMyModel(BaseTrainer[BaseTrainerConfig, MyModel]):
        MODEL = MyModel
        CONFIG = BaseTrainerConfig

        @classmethod
        def schedule(cls):
            return "wsd"

It is the same loop as ``Trainer``'s, whose hooks can be overridden here, too (docs/extend.md).
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
import torch.nn as nn

from tinytron.config import configure, is_configured
from tinytron.data import Batch
from tinytron.data.batch import FIELDS, as_batch
from tinytron.distributed.layout import ParallelLayout
from tinytron.errors import ConfigError
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.optim.schedule import SCHEDULES
from tinytron.training.batch_preparer import check_batch
from tinytron.training.build import build_model
from tinytron.training.config import Config, OptimConfig
from tinytron.training.evaluator import Evaluator
from tinytron.training.objective import sums_of_mean
from tinytron.training.trainer import Trainer
from tinytron.utils.flags import nearest
from tinytron.utils.sequences import IGNORE_INDEX
from tinytron.utils.training import DTYPES

ConfigT = TypeVar("ConfigT")
ModelT = TypeVar("ModelT")
OPTIMIZERS = {"adamw": "adam", "adam": "adam", "muon": "muon"}
PADDING_MASK = "padding_mask"
_IGNORED_ELSEWHERE = -1  # the ignored label of other systems


@dataclass
class BaseTrainerConfig:
    """The options of a run are those of ``tinytron pretrain``. A subclass declares more of them by
    ``tinytron.config.field``."""


class TrainState:
    """The model as ``forward`` sees it. ``params`` are its parameters by name; ``apply_fn`` runs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())

    def apply_fn(
        self, variables: Mapping[str, Any], x: torch.Tensor, y: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model with the parameters ``variables["params"]``: logits ``[B, s, V]`` and, with targets ``y``, their
        mean loss. ``padding_mask`` ``[B, s]`` is false for padding, ``deterministic`` turns dropout off."""
        params = variables.get("params", self.params)
        changed = {name: value for name, value in params.items() if value is not self.params.get(name)}
        deterministic = bool(arguments.get("deterministic", False))
        was_training = self.model.training
        self.model.train(was_training and not deterministic)
        call = _call_gpt if isinstance(self.model, GPT) else _call_model
        try:
            return call(self._with(changed), x, y, arguments)
        finally:
            self.model.train(was_training)

    def _with(self, changed: dict[str, torch.Tensor]) -> Callable[..., Any]:
        if not changed:
            return self.model
        return lambda *args, **kwargs: torch.func.functional_call(self.model, changed, args, kwargs)


def _call_gpt(model: Callable[..., Any], x: torch.Tensor, y: torch.Tensor | None, arguments: dict[str, Any]) -> Any:
    if y is None:
        return model(x), None
    inputs = {
        name: arguments[name] for name in ("positions", "documents", "weights", "routing_scale") if name in arguments
    }
    mask = arguments.get(PADDING_MASK)
    if mask is not None:
        y = y.masked_fill(~mask.bool(), IGNORE_INDEX)
    logits, sums = model(x, y, with_logits=True, **inputs)
    counted = (y != IGNORE_INDEX) if (weights := inputs.get("weights")) is None else weights * (y != IGNORE_INDEX)
    return logits, sums.objective / counted.sum().clamp(min=torch.finfo(torch.float32).tiny)


def _call_model(model: Callable[..., Any], x: torch.Tensor, y: torch.Tensor | None, arguments: dict[str, Any]) -> Any:
    return model(x, y, **arguments)


class _Pulled:
    """A loader whose batches go through ``BaseTrainer.batch``."""

    def __init__(self, trainer: BaseTrainer[Any, Any], part: str, loader: Any) -> None:
        self._trainer, self._part, self._loader = weakref.proxy(trainer), part, loader  # as in Evaluator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._loader, name, value)

    def __iter__(self) -> Iterator[Batch]:
        self._trainer._iterators[self._part] = iter(self._loader)
        while True:
            try:
                fields = self._trainer.batch(self._part)
            except StopIteration:
                return
            yield self._trainer._from_fields(fields, self._part)


class BaseTrainer(Trainer, Generic[ConfigT, ModelT]):
    """Trains ``MODEL``, whose options and ``CONFIG``'s become those of the job. Override ``schedule`` and ``optimizer`` to
    choose by name, ``batch`` to change data, ``forward`` to change the loss, ``evaluator`` to evaluate.

    ``MODEL`` is the GPT, a subclass of it, or a module that ``configure`` can make and that maps
    ``(x, y, padding_mask=, deterministic=)`` to ``(logits, mean loss)``. Raises: as ``Trainer``.
    """

    MODEL: ClassVar[type[nn.Module]] = GPT
    CONFIG: ClassVar[type] = BaseTrainerConfig

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = cls.__dict__.get("_init_model")
        if own is not None and len(inspect.signature(own).parameters) == 1:  # as in other systems: _init_model(self)
            cls._init_model = lambda self, config=None: own(self)  # type: ignore[method-assign]

    def __init__(self, spec: Config) -> None:
        self._iterators: dict[str, Iterator[Any]] = {}
        self._loaded: dict[str, Batch] = {}
        if not is_configured():  # a job's options have these as their defaults
            chosen = type(self).chosen_options().items()
            own = {name: value for name, value in chosen if getattr(spec.optim, name) == getattr(OptimConfig, name)}
            spec = replace(spec, optim=replace(spec.optim, **own))
        super().__init__(spec)

    # Choices by name.

    @classmethod
    def schedule(cls) -> str | Callable[[int], float] | None:
        """The name of a schedule, a function from the step (from 0) to the rate, or ``None`` for that of the options."""
        return None

    @classmethod
    def optimizer(cls) -> str | Callable[[Any], torch.optim.Optimizer] | None:  # type: ignore[override]
        """The name of an optimizer (``adamw``, ``muon``), a function from the parameters to one, or ``None`` for that of
        the options."""
        return None

    @classmethod
    def chosen_options(cls) -> dict[str, Any]:
        """The options of the section ``optim`` that ``schedule`` and ``optimizer`` name; options that are given override
        them. Raises: ConfigError for an unknown name."""
        schedule, optimizer = cls.schedule(), cls.optimizer()
        found: dict[str, Any] = {}
        if isinstance(schedule, str):
            found["lr_schedule"] = _known("schedule", schedule, SCHEDULES)
        if isinstance(optimizer, str):
            found["optimizer"] = OPTIMIZERS[_known("optimizer", optimizer, OPTIMIZERS)]
        return found

    def evaluator(self) -> Evaluator:
        """The evaluator, which runs where ``--eval_tasks`` would."""
        return Evaluator.from_trainer(self)

    # Data and loss.

    def batch(self, slice: str = "train") -> dict[str, Any]:
        """The next micro-batch of this rank, of the ``slice`` ``"train"`` or ``"val"``, as NumPy arrays: ``x`` and ``y``
        ``[B, S]`` (token ids and shifted labels), ``padding_mask`` ``[B, S]`` (false for padding), and further keys of the
        data. Keys that an override adds reach ``forward``. Raises: StopIteration at the end of the data."""
        self._loaded[slice] = loaded = as_batch(next(self._iterators[slice]))
        mask = torch.ones_like(loaded.labels, dtype=torch.bool) if loaded.padding is None else ~loaded.padding
        fields = {"x": loaded.input_ids, "y": loaded.labels, PADDING_MASK: mask, **loaded.extras}
        return {name: value.numpy() for name, value in fields.items()}

    def _from_fields(self, fields: Mapping[str, Any], part: str) -> Batch:
        """``fields``, a result of ``batch``, as the loop's batch. Raises: ConfigError or DataError for invalid ones."""
        if missing := [name for name in ("x", "y") if name not in fields]:
            raise ConfigError(
                f"batch() returned no {missing[0]}; return the dictionary of super().batch(), with more keys"
            )
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fields.items()}
        ids, labels = tensors.pop("x").long(), tensors.pop("y").long()
        mask = tensors.get(PADDING_MASK, torch.ones_like(labels, dtype=torch.bool)).bool()
        labels = labels.masked_fill((labels == _IGNORED_ELSEWHERE) | ~mask, IGNORE_INDEX)
        tensors[PADDING_MASK] = mask
        if taken := sorted(tensors.keys() & FIELDS.keys()):
            raise ConfigError(f"batch() returned the key {taken[0]}, which means something else in a batch; rename it")
        batch = self._loaded[part]
        padding = None if batch.padding is None and bool(mask.all()) else ~mask
        batch = batch._replace(input_ids=ids, labels=labels, padding=padding, extras=tensors)
        check_batch(batch, self.config.train.seq_len, self.config.model.vocab_size)
        return batch

    @staticmethod
    def forward(
        state: TrainState,
        params: Mapping[str, Any],
        batch: Mapping[str, torch.Tensor],
        key: Any = None,
        deterministic: bool = False,
        intermediates: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Logits, mean loss over the targets of ``batch`` (this rank's micro-batch, on the device), and numbers to log by
        name. It runs in training and, ``deterministic`` and with ``intermediates``, in validation. ``key`` is always
        ``None``: dropout draws from torch's generator."""
        optional = {name: batch[name] for name in _FOR_MODEL if name in batch}
        logits, loss = state.apply_fn(
            {"params": params},
            batch["x"],
            batch["y"],
            padding_mask=batch[PADDING_MASK],
            deterministic=deterministic,
            **optional,
        )
        assert loss is not None, "there are targets"
        return logits, loss, {}

    def _loss(self, batch: Batch) -> LossSums:
        if type(self).forward is BaseTrainer.forward and isinstance(self.raw_model, GPT):
            return super()._loss(batch)  # the same loss without the logits
        training = self.model.training
        fields: dict[str, Any] = {"x": batch.input_ids, "y": batch.labels, **batch.extras}
        fields.setdefault(PADDING_MASK, torch.ones_like(batch.labels, dtype=torch.bool))
        if isinstance(self.raw_model, GPT):
            fields |= batch.model_inputs()
        result = self.forward(self._train_state, self._train_state.params, fields, None, not training, not training)
        if not isinstance(result, tuple) or len(result) != 3:
            raise ConfigError(f"forward() returned a {type(result).__name__}; return (logits, loss, meta)")
        logits, loss, meta = result
        self._custom["train" if training else "val"].update({"logits": logits, "loss": loss, **meta}, batch)
        numbers = {name: value for name, value in meta.items() if torch.is_tensor(value) and value.numel() == 1}
        return sums_of_mean(loss, batch, "the loss of forward()", numbers)

    # Initialization, in the order of ``Trainer``, under the names of other systems.

    def _init_topology(self, spec: Config) -> None:
        """Join the process group and lay the ranks out: set ``state``."""
        super()._init_distributed(spec)

    def _init_data(self, spec: Config) -> None:
        """Set the datasets or loaders."""
        super()._init_dataset(spec)

    def _init_batch_config(self, topology: ParallelLayout) -> None:
        """Derive accumulation and steps, and build the loaders."""
        super()._init_pipeline(self.config)

    def _init_state(self, params: Mapping[str, nn.Parameter]) -> None:
        """Set ``optimizer``, over ``params``."""
        factory = type(self).optimizer()
        if factory is None or isinstance(factory, str):
            super()._init_optimizer(self.config)
        else:
            self.optimizer = factory(params.values())  # type: ignore[assignment, method-assign]

    def _init_wandb(self, spec: Config) -> None:
        """Called once the run's folder exists; add sinks with ``self.reporter.add``."""

    def _init_counters_and_eval(self) -> None:
        """Set the evaluator. Called last."""
        self._evaluator = self.evaluator()

    def _init_distributed(self, config: Config) -> None:
        self._init_topology(config)

    def _init_dataset(self, config: Config) -> None:
        self._init_data(config)

    def _init_pipeline(self, config: Config) -> None:
        self._init_batch_config(self.state.layout)
        if type(self).batch is not BaseTrainer.batch:
            self.data.train = replace(self.data.train, loader=_Pulled(self, "train", self.data.train.loader))
            if self.data.val is not None:
                self.data.val = replace(self.data.val, loader=_Pulled(self, "val", self.data.val.loader))
        if callable(rate := type(self).schedule()):
            self._schedule = rate  # type: ignore[assignment]

    def _init_model(self, config: Config | None = None) -> None:
        config = self.config if config is None else config
        if issubclass(self.MODEL, GPT):
            self.raw_model = self.model = build_model(config, self.state, self.MODEL)
            return
        if (config.parallel.sep_size, config.parallel.ep_size or 1) != (1, 1):
            raise ConfigError(
                f"{self.MODEL.__name__} needs whole sequences and has no experts, but --sep_size is "
                f"{config.parallel.sep_size}; use --sep_size 1 and --ep_size 1, or build on tinytron.model.GPT"
            )
        torch.manual_seed(config.seed.seed)
        self.raw_model = self.model = configure(self.MODEL).to(self.device, dtype=DTYPES[config.train.precision])

    def _init_optimizer(self, config: Config) -> None:
        self._train_state = TrainState(self.raw_model)
        self._init_state(self._train_state.params)

    def _init_logging(self, config: Config) -> None:
        super()._init_logging(config)
        self._init_wandb(config)

    def _init_metrics(self, config: Config) -> None:
        self._init_counters_and_eval()
        if type(self._evaluator) is not Evaluator:
            self.due = replace(self.due, answers=True)
        super()._init_metrics(config)

    def _answer_tasks(self) -> list[dict[str, Any]]:
        return self._evaluator.records()


_FOR_MODEL = ("positions", "documents", "weights", "routing_scale")


def _known(what: str, name: str, names: Mapping[str, Any]) -> str:
    """``name``. Raises: ConfigError unless it is one of ``names``."""
    if name not in names:
        hint = nearest(name, names) or f"; use one of {', '.join(names)}"
        raise ConfigError(f"{what}() returned {name!r}, which does not exist{hint}")
    return name
