"""The training step of one model: ours beside transformers and plain torch, in turns, and its MFU."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace

from step_report import Row, Table
from step_time import measure
from step_variants import Variant, join_alone, plain, tinytron, transformers

from gpu.part import Context, run
from tinytron.errors import ConfigError
from tinytron.kernels.choice import Kernels, check_device
from tinytron.utils.training import DTYPES

EAGER = Variant(tinytron)
OURS = Variant(tinytron, compiled=True)
VARLEN = replace(OURS, attn_backend="varlen")
TRITON = replace(OURS, triton=True)
SELECTIVE = replace(OURS, recompute="selective")
PLAIN = Variant(plain, compiled=True)
PEER = Variant(transformers, compiled=True)
# The most telling first. Compiled experts of transformers may fail: its eager ones are measured, too.
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "dense128": (PEER, PLAIN, OURS, EAGER),
    "dense64": (PEER, PLAIN, OURS),
    "large": (PEER, PLAIN, OURS, SELECTIVE),
    "experts": (PEER, Variant(transformers), OURS),
    "options": (OURS, VARLEN, TRITON, SELECTIVE),
}
SHOWN = ("tokens_per_second", "mfu", "over_transformers", "over_plain", "varlen", "triton", "selective")
MODEL_OF = {"options": "dense128"}  # the model of a role; default: its own


def runnable(context: Context, variants: tuple[Variant, ...]) -> list[Variant]:
    """Those of ``variants`` that can run here; a note on each of the others."""
    left = []
    for variant in variants:
        reason = variant.importable()
        if reason is None and variant.triton and context.rehearsing:
            reason = "a rehearsal interprets Triton kernels in the part 'kernels' alone"
        if reason is None:
            try:
                check_device(Kernels(attention=variant.attn_backend), context.device, DTYPES[context.sizes.precision])
            except ConfigError as error:
                reason = str(error)
        if reason is None:
            left.append(variant)
        else:
            context.result.note(f"left out: {variant.name} ({reason})")
    return left


def speed_over(table: Table, row: Row, base: Row) -> float:
    """Speed of ``row`` relative to ``base``: the median over rounds."""
    return statistics.median(b / own for b, own in zip(base.seconds, row.seconds, strict=True))


def keep(context: Context, role: str, table: Table) -> None:
    """The figures of a table."""
    result, rows = context.result, {row.name: row for row in table.rows if row.seconds}
    ours = rows.get(OURS.name)
    if ours is None:
        return
    measured = context.figure_of("environment", f"environment.{context.sizes.precision}_flops") or table.peak_flops
    rate = table.rate(ours) * table.flops_per_token
    result.figure(f"speed.{role}.tokens_per_second", table.rate(ours))
    result.figure(f"speed.{role}.step_ms", 1e3 * statistics.median(ours.seconds))
    result.figure(f"speed.{role}.first_step_seconds", ours.first_step or 0.0)
    result.figure(f"speed.{role}.peak_bytes", ours.peak_bytes or 0)
    if role != "options":
        result.figure(f"speed.{role}.mfu", rate / measured)
        result.figure(f"speed.{role}.mfu_of_data_sheet", rate / table.peak_flops)
    peers = [row for name, row in rows.items() if name.startswith("transformers")]
    if peers:
        best = min(peers, key=lambda row: statistics.median(row.seconds))
        result.figure(f"speed.{role}.over_transformers", speed_over(table, ours, best))
    for name, other in (("over_plain", PLAIN), ("compiled_over_eager", EAGER)):
        if other.name in rows:
            result.figure(f"speed.{role}.{name}", speed_over(table, ours, rows[other.name]))
    for name, other in (("varlen", VARLEN), ("triton", TRITON), ("selective", SELECTIVE)):
        if other.name in rows:
            result.figure(f"speed.{role}.{name}", speed_over(table, rows[other.name], ours))
            result.figure(f"speed.{role}.{name}_memory", (rows[other.name].peak_bytes or 0) / (ours.peak_bytes or 1))


def main(context: Context, args: argparse.Namespace) -> None:
    """Check that all variants compute the same, time them, and keep the figures."""
    name, batch = context.sizes.models[MODEL_OF.get(args.role, args.role)]
    variants = runnable(context, VARIANTS[args.role])
    join_alone()
    settings = argparse.Namespace(
        device=context.device.type,
        seq_len=context.sizes.seq_len,
        batch=batch,
        rounds=context.sizes.rounds,
        steps=context.sizes.steps,
        memory=False,
    )
    table = measure(name, context.sizes.precision, variants, settings)
    context.result.check("all variants compute the same losses")  # or measure had ended this process
    (context.out / "table.json").write_text(json.dumps(asdict(table), indent=2))
    context.result.table(table.lines())
    keep(context, args.role, table)
    figures = {key.rsplit(".", 1)[1]: value for key, value in context.result.figures.items()}
    context.result.note(f"{name}: {', '.join(f'{key} {figures[key]:,.2f}' for key in SHOWN if key in figures)}")
    if failed := [row.name for row in table.rows if row.name.startswith("tinytron") and not row.seconds]:
        context.result.check("our variants run", f"no figures for {', '.join(failed)}")
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, __doc__, ("role", tuple(VARIANTS)))
