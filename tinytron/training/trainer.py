"""The training loop. Subclass ``Trainer`` and override one ``_init_*`` method to change a part, ``_loss`` to change the
objective; ``train`` shows what happens after a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from tinytron.checkpoint import CheckpointFiles
from tinytron.data import Batch, GlobalBatchSampler
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.topology import describe_topology
from tinytron.metrics import SourceLosses
from tinytron.metrics.custom import Metrics, MetricSet
from tinytron.metrics.sinks import RunInfo, make_sinks
from tinytron.model.modules.loss import LossSums, checked_sums
from tinytron.model.protocols import EndsSteps, WaitsForParameters
from tinytron.training import datasets
from tinytron.training.attributes import TrainerAttributes
from tinytron.training.batch_fit import with_fitted_batch
from tinytron.training.batch_preparer import count_targets, scale_weights
from tinytron.training.build import (
    build_metrics,
    build_model,
    build_optimizer,
    build_profiler,
    build_rates,
    build_statistics,
    describe_run_size,
    flops_per_token,
    optimizer_options,
    param_wait_hook,
)
from tinytron.training.config import Config
from tinytron.training.derive import Due
from tinytron.training.evals import TrainingEvals
from tinytron.training.evaluator import check_registered, registered_records
from tinytron.training.hf_model import foreign_model
from tinytron.training.memory import Frozen, memory_notes
from tinytron.training.objective import LossFunction, loss_sums
from tinytron.training.pipeline import DataPipeline
from tinytron.training.plots import Plots
from tinytron.training.run.best import own_stages
from tinytron.training.run.exports import check_exportable
from tinytron.training.run.folder import RunFolder
from tinytron.training.run.guards import Guards
from tinytron.training.run.reporter import Reporter
from tinytron.training.run.resume import resume
from tinytron.training.run.saver import RunSaver
from tinytron.training.run.unfinished_step import StepDropped, StepStart
from tinytron.training.world import join_world
from tinytron.utils.batch_sizes import Skips
from tinytron.utils.phases import BACKWARD, EVALUATION, FORWARD, SAVE, phase


class Trainer(TrainerAttributes):
    """Pre-trains a model as ``config`` describes. Construction is collective over all processes; so is ``train``.

    For subclasses (all set before ``train``): ``state`` (layout and groups), ``device``, ``dp_group/rank/world_size``,
    ``sp_group/rank/world_size``, ``master_process``, ``train_dataset/sampler/loader``, ``val_dataset/loader``,
    ``raw_model``, ``model``, ``raw_optimizer``, ``optimizer``, ``training_info``, ``log_dir``, ``one_step_results``.
    The parts of a run, each built by one ``_init_*``: ``reporter``, ``data``, ``evals``, ``folder``, ``guards``, ``saver``.

    Raises: ConfigError, DataError or CheckpointError, the same on every rank, before any step.
    """

    sections: ClassVar[Mapping[str, type]] = {}  # extra sections of the configuration: name -> dataclass of flags
    compute_loss_func: LossFunction | None = None  # (outputs, inputs) -> mean loss; a method, or set on an instance
    train_metric_cls: Metrics = None  # a metric class, or several (tinytron/metrics/custom.py)
    eval_metric_cls: Metrics = None
    train_dataset: Dataset[Any] | None = None
    val_dataset: Dataset[Any] | None = None
    train_loader: Iterable[Any] | None = None
    val_loader: Iterable[Any] | None = None
    train_sampler: GlobalBatchSampler | None = None  # for a map-style train_dataset
    _continues = False  # from a checkpoint
    raw_model: nn.Module
    model: nn.Module
    optimizer: DistributedOptimizer

    def __init__(self, config: Config) -> None:
        config = config.with_sections(self.sections)
        check_exportable(config)
        self.config, self.step = config, 0  # step counts completed optimizer steps
        self.one_step_results: dict[str, float] = {}
        self._init_distributed(config)  # -> state, device
        self.config = config = replace(config, dp_size=self.state.layout.dp)
        self._init_reporter(config)  # -> reporter, which everything below prints with
        self.config = config = self._fit_batch_size(config)
        self._check_memory(config)
        self._init_dataset(config)  # -> train_dataset, val_dataset
        self._init_pipeline(config)  # -> data: training_info, sampler, loaders
        self._init_evals(config)  # -> evals
        self._init_model(config)  # -> raw_model, model
        self._init_optimizer(config)  # -> optimizer
        self._attach_optimizer()
        self._init_logging(config)  # -> folder, log_dir
        self._init_guards(config)  # -> guards
        self._resume_from_checkpoint()  # -> step; restores all of the above
        self._init_saver(config)  # -> saver
        self._init_metrics(config)  # starts the reporter

    # The parts of a run: override any of these.

    def _init_distributed(self, config: Config) -> None:
        """Join the process group, choose the device, build every parallel group: set ``state``."""
        self.state = join_world(config)

    def _init_reporter(self, config: Config) -> None:
        """Set ``reporter``, with the sinks that records and messages go to."""
        self.reporter = Reporter(self.state, make_sinks(config.logging.loggers), config.logging.log_phases)

    def _fit_batch_size(self, config: Config) -> Config:
        """Replace ``--batch_size auto``, or under ``--fit_batch`` a number that does not divide the batch, with one that
        works. Raises: ConfigError for a model whose memory cannot be estimated."""
        config, notes = with_fitted_batch(config, self.state, self._frozen_models(config))
        self._say(*notes)
        return config

    def _check_memory(self, config: Config) -> None:
        """Report or refuse what does not fit the machine before it takes minutes. Only Tinytron's own model is known."""
        if (frozen := self._frozen_models(config)) is not None:
            self._say(*memory_notes(config, self.state, frozen))

    def _init_dataset(self, config: Config) -> None:
        """Set ``train_dataset`` and, if there is one, ``val_dataset``: map-style or iterable, with items
        ``{input_ids, labels}`` or rows of ``seq_len + 1`` token ids; or ``train_loader`` and ``val_loader``, which yield
        this rank's micro-batches. Without validation data, a part of ``train_dataset`` may be held out (docs/data.md)."""
        if config.data.dataset_path is None and not config.data.use_mock_data:
            self._say("no --dataset_path given: training on mock data (random tokens: the loss stays near ln V)")
        self.train_dataset, self.val_dataset = datasets.builtin_datasets(config, self.state)

    def _init_pipeline(self, config: Config) -> None:
        """Set ``data``, which builds what ``_init_dataset`` left unset: validation split, sampler, loaders, step counts."""
        names = ("train_dataset", "val_dataset", "train_loader", "val_loader")
        self.data = DataPipeline(config, self.state, **{name: getattr(self, name) for name in names})
        self.train_dataset, self.train_loader = self.data.train.dataset, self.data.train.loader
        if self.data.val is not None:
            self.val_dataset, self.val_loader = self.data.val.dataset, self.data.val.loader
        self.train_sampler = self.data.sampler
        self._say(*self.data.notes)
        self.due = Due(config, self.training_info.max_steps, answers=bool(config.train.eval_tasks))
        self._rates = build_rates(config.optim, self.training_info)

    def _init_evals(self, config: Config) -> None:
        """Set ``evals``, which validates and answers tasks during training."""
        self.evals = TrainingEvals(config, self.state, self.data.val, own_stages(self))
        check_registered(self)

    def _init_model(self, config: Config) -> None:
        """Set ``raw_model``, which owns the parameters and maps ``(input_ids, labels)`` to ``LossSums`` or an object
        with ``.loss``, a mean, and ``model``, which ``_loss`` calls."""
        self.raw_model = self.model = build_model(config, self.state)

    def _init_optimizer(self, config: Config) -> None:
        """Set ``optimizer``: any torch optimizer over ``raw_model.parameters()``, wrapped or not."""
        self.optimizer = DistributedOptimizer(
            optimizer=build_optimizer(config, self.raw_model), process_group=self.dp_group
        )

    def _init_logging(self, config: Config) -> None:
        """Set ``folder``, the run's folder; ``config.json`` follows once it is certain that the run continues in it."""
        self.folder = RunFolder(config, self.state)
        self._say(*self.folder.notes)

    def _init_guards(self, config: Config) -> None:
        """Set ``guards``: signals, spikes, replicas and stalls."""
        self.guards = Guards(config, self.state, self.log_dir, self.optimizer)

    def _init_saver(self, config: Config) -> None:
        """Set ``saver``, which writes checkpoints and exports."""
        parts = (self.folder, self.raw_model, self.optimizer, self.data, self.guards)
        self.saver = RunSaver(config, self.state, *parts, resumed=self.step, say=self._say)

    def _init_metrics(self, config: Config) -> None:
        """Choose what is logged in addition to the losses, and open the sinks."""
        self._sources = SourceLosses(self.data.train.sources, self.state)
        classes = (("train", self.train_metric_cls), ("val", self.eval_metric_cls))
        self._custom = {stage: MetricSet(found, config, self.state, self.raw_model) for stage, found in classes}
        parts = (config, self.raw_model, self.state)
        self._statistics = build_statistics(*parts, self.optimizer, self._custom["train"], self._sources)
        metrics = build_metrics(*parts, self.log_dir, self._sources, self.data.seen_tokens)
        self.reporter.metrics += [self._statistics.record, *metrics]
        self._plots = Plots(self)
        length, batch = self.training_info.max_steps, config.train.total_batch_size
        self.reporter.start(RunInfo(self.log_dir, config.as_dict(), self.step, length, batch, self.data.tokens_before))

    def _init_profiler(self, config: Config) -> contextlib.AbstractContextManager[Any]:
        """A profiler with a ``step`` method, or a context of ``None``."""
        if not config.train.use_profiler:
            return contextlib.nullcontext()
        trace = self.log_dir / f"rank{self.state.rank}_trace.json"
        return build_profiler(self.training_info.profile_window, self.step, trace, self._say)

    def _lr_scheduler(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        return self._rates.lr(step)

    def _loss(self, batch: Batch) -> LossSums:
        """Loss *sums* over this rank's part of a micro-batch; ``train_step`` divides them by what ``_normalizer`` counts in
        the global batch. ``batch.extras`` are extra keys of the data."""
        outputs = self.model(batch.input_ids, batch.labels, **batch.model_inputs())
        self._custom["train" if self.model.training else "val"].update(outputs, batch)
        return loss_sums(outputs, batch, self.compute_loss_func)

    def _normalizer(self, batch: Batch) -> torch.Tensor:
        """This rank's contribution to the divisor of the loss for a micro-batch: a whole number, on the device; default:
        its valid targets. It is summed over all ranks, so anything that every rank of ``sp_group`` sees must be counted on
        only one of them. Rows that pad a validation batch have no valid label and must not count."""
        return batch.targets()

    # The loop.

    def train(self) -> None:
        """Train until ``training_info.max_steps``; validate, answer tasks and save on the way and at the end. Collective.

        Raises: SystemExit, after saving a checkpoint, if a rank got SIGTERM, SIGUSR1 (status 0) or Ctrl-C (130);
        TrainingError if a guard rail ends the run (docs/reliability.md).
        """
        last = self.training_info.max_steps
        if self.step >= last:
            self._say(f"already trained: {self.step} of {last} steps are done")
            self.saver.close(self._say)
            self._say_what_is_next()
            self.reporter.close()
            return
        self.reporter.begin_training(self.config, flops_per_token(self.config, self.raw_model), self.optimizer)
        with self.reporter.closing(), self.guards.active(), self._init_profiler(self.config) as profiler:
            with self.saver.in_background():
                if self.saver.needed_at_start(continues=self._continues):
                    self.save()
                for turn, microbatches in enumerate(self.data.steps(self.step), self.step + 1):
                    start = StepStart(self.raw_model, self._sources.sums) if self.guards.before_step() else None
                    try:
                        self.train_step(microbatches)
                    except StepDropped:
                        assert start is not None, "guards drop a step only if before_step returned True"
                        start.restore()
                        self.optimizer.zero_grad()
                    else:
                        self.step += 1
                        self.guards.after_step(self.step, last=self.step >= last)
                    self._maybe_log()
                    if self.guards.spike is not None:
                        self._go_back()
                    else:
                        self._maybe_evaluate()
                        self._maybe_save()
                    if profiler is not None:
                        if turn == self.training_info.profile_window[1]:  # the profiler does not go back
                            self._finish_exchanges()
                        profiler.step()
                    if self.step >= last or self.guards.ends:
                        break
            self.optimizer.finish_gather()
            with self.guards.paused():
                self.saver.close(self._say, wait=not self.guards.ends)
                self.folder.push_logs()
            self.guards.leave(self.step, self._say)
            self._say_what_is_next()

    def train_step(self, microbatches: list[Batch]) -> None:
        """One optimizer step on this rank's part of the global batch. Collective; the host waits for no result."""
        lr = self._lr_scheduler(self.step)
        self._rates.apply(self.optimizer.param_groups, self.step, lr)
        count = count_targets(microbatches, self.state.groups["world"], self._normalizer)
        divisor = count.divisor  # used in the single division
        microbatches = scale_weights(microbatches, count.weight_scale)
        if self.config.model.use_moe:
            microbatches = [batch._replace(routing_scale=count.routing_scale) for batch in microbatches]
        if self.due.report(self.step + 1):
            self._statistics.begin()
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(microbatches):
            self.reporter.advance_within_step(i, len(microbatches))
            if i:
                self.guards.between_microbatches()
            with self.optimizer.accumulate(last=i == len(microbatches) - 1):
                with phase(FORWARD):
                    losses = checked_sums(self._loss(batch))
                with phase(BACKWARD):
                    self.optimizer.scale(losses.objective / divisor).backward()
            self._statistics.add(batch, losses)
            for name, value in {"loss": losses.token, **losses.aux}.items():
                sums[name] = sums[name] + value if i else value
            for name, number in losses.counts.items():
                counts[name] = counts[name] + number if i else number
        parts = {name: value if name in counts else value / divisor for name, value in sums.items()}
        # Without targets it is not 0, which would be the best loss.
        parts["loss"] = parts["loss"].masked_fill(count.empty, torch.nan)
        reject = self.guards.spikes.judge(self.step + 1, parts["loss"])
        grad_norm = self.optimizer.step(max_norm=self.config.train.grad_clip_value, reject=reject)
        self.optimizer.zero_grad()
        self._end_step()
        self.reporter.window.add(self.step + 1, lr, parts, grad_norm, counts)

    def eval(self) -> float:
        """Validate the current weights, log the result and return it, in nats per token. Collective."""
        with self.reporter.aside(EVALUATION), self.guards.paused():
            self._custom["val"].begin()
            objective = (self.model, self._plots.watched(self._loss), self._normalizer)
            loss, record = self.evals.validate(self.step, *objective, self.data.validation())
            record |= self._custom["val"].end()
            record |= self.evals.averaged(self.optimizer, *objective, self.data.validation())
        self.one_step_results["val_loss"] = loss
        self.reporter.write(self.evals.noted([record]))
        return loss

    def save(self) -> CheckpointFiles:
        """Save a checkpoint of the current step; inside ``train`` it is written while training continues. Collective."""
        with self.reporter.aside(SAVE), self.guards.paused():
            self.optimizer.finish_gather()
            messages = self.saver.save(self.step, self.evals.about(self.step))
        self._say(*messages)
        return self.saver.files(self.step)

    def _frozen_models(self, config: Config) -> Frozen | None:
        """The models in memory in addition to the trained one; ``None`` if that one is not Tinytron's own."""
        return () if type(self)._init_model is Trainer._init_model and foreign_model(config) is None else None

    def _finish_exchanges(self) -> None:
        """Wait for background exchanges between ranks. An operation that ends after torch's profiler has stopped corrupts
        memory (torch 2.13): the process later dies from SIGSEGV or SIGABRT."""
        self.optimizer.finish_gather()
        self.guards.finish_exchange()

    def _end_step(self) -> None:
        if isinstance(self.raw_model, EndsSteps):
            self.raw_model.end_step(self.optimizer.last_skipped)

    def _attach_optimizer(self) -> None:
        """Wrap a plain torch optimizer, and give the wrapper the parameters' names and groups."""
        if not isinstance(self.optimizer, DistributedOptimizer):
            self.optimizer = DistributedOptimizer(optimizer=self.optimizer, process_group=self.dp_group)
        options = optimizer_options(self.config, self.raw_model)
        self.optimizer.attach(self.raw_model, specs_of(self.raw_model), self.state, options)
        if isinstance(self.raw_model, WaitsForParameters):
            self.raw_model.wait_for_params = param_wait_hook(self.optimizer, self.raw_model)
        if self.config.parallel.print_topology:
            self._say(describe_topology(self.state.layout, self.optimizer))
        self._say(describe_run_size(self.config, self.raw_model, self.state, self.training_info))

    def _resume_from_checkpoint(self) -> None:
        """Load the newest undamaged checkpoint of the run's folder, else of ``--resume_path``, if there is one."""
        parts = (self.raw_model, self.optimizer, self.state)
        found = resume(self.config, self.log_dir, *parts, self.data.identity, self._say)
        if found is not None:
            assert found.step is not None, "check_continues rejects records from elsewhere"
            self.guards.load_state_dict(found.guard)
            self.step, self._continues = found.step, True
            self.data.pass_over(Skips.of(found.skips))
        self._say(*self.folder.begin(self.step, self.training_info.max_steps))

    def _maybe_log(self) -> None:
        self.reporter.advance(self.step)
        if self.due.report(self.step) or self.guards.ends:
            self.one_step_results |= self.reporter.report(self.step, self.optimizer.skipped_steps)
            self.guards.after_report()  # the host has waited for the device

    def _go_back(self) -> None:
        """Return to the last checkpoint because of a spike, and pass over the data since then. Collective."""
        left = self.step
        with self.reporter.aside(SAVE), self.guards.paused():
            self._finish_exchanges()
            self.step = self.saver.go_back(left, self.due.save, self._say)
        why, (_, count) = self.guards.went_back(self.step), self.data.skips.parts[-1]
        self._say(f"step {left} | back to the checkpoint of step {self.step}, passing over {count:,} sequences: {why}")
        self.reporter.go_back(self.step)

    def _maybe_evaluate(self) -> None:
        if self.due.validation(self.step) and not self.guards.ends:
            self.eval()
        if self.due.tasks(self.step) and not self.guards.ends:
            with self.reporter.aside(EVALUATION), self.guards.paused():
                records = self._answer_tasks()
            self.reporter.write(self.evals.noted(records))

    def _answer_tasks(self) -> list[dict[str, Any]]:
        return self.evals.answer(self.step, self.model, self._loss) + registered_records(self)

    def _maybe_save(self) -> None:
        self._say(*self.saver.report())
        due = self.due.save(self.step) or (self.guards.ends and self.saver.enabled)
        if due and self.step != self.saver.saved:  # after a dropped step, the step before it may already be saved
            self.save()

    def _say_what_is_next(self) -> None:
        if self.saver.enabled:
            self._say(self.folder.next_command(self.raw_model))

    def _say(self, *texts: str) -> None:
        self.reporter.say(*texts)
