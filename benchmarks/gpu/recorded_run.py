"""Record the losses that real_run.py compares a GPU with: the same run on this CPU, in fp32 (some minutes).

python -m gpu.recorded_run [--precision fp32] [--out FILE]      with benchmarks and the checkout in PYTHONPATH
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
from pathlib import Path

import torch
from step_report import machine

from gpu.real_run import RECORD, flags_of, launch, prepare, read_losses
from gpu.sizes import FULL


def main() -> None:
    """Train, and write the losses with the machine they are from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path, default=RECORD)
    args = parser.parse_args()
    os.environ["NUM_GPUS"] = "0"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch(flags_of(FULL, prepare(FULL, folder / "data"), folder / "log", args.precision), compiled=False)
        (run_folder,) = (path for path in (folder / "log").iterdir() if path.is_dir())
        losses = read_losses(run_folder)
    where = f"{machine(torch.device('cpu'))}, {datetime.date.today().isoformat()}"
    args.out.write_text(json.dumps({"machine": where, "precision": args.precision, **losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
