"""Margins against loops; what recording leaves alone; log, trace and comparison of runs over layouts and after a resume."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import Ranks
from tests.helpers.runs import ROOT, Run, run, train, user_error
from tests.helpers.stopping import run_until
from tests.model.test_gpt import gradients, make_batch, sums
from tests.model.test_moe_gpt import MOE, VARIANTS, K, MoETwin, make_model
from tinytron.data import GlobalBatchSampler, MockDataset, ShuffledEpochs
from tinytron.errors import DataError
from tinytron.metrics.routing import keep_traces_until, margin_statistics, route_lines, weight_entropy
from tinytron.metrics.sinks import Console
from tinytron.metrics.sinks.files import json_line
from tinytron.model import GPT, ModelConfig
from tinytron.model.modules.moe import Router
from tinytron.training import Config, Trainer

SCRIPT = ROOT / "scripts" / "compare_routes.py"
spec = importlib.util.spec_from_file_location("compare_routes", SCRIPT)
assert spec is not None
assert spec.loader is not None
compare_routes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare_routes)

Pools = Callable[[int], Ranks]
Lines = list[dict[str, Any]]
EXPERTS: tuple[object, ...] = (
    *("--use_moe", "--num_experts", 4, "--num_experts_per_tok", 2, "--moe_intermediate_size", 8),
    *("--moe_bias_update_rate", 0.02, "--num_layer", 3, "--first_k_dense", 1, "--precision", "fp64"),
)
BOTH = ("--moe_router_debug", "--moe_route_trace")


def recording(model: GPT) -> GPT:
    for layer in model.moe_layers:
        layer.router.record = True
    return model


# What is recorded.


@pytest.mark.parametrize("top_k", [1, 2, 4, 5])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_margins_equal_sorted_scores(score: Any, top_k: int) -> None:
    """The choice's scores, bias included; unlike the weights."""
    config = ModelConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, use_moe=True, num_experts=5,
        num_experts_per_tok=top_k, moe_router_score=score,
    )  # fmt: skip
    router = Router(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        router.weight.copy_(torch.randn(5, 8, generator=random))
        router.bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.1, 0.0]))
    x_TD = torch.randn(40, 8, generator=random).bfloat16()
    assert router.choose(router(x_TD)).choice is None
    router.record = True
    choice = router.choose(router(x_TD)).choice
    assert choice.margin_T.dtype == torch.float32
    assert not any(part.requires_grad for part in choice)
    for t, x_D in enumerate(x_TD.float()):
        logits = [float(x_D @ row) for row in router.weight.detach()]
        scores = [1 / (1 + math.exp(-z)) for z in logits]
        if score == "softmax":
            scores = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
        ranked = sorted((s + float(b) for s, b in zip(scores, router.bias, strict=True)), reverse=True)
        expected = ranked[top_k - 1] - ranked[top_k] if top_k < 5 else math.inf
        assert float(choice.margin_T[t]) == pytest.approx(expected, abs=1e-5)
        assert float(choice.weight_Tk[t].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("variant", ["plain", "dense first", "shared"])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_the_model_keeps_the_choices_that_its_twin_makes(variant: str, recompute: Any) -> None:
    model = recording(make_model(variant, recompute=recompute))
    twin, (ids, labels) = MoETwin(model, MOE | VARIANTS[variant]), make_batch()
    sums(model, ids, labels).objective.backward()  # recomputation must not disturb it
    for row in ids.tolist():
        twin.logits(row)
    assert model.recorded is not None
    assert torch.equal(model.recorded.input_ids_Bs, ids)
    assert len(model.recorded.choices) == len(twin.decisions) == len(model.moe_layers)
    for choice, (name, rows) in zip(model.recorded.choices, twin.decisions.items(), strict=True):
        decisions = [decision for row in rows for decision in row]
        assert choice.expert_Tk.tolist() == [d.experts for d in decisions]
        for t, d in enumerate(decisions):
            ranked = sorted((p + b for p, b in zip(d.probs.tolist(), twin.biases[name + "router.bias"], strict=True)))
            assert float(choice.margin_T[t]) == pytest.approx(ranked[-K] - ranked[-K - 1], rel=1e-8)
            assert choice.weight_Tk[t].tolist() == pytest.approx([float(w.detach()) for w in d.weights], rel=1e-8)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_recording_changes_no_bit_and_only_training_records(recompute: Any) -> None:
    ids, labels = make_batch()
    plain, model = (make_model("all", torch.float32, recompute=recompute) for _ in range(2))
    recording(model)
    sums(model.eval(), ids, labels)
    assert model.recorded is None
    losses, expected = sums(model.train(), ids, labels), sums(plain, ids, labels)
    assert torch.equal(losses.objective, expected.objective)
    mine, theirs = gradients(losses.objective, model), gradients(expected.objective, plain)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert plain.recorded is None
    assert model.recorded is not None


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_record_the_same(recompute: Any) -> None:
    ids, labels = make_batch()
    plain, model = (recording(make_model("plain", torch.float64, recompute=r)) for r in ("none", recompute))
    model.compile_blocks()
    for one in (plain, model):
        sums(one, ids, labels).objective.backward()
    assert plain.recorded is not None
    assert model.recorded is not None
    for mine, theirs in zip(model.recorded.choices, plain.recorded.choices, strict=True):
        assert torch.equal(mine.expert_Tk, theirs.expert_Tk)
        torch.testing.assert_close(mine.weight_Tk, theirs.weight_Tk)
        torch.testing.assert_close(mine.margin_T, theirs.margin_T)


def test_statistics_of_margins() -> None:
    random = np.random.default_rng(0)
    margins = np.concatenate([random.uniform(0.01, 1, 3990), np.full(4, 9e-4), np.full(3, 1e-4), [2e-5, 1e-6, 1e-6]])
    found = margin_statistics(random.permutation(margins), np.array([0.25, 0.75]))
    ranked = sorted(margins.tolist())
    assert found == {
        "mean": pytest.approx(sum(ranked) / 4000),
        "min": 1e-6,
        "percentile_1": ranked[39],
        "percentile_0.1": ranked[3],
        "at_most_1e-3": 10 / 4000,
        "at_most_1e-4": 6 / 4000,
        "at_most_1e-5": 2 / 4000,
        "weight_entropy": 0.5,
    }


def test_entropy_is_of_weights_made_to_sum_to_one() -> None:
    weights = torch.tensor([[0.1, 0.1], [0.3, 0.1], [0.5, 0.0], [0.0, 0.0]])
    quarter = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert weight_entropy(weights).tolist() == pytest.approx([math.log(2), quarter, 0, 0])


def test_an_infinite_margin_is_text_at_any_depth() -> None:
    found = margin_statistics(np.full(8, math.inf), np.zeros(8))
    line = json.loads(json_line({"router_margin": [found]}), parse_constant=pytest.fail)
    assert line["router_margin"][0]["percentile_1"] == line["router_margin"][0]["mean"] == "inf"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
def test_lines_written_by_column_are_those_of_a_loop(k: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    tokens, experts = (torch.randint(0, 10**6, shape, generator=random) for shape in ((50,), (50, k)))
    weights, margins = (torch.randn(shape, generator=random, dtype=dtype) for shape in ((50, k), (50,)))
    margins[:6] = torch.tensor([math.inf, -math.inf, math.nan, 1e-30, 0.0, 12345678.0])
    weights[7, 0], weights[8, 0] = math.nan, 1.0
    rows, positions = torch.arange(50) // 8, torch.arange(50) % 8 + 16
    found = route_lines(3, 5, [rows, positions, tokens, experts, weights, margins])
    expected = ""
    for t in range(50):
        place = {"row": int(rows[t]), "position": int(positions[t]), "token": int(tokens[t])}
        decision = {"experts": experts[t].tolist(), "weights": weights[t].tolist(), "margin": margins[t].item()}
        expected += json_line({"step": 3, "layer": 5, **place, **decision})
    assert found == expected
    assert route_lines(3, 5, [column[:0] for column in (rows, positions, tokens, experts, weights, margins)]) == ""


# Runs.


def read_trace(folder: Path) -> Lines:
    """The lines of all ranks, in the order of their places."""
    lines = [json.loads(x) for path in folder.glob("routes_rank*.jsonl") for x in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: [line[name] for name in compare_routes.Place._fields])


def margins_of(result: Run) -> dict[int, Lines]:
    return {record["step"]: record["router_margin"] for record in result.records if "router_margin" in record}


LAYOUTS = [(1, 1, 1), (2, 2, 2), (2, 1, 2), (2, 2, 1), (4, 2, 4), (4, 4, 2), (4, 1, 1)]
RUN = (*EXPERTS, *BOTH, "--max_steps", 3, "--log_every", 2, "--no-do_save")


@pytest.mark.parametrize(("world", "sep", "ep"), LAYOUTS)
def test_every_layout_traces_the_same_tokens(ranks: Pools, tmp_path: Path, world: int, sep: int, ep: int) -> None:
    """The last two rows of each step, whoever has them; checked against the data and against one process."""
    flags = ("--sep_size", sep, "--ep_size", ep)
    rows = 4 * sep // world  # of a micro-batch: the ranks of a sequence group share it
    alone = ranks(1).run(train, Trainer, tmp_path / "one", *RUN, "--batch_size", 4)[0]
    result = ranks(world).run(train, Trainer, tmp_path / "other", *RUN, *flags, "--batch_size", rows)[0]
    found, expected = read_trace(result.folder), read_trace(alone.folder)
    assert len(list(result.folder.glob("routes_rank*.jsonl"))) == world
    assert len(found) == 3 * 2 * 4 * 12  # reports x layers x rows x positions
    assert {line["step"] for line in found} == {1, 2, 3}
    assert {line["layer"] for line in found} == {1, 2}
    assert {line["row"] for line in found} == {4, 5, 6, 7}  # of the second micro-batch
    data = MockDataset(32, 12, 61, seed=1337)
    sampler = GlobalBatchSampler(ShuffledEpochs(32, 1337), global_batch=8, micro_batch=1, dp_rank=0, dp_size=1)
    for line, other in zip(found, expected, strict=True):
        sample = data[sampler.samples_of_step(line["step"] - 1)[line["row"]]]
        assert line["token"] == int(sample["input_ids"][line["position"]])
        assert line == {
            **other,
            "weights": pytest.approx(other["weights"], rel=1e-9),
            "margin": pytest.approx(other["margin"], rel=1e-7),
        }
    assert compare_routes.compare(*(compare_routes.read_routes(r.folder) for r in (alone, result)))[1] == 0
    mine, theirs = margins_of(result), margins_of(alone)
    assert list(mine) == [1, 2, 3]
    for step, layers in mine.items():
        assert layers == [pytest.approx(layer, rel=1e-7) for layer in theirs[step]]
        for layer in layers:
            traced = [line["margin"] for line in found if (line["step"], line["layer"]) == (step, layer["layer"])]
            assert layer["min"] == pytest.approx(min(traced))
            assert layer["mean"] == pytest.approx(sum(traced) / len(traced))


def test_a_resumed_run_has_every_line_once(ranks: Pools, tmp_path: Path) -> None:
    """Also where it had more processes before it died: their lines are done again by others."""
    flags = (*EXPERTS, *BOTH, "--max_steps", 4, "--save_every_steps", 2, "--log_every", 1)
    unbroken = ranks(1).run(train, Trainer, tmp_path / "unbroken", *flags, "--batch_size", 2)[0]
    ranks(2).run(run_until, tmp_path / "broken", 3, *flags, "--batch_size", 1)
    folder = next((tmp_path / "broken").glob("tiny_*"))
    with open(folder / "routes_rank1.jsonl", "a") as file:
        file.write('{"step": 2, "layer": 1, "ro')  # killed while writing
    broken = ranks(1).run(run_until, tmp_path / "broken", 0, *flags, "--batch_size", 2)[0]
    places = [
        [(x["step"], x["layer"], x["row"], x["position"]) for x in read_trace(r.folder)] for r in (broken, unbroken)
    ]
    assert len(places[1]) == 4 * 2 * 2 * 12
    assert places[0] == places[1]
    assert list(margins_of(broken)) == [1, 2, 3, 4]


class Reporting(Trainer):
    """Tells what was recorded, and what the console showed last."""

    def _init_reporter(self, config: Config) -> None:
        super()._init_reporter(config)
        self.shown: dict[str, str] = {}
        shows = type("Shows", (Console,), {"show": lambda _, step, values: self.shown.update(values)})
        self.reporter.add(shows())

    def report(self) -> Any:
        records = any(layer.router.record for layer in self.raw_model.moe_layers)
        return self.raw_model.recorded is not None, records, self.shown.get("min margin")


@pytest.mark.parametrize(
    ("flags", "traces", "logs"),
    [((), False, False), (BOTH[:1], False, True), (BOTH[1:], True, False)],
    ids=["neither", "debug", "trace"],
)
def test_each_flag_gives_its_own_output_only(
    ranks: Pools, tmp_path: Path, flags: tuple[str, ...], traces: bool, logs: bool
) -> None:
    (result,) = ranks(1).run(train, Reporting, tmp_path, *EXPERTS, *flags, "--max_steps", 1, "--no-do_save")
    smallest = f"{min(layer['min'] for layer in margins_of(result)[1]):.1e}" if logs else None
    assert result.extra == (bool(flags), bool(flags), smallest)
    assert (result.folder / "routes_rank0.jsonl").exists() == traces
    assert ("router_margin" in result.records[0]) == logs
    assert "expert_load" in result.records[0]


def test_where_all_experts_are_chosen_margins_are_infinite(ranks: Pools, tmp_path: Path) -> None:
    flags = (*EXPERTS, "--num_experts_per_tok", 4, *BOTH, "--max_steps", 1, "--no-do_save")
    (result,) = ranks(1).run(train, Trainer, tmp_path, *flags)
    assert {layer["min"] for layer in margins_of(result)[1]} == {"inf"}
    assert {line["margin"] for line in read_trace(result.folder)} == {"inf"}


class Foreign(Trainer):
    """With a model of one's own."""

    def _init_model(self, config: Config) -> None:
        self.raw_model = self.model = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("flag", BOTH)
@pytest.mark.parametrize(("cls", "name", "flags"), [(Trainer, "GPT", ()), (Foreign, "Linear", EXPERTS)])
def test_models_without_our_routers_are_refused(
    ranks: Pools, tmp_path: Path, cls: type[Trainer], name: str, flags: tuple[object, ...], flag: str
) -> None:
    (text,) = ranks(1).run(user_error, cls, tmp_path, *flags, flag)
    assert text == (
        f"ConfigError: {flag} needs the expert layers of Tinytron's GPT, but this {name} has none; "
        f"use --use_moe, or --no-{flag[2:]}"
    )


# The comparison.


def trace(folder: Path, *changes: dict[str, Any], ranks: int = 1) -> Path:
    """A trace of 2 steps, layers, rows and positions; ``changes`` name a place and what is different there."""
    folder.mkdir()
    number = 0
    for step in (1, 2):
        for layer in (0, 1):
            for row in (0, 1):
                for position in (0, 1):
                    line = {"step": step, "layer": layer, "row": row, "position": position, "token": 7 + row}
                    line |= {"experts": [0, 3], "weights": [0.5, 0.5], "margin": 1e-3 * (1 + number)}
                    for change in changes:
                        if all(line[name] == change[name] for name in compare_routes.Place._fields):
                            line |= change
                    with open(folder / f"routes_rank{number % ranks}.jsonl", "a") as file:
                        file.write(json_line(line))
                    number += 1
    return folder


def place(step: int, layer: int, row: int, position: int) -> dict[str, Any]:
    return {"step": step, "layer": layer, "row": row, "position": position}


def test_planted_flips_are_found(tmp_path: Path) -> None:
    one = trace(tmp_path / "one", ranks=2)
    flips = [place(2, 1, 0, 1) | {"experts": [0, 2], "margin": 0.75}, place(2, 1, 1, 1) | {"experts": [3, 1]}]
    order = place(1, 0, 0, 0) | {"experts": [3, 0]}  # no flip: the same experts
    other = trace(tmp_path / "other", *flips, order, ranks=3)
    lines, count = compare_routes.compare(*map(compare_routes.read_routes, (one, other)))
    assert count == 2
    assert lines == [
        "16 decisions compared; in one run only: 0",
        "layer 0: 0 of 8 tokens flipped",
        "layer 1: 2 of 8 tokens flipped, largest margin 7.500e-01, first in step 2",
    ]


@pytest.mark.slow
def test_the_script_tells_by_its_exit_status(tmp_path: Path) -> None:
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two", ranks=4)
    flipped = trace(tmp_path / "flipped", place(1, 1, 0, 0) | {"experts": [1, 2], "margin": "inf"})
    same = run(one, two, cwd=tmp_path, script=SCRIPT)
    assert (same.code, same.stdout.count("0 of 8 tokens flipped"), same.stderr) == (0, 2, "")
    found = run(one, flipped, cwd=tmp_path, script=SCRIPT)
    assert (found.code, found.stderr) == (1, "")
    assert "layer 1: 1 of 8 tokens flipped, largest margin inf, first in step 1" in found.stdout
    missing = run(one, tmp_path / "nowhere", cwd=tmp_path, script=SCRIPT)
    assert (missing.code, missing.stdout) == (2, "")
    assert missing.stderr == (
        f"error: {tmp_path}/nowhere has no routes_rank*.jsonl; give the folder of a run made with --moe_route_trace\n"
    )


def test_only_common_places_are_compared(tmp_path: Path) -> None:
    one, other = trace(tmp_path / "one"), trace(tmp_path / "other")
    keep_traces_until(other, 1)
    lines, count = compare_routes.compare(*map(compare_routes.read_routes, (one, other)))
    assert (lines[0], count) == ("8 decisions compared; in one run only: 8", 0)
    keep_traces_until(other, 0)
    with pytest.raises(DataError, match="the traces have no step, layer, row and position in common"):
        compare_routes.compare(*map(compare_routes.read_routes, (one, other)))


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one, other = trace(tmp_path / "one"), trace(tmp_path / "other", place(1, 0, 1, 0) | {"token": 9})
    with pytest.raises(DataError, match=r"row=1, position=0\) is token 8 in one run and 9 in the other"):
        compare_routes.compare(*map(compare_routes.read_routes, (one, other)))
    text = (one / "routes_rank0.jsonl").read_text()
    (one / "routes_rank1.jsonl").write_text(text.splitlines(keepends=True)[3])
    with pytest.raises(DataError, match=r"routes_rank1.jsonl, line 1: Place.* occurs twice"):
        compare_routes.read_routes(one)
    for damaged in (text[:-9], "3\n", "{}\n", text.replace('"margin": 0.001', '"margin": []')):
        (other / "routes_rank0.jsonl").write_text(damaged)
        with pytest.raises(DataError, match=r"routes_rank0.jsonl, line \d+ is incomplete; resume the run"):
            compare_routes.read_routes(other)
