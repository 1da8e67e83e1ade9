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
from tinytron.training.hf_model import foreign_model
from tinytron.training.memory import Frozen
from tinytron.training.objective import checked_mean, means_to_log, sums_of_mean
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
    """The model as ``forward`` sees it. ``params`` are its parameters by name; ``apply_fn`` runs it.

    ``inputs`` is what the current micro-batch has beyond ids, labels and mask (weights, positions, documents). ``apply_fn``
    passes it on, so that no ``forward`` has to. ``last`` are the loss that it returned last, and the sums for that loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.inputs: dict[str, Any] = {}
        self.last: tuple[torch.Tensor, LossSums, torch.Tensor] | None = None
        signature = inspect.signature(model.forward).parameters
        self._takes = set(signature)
        self._takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.values())

    def apply_fn(
        self, variables: Mapping[str, Any], x: torch.Tensor, y: torch.Tensor | None = None, **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model with the parameters ``variables["params"]``: logits ``[B, s, V]`` and, with targets ``y``, their
        mean loss. ``padding_mask`` ``[B, s]`` is false for padding, ``deterministic`` turns dropout off. Raises:
        ConfigError if the data have weights or positions and the model takes none."""
        params = variables.get("params", self.params)
        changed = {name: value for name, value in params.items() if value is not self.params.get(name)}
        was_training = self.model.training
        self.model.train(was_training and not arguments.get("deterministic", False))
        call = self._gpt if isinstance(self.model, GPT) else self._other
        try:
            return call(self._with(changed), x, y, arguments)
        finally:
            self.model.train(was_training)

    def _with(self, changed: dict[str, torch.Tensor]) -> Callable[..., Any]:
        if not changed:
            return self.model
        return lambda *args, **kwargs: torch.func.functional_call(self.model, changed, args, kwargs)

    def _gpt(
        self, model: Callable[..., Any], x: torch.Tensor, y: torch.Tensor | None, arguments: dict[str, Any]
    ) -> Any:
        inputs = {**self.inputs, **{name: value for name, value in arguments.items() if name in _FOR_MODEL}}
        if y is None:
            return model(x, **{name: inputs[name] for name in ("positions", "documents") if name in inputs}), None
        if (mask := arguments.get(PADDING_MASK)) is not None:
            y = y.masked_fill(~mask.bool(), IGNORE_INDEX)
        logits, sums = model(x, y, with_logits=True, **inputs)
        weights = inputs.get("weights")
        count = ((y != IGNORE_INDEX) if weights is None else weights * (y != IGNORE_INDEX)).sum(dtype=torch.float64)
        loss = sums.objective / torch.where(count > 0, count, 1).to(sums.objective.dtype)
        self.last = loss, sums, count
        return logits, loss

    def _other(
        self, model: Callable[..., Any], x: torch.Tensor, y: torch.Tensor | None, arguments: dict[str, Any]
    ) -> Any:
        given = {name: value for name, value in self.inputs.items() if name in _MEANINGFUL}
        if not self._takes_all:
            for name in given.keys() - self._takes - arguments.keys():
                raise ConfigError(
                    f"the data have {name}, but {type(self.model).__name__}.forward takes none; add the argument, or leave "
                    f"{'--document_mask' if name == 'positions' else 'them'} out"
                )
        return model(x, y, **{**given, **arguments})


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
        """The options of the section ``optim`` that ``schedule`` and ``optimizer`` name. Those of a job override them;
        outside of jobs, only options that differ from their defaults do. Raises: ConfigError for an unknown name."""
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
        batch = self._loaded.pop(part, Batch(ids, labels))  # without one, the override takes its data from elsewhere
        if batch.labels.shape != labels.shape:
            batch = Batch(ids, labels)
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
        logits, loss = state.apply_fn(
            {"params": params},
            batch["x"],
            batch["y"],
            padding_mask=batch[PADDING_MASK],
            deterministic=deterministic,
        )
        assert loss is not None, "there are targets"
        return logits, loss, {}

    def _loss(self, batch: Batch) -> LossSums:
        if type(self).forward is BaseTrainer.forward and isinstance(self.raw_model, GPT):
            return super()._loss(batch)  # the same loss without the logits
        training, state = self.model.training, self._train_state
        state.inputs, state.last = batch.model_inputs(), None
        fields: dict[str, Any] = {"x": batch.input_ids, "y": batch.labels, **batch.extras}
        fields.setdefault(PADDING_MASK, torch.ones_like(batch.labels, dtype=torch.bool))
        fields |= {name: value for name, value in state.inputs.items() if name in _MEANINGFUL}
        result = self.forward(state, state.params, fields, None, not training, not training)
        if not isinstance(result, tuple) or len(result) != 3:
            raise ConfigError(f"forward() returned a {type(result).__name__}; return (logits, loss, meta)")
        logits, loss, meta = result
        self._custom["train" if training else "val"].update({"logits": logits, "loss": loss, **meta}, batch)
        self._plots.add(meta)
        numbers = {name: value for name, value in meta.items() if torch.is_tensor(value) and value.numel() == 1}
        last, state.last = state.last, None  # it would keep the logits alive until the next micro-batch
        return _sums(loss, batch, numbers, last)

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
            self._rates = replace(self._rates, lr=rate)

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

    def _frozen_models(self, config: Config) -> Frozen | None:
        ours = type(self)._init_model is BaseTrainer._init_model and issubclass(self.MODEL, GPT)
        return () if ours and foreign_model(config) is None else None


_FOR_MODEL = ("positions", "documents", "weights", "padding", "routing_scale")
_MEANINGFUL = ("positions", "weights")  # these change the loss of any model


def _sums(
    loss: Any,
    batch: Batch,
    numbers: Mapping[str, torch.Tensor],
    last: tuple[torch.Tensor, LossSums, torch.Tensor] | None,
) -> LossSums:
    """The sums for the ``loss`` of a forward pass. For the part that the GPT computed (``last``), its own sums are used.
    Their auxiliary losses are apart from the cross entropy, and exist without targets, too."""
    if last is None:
        return sums_of_mean(loss, batch, "the loss of forward()", numbers)
    own, sums, count = last
    weight = batch.target_weight().to(sums.objective.dtype)
    scale = torch.where(count > 0, weight / torch.where(count > 0, count, 1), 1.0).to(sums.objective.dtype)
    more = (checked_mean(loss, "the loss of forward()") - own) * weight
    aux, per_token, counts = means_to_log(numbers, batch)
    return LossSums(
        sums.objective * scale + more,
        sums.token * scale + more.detach(),
        {**sums.aux, **aux},
        per_token,
        {**sums.counts, **counts},
        sums.hits,
    )


def _known(what: str, name: str, names: Mapping[str, Any]) -> str:
    """``name``. Raises: ConfigError unless it is one of ``names``."""
    if name not in names:
        hint = nearest(name, names) or f"; use one of {', '.join(names)}"
        raise ConfigError(f"{what}() returned {name!r}, which does not exist{hint}")
    return name
