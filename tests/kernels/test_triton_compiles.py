"""Our Triton kernels compiled for GPUs that are not here: what the interpreter accepts may not compile, or not well."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import ROOT

pytest.importorskip("triton", reason="needs the triton package: pip install triton")

# Not interpreted, so in a process of its own. A type names a pointer's element; numbers are constants of the kernel.
COMPILE = """
import importlib, json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for capability, module, name, arguments, options in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module(f"tinytron.kernels.{module}"), name)
    given = {n: arguments[n] for n in kernel.arg_names}
    types = {n: v if str(v)[0] == "*" or v in ("i32", "fp32") else "constexpr" for n, v in given.items()}
    constants = {(i,): v for i, (n, v) in enumerate(given.items()) if types[n] == "constexpr"}
    whole = {(i,): [["tt.divisibility", 16]] for i, v in enumerate(types.values()) if v[0] in "*i"}  # pointers, sizes
    source = ASTSource(kernel, types, constants, whole)
    print(json.dumps(compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]))
"""


def cases(dtype: str, size: int) -> list[tuple[str, str, dict[str, Any], dict[str, int]]]:
    """Every kernel as it is launched for wide matrices of ``dtype``, which has ``size`` bytes."""
    x, wide, index = f"*{dtype}", "*fp32", "*i64"
    loss = {"z": x, "label": index, "counted": wide, "nll": wide, "lse": wide, "V": "i32", "z_loss_coef": "fp32"}
    rows = {"rows": x, "place": index, "weight": wide, "D": "i32", "K": 4}
    grads = {"grad": x, "grad_rows": x, "grad_weight": wide}
    tiles = {"x": x, "out": x, "m": "i32", "n": "i32", "b": "fp32", "c": "fp32", "BLOCK_K": 128 // size}
    return [
        *(
            (
                "cross_entropy_triton", "_rows", {**loss, "IGNORE": -100, "GRADIENT": gradient, "BLOCK": 4096},
                {"num_warps": 8},
            )
            for gradient in (False, True)
        ),
        ("expert_rows_triton", "_sum_rows", {**rows, "out": x, "WEIGHTED": True, "BLOCK": 1024}, {"num_warps": 4}),
        (
            "expert_rows_triton", "_sum_rows", {**rows, "out": x, "weight": None, "WEIGHTED": False, "BLOCK": 2048},
            {"num_warps": 8},
        ),
        ("expert_rows_triton", "_spread", {**rows, **grads, "BLOCK": 1024}, {"num_warps": 4}),
        ("gram_triton", "_tiles", {**tiles, "ADD": True, "PRECISION": "tf32", "BLOCK": 128}, {"num_warps": 8}),
        ("gram_triton", "_tiles", {**tiles, "ADD": False, "PRECISION": "ieee", "BLOCK": 64}, {"num_warps": 4}),
    ]  # fmt: skip


def test_kernels_compile_for_ampere_and_hopper(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    chosen = [(capability, *case) for capability in (80, 90) for case in (*cases("bf16", 2), *cases("fp32", 4))]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(chosen)],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    for (capability, _, name, arguments, _), ptx in zip(chosen, compiled, strict=True):
        assert not re.search(r"\b(atom|red)\.", ptx), f"{name} adds in no fixed order"
        if name != "_tiles":
            assert re.search(r"ld\.global\S*\.v4", ptx), f"{name} does not read 16 bytes at a time"
            continue
        assert "cp.async.cg.shared" in ptx, "tiles are not fetched ahead, 16 bytes at a time"
        tensor_cores = ("wgmma.mma_async" if capability == 90 else "mma.sync") in ptx
        assert tensor_cores == (arguments["x"] == "*bf16" or arguments["PRECISION"] == "tf32")
