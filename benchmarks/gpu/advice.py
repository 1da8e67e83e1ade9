"""Advice on flags from the figures: a line for each choice that was measured."""

from __future__ import annotations

from collections.abc import Iterator

from gpu.targets import TARGETS, TRITON

NOISE = 0.03  # relative; a smaller difference is none
PAYS = next(target.bound for target in TARGETS if target.figure.startswith("kernels."))


def advice(figures: dict[str, float]) -> Iterator[str]:
    """Lines of advice for this machine, of what ``figures`` hold."""
    for line in (*_compile(figures), *_attention(figures), *_triton(figures), *_recompute(figures)):
        yield f"advice   {line}"


def _compile(figures: dict[str, float]) -> Iterator[str]:
    gain = figures.get("speed.dense128.compiled_over_eager")
    if gain is not None:
        choice = "--use_compile" if gain > 1 + NOISE else "--no-use_compile"
        yield f"{choice}: compiled steps run at {gain:.2f} times the eager speed"


def _attention(figures: dict[str, float]) -> Iterator[str]:
    for kind, where in (("plain", "without documents"), ("documents", "with documents")):
        found = {
            name.rsplit(".", 1)[1]: value
            for name, value in figures.items()
            if name.startswith(f"operations.attention.{kind}.") and not name.endswith(".math")
        }
        if len(found) > 1:
            best, base = min(found, key=lambda name: found[name]), found.get("sdpa")
            beside = f", sdpa {base:.2f} ms" if base is not None and best != "sdpa" else ""
            yield f"--attn_backend {best} {where}: {found[best]:.2f} ms{beside}"


def _triton(figures: dict[str, float]) -> Iterator[str]:
    gains = {name: figures[f"kernels.{name}.gain"] for name in TRITON if f"kernels.{name}.gain" in figures}
    if gains:
        paying = [f"{name} {gain:.2f}" for name, gain in gains.items() if gain >= PAYS]
        other = [f"{name} {gain:.2f}" for name, gain in gains.items() if not gain >= PAYS]
        step = figures.get("speed.options.triton")
        shown = f"; a whole step: {step:.2f}" if step is not None else ""
        yield (
            f"--use_triton_kernels pays for {', '.join(paying) or 'nothing'}"
            + (f"; not for {', '.join(other)}" if other else "")
            + f" (times the speed of the best twin{shown})"
        )


def _recompute(figures: dict[str, float]) -> Iterator[str]:
    speed, memory = figures.get("speed.options.selective"), figures.get("speed.options.selective_memory")
    if speed is not None and memory is not None:
        choice = "--recompute selective" if speed >= 1 - NOISE else "--recompute none"
        yield f"{choice}: selective runs at {speed:.2f} times the speed with {memory:.2f} times the memory"
