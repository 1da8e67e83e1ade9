"""The training loop. Subclass ``Trainer`` and override one ``_init_*`` to change a part, ``_loss`` to change the
objective; what happens after a step stands in ``train``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils.data import Dataset

from tinytron.checkpoint import CheckpointFiles
from tinytron.checkpoint.meta import FORMAT_VERSION, CheckpointMeta
from tinytron.data import Batch, GlobalBatchSampler
from tinytron.distributed import DistributedOptimizer
from tinytron.distributed.param_spec import specs_of
from tinytron.distributed.topology import describe_topology
from tinytron.errors import ConfigError
from tinytron.evaluation import validate
from tinytron.metrics import SourceLosses, load_statistics
from tinytron.metrics.routing import keep_traces_until
from tinytron.metrics.sinks import SINKS, RunInfo
from tinytron.model import GPT
from tinytron.model.modules.loss import LossSums
from tinytron.training import datasets, evaluate
from tinytron.training.build import (
    build_model,
    build_optimizer,
    build_routing,
    build_saver,
    build_schedule,
    optimizer_options,
    parameter_gate,
)
from tinytron.training.config import Config
from tinytron.training.derive import TrainingInfo, data_position, derive
from tinytron.training.exports import build_exports
from tinytron.training.feed import Feed, count_targets
from tinytron.training.guards import Guards
from tinytron.training.run.folder import RunFolder
from tinytron.training.run.reporter import Metric, Reporter
from tinytron.training.run.resume import resume
from tinytron.training.world import RankAttributes, join_world, measure_peak
from tinytron.utils.model import train_flops_per_token
from tinytron.utils.profile import build_profiler


class Trainer(RankAttributes):
    """Pre-trains a model as ``config`` says. Construction is collective over all processes; so is ``train``.

    For subclasses (all set before ``train``): ``state`` (layout and groups), ``device``, ``dp_group/rank/world_size``,
    ``sp_group/rank/world_size``, ``master_process``, ``train_dataset/sampler/loader``, ``val_dataset/loader``,
    ``raw_model``, ``model``, ``raw_optimizer``, ``optimizer``, ``training_info``, ``log_dir``, ``one_step_results``.

    Raises: ConfigError, DataError or CheckpointError, the same on every rank, before any step.
    """

    train_dataset: Dataset[Any] | None = None
    val_dataset: Dataset[Any] | None = None
    train_loader: Iterable[Any] | None = None
    val_loader: Iterable[Any] | None = None
    train_sampler: GlobalBatchSampler | None = None  # of a map-style train_dataset
    raw_model: nn.Module
    model: nn.Module
    raw_optimizer: torch.optim.Optimizer
    optimizer: DistributedOptimizer

    def __init__(self, config: Config) -> None:
        self.config, self.step = config, 0  # step counts completed optimizer steps
        self.one_step_results: dict[str, float] = {}
        self._init_distributed(config)  # -> state, device
        self._init_reporter()  # -> reporter: from here on there is something to print with
        self._init_dataset(config)  # -> train_dataset, val_dataset
        self._init_loaders(config)  # -> training_info, samplers, loaders
        self._init_model(config)  # -> raw_model, model
        self._init_optimizer(config)  # -> raw_optimizer, optimizer
        self._attach_optimizer()
        self._init_logging(config)  # -> log_dir
        self._guards = Guards(config, self.state, self.log_dir, self.optimizer, self.raw_model)
        self._resume_from_checkpoint()  # -> step, and all of the above as it was
        self._init_metrics()

    # The parts of a run: override any of these.

    def _init_distributed(self, config: Config) -> None:
        """Join the process group, choose the device, build every parallel group."""
        self.state = join_world(config)

    def _init_reporter(self) -> None:
        """Set ``reporter``, with the sinks that records and messages go to."""
        self.reporter = Reporter(self.state, [sink() for sink in SINKS.values()])

    def _init_dataset(self, config: Config) -> None:
        """Set ``train_dataset`` and, if there is one, ``val_dataset``: map-style or iterable, items ``{input_ids, labels}``
        or rows of ``seq_len + 1`` token ids; or ``train_loader`` and ``val_loader`` that give this rank's micro-batches.
        Without validation data, ``--split_rate`` keeps part of a map-style ``train_dataset`` back (docs/data.md)."""
        if config.data.dataset_path is None and not config.data.use_mock_data:
            self._say("no --dataset_path given: training on mock data (random tokens: the loss stays near ln V)")
        self.train_dataset, self.val_dataset = datasets.builtin_datasets(config, self.state)

    def _init_model(self, config: Config) -> None:
        """Set ``raw_model``, which owns the parameters and maps ``(input_ids, labels)`` to ``LossSums``, and ``model``,
        what ``_loss`` calls."""
        self.raw_model = self.model = build_model(config, self.state)

    def _init_optimizer(self, config: Config) -> None:
        """Set ``optimizer``: any torch optimizer over ``raw_model.parameters()``, wrapped or not."""
        self.optimizer = DistributedOptimizer(
            optimizer=build_optimizer(config, self.raw_model), process_group=self.dp_group
        )

    def _init_logging(self, config: Config) -> None:
        """Make the run's folder; ``config.json`` follows once it is clear that the run goes on in it."""
        self.folder = RunFolder(config, self.state)
        self._say(*self.folder.notes)

    @property
    def log_dir(self) -> Path:
        """The run's folder."""
        return self.folder.path

    def _init_profiler(self, config: Config) -> contextlib.AbstractContextManager[Any]:
        """A profiler with a ``step`` method, or a context of ``None``."""
        if not config.train.use_profiler:
            return contextlib.nullcontext()
        trace = self.log_dir / f"rank{self.state.rank}_trace.json"
        first, last = self.training_info.profile_window
        if last <= self.step:
            self._say(f"not profiling: steps {first} to {last} are done already")
            return contextlib.nullcontext()
        self._say(f"profiling steps {max(first, self.step + 1)} to {last}: {trace}")
        return build_profiler(max(1, first - self.step), last - self.step, trace)  # counted from here on

    def _lr_scheduler(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        return self._schedule(step)

    def _loss(self, batch: Batch) -> LossSums:
        """Loss *sums* over this rank's valid targets; ``train_step`` divides by the global batch's target count."""
        losses: LossSums = self.model(batch.input_ids, batch.labels, **batch.model_inputs())
        return losses

    # The loop.

    def train(self) -> None:
        """Train until ``training_info.max_steps``; validate, answer tasks and save on the way and at the end. Collective.

        Raises: SystemExit(0), once a checkpoint is saved, if a rank got SIGTERM or SIGUSR1; TrainingError if a guard rail
        ends the run (docs/reliability.md).
        """
        last = self.training_info.max_steps
        if self.step >= last:
            self._say(f"already trained: {self.step} of {last} steps are done")
            self._saver.close(self._say)
            return
        peak, lines = measure_peak(self.config, self.state)
        self._say(*lines)
        flops = train_flops_per_token(self.config.model, self.config.train.seq_len)
        self.reporter.begin_training(flops_per_token=flops, peak_flops=peak)
        self._in_loop = True
        with contextlib.closing(self.reporter), self._guards.active(), self._init_profiler(self.config) as profiler:
            for microbatches in self._microbatches():
                self.train_step(microbatches)
                self.step += 1
                self._guards.after_step(self.step, last=self.step >= last)
                self._maybe_log()
                self._maybe_evaluate()
                self._maybe_save()
                if profiler is not None:
                    profiler.step()
                if self.step >= last or self._guards.ends:
                    break
            self._in_loop = False
            self.optimizer.finish_gather()
            with self._guards.paused():
                self._saver.close(self._say, wait=not self._guards.ends)
                self.folder.push_logs()
            self._guards.leave(self.step, self._say)

    def train_step(self, microbatches: list[Batch]) -> None:
        """One optimizer step on this rank's part of the global batch. Collective; the host waits for no result."""
        lr = self._lr_scheduler(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_mult", 1.0)
        targets, microbatches = count_targets(microbatches, self.state.groups["world"])  # for the one division
        sums: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(microbatches):
            with self.optimizer.accumulate(last=i == len(microbatches) - 1):
                losses = self._loss(batch)
                self.optimizer.scale(losses.objective / targets).backward()
            self._sources.add(batch, losses)
            for name, value in {"loss": losses.token, **losses.aux}.items():
                sums[name] = sums[name] + value if i else value
        parts = {name: value / targets for name, value in sums.items()}
        reject = self._guards.spikes.judge(self.step + 1, parts["loss"])
        grad_norm = self.optimizer.step(max_norm=self.config.train.grad_clip_value, reject=reject)
        self.optimizer.zero_grad()
        self._end_step()
        self.reporter.window.add(self.step + 1, lr, parts, grad_norm)

    def eval(self) -> float:
        """Validate the current weights, log the result and return it, in nats per token. Collective."""
        assert self.val_loader is not None, "no validation data: set val_dataset or pass --do_val"
        with self.reporter.clock.paused(), self._guards.paused():
            batches = self._feed.once(self.val_loader, **self._feeding(self.val_dataset, self._own_val_loader))
            names = getattr(self.val_dataset, "names", [])
            result = validate(self.model, self._loss, batches, self.state, names, self._measures.text_bytes_V)
        self.one_step_results["val_loss"] = result.loss
        self._validated = (self.step, result.loss)
        self.reporter.write([{"step": self.step, "stage": "val", **result.fields()}])
        return result.loss

    def save(self) -> CheckpointFiles:
        """Save a checkpoint of the current step; inside ``train`` it is written while training goes on. Collective."""
        val_step, val_loss = self._validated
        meta = CheckpointMeta(
            format=FORMAT_VERSION,
            run=self.folder.description,
            identity=self.config.identity(),
            data=self._data_identity(self.step),
            data_position=data_position(self.config, self.step),
            val_loss=val_loss if val_step == self.step else None,
            guard=self._guards.state_dict(),
        )
        with self.reporter.clock.paused(), self._guards.paused():
            self.optimizer.finish_gather()
            wait = not (self._in_loop and self.config.ckpt.async_save)
            messages = self._saver.save(self.step, meta, wait=wait)
        self._say(*messages)
        return CheckpointFiles(self.log_dir, self.step)

    def _end_step(self) -> None:
        if isinstance(self.raw_model, GPT):
            self.raw_model.end_step(self.optimizer.last_skipped)

    # Details.

    def _init_loaders(self, config: Config) -> None:
        """Complete what ``_init_dataset`` left unset: validation split, sampler, loaders; and derive step counts."""
        self._feed = Feed(config, self.state)
        self._validates = config.train.do_val and not config.train.debug
        self._own_train_loader, self._own_val_loader = self.train_loader is None, self.val_loader is None
        rate = config.train.split_rate
        if self.train_dataset is None and self.train_loader is None:
            raise ConfigError("_init_dataset set no train_dataset; set self.train_dataset, or self.train_loader")
        if self.val_dataset is None and self.val_loader is None and (self._validates or rate is not None):
            rate = rate if rate is not None else 0.99
            if self._validates or rate < 1.0:
                self.train_dataset, self.val_dataset = datasets.split_off_validation(self.train_dataset, rate)
        epoch = datasets.epoch_size(config, self.train_dataset, self.train_loader)
        self.training_info: TrainingInfo = derive(config, self.state.layout, epoch)
        self._say(*self.training_info.notes)
        if self.train_loader is None:
            made = datasets.make_train_loader(config, self.state, self.training_info, self.train_dataset)
            self.train_sampler, self.train_loader = made
        if self.val_loader is None and self.val_dataset is not None:
            self.val_loader = datasets.make_val_loader(config, self.state, self.val_dataset)
        self._say(*datasets.describe(self.train_dataset, self.training_info))
        self._schedule = build_schedule(config.optim, self.training_info)
        self._measures: evaluate.Measures = evaluate.Measures(config, self.state, self.val_dataset)

    def _attach_optimizer(self) -> None:
        """Wrap a plain torch optimizer, and tell the wrapper the parameters' names and groups."""
        if not isinstance(self.optimizer, DistributedOptimizer):
            self.optimizer = DistributedOptimizer(optimizer=self.optimizer, process_group=self.dp_group)
        self.raw_optimizer = self.optimizer.inner
        made = self.state.groups
        groups = {"dense": made["world"], "expert": made["edp"], "ep": made["ep"]}
        options = optimizer_options(self.config, self.raw_model)
        self.optimizer.attach(self.raw_model, specs_of(self.raw_model), groups, options)
        if isinstance(self.raw_model, GPT):
            self.raw_model.before_use = parameter_gate(self.optimizer, self.raw_model)
        if self.config.parallel.print_topology:
            self._say(describe_topology(self.state.layout, self.optimizer))
        count = sum(spec.numel for spec in specs_of(self.raw_model))  # of all experts, wherever they are
        info, world = self.training_info, self.state.layout.world_size
        self._say(
            f"{count / 1e6:.2f}M parameters in {self.config.train.precision} on {world} x {self.device.type} | "
            f"{info.max_steps} steps of {self.config.train.total_batch_size:,} tokens, "
            f"{info.grad_accum_steps} micro-batches each"
        )

    def _resume_from_checkpoint(self) -> None:
        """Load the newest undamaged checkpoint of the run's folder, else of ``--resume_path``, if there is one."""
        source = self.train_loader if self.train_dataset is None else self.train_dataset
        self._data_identity = datasets.identity_of(self.config, source)
        parts = (self.raw_model, self.optimizer, self.state)
        found = resume(self.config, self.log_dir, *parts, self._data_identity, self._say)
        if found is not None:
            assert found.step is not None, "check_continues refuses metadata that is not ours"
            self._guards.load_state_dict(found.guard)
            self.step = found.step
        self.folder.write_description()

    def _init_metrics(self) -> None:
        last, run = self.training_info.max_steps, (self.raw_model, self.log_dir, self.state, self.folder.mirror)
        exports = build_exports(self.config, *run, resumed=self.step, last=last, say=self._say)
        self._saver = build_saver(self.config.ckpt, self.optimizer, *run, exports)
        self._validated, self._in_loop = (0, 0.0), False  # step and loss
        self._sources = SourceLosses(getattr(self.train_dataset, "names", []), self.state)
        self.reporter.metrics += self._metrics()
        if self.master_process:
            keep_traces_until(self.log_dir, self.step)
        batch = self.config.train.total_batch_size
        self.reporter.start(RunInfo(self.log_dir, self.config.as_dict(), self.step, last, batch))

    def _metrics(self) -> list[Metric]:
        """What the log says of a report's last step beside its losses."""
        found: list[Metric] = []
        if isinstance(self.raw_model, GPT) and self.raw_model.moe_layers:
            model, layers = self.raw_model, self.config.model.moe_layers
            found.append(lambda step: {"expert_load": load_statistics(model.take_load(), layers)})
        if self._sources.names:
            config, dataset = self.config, self.train_dataset
            found.append(lambda step: self._sources.record(datasets.seen_tokens(config, dataset, step)))
        if (routing := build_routing(self.config, self.raw_model, self.state, self.log_dir)) is not None:
            found.append(routing.record)
        return found

    def _microbatches(self) -> Iterator[list[Batch]]:
        """This rank's micro-batches of one optimizer step at a time, from the current step on, without end."""
        assert self.train_loader is not None, "made by _init_loaders"
        skip = 0
        if self._own_train_loader:
            (self.train_sampler or self.train_loader).start_step = self.step  # type: ignore[union-attr]
        else:
            skip = self.step  # a foreign loader can only be read again up to where it was
        options = self._feeding(self.train_dataset, self._own_train_loader)
        return self._feed.steps(self.train_loader, self.training_info.grad_accum_steps, skip_steps=skip, **options)

    def _feeding(self, dataset: Dataset[Any] | None, own_loader: bool) -> dict[str, bool]:
        return {"trusted": own_loader and datasets.checks_its_tokens(dataset), "own": own_loader}

    def _due(self, every: int) -> bool:
        return self.step == self.training_info.max_steps or (every > 0 and self.step % every == 0)

    def _maybe_log(self) -> None:
        """Write and show the steps since the last report; also before validation and saving, to keep lines in order."""
        self.reporter.advance(self.step)
        train, ckpt = self.config.train, self.config.ckpt
        validates = self._validates and self._due(train.val_every_steps)
        answers = self._measures.tasks and self._due(train.eval_every)
        saves = self._saves and self._due(ckpt.save_every_steps)
        ends = self._guards.ends
        if not (self.step == 1 or self._due(self.config.logging.log_every) or validates or answers or saves or ends):
            return
        self.one_step_results |= self.reporter.report(self.step, self.optimizer.skipped_steps)
        self._guards.after_report()  # the host has waited for the device

    def _maybe_evaluate(self) -> None:
        if self._validates and self._due(self.config.train.val_every_steps) and not self._guards.ends:
            self.eval()
        if self._measures.tasks and self._due(self.config.train.eval_every) and not self._guards.ends:
            with self.reporter.clock.paused(), self._guards.paused():
                entries = self._measures.answer(self.step, self.model, self._loss)
            self.reporter.write(entries)

    @property
    def _saves(self) -> bool:
        return self.config.ckpt.do_save and not self.config.train.debug

    def _maybe_save(self) -> None:
        self._say(*self._saver.report())
        if self._saves and (self._due(self.config.ckpt.save_every_steps) or self._guards.ends):
            self.save()

    def _say(self, *texts: str) -> None:
        self.reporter.say(*texts)
