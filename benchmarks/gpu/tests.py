"""The gpu tests of one file, with the outcome of each written as soon as it is known."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from gpu.part import Context, Result, run

TESTS = Path(__file__).resolve().parents[2] / "tests" / "gpu"
FILES = {
    "training": ("test_training_cuda.py",),
    "model": ("test_model_cuda.py",),
    "compile": ("test_compile_cuda.py",),
    "attention": ("test_attention_cuda.py",),
    "checkpoint": ("test_checkpoint_cuda.py",),
    "experts": ("test_experts_cuda.py",),
    "triton": ("test_triton_cuda.py",),
    "graph": ("test_graph_cuda.py",),
    "rest": ("test_data_cuda.py", "test_generate_cuda.py", "test_packages_cuda.py"),
}


BROKEN = ("illegal memory access", "device-side assert")


class Recorder:
    """A pytest plugin that keeps the outcome of every test: right, skipped, or the last line of what is wrong."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self.passed = 0
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for setup, call and teardown of every test."""
        name = report.nodeid.split("::", 1)[-1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = getattr(crash, "message", None) or str(report.longrepr).splitlines()[-1]
            self._result.check(name, message)
            if any(text in message for text in BROKEN):
                raise SystemExit(1)  # the GPU refuses everything from here on in this process
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped.append(reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self.passed += 1
            self._result.check(name)

    def pytest_collectreport(self, report: Any) -> None:
        """Called by pytest for every file; a file that cannot be imported is wrong."""
        if report.failed:
            self._result.check(f"import of {report.nodeid}", str(report.longrepr).splitlines()[-1])


def main(context: Context, args: argparse.Namespace) -> None:
    """Run the tests. Raises: SystemExit(1) if one fails, or none ran."""
    if importlib.util.find_spec("pytest") is None:
        context.leave_out("pytest is missing: pip install pytest")
    pytest = importlib.import_module("pytest")
    recorder = Recorder(context.result)
    files = [str(TESTS / name) for name in FILES[args.file]]
    status = int(pytest.main(["-m", "gpu", "-v", "--durations=10", "--tb=short", *files], plugins=[recorder]))
    reasons = sorted(set(recorder.skipped))
    skipped = f", {len(recorder.skipped)} skipped ({'; '.join(reasons)})" if reasons else ""
    context.result.note(f"{recorder.passed} passed{skipped}")
    if status or not (recorder.passed or recorder.skipped):
        raise SystemExit(1)


if __name__ == "__main__":
    run(main, __doc__, ("file", tuple(FILES)))
